"""T1 where the window changes from pass to pass: any window that committed tokens decide leaves the law as it is.

Every sequence of a run has windows of its own, as if it were decoded alone. V = T = 4 as in test_exactness.py;
N = 100,000 for each case, a G-test at 1e-5 each.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sjd_engine import JacobiDecoder, SamplingParams, Schedule, auto_window
from sjd_engine.auto_window import AutoWindow, History, PassCosts
from sjd_engine.decoder import ROW_STATE
from sjd_engine.testing import TableModel, forget, g_test, outcome_counts

VOCAB = TOKENS = 4
SIGNIFICANCE = 1e-5
MODEL = TableModel(VOCAB, TOKENS, seed=7, spread=1.5)
CASES = [
    ("sjd", "random", 0),
    ("maximal", "random", 3),
    ("maximal", "above-sample", 0),
    ("gumbel", "left-sample", 0),
    ("exact", "left-repeat", 0),
]


def of_rows(decoder: JacobiDecoder, rows: Tensor, window_size: int, previous: Tensor) -> JacobiDecoder:
    """Some sequences of `decoder` as a batch of their own; its state is a copy."""
    part = copy.copy(decoder)
    part.window_size, part._state = window_size, copy.copy(decoder._state)
    for name in ROW_STATE:
        setattr(part._state, name, getattr(decoder._state, name)[rows])
    part._state.laws = decoder._state.laws[:, rows]
    part._state.published, part._state.ticket = decoder._state.published[rows], decoder._state.ticket[rows]
    part._state.previous_logits = previous[rows]
    part._seeds = decoder._seeds[rows]
    part.warp_arguments = {k: None if v is None else v[rows] for k, v in decoder.warp_arguments.items()}
    return part


def decode(decoder: JacobiDecoder, next_windows: Callable[[JacobiDecoder, Tensor], Tensor]) -> Tensor:
    """Run `decoder` to the end, sequences with equal windows together; [B, T] tokens.

    next_windows: (decoder, windows of this pass [B]) -> those of the next.
    """
    cache, state = MODEL.new_cache(decoder.batch_size), decoder._state
    previous = torch.zeros(decoder.batch_size, decoder.max_window_size, VOCAB)
    windows = torch.full((decoder.batch_size,), decoder.window_size)
    while not decoder.done:
        following = next_windows(decoder, windows)
        for window, next_window in torch.stack((windows, following), 1).unique(dim=0).tolist():
            rows = ((windows == window) & (following == next_window)).nonzero().squeeze(1)
            part, own = of_rows(decoder, rows, window, previous), cache[rows]
            logits = MODEL.forward(*part.window(), own)
            forget(own, part.verify(logits, next_window_size=next_window))
            cache[rows], previous[rows, :window], state.laws[:, rows] = own, logits, part._state.laws
            for name in ROW_STATE:
                getattr(state, name)[rows] = getattr(part._state, name)
        windows = following
    return decoder.token_ids


def by_history(decoder: JacobiDecoder, windows: Tensor) -> Tensor:
    """From 1 to 4, by everything that is committed: how many tokens, in how many passes, and which came last."""
    committed = decoder.num_committed
    last = decoder.draft_ids.gather(1, (committed - 1).clamp_min(0)[:, None]).squeeze(1)
    return 1 + (committed + decoder._state.iteration + torch.where(committed > 0, last, 0)) % 4


def by_a_draft(decoder: JacobiDecoder, windows: Tensor) -> Tensor:
    """Rule C2 broken: the draft behind the first one is left behind where it is token 0, so that it is drawn anew."""
    unwanted = decoder._state.tokens.gather(1, decoder.num_committed[:, None] + 2).squeeze(1) == 0
    return torch.where(unwanted & (windows > 2), 1, 3)


class ByPolicy:
    """What `window_size="auto"` chooses for each sequence, decoded alone, where pass times grow with the window.

    peeks: count the draft behind the first one as committed where it is token 0, which breaks rule C2.
    """

    def __init__(self, *, peeks: bool = False):
        costs = PassCosts()
        self.policy, self.peeks = AutoWindow("maximal", VOCAB, costs), peeks
        self.policy.measure(1, lambda window: lambda: 3.0 + window)
        self.passes: list[Tensor] = []

    def __call__(self, decoder: JacobiDecoder, windows: Tensor) -> Tensor:
        committed = decoder.num_committed
        if self.peeks:
            draft = decoder._state.tokens.gather(1, committed[:, None] + 2).squeeze(1)
            committed = torch.where((draft == 0) & (windows > 2), committed + 8, committed)
        known, sequences = torch.stack((*self.passes, windows, committed), 1).unique(dim=0, return_inverse=True)
        self.passes.append(windows)
        chosen = [
            self.policy.choose(current, 1, [History(before, count, TOKENS - count)])
            for *before, current, count in known.tolist()
        ]
        return torch.tensor(chosen)[sequences]


@pytest.fixture
def toy_windows(monkeypatch):
    """Every window up to 4, and passes that a toy image outweighs, of drafts that are good soon."""
    monkeypatch.setattr(auto_window, "PASSES", dict.fromkeys(auto_window.PASSES, (1, 0.7, 0.5, 0.4)))
    monkeypatch.setattr(auto_window, "CANDIDATES", (1, 2, 3, 4))
    monkeypatch.setattr(auto_window, "MEASURED", (1, 2, 4))
    monkeypatch.setattr(auto_window, "PRIOR_PASSES", 1)
    monkeypatch.setattr(auto_window, "WORTH_A_CHANGE", 0.0)


def p_value(method: str, init: str, top_k: int, next_windows: Callable[[JacobiDecoder, Tensor], Tensor]) -> float:
    decoder = JacobiDecoder(
        batch_size=100_000,
        num_tokens=TOKENS,
        vocab_size=VOCAB,
        window_size=3,
        max_window_size=4,
        method=method,
        init=init,
        params=SamplingParams(top_k=top_k),
        schedule=Schedule(2, 2),
        seeds=range(100_000),
    )
    return g_test(outcome_counts(decode(decoder, next_windows), VOCAB), MODEL.joint(decoder))


@pytest.mark.parametrize(("method", "init", "top_k"), CASES)
def test_windows_that_committed_tokens_decide_leave_the_law(method, init, top_k):
    assert p_value(method, init, top_k, by_history) > SIGNIFICANCE


def test_a_window_that_a_draft_decides_fails():
    assert p_value("maximal", "random", 0, by_a_draft) < 1e-20


@pytest.mark.usefixtures("toy_windows")
@pytest.mark.parametrize("method", ["maximal", "gumbel"])
def test_the_automatic_window_leaves_the_law(method):
    policy = ByPolicy()
    assert p_value(method, "above-sample", 0, policy) > SIGNIFICANCE
    assert sum(len(windows.unique()) > 1 for windows in policy.passes) >= 2, "unlike histories have unlike windows"


@pytest.mark.usefixtures("toy_windows")
def test_an_automatic_window_that_counts_a_draft_fails():
    assert p_value("maximal", "random", 0, ByPolicy(peeks=True)) < 1e-20

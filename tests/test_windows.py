"""T1 where the window changes from pass to pass: any window that committed tokens decide leaves the law as it is.

Every sequence of a run has windows of its own, as if it were decoded alone. V = T = 4 as in test_exactness.py;
N = 100,000 for each case, a G-test at 1e-5 each.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sjd_engine import JacobiDecoder, SamplingParams, Schedule
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

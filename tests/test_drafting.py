"""T1 where a drafter draws drafts anew between passes, from laws of its own.

V = T = 4 as in test_exactness.py; N = 100,000 for each case, a G-test at 1e-5 each. The drafter knows nothing of the
model: it has a random table of the token to the left, which by then may be a draft that it has just drawn.
"""

import pytest
import torch

from sjd_engine import JacobiDecoder, SamplingParams, Schedule, ops
from sjd_engine.testing import TableModel, decode, g_test, outcome_counts

VOCAB = TOKENS = 4
COUNT = 100_000
LAWS = torch.rand(VOCAB, VOCAB, generator=torch.Generator().manual_seed(5)) ** 2
LAWS[range(VOCAB), (1, 0, 3, 2)] = 1.0


class Table:
    """Draws the drafts from left to right; `chosen` says which of a row [B, 1]."""

    def __init__(self, chosen=lambda drafts, row: drafts.positions[:, row : row + 1] % 2 == 0):
        self.chosen = chosen

    def __call__(self, drafts):
        for row in range(drafts.num_drafts):
            left = drafts.tokens(drafts.positions[:, row : row + 1] - 1)
            drafts.redraw(row, LAWS[left.clamp_min(0)], self.chosen(drafts, row))


def everywhere(drafts, row):
    return torch.ones_like(drafts.entered[:, row : row + 1])


def entered(drafts, row):
    return drafts.entered[:, row : row + 1]


def p_value(method, drafter, *, window=TOKENS, params=None, forced=None, init="random"):
    schedule = Schedule(1, TOKENS - len(forced), forced) if forced else Schedule(2, 2)
    model = TableModel(VOCAB, TOKENS, seed=7, spread=1.5)
    decoder = JacobiDecoder(
        batch_size=COUNT,
        num_tokens=TOKENS,
        vocab_size=VOCAB,
        window_size=window,
        method=method,
        init=init,
        params=params,
        schedule=schedule,
        seeds=range(COUNT),
        drafter=drafter,
    )
    law = model.joint(decoder)
    counts = outcome_counts(decode(model, decoder), VOCAB)
    assert not decoder._state.zero_draft_prob.any(), "a draft outside its own law"
    return g_test(counts, law)


@pytest.mark.parametrize("chosen", [everywhere, entered], ids=["everywhere", "entered"])
@pytest.mark.parametrize("window", [2, TOKENS])
@pytest.mark.parametrize("method", ["sjd", "maximal", "gumbel", "exact"])
def test_drafts_of_any_law_leave_the_law_of_images(method, window, chosen):
    assert p_value(method, Table(chosen), window=window) > 1e-5


@pytest.mark.parametrize("method", ["maximal", "gumbel"])
def test_some_drafts_of_any_law_with_top_k_and_forced_tokens(method):
    assert p_value(method, Table(), params=SamplingParams(top_k=3), forced={0: 1, 2: 3}) > 1e-5


def test_a_law_that_was_not_drawn_from_fails(monkeypatch):
    """What is stored is the table before it is blended with the uniform law, what is drawn from is the blend."""
    redraft = ops.redraft

    def blended(state, grid, seeds, row, weights, where):
        redraft(state, grid, seeds, row, (weights + 1) / 2, where)
        rows = slice(row, row + weights.shape[1])
        state.drafted[:, rows] = weights
        state.drafted_scale[:, rows] = 1 / weights.sum(-1)

    monkeypatch.setattr(ops, "redraft", blended)
    assert p_value("maximal", Table(everywhere)) < 1e-20


def test_a_choice_that_looks_at_the_token_it_replaces_fails():
    """Rule C2 broken: only drafts of token 0 are drawn anew, so those that are kept follow another law than theirs."""

    def zeros(drafts, row):
        return drafts.tokens(drafts.positions[:, row : row + 1]) == 0

    assert p_value("maximal", Table(zeros)) < 1e-20

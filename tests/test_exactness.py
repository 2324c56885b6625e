"""T1: every lossless method against the exact joint law, on models whose sequences can be enumerated.

V = T = 4 gives 256 outcomes (a 2x2 grid). On the backend of this machine: N = 100,000 sequences for each combination of
method, initialisation, window, top-k and forced tokens, and of each method with temperature, top-p and guidance; and
N = 1,000,000 for each method at its default. On the reference: N = 100,000 for each method and variation that contains
the others. A G-test at 1e-5 a test: all together reject an exact engine once in about 300 times, and the seeds are
fixed. Power at N = 100,000, whatever the shape of an error: a total variation of 0.02 is found with 94 %, one of 0.025
with 99.9 % (the non-central chi-square of 255 degrees of freedom); the broken variants, made of the reference and off
by 0.03 and more, must fail in the same run, and so must SJD++. Trees: N = 50,000 on the backend of this machine;
siblings from the residual, which bend this model's law by less, must fail at N = 300,000.

Every sequence of a batch accepts at its own pace, so each of these runs is a ragged batch.
"""

from itertools import product

import pytest
import torch

from sjd_engine import JacobiDecoder, SamplingParams, Schedule, ops
from sjd_engine.kernels import reference
from sjd_engine.methods import INITS, METHODS
from sjd_engine.testing import (
    FUSED,
    TableModel,
    decode,
    expected_total_variation,
    g_test,
    outcome_counts,
    total_variation,
)

VOCAB = TOKENS = 4
SIGNIFICANCE = 1e-5
LOSSLESS = [name for name in FUSED if METHODS[name].lossless]
CROSSED = {
    "free": {},
    "topk": {"params": SamplingParams(top_k=3)},
    "forced": {"forced": {1: 2}},
    "topk-forced": {"params": SamplingParams(top_k=3), "forced": {0: 1, 2: 3}},
}
WARPED = {
    "temperature-topp": {"params": SamplingParams(temperature=0.7, top_p=0.9)},
    "guidance": {"params": SamplingParams(guidance_scale=2.0)},
    "guidance-topk-forced": {"params": SamplingParams(guidance_scale=1.5, top_k=3), "forced": {0: 1, 3: 0}},
}

CROSSING = [  # `ar` has no drafts: one initialisation and window stands for all
    (method, init, window, variation)
    for method, init, window, variation in product(LOSSLESS, INITS, range(2, TOKENS + 1), CROSSED)
    if not METHODS[method].one_token or (init, window) == (INITS[0], 2)
]


def sample_counts(
    method: str,
    count: int,
    *,
    window: int = 3,
    init: str = "random",
    params: SamplingParams | None = None,
    forced: dict[int, int] | None = None,
    first_seed: int = 0,
    threshold: float = 0.5,
    tree: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(outcome counts of `count` sequences, their exact law)."""
    params = params or SamplingParams()
    schedule = Schedule(1, TOKENS - len(forced), forced) if forced else Schedule(2, 2)
    model = TableModel(VOCAB, TOKENS, seed=7, spread=1.5, guided=params.guidance_scale > 1)
    counts, law = torch.zeros(VOCAB**TOKENS, dtype=torch.int64), None
    for first in range(first_seed, first_seed + count, 100_000):
        decoder = JacobiDecoder(
            batch_size=min(100_000, first_seed + count - first),
            num_tokens=TOKENS,
            vocab_size=VOCAB,
            window_size=window,
            method=method,
            init=init,
            params=params,
            schedule=schedule,
            seeds=range(first, first + min(100_000, first_seed + count - first)),
            reuse_threshold=threshold,
            tree=tree,
        )
        law = model.joint(decoder)
        counts += outcome_counts(decode(model, decoder), VOCAB)
        assert not decoder._state.zero_draft_prob.any(), "a draft outside its own law: rule C1 or C2 is broken"
    return counts, law


@pytest.mark.parametrize(("method", "init", "window", "variation"), CROSSING)
def test_lossless_methods_follow_the_exact_joint_law(method, init, window, variation):
    counts, law = sample_counts(
        method, 100_000, window=window, init=init, first_seed=1_000_000 * window, **CROSSED[variation]
    )
    assert g_test(counts, law) > SIGNIFICANCE


@pytest.mark.parametrize("variation", WARPED)
@pytest.mark.parametrize("method", LOSSLESS)
def test_lossless_methods_follow_the_warped_law(method, variation):
    counts, law = sample_counts(method, 100_000, **WARPED[variation])
    assert g_test(counts, law) > SIGNIFICANCE


@pytest.mark.parametrize("method", LOSSLESS)
def test_a_million_sequences_follow_the_exact_joint_law(method):
    counts, law = sample_counts(method, 1_000_000, first_seed=50_000_000)
    assert g_test(counts, law) > SIGNIFICANCE
    assert total_variation(counts, law) < 1.25 * expected_total_variation(law, 1_000_000)


TREES = {  # and windows: with the shortest chain, and with one that goes on behind the levels
    "2x2": ((2, 2), 3),
    "3x3": ((3, 3), 14),
}


@pytest.mark.parametrize("variation", CROSSED)
@pytest.mark.parametrize("shape", TREES)
@pytest.mark.parametrize("method", ["maximal", "gumbel"])
def test_trees_follow_the_exact_joint_law(method, shape, variation):
    tree, window = TREES[shape]
    counts, law = sample_counts(method, 50_000, tree=tree, window=window, **CROSSED[variation])
    assert g_test(counts, law) > SIGNIFICANCE


@pytest.fixture
def on_the_reference(monkeypatch):
    monkeypatch.setenv("SJD_BACKEND", "reference")


@pytest.mark.usefixtures("on_the_reference")
@pytest.mark.parametrize("variation", ["free", "topk-forced", "temperature-topp", "guidance-topk-forced"])
@pytest.mark.parametrize("method", LOSSLESS)
def test_the_reference_follows_the_exact_joint_law(method, variation):
    counts, law = sample_counts(method, 100_000, **(CROSSED | WARPED)[variation])
    assert g_test(counts, law) > SIGNIFICANCE


@pytest.mark.usefixtures("on_the_reference")
def test_siblings_from_the_residual_fail(monkeypatch):
    """The published law of siblings: drawn from what is left over of p, and tried as if drawn from q."""
    left_over, residual, next_siblings = [], reference.residual, reference.next_siblings

    def recording(p, q):
        left_over[:] = [residual(p, q)]
        return left_over[0]

    def broken(state, grid, num_new, tree, seeds, weights):
        return next_siblings(state, grid, num_new, tree, seeds, left_over[0][:, : weights.shape[1]])

    monkeypatch.setattr(reference, "residual", recording)
    monkeypatch.setattr(reference, "next_siblings", broken)
    counts, law = sample_counts("maximal", 300_000, tree=(2, 2), window=4)
    assert g_test(counts, law) < 1e-20


@pytest.mark.parametrize("window", [2, TOKENS])
@pytest.mark.parametrize("variation", ["topk-forced", "guidance"])
def test_block_verification_follows_the_exact_joint_law(variation, window):
    counts, law = sample_counts("sjd-block", 100_000, window=window, **(CROSSED | WARPED)[variation])
    assert g_test(counts, law) > SIGNIFICANCE


@pytest.mark.parametrize("init", ["left-repeat", "above-sample"])
def test_block_verification_follows_the_exact_joint_law_from_other_drafts(init):
    counts, law = sample_counts("sjd-block", 100_000, window=TOKENS, init=init)
    assert g_test(counts, law) > SIGNIFICANCE


def test_sjd_plus_plus_is_lossy():
    counts, law = sample_counts("sjd++", 1_000_000)
    assert g_test(counts, law) < 1e-20


def test_sjd_plus_plus_without_reuse_is_sjd():
    counts, law = sample_counts("sjd++", 100_000, threshold=1e30)
    assert g_test(counts, law) > SIGNIFICANCE


@pytest.mark.usefixtures("on_the_reference")
@pytest.mark.parametrize("method", ["sjd", "maximal", "gumbel"])
def test_the_rejected_token_from_p_fails(method, monkeypatch):
    monkeypatch.setattr(reference, "residual", lambda p, q: p.clone())
    counts, law = sample_counts(method, 100_000)
    assert g_test(counts, law) < 1e-20


def stale_verify():
    """`ops.verify` as one who stores laws by position and forgets those of kept drafts would write it."""
    verify, laws = ops.verify, {}

    def stale(logits, state, grid, **arguments):
        before, window = state.tokens.clone(), arguments["window_size"]
        first = state.num_committed.clone()
        result = verify(logits, state, grid, **arguments)
        rows = torch.arange(window)
        old = laws.get("q", torch.full((*logits.shape[:-1], logits.shape[-1]), 1 / logits.shape[-1]))
        p = logits.softmax(-1)
        kept = state.tokens.gather(1, first[:, None] + rows + 1) == before.gather(1, first[:, None] + rows + 1)
        kept &= rows < window - 1
        stored = torch.where(kept[..., None], old, p)
        shifted = (result.num_committed - first)[:, None] + rows
        entering = shifted >= window
        laws["q"] = torch.where(
            entering[..., None],
            1 / logits.shape[-1],
            stored.gather(1, shifted.clamp_max(window - 1)[..., None].expand_as(stored)),
        )
        # The next pass computes q from these logits: let them be those of the stale laws.
        state.previous_logits = torch.where(laws["q"] > 0, laws["q"], 1e-30).log()
        state.law_row.copy_(rows)
        total = laws["q"].amax(-1)
        state.laws[:] = torch.stack((total.log(), total, torch.full_like(total, -1e30), torch.zeros_like(total)), -1)
        return result

    return stale


@pytest.mark.parametrize("method", ["maximal", "gumbel"])
def test_a_stale_draft_law_fails(method, monkeypatch):
    """Rule C1 broken: a draft that was kept also keeps its old law."""
    monkeypatch.setattr(ops, "verify", stale_verify())
    counts, law = sample_counts(method, 100_000, window=TOKENS)
    assert g_test(counts, law) < 1e-20


@pytest.mark.usefixtures("on_the_reference")
def test_one_draw_for_acceptance_and_residual_fails(monkeypatch):
    """Rule C4 broken: the acceptance uniform is used again for the recovered token."""
    draw_words = reference.philox.draw_words
    monkeypatch.setattr(reference.philox, "draw_words", lambda *arguments: draw_words(*arguments)[[0, 1, 0, 3]])
    counts, law = sample_counts("sjd", 100_000)
    assert g_test(counts, law) < 1e-20


@pytest.mark.parametrize("window", range(2, TOKENS + 1))
@pytest.mark.parametrize("init", INITS)
def test_exact_equals_ar_token_for_token(window, init):
    model = TableModel(VOCAB, TOKENS, seed=3, spread=1.0)
    tokens = {}
    for method in ("ar", "exact"):
        decoder = JacobiDecoder(
            batch_size=5000,
            num_tokens=TOKENS,
            vocab_size=VOCAB,
            window_size=window,
            method=method,
            init=init,
            seeds=range(5000),
            schedule=Schedule(2, 2),
        )
        tokens[method] = decode(model, decoder)
    assert torch.equal(tokens["ar"], tokens["exact"])

"""Acceptance beside the plain test: hand-made cases, and that it becomes `sjd` where nothing is relaxed."""

import pytest
import torch

from sjd_engine import JacobiDecoder, SamplingParams
from sjd_engine.kernels.acceptance import Drafted, Group, Neighbours, accept_block
from sjd_engine.testing import TableModel, decode, g_test, outcome_counts

VOCAB, TOKENS = 8, 4
CODEBOOK = torch.randn(VOCAB, 3, generator=torch.Generator().manual_seed(1))


def drafted(p: list[float], q: list[float], tokens: list[int] | torch.Tensor, uniforms: torch.Tensor) -> Drafted:
    """Rows that all have the laws p and q; the last has no draft."""
    shape = (*uniforms.shape, len(p))
    has_draft = torch.arange(uniforms.shape[1]).expand(uniforms.shape) < uniforms.shape[1] - 1
    return Drafted(
        torch.tensor(p).expand(shape),
        torch.tensor(q).expand(shape),
        torch.as_tensor(tokens).expand(uniforms.shape),
        uniforms,
        has_draft,
        torch.zeros_like(has_draft),
    )


def test_a_block_accepts_as_many_as_the_paper_says():
    """Two drafts from q = (2/3, 1/3) for p = (1/3, 2/3): 11/9 tokens on average, 10/9 by single tests (its example)."""
    uniforms = torch.rand(400_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for tokens, probability in (([0, 0, 0], 4 / 9), ([0, 1, 0], 2 / 9), ([1, 0, 0], 2 / 9), ([1, 1, 0], 1 / 9)):
        passed, _ = accept_block(drafted([1 / 3, 2 / 3], [2 / 3, 1 / 3], tokens, uniforms))
        expected += probability * passed.cumprod(1).sum(1).double().mean().item()
    assert expected == pytest.approx(11 / 9, abs=0.003)


@pytest.mark.parametrize(
    ("residual", "exact"),
    [(lambda drafted, left_over: left_over, True), (lambda drafted, left_over: drafted.residual, False)],
    ids=["block", "single"],
)
def test_a_block_follows_the_law_with_its_own_residual_only(residual, exact):
    """400,000 blocks of two drafts; the residual of single drafts moves 1 % of the mass, and must fail."""
    p, q, count = [0.6, 0.1, 0.3], [0.9, 0.05, 0.05], 400_000
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(count, 3, dtype=torch.float64, generator=generator)
    tokens = torch.multinomial(torch.tensor(q), 3 * count, True, generator=generator).view(count, 3)
    case = drafted(p, q, tokens, uniforms)
    passed, left_over = accept_block(case)
    accepted = passed.sum(1, keepdim=True)
    at = residual(case, left_over).gather(1, accepted[..., None].expand(-1, -1, 3)).squeeze(1)
    recovered = torch.multinomial(torch.where(accepted < 2, at, torch.tensor(p)), 1, generator=generator)
    drawn = torch.multinomial(torch.tensor(p), 2 * count, True, generator=generator).view(count, 2)
    slots = torch.arange(2)
    out = torch.where(slots < accepted, tokens[:, :2], torch.where(slots == accepted, recovered, drawn))
    law = torch.tensor(p, dtype=torch.float64)
    p_value = g_test(outcome_counts(out, 3), (law[:, None] * law).flatten())
    assert p_value > 1e-5 if exact else p_value < 1e-20


def passes(method: str, **arguments) -> tuple[torch.Tensor, float]:
    """(tokens, mean passes) on a toy model with top-k."""
    decoder = JacobiDecoder(
        batch_size=5000,
        num_tokens=TOKENS,
        vocab_size=VOCAB,
        window_size=TOKENS,
        method=method,
        seeds=range(5000),
        params=SamplingParams(top_k=6),
        **arguments,
    )
    tokens = decode(TableModel(VOCAB, TOKENS, seed=4, spread=1.0), decoder)
    return tokens, sum(decoder.stats.iterations) / 5000


@pytest.mark.parametrize(("method", "nothing"), [("gsd", 0), ("lantern", 1.0)])
def test_without_relaxation_it_is_sjd_bit_for_bit(method, nothing):
    tokens, _ = passes(method, relaxation=nothing, codebook=CODEBOOK)
    assert torch.equal(tokens, passes("sjd")[0])


@pytest.mark.parametrize(
    ("method", "arguments"),
    [("sjd-block", {}), ("gsd", {"codebook": 0.1 * CODEBOOK}), ("lantern", {"codebook": CODEBOOK})],
)
def test_it_takes_fewer_passes_than_sjd(method, arguments):
    assert passes(method, **arguments)[1] < passes("sjd")[1]


def test_a_group_is_near_in_rank_probability_and_codebook():
    p, q = [0.4, 0.2, 0.18, 0.12, 0.1], [0.05, 0.4, 0.15, 0.3, 0.1]
    codebook = torch.tensor([[0.0], [0.0], [0.1], [9.0], [0.2]])
    # Of the draft 1: 0 is too likely, 3 too far in the codebook, 4 three ranks away.
    group = Group(codebook, ranks=2)
    ratio = (0.2 + 0.18) / (0.4 + 0.15)
    for uniform, accepted in ((ratio - 1e-3, True), (ratio + 1e-3, False)):
        passed, _ = group(drafted(p, q, [1, 1], torch.full((1, 2), uniform, dtype=torch.float64)))
        assert passed[0, 0].item() is accepted


def test_neighbours_stop_at_the_bound():
    p, q = [0.4, 0.1, 0.12, 0.38], [0.1, 0.7, 0.1, 0.1]
    codebook = torch.tensor([[5.0], [0.0], [1.0], [2.0]])
    for relaxation, mass in ((1.0, 0.1), (2.0, 0.1), (2.5, 0.22), (8.0, 0.6)):
        neighbours = Neighbours.of(codebook, relaxation)
        for uniform, accepted in ((mass / 0.7 - 1e-3, True), (mass / 0.7 + 1e-3, False)):
            passed, _ = neighbours(drafted(p, q, [1, 1], torch.full((1, 2), uniform, dtype=torch.float64)))
            assert passed[0, 0].item() is accepted


@pytest.mark.parametrize(
    ("method", "arguments", "error", "text"),
    [
        ("sjd", {"relaxation": 2.0}, ValueError, "relaxation: sjd has none, only gsd, lantern"),
        ("gsd", {"relaxation": 2.5}, TypeError, "expected an int"),
        ("lantern", {"relaxation": 0.5}, ValueError, "expected >= 1"),
        ("gsd", {}, ValueError, "codebook"),
    ],
)
def test_bad_relaxations_are_refused(method, arguments, error, text):
    with pytest.raises(error, match=text):
        passes(method, **arguments)

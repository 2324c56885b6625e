"""SJD2: noise and its levels, what the transformer reads, and T1 of verification behind clean tokens."""

import pytest
import torch

from sjd_engine import JacobiDecoder, SamplingParams, Schedule
from sjd_engine.denoise import NoiseSchedule
from sjd_engine.kernels.noise import NoisePlan, NoiseState, denoise, gaussian
from sjd_engine.sjd2 import NoisyWindow, steps_down
from sjd_engine.testing import TableModel, forget, g_test, outcome_counts

VOCAB = TOKENS = 4
HIDDEN = 6
SCHEDULES = [
    NoiseSchedule(kind, steps, rho) for kind in ("flow", "cosine") for steps, rho in ((1, 7.0), (5, 7.0), (25, 1.0))
]


def plan_of(schedule: NoiseSchedule, vocab_size: int = VOCAB, dtype: torch.dtype = torch.float32) -> NoisePlan:
    generator = torch.Generator().manual_seed(3)
    embeddings = torch.randn(vocab_size, HIDDEN, generator=generator).to(dtype)
    encodings = torch.randn(schedule.steps + 1, HIDDEN, generator=generator)
    mean, std = embeddings.float().mean(0), embeddings.float().std(0)
    return NoisePlan(embeddings, mean, std, 1 / std, encodings, *(table.float() for table in steps_down(schedule)))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_step_down_is_the_closed_form(schedule):
    """DDIM towards a fixed e_0 stays on alpha e_0 + sigma eps, at every level."""
    generator = torch.Generator().manual_seed(0)
    clean, eps = torch.randn(2, 1000, generator=generator, dtype=torch.float64)
    alpha, sigma = schedule.mixture(schedule.times())
    keep, pull = steps_down(schedule)
    noisy = eps
    for level in range(schedule.steps, 0, -1):
        noisy = keep[level] * noisy + pull[level] * clean
        torch.testing.assert_close(noisy, alpha[level - 1] * clean + sigma[level - 1] * eps, rtol=0, atol=1e-12)
    assert torch.equal(noisy, clean)


def test_noise_is_standard_normal():
    noise = gaussian(torch.arange(200), torch.arange(50).expand(200, -1), 10)
    assert noise.mean().abs() < 0.01  # 100,000 numbers: 3 sigma
    assert (noise.var() - 1).abs() < 0.014
    assert (noise[:, :, :5] * noise[:, :, 5:]).mean().abs() < 0.014
    assert torch.equal(noise[7:8, 9:10], gaussian(torch.tensor([7]), torch.tensor([[9]]), 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_levels_fall_where_a_slot_was_and_end_at_the_embedding(dtype):
    plan, seeds = plan_of(NoiseSchedule(steps=2), dtype=dtype), torch.tensor([5])
    forced = torch.tensor([-1, 2, -1, -1])
    state = NoiseState.new(seeds, TOKENS, HIDDEN, 2, forced)
    tokens = torch.tensor([[-1, 3, 0, 1, 2, 0, 0]])
    zero = torch.zeros_like(seeds)
    assert denoise(state, plan, tokens, zero, zero, 3)[1].tolist() == [[2, 0, 2]]
    inputs, levels = denoise(state, plan, tokens, zero + 1, zero + 2, 3)
    assert levels.tolist() == [[0, 1, 2]]
    inputs, levels = denoise(state, plan, tokens, zero + 2, zero + 1, 3)
    assert levels.tolist() == [[0, 2, 0]], "past the image's end there is no noise"
    inputs = inputs.float() - plan.encodings[0]
    torch.testing.assert_close(
        inputs[0, 0], plan.embeddings[1].float(), atol=0.02 if dtype == torch.bfloat16 else 1e-6, rtol=0
    )
    assert torch.equal(state.noisy[0, 2], (plan.embeddings[1].float() - plan.mean) * plan.inverse)


def sample(
    count: int, *, verify: str, window: int, steps: int, forced: dict[int, int] | None = None, **params: float
) -> float:
    """The G-test of `count` sequences of a model that takes noise for tokens it does not hold."""
    schedule = Schedule(1, TOKENS - len(forced), forced) if forced else Schedule(2, 2)
    plan = plan_of(NoiseSchedule(steps=steps))
    model = TableModel(VOCAB, TOKENS, seed=7, spread=1.5)
    noisy = NoisyWindow(plan, schedule.grid(), batch_size=count, window_size=window, verify=verify)
    decoder = JacobiDecoder(
        batch_size=count,
        num_tokens=TOKENS,
        vocab_size=VOCAB,
        window_size=window,
        method="sjd2",
        seeds=range(count),
        schedule=schedule,
        params=SamplingParams(**params),
        drafter=noisy,
    )
    noisy.begin(slice(None), decoder.seeds)
    cache, rows = model.new_cache(count), torch.arange(count)
    while not decoder.done:
        ids, positions = decoder.window()
        nothing = torch.full((count, window, HIDDEN), -torch.inf)
        read = noisy.embed(nothing, rows)
        taken = torch.where(read[..., 0] == -torch.inf, ids, read[..., :VOCAB].argmax(-1))
        forget(cache, decoder.verify(model.forward(taken, positions, cache)))
    assert not decoder._state.zero_draft_prob.any()
    return g_test(outcome_counts(decoder.token_ids, VOCAB), model.joint(decoder))


@pytest.mark.parametrize(
    ("window", "steps", "options"),
    [(4, 1, {}), (4, 2, {}), (3, 2, {"top_k": 3, "forced": {1: 2}})],
)
def test_verification_behind_clean_tokens_follows_the_exact_joint_law(window, steps, options):
    assert sample(60_000, verify="clean", window=window, steps=steps, **options) > 1e-5


def test_verification_behind_noise_does_not():
    """The broken variant: a draft is accepted by a law that noise has told."""
    assert sample(60_000, verify="paper", window=3, steps=1) < 1e-20

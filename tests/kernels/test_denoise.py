"""The denoise update equals its definition bit for bit: compiled for a CPU, and on a GPU or in Triton's interpreter.

The interpreter is an oracle of meaning only: what the compiler makes of the kernel is checked by test_compile.py.
"""

import pytest
import torch
from torch import Tensor

from sjd_engine import native
from sjd_engine.kernels import launch, noise
from sjd_engine.kernels.noise import NoisePlan, NoiseState

TOKENS, WINDOW, STEPS, VOCAB = 9, 6, 3, 11
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fused(name: str):
    """`denoise` of a backend, and the device that it runs on."""
    if name == "cpu":
        if not native.available():
            pytest.skip(native.why_not())
        return native.denoise, "cpu"
    triton = pytest.importorskip("triton")
    if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
        pytest.skip("without a GPU, TRITON_INTERPRET=1 must be set before Triton is imported")
    from sjd_engine.kernels import denoise

    return denoise, "cuda" if torch.cuda.is_available() else "cpu"


def arguments(hidden: int, dtype: torch.dtype) -> tuple[NoiseState, NoisePlan, dict[str, Tensor | int]]:
    """Three sequences: at the beginning, in the middle, and with most of the window past the image's end."""
    generator = torch.Generator().manual_seed(hidden)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    std = random(hidden).abs() + 0.1
    plan = NoisePlan(
        random(VOCAB, hidden).to(dtype), random(hidden), std, 1 / std, random(STEPS + 1, hidden), *random(2, STEPS + 1)
    )
    levels = torch.randint(STEPS + 1, (3, TOKENS), generator=generator, dtype=torch.int32)
    tokens = torch.randint(-1, VOCAB + 2, (3, 1 + TOKENS + 2 * WINDOW), generator=generator)
    places = {"num_committed": torch.tensor([0, 4, 7]), "lowered": torch.tensor([4, 5, 1]), "num_slots": WINDOW - 1}
    return NoiseState(levels, random(3, TOKENS, hidden)), plan, {"tokens": tokens, **places}


def run(op, device: str, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    """Everything that is read later, on the CPU."""
    state, plan, places = arguments(hidden, dtype)
    state, plan = (type(x)(*(t.to(device) for t in vars(x).values())) for x in (state, plan))
    inputs, levels = op(state, plan, **{k: v.to(device) if isinstance(v, Tensor) else v for k, v in places.items()})
    inputs = torch.where(levels[..., None] > 0, inputs, 0)
    return [tensor.cpu() for tensor in (inputs, levels, state.levels, state.noisy)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [6, 40])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_every_number_equals_the_reference(backend, hidden, dtype, monkeypatch):
    monkeypatch.setattr(launch, "DENOISE_BLOCK", 16)
    expected = run(noise.denoise, "cpu", hidden, dtype)
    got = run(*fused(backend), hidden, dtype)
    if backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        # The interpreter cuts float32 to bfloat16 off, where compilers round.
        torch.testing.assert_close(got[0], expected[0], rtol=2**-7, atol=0)
        got[0] = expected[0]
    for left, right in zip(expected, got, strict=True):
        assert torch.equal(left, right)
    assert (expected[1] > 0).any()


def test_a_tensor_of_another_dtype_is_named():
    op, _ = fused("cpu")
    state, plan, places = arguments(6, torch.float32)
    with pytest.raises(ValueError, match=r"denoise: lowered must be contiguous torch.int64"):
        op(state, plan, **places | {"lowered": torch.tensor([4, 5, 1], dtype=torch.int32)})

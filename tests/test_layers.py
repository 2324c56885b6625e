"""The fused ops between a block's products against their definition, and where they run."""

import pytest
import torch
from torch import Tensor

from sjd_engine import native, ops
from sjd_engine.kernels import layers

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 7, 40, 256]
EPS = 1e-6


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """float64 of the size of activations, and a few that are large."""
    generator = torch.Generator().manual_seed(seed)
    small, large = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return torch.where(large > 2, 40 * small, small)


def assert_rounded_once(got: Tensor, exact: Tensor, scale: Tensor) -> None:
    """Of exact [...] in float64: float32 sums of terms of the size of `scale`, then half a step of the dtype. No power
    of e is smaller than 2^-64."""
    step = torch.finfo(got.dtype).eps if got.dtype != torch.float32 else 0.0
    least = max(torch.finfo(got.dtype).tiny, 1e-15)
    assert ((got.double() - exact).abs() <= 1e-6 * scale + 0.5 * step * exact.abs() + least).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
class TestEqualsTheDefinition:
    def test_rms_norm(self, dtype, width):
        x, weight = numbers(3, 5, width).to(dtype), (1 + 0.2 * numbers(width, seed=1)).to(dtype)
        exact = layers.rms_norm(x.double(), weight.double(), EPS)
        assert_rounded_once(native.rms_norm(x, weight, EPS), exact, exact.abs())

    def test_add_rms_norm(self, dtype, width):
        x, y = numbers(3, 5, width).to(dtype), numbers(3, 5, width, seed=2).to(dtype)
        weight = (1 + 0.2 * numbers(width, seed=1)).to(dtype)
        total, norm = native.add_rms_norm(x, y, weight, EPS)
        assert torch.equal(total, x + y)
        exact = layers.rms_norm(total.double(), weight.double(), EPS)
        assert_rounded_once(norm, exact, exact.abs())

    def test_rotate(self, dtype, width):
        """In place, on the queries and keys of a joined product, whose values stay."""
        qkv = numbers(2, 5, 6, 2 * width).to(dtype)
        cos, sin = (numbers(2, 5, 1, 2 * width, seed=seed).to(dtype) for seed in (3, 4))
        before = qkv.double()
        exact = layers.rotate(before[:, :, :4], cos.double(), sin.double())
        scale = before.roll(width, -1).abs()[:, :, :4] * sin.double().abs() + exact.abs()
        rotated = native.rotate(qkv[:, :, :4], cos, sin)
        assert rotated.data_ptr() == qkv.data_ptr()
        assert_rounded_once(rotated, exact, scale)
        assert torch.equal(qkv[:, :, 4:].double(), before[:, :, 4:])

    def test_silu_mul(self, dtype, width):
        gate_up = (5 * numbers(3, 5, 2 * width)).to(dtype)
        exact = layers.silu_mul(gate_up.double())
        assert_rounded_once(native.silu_mul(gate_up), exact, exact.abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_in_any_batch_and_for_any_number_of_threads(dtype):
    rows, width = 128, 512  # enough for a second thread
    x, y, gate_up = (numbers(1, rows, size, seed=size).to(dtype) for size in (width, width, 2 * width))
    weight, (cos, sin) = x[0, 0], (t.to(dtype)[:, :, None] for t in (numbers(1, rows, 64), numbers(1, rows, 64)))

    def run(part: slice) -> list[Tensor]:
        heads = y[:, part].clone().unflatten(-1, (8, 64))
        return [
            *native.add_rms_norm(x[:, part], y[:, part], weight, EPS),
            native.rotate(heads, cos[:, part].contiguous(), sin[:, part].contiguous()),
            native.silu_mul(gate_up[:, part]),
        ]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = run(slice(None))
    finally:
        torch.set_num_threads(threads)
    for row in (0, 63, rows - 1):
        for whole, alone in zip(together, run(slice(row, row + 1)), strict=True):
            assert torch.equal(whole[:, row : row + 1], alone)


def test_a_rotary_table_may_be_shared_by_the_sequences():
    x = numbers(2, 5, 3, 8).float()
    cos, sin = (numbers(5, 1, 8, seed=seed).float() for seed in (1, 2))
    assert torch.allclose(layers.rotate(x, cos, sin), native.rotate(x.clone(), cos, sin), atol=1e-5)


def test_nan_is_shown():
    x = torch.tensor([[float("nan"), 1.0, 2.0, 3.0]])
    assert native.rms_norm(x, torch.ones(4), EPS).isnan().all()
    assert native.silu_mul(x).isnan().tolist() == [[True, False]]


class TestWhatRuns:
    def test_the_compiled_module_for_a_pass_on_a_cpu(self):
        assert ops.layer_ops(torch.zeros(1)) is native

    def test_the_definition_where_gradients_casts_or_the_reference_are_asked_for(self, monkeypatch):
        assert ops.layer_ops(torch.zeros(1, dtype=torch.float64)) is layers
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.layer_ops(torch.zeros(1)) is layers
        with torch.inference_mode(False), torch.enable_grad():
            assert ops.layer_ops(torch.zeros(1)) is layers
        monkeypatch.setenv("SJD_BACKEND", "reference")
        assert ops.layer_ops(torch.zeros(1)) is layers

    def test_errors_name_op_and_argument(self):
        x = torch.zeros(2, 4)
        with pytest.raises(ValueError, match=r"rms_norm: weight must be \[4\], got \[3\]"):
            native.rms_norm(x, torch.ones(3), EPS)
        with pytest.raises(ValueError, match=r"rms_norm: weight must be contiguous torch.float32"):
            native.rms_norm(x, torch.ones(4).half(), EPS)
        with pytest.raises(ValueError, match=r"add_rms_norm: y must be \[2, 4\]"):
            native.add_rms_norm(x, x[:1], torch.ones(4), EPS)
        with pytest.raises(ValueError, match="silu_mul: gate_up must be float32, float16 or bfloat16"):
            native.silu_mul(x.double())
        with pytest.raises(ValueError, match="rotate: the head dim must be even, got 3"):
            native.rotate(torch.zeros(1, 1, 1, 3), torch.zeros(1, 1, 1, 3), torch.zeros(1, 1, 1, 3))

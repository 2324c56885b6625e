"""Products with matrices in panels: against the sums they stand for, and what a row of one may depend on."""

import pytest
import torch
from torch import Tensor

from sjd_engine import native, ops
from sjd_engine.kernels import layers

PANELS = pytest.mark.skipif(not ops.multiplies_panels(), reason="this CPU does not multiply bfloat16 in vectors")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=PANELS)]
SHAPES = [(1, 1), (64, 32), (65, 31), (200, 97), (130, 2500)]  # outputs, inputs; the last goes through in parts

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def numbers(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_outputs", "depth"), SHAPES)
@pytest.mark.parametrize("implementation", [native, layers], ids=["compiled", "definition"])
def test_a_product_is_rounded_once(implementation, num_outputs, depth, dtype):
    """Each row count has tiles of its own; float32 sums of products err by less than depth * 2^-24 of their size."""
    weight, bias = numbers(num_outputs, depth, seed=0, dtype=dtype), numbers(num_outputs, seed=1, dtype=dtype)
    panels = ops.to_panels(weight)
    for num_rows in (0, 1, 2, 3, 5, 6, 7, 13, 33):
        x = numbers(1, num_rows, depth, seed=num_rows, dtype=dtype)
        for added in (None, bias):
            exact = x.double() @ weight.double().T + (0 if added is None else added.double())
            size = x.double().abs() @ weight.double().abs().T + 1
            got = implementation.linear(x, panels, num_outputs, added)
            step = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0
            assert got.dtype == dtype
            assert got.shape == exact.shape
            assert ((got.double() - exact).abs() <= 1.01 * step * exact.abs() + (depth + 2) * 2**-24 * size).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [31, 2500])
def test_a_row_is_the_same_beside_any_rows_and_for_any_number_of_threads(dtype, depth):
    panels = ops.to_panels(numbers(500, depth, seed=0, dtype=dtype))
    x = numbers(40, depth, seed=1, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = native.linear(x, panels, 500)
        torch.set_num_threads(1)
        assert torch.equal(native.linear(x, panels, 500), together)
    finally:
        torch.set_num_threads(threads)
    for first, last in ((0, 1), (3, 5), (39, 40), (7, 13), (5, 40)):
        assert torch.equal(native.linear(x[first:last], panels, 500), together[first:last])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row(dtype):
    panels = ops.to_panels(numbers(70, 33, seed=0, dtype=dtype))
    x = numbers(9, 33, seed=1, dtype=dtype)
    clean = native.linear(x, panels, 70)
    x[4, 0] = float("nan")
    x[6] = float("inf")
    got = native.linear(x, panels, 70)
    assert got[4].isnan().all()
    assert not got[6].isfinite().any()
    others = [row for row in range(9) if row not in (4, 6)]
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_begin_anywhere(dtype):
    panels, x = ops.to_panels(numbers(64, 32, seed=0, dtype=dtype)), numbers(3 * 32 + 1, seed=1, dtype=dtype)
    shifted = x[1:].view(3, 32)
    assert torch.equal(native.linear(shifted, panels, 64), native.linear(shifted.clone(), panels, 64))
    across = shifted.T.clone().T
    assert torch.equal(native.linear(across, panels, 64), native.linear(shifted.clone(), panels, 64))


def test_errors_name_op_and_argument():
    x, panels = torch.zeros(2, 4), ops.to_panels(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"linear: panels must be \[1, 5, 64, 1\], got \[1, 4, 64, 1\]"):
        native.linear(torch.zeros(2, 5), panels, 3)
    with pytest.raises(ValueError, match=r"linear: panels must be \[2, 4, 64, 1\]"):
        native.linear(x, panels, 65)
    with pytest.raises(ValueError, match=r"linear: bias must be \[3\], got \[4\]"):
        native.linear(x, panels, 3, torch.zeros(4))
    with pytest.raises(ValueError, match=r"linear: bias must be contiguous torch.float32"):
        native.linear(x, panels, 3, torch.zeros(3).double())
    with pytest.raises(ValueError, match=r"linear: x must be float32 or bfloat16 on a CPU, got torch.float16"):
        native.linear(x.half(), panels, 3)

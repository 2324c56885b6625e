"""Matrices in 8 bits, in panels and in blocks: what they cost in accuracy, and what they take."""

import pytest
import torch

from sjd_engine import Engine, ops
from sjd_engine.loading import load
from sjd_engine.models.block import Transformer
from sjd_engine.models.linear import Matrix, linear, nbytes
from sjd_engine.pack import PackedMatrix, PanelMatrix, computes_bfloat16
from sjd_engine.quantize import Int8Matrix

BFLOAT16 = pytest.mark.skipif(not computes_bfloat16(), reason="oneDNN does not multiply bfloat16 on this CPU")


def logits(model: Transformer) -> torch.Tensor:
    ids = torch.randint(3072, 4072, (2, 256), generator=torch.Generator().manual_seed(1))
    return model.logits(model(model.embed(ids), model.new_cache(2, 256)))


def transformer(**arguments: object) -> Transformer:
    return load("emoji", "cpu", **arguments).transformer


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    return logits(transformer(dtype=torch.float32))


class TestInt8Matrix:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("num_rows", [1, 4, 5, 40])
    def test_a_product_is_that_of_the_rounded_weights(self, num_rows, dtype):
        """Few rows and many take different ways. 3000 x 400 is widened in two parts."""
        generator = torch.Generator().manual_seed(0)
        weight, x, bias = (
            torch.randn(*shape, generator=generator) for shape in ((3000, 400), (num_rows, 400), (3000,))
        )
        matrix = Int8Matrix(weight.to(dtype))
        rounded = matrix.rows.double() * matrix.scales.double()[:, None]
        expected = x.to(dtype).double() @ rounded.T + bias.to(dtype).double()
        got = linear(x.to(dtype)[None], matrix, bias.to(dtype))
        assert got.shape == (1, num_rows, 3000)
        assert (got - expected).abs().max() <= 16 * torch.finfo(dtype).eps * expected.abs().max()

    def test_no_weight_moves_by_more_than_half_a_step(self):
        weight = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
        weight[3] = 0
        matrix = Int8Matrix(weight)
        error = (matrix.rows * matrix.scales[:, None] - weight).abs()
        assert (error <= weight.abs().amax(1, keepdim=True) / 254 * 1.001).all()


class TestEngine:
    @BFLOAT16
    def test_int8_logits_are_nearly_as_exact_as_those_of_bfloat16(self, exact):
        bfloat16 = (logits(transformer(dtype=torch.bfloat16)) - exact).abs()
        int8 = (logits(transformer(dtype=torch.bfloat16, quantization="int8")) - exact).abs()
        assert int8.mean() <= 2 * bfloat16.mean()
        assert int8.mean() <= 0.02 * exact.std()
        assert int8.max() <= 0.25 * exact.std()

    def test_four_bits_would_show(self, exact, monkeypatch):
        monkeypatch.setattr("sjd_engine.quantize.LEVELS", 7)
        assert (logits(transformer(dtype=torch.float32, quantization="int8")) - exact).abs().mean() > 0.1 * exact.std()

    def test_matrices_take_half_of_their_bfloat16_memory(self):
        plain, int8 = (transformer(dtype=torch.bfloat16, quantization=q) for q in (None, "int8"))
        for block in int8.blocks:
            assert all(isinstance(m, Int8Matrix) for m in (block.wqkv, block.wo, block.w_gate_up, block.w_down))
        assert isinstance(int8.head, Int8Matrix)
        saved = sum(m.shape.numel() * m.dtype.itemsize - m.nbytes for m in int8.modules() if isinstance(m, Int8Matrix))
        filling = sum(m.nbytes - m.shape.numel() * m.dtype.itemsize for m in plain.modules() if isinstance(m, Matrix))
        assert nbytes(plain) - filling - nbytes(int8) == saved
        for matrix in (m for block in int8.blocks for m in block.modules() if isinstance(m, Int8Matrix)):
            assert matrix.nbytes < 0.51 * matrix.shape.numel() * 2

    def test_decodes_the_same_in_any_window(self):
        engine = Engine("emoji", device="cpu", dtype=torch.float32, quantization="int8")
        arguments = {"method": "exact", "seed": 1, "output_type": "codes", "progress": False}
        short, long = (engine.generate("a red apple", window_size=w, **arguments).token_ids for w in (16, 48))
        assert torch.equal(short, long)

    def test_an_unknown_quantization(self):
        with pytest.raises(ValueError, match="quantization: expected int8 or None, got 'int3'"):
            Engine("emoji", device="cpu", quantization="int3")

    def test_a_model_that_is_stored_in_another_way_already(self):
        model = load("emoji", "cpu", quantization="int8")
        with pytest.raises(ValueError, match="load it again"):
            Engine(model, quantization="int8")


@BFLOAT16
class TestPackedMatrix:
    @pytest.mark.parametrize("num_rows", [1, 2, 33])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_product_is_that_of_the_weights(self, num_rows, dtype):
        generator = torch.Generator().manual_seed(0)
        weight, x, bias = (torch.randn(*shape, generator=generator) for shape in ((300, 96), (1, num_rows, 96), (300,)))
        weight, x, bias = weight.to(dtype), x.to(dtype), bias.to(dtype)
        expected = x.double() @ weight.double().T + bias.double()
        got = linear(x, PackedMatrix(weight), bias)
        assert (got - expected).abs().max() <= 16 * torch.finfo(dtype).eps * expected.abs().max()

    def test_a_bfloat16_model_is_packed(self, exact):
        """In panels or blocks."""
        packed, form = transformer(dtype=torch.bfloat16), PanelMatrix if ops.multiplies_panels() else PackedMatrix
        assert isinstance(packed.head, form)
        assert isinstance(packed.blocks[-1].w_down, form)
        assert (logits(packed) - exact).abs().mean() <= 0.02 * exact.std()

    def test_in_blocks_where_the_compiled_module_may_not_run(self, exact, monkeypatch):
        monkeypatch.setenv("SJD_BACKEND", "reference")
        packed = transformer(dtype=torch.bfloat16)
        assert isinstance(packed.head, PackedMatrix)
        assert (logits(packed) - exact).abs().mean() <= 0.02 * exact.std()

    def test_a_float32_model_keeps_its_order_of_sums(self):
        assert not any(
            isinstance(part, PackedMatrix | PanelMatrix) for part in transformer(dtype=torch.float32).modules()
        )

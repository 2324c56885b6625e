"""Weight-only int8: half the memory of bfloat16 for the matrices of blocks and head.

    w[o, i] ~ scale[o] * q[o, i],   q in -127..127,   scale[o] = max |w[o]| / 127

Source: the symmetric scheme of Jacob et al., "Quantization and Training of Neural Networks" (arXiv 1712.05877), one
    scale for each output row. torchao's weight-only tensor is the same scheme, but outside torch.compile it widens the
    whole matrix in every product, which takes longer than what is below.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sjd_engine.models.block import Transformer
from sjd_engine.models.linear import Matrix, replace_matrices

LEVELS = 127
FEW_ROWS = 4  # up to so many, reading the matrix is what takes the time, and int8 is read in half of it
CACHED = 1 << 20  # weights that are widened together on a CPU: they stay in its cache


class Int8Matrix(Matrix):
    """A weight as int8 rows and a scale for each."""

    rows: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        peaks = weight.abs().amax(1).float()
        # Rounded to the dtype of the products first, so that the rounding is no error of its own.
        scales = torch.where(peaks > 0, peaks / LEVELS, 1.0).to(weight.dtype)
        rows = (weight.float() / scales.float()[:, None]).round_().clamp_(-LEVELS, LEVELS)
        self.register_buffer("rows", rows.to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if x.device.type != "cpu":
            out = F.linear(flat, self.rows.to(self.dtype)) * self.scales
        elif len(flat) <= FEW_ROWS:
            out = torch._weight_int8pack_mm(flat.contiguous(), self.rows, self.scales)
        else:
            out = self._widened_in_parts(flat)
        out = out if bias is None else out + bias
        return out.unflatten(0, x.shape[:-1])

    def _widened_in_parts(self, x: Tensor) -> Tensor:
        """x [N, I] -> [N, O], without a widened copy of the whole."""
        out, step = x.new_empty(len(x), len(self)), max(1, CACHED // self.shape[1])
        for first in range(0, len(self), step):
            part = slice(first, first + step)
            torch.mul(F.linear(x, self.rows[part].to(self.dtype)), self.scales[part], out=out[:, part])
        return out

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.scales.nbytes


def quantize(transformer: Transformer) -> None:
    """Store the matrices of blocks and head as int8, in place. The embedding stays: a pass reads a few rows of it."""
    replace_matrices(transformer, Int8Matrix)

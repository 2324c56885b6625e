"""Matrices in the layout of oneDNN's bfloat16 products.

A product with a plain matrix brings it into blocks first, in every pass. Stored in blocks it takes about two thirds of
the time for the few rows of a window, and no more memory.
"""

import torch
from torch import Tensor

from sjd_engine.models.block import Transformer
from sjd_engine.models.draft_head import DraftHead
from sjd_engine.models.linear import Matrix, replace_matrices

ROWS = 32  # of the products that the blocks are chosen for; other numbers are served as well


class PackedMatrix(Matrix):
    """A weight in blocks, on a CPU."""

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        self._blocks = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._blocks, bias, "none", [], "")

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def computes_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(module: Transformer | DraftHead) -> None:
    """Store the matrices of a bfloat16 module on a CPU in blocks, in place; leave any other alone. Its products then
    sum in another order."""
    if module.norm.device.type == "cpu" and module.norm.dtype == torch.bfloat16 and computes_bfloat16():
        replace_matrices(module, PackedMatrix)

"""Matrices of a bfloat16 model in the layout of a CPU's products, for the few rows of a window.

    panels  csrc/linear_cpu.cpp, where the CPU multiplies bfloat16 in vectors: a row of a product is the same bit for
            bit beside any others, so that a batch gives the images that its prompts give alone
    blocks  oneDNN, where it multiplies bfloat16 in tiles, or the compiled module is missing

A product with a plain matrix would bring it into blocks first, in every pass. Either takes no more memory, but for what
fills the last panel.
"""

import torch
from torch import Tensor

from sjd_engine import ops
from sjd_engine.models.block import Transformer
from sjd_engine.models.draft_head import DraftHead
from sjd_engine.models.linear import Matrix, replace_matrices

ROWS = 32  # of the products that the blocks are chosen for; other numbers are served as well


class PanelMatrix(Matrix):
    """A weight in panels, on a CPU."""

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        self._panels = ops.to_panels(weight)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return ops.linear(x, self._panels, len(self), bias)

    @property
    def nbytes(self) -> int:
        return self._panels.nbytes


class PackedMatrix(Matrix):
    """A weight in oneDNN's blocks, on a CPU."""

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
    """Store the matrices of a bfloat16 module on a CPU in panels or blocks, in place; leave any other alone. Its
    products then sum in another order."""
    if module.norm.device.type != "cpu" or module.norm.dtype != torch.bfloat16:
        return
    if ops.multiplies_panels():
        replace_matrices(module, PanelMatrix)
    elif computes_bfloat16():
        replace_matrices(module, PackedMatrix)

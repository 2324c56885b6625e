"""Products with matrices of a transformer, whatever form they are stored in."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRODUCTS = ("w", "head")  # how the names of matrices begin that are multiplied, not looked up


class Matrix(nn.Module, ABC):
    """A weight [O, I] in a form of its own, in the place of the parameter that it was made from.

    Attributes:
        shape: (O, I).
        dtype: of the vectors it is multiplied with, and of the products.
    """

    shape: torch.Size
    dtype: torch.dtype

    def __init__(self, weight: Tensor):
        super().__init__()
        self.shape, self.dtype = weight.shape, weight.dtype

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., I] -> [..., O]."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory that it takes."""


def linear(x: Tensor, weight: Tensor | nn.Module, bias: Tensor | None = None) -> Tensor:
    """x [..., I] -> [..., O]: the product with a parameter or a Matrix."""
    return F.linear(x, weight, bias) if isinstance(weight, Tensor) else weight(x, bias)


def replace_matrices(module: nn.Module, change: Callable[[Tensor], Matrix | None]) -> None:
    """Put a Matrix in the place of the products' parameters, one after the other: each is freed before the next.

    Args:
        module: a transformer.
        change: None leaves a parameter as it is.
    """
    for part in list(module.modules()):
        for name in [name for name, p in part.named_parameters(recurse=False) if p.ndim == 2]:
            matrix = change(getattr(part, name).detach()) if name.startswith(PRODUCTS) else None
            if matrix is not None:
                delattr(part, name)
                setattr(part, name, matrix)


def nbytes(module: nn.Module) -> int:
    """Memory of parameters, buffers and matrices."""
    tensors = sum(t.nbytes for part in module.modules() if not isinstance(part, Matrix) for t in own_tensors(part))
    return tensors + sum(part.nbytes for part in module.modules() if isinstance(part, Matrix))


def own_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, without those of its parts."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]

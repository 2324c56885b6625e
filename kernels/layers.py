"""The products of a transformer block with matrices in panels, and what stands between them, in plain PyTorch: the
definition of correct, and what runs where nothing faster does, and in graphs that are traced or differentiated."""

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 64  # outputs of a panel


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        x: [..., hidden].
        weight: [hidden].
    """
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + y, its `rms_norm`), x and y [..., hidden]."""
    total = x + y
    return total, rms_norm(total, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [S, N, H, D] rotated by its positions' rows of a rotary table, cos and sin [S, N, 1, D]; see `models.rope`. The
    memory of x may be taken for the result."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [..., 2 * width], gate before up."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def to_panels(weight: Tensor) -> Tensor:
    """A matrix [O, I] in panels: the weights of PANEL outputs lie in the order in which their sums read them.

    Args:
        weight: float32 or bfloat16.
    Returns: [ceil(O / PANEL), steps, PANEL, n], n inputs of an output in 4 bytes; zeros behind O and I.
    """
    together = 4 // weight.itemsize
    rows, cols = -len(weight) % PANEL, -weight.shape[1] % together
    padded = F.pad(weight, (0, cols, 0, rows)) if rows or cols else weight.contiguous()
    steps = padded.view(torch.int32).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()
    return steps.view(weight.dtype).unflatten(-1, (PANEL, together))


def linear(x: Tensor, panels: Tensor, num_outputs: int, bias: Tensor | None = None) -> Tensor:
    """x [..., I] -> [..., O]: the product with a matrix that `to_panels` has stored.

    Args:
        num_outputs: O.
        bias: [O].
    """
    weight = panels.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    return F.linear(x, weight[:num_outputs, : x.shape[-1]], bias)

"""What stands between the products of a transformer block, in plain PyTorch: the definition of correct, and what runs
where nothing faster does, and in graphs that are traced or differentiated."""

import torch
import torch.nn.functional as F
from torch import Tensor


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

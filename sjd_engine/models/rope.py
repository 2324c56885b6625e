"""Rotary position embedding as a table: any position scheme is a choice of rows."""

import torch
from torch import Tensor


def rope_table(num_positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """1-D rotary table in the rotate-half layout.

    Returns: (cos, sin), both [num_positions, head_dim] float32. The first half of `sin` is negated, so that
        rotating x is x * cos + roll(x, head_dim / 2) * sin.
    Source: Su et al., "RoFormer" (arXiv 2104.09864), equation 34.
    """
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * inverse
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [S, N, H, D] rotated by its positions' table rows, cos and sin [S, N, 1, D]."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)

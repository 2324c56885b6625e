"""Rotary position embedding as a table: any position scheme is a choice of rows."""

import torch
from torch import Tensor


def rope_table(num_positions: int, head_dim: int, theta: float, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """1-D rotary table in the rotate-half layout.

    Args:
        factor: positions are divided by it; a model trained so reads sequences longer by it ("linear" RoPE scaling).
    Returns: (cos, sin), both [num_positions, head_dim] float32. The first half of `sin` is negated, so that
        rotating x is x * cos + roll(x, head_dim / 2) * sin.
    Source: Su et al., "RoFormer" (arXiv 2104.09864), equation 34; Chen et al., "Extending context window of large
        language models via positional interpolation" (arXiv 2306.15595).
    """
    return table(torch.arange(num_positions)[:, None] * (frequencies(head_dim, theta) / factor))


def grid_rope_table(num_unrotated: int, side: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """2-D rotary table of a square grid in raster order, as LlamaGen has it: the first half of a head's pairs turns by
    the row, the second by the column. Rows of zeros, which make queries and keys zero, stand for the tokens before it.

    Args:
        num_unrotated: positions of the conditioning.
        side: rows and columns of the grid.
    Returns: as `rope_table`, for num_unrotated + side * side positions.
    """
    turns = torch.arange(side)[:, None] * frequencies(head_dim // 2, theta)
    rows, cols = turns[:, None].expand(-1, side, -1), turns[None].expand(side, -1, -1)
    cos, sin = table(torch.cat((rows, cols), -1).flatten(0, 1))
    zeros = cos.new_zeros(num_unrotated, head_dim)
    return torch.cat((zeros, cos)), torch.cat((zeros, sin))


def frequencies(dim: int, theta: float) -> Tensor:
    """[dim / 2] float32 angles of position 1."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)


def table(angles: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of angles [P, head_dim / 2]."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

"""Drafters: laws for drafts that are better than a neighbour's, and exact all the same.

Between two passes a drafter may draw any draft of the next window anew. The next pass verifies it by the law that it
was drawn from, so images keep their law whatever a drafter does, as long as

    which drafts it draws, and their laws, depend on laws of earlier passes and on tokens before them alone.

It must not look at the token that it replaces, nor at any to the right (rules C2 and C3).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sjd_engine import ops


@dataclass(frozen=True)
class Drafts:
    """The drafts between two passes. Row i of the next window holds the draft for position num_committed + i.

    state, grid, seeds: the decoder's.
    logits: of the pass; its row i predicted position `first + i`.
    first: [B] tokens that were committed before the pass.
    num_drafts: N, of the next window.
    warp_arguments: guidance, temperature, top-k and top-p, see `SamplingParams.warp_arguments`.
    """

    state: ops.WindowState
    grid: ops.Grid
    seeds: Tensor
    logits: Tensor
    first: Tensor
    num_drafts: int
    warp_arguments: Mapping[str, Tensor | None]

    @property
    def window_size(self) -> int:
        """W of the pass."""
        return self.logits.shape[-2]

    @property
    def positions(self) -> Tensor:
        """[B, N] int64, of the drafts."""
        return self.state.num_committed[:, None] + torch.arange(self.num_drafts, device=self.seeds.device)

    @property
    def entered(self) -> Tensor:
        """[B, N] bool: drafts that the pass had no slot for."""
        return self.positions >= self.first[:, None] + self.window_size

    def tokens(self, positions: Tensor) -> Tensor:
        """[B, N] int64, committed or drafted; -1 before the image."""
        return self.state.tokens.gather(1, (positions + 1).clamp_min(0))

    def weights(self, rows: Tensor) -> Tensor:
        """[B, N, V] float32: laws of rows [B, N] of the pass, before they are scaled to sum to 1."""
        guidance_scale, temperature = self.warp_arguments["guidance_scale"], self.warp_arguments["temperature"]
        return ops.law_weights(self.state, self.logits, rows, guidance_scale, temperature)

    def redraw(self, row: int, weights: Tensor, where: Tensor) -> None:
        """Draw the drafts of rows row .. row + n - 1 anew from `weights` [B, n, V], where `where` [B, n] says so; see
        `kernels.reference.redraft`."""
        ops.redraft(self.state, self.grid, self.seeds, row, weights, where)


class Drafter(Protocol):
    """Draws drafts anew between two passes."""

    def __call__(self, drafts: Drafts) -> None:
        """No sync with the device, and the same shapes in every call for a window: CUDA graphs capture it."""

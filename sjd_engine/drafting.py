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

    @property
    def unfinished(self) -> Tensor:
        """[S] int64: sequences with something left to draft; all of them where asking would wait for the device."""
        if self.seeds.device.type != "cpu":
            return torch.arange(len(self.seeds), device=self.seeds.device)
        return (self.state.num_committed < self.grid.num_tokens).nonzero().squeeze(1)

    def tokens(self, positions: Tensor) -> Tensor:
        """[B, N] int64, committed or drafted; -1 before the image."""
        return self.state.tokens.gather(1, (positions + 1).clamp_min(0))

    def scores(self, sequences: Tensor) -> Tensor:
        """[S, W, V] float32: the pass's logits of some sequences after guidance and temperature."""
        own = (self.warp_arguments[name] for name in ("guidance_scale", "temperature"))
        return ops.combine(self.logits[..., sequences, :, :], *(None if x is None else x[sequences] for x in own))

    def laws(self, sequences: Tensor) -> Tensor:
        """[S, W, 4] float32: what turns rows of `scores` into laws. Rows of forced positions have none."""
        return self.state.laws[(self.state.iteration[sequences] + 1) % 2, sequences, : self.window_size]

    def redraw(self, row: int, weights: Tensor, where: Tensor, sequences: Tensor | None = None) -> None:
        """Draw the drafts of rows row .. row + n - 1 anew from `weights` [S, n, V], where `where` [S, n] says so; see
        `kernels.reference.redraft`."""
        ops.redraft(self.state, self.grid, self.seeds, row, weights, where, sequences)


class Drafter(Protocol):
    """Draws drafts anew between two passes.

    One that has an attribute `most_accepted`, [B] int64, limits the drafts that the next pass may accept.
    """

    def __call__(self, drafts: Drafts) -> None:
        """No sync with the device, and the same shapes in every call for a window: CUDA graphs capture it."""


MOST = 8  # drafts that a drafter of entering tokens draws in a pass, the last ones: rarely too few
BY_ROW_ABOVE = {"above-law": 0.0, "above-blend": 1 / 16}  # inits by `RowAbove`, and their share of the uniform law


class RowAbove:
    """Drafts enter by the law one row up, remembered from the pass that computed it.

    `above-law`: only where that position has left a window shorter than a row; elsewhere `above-sample` does the same.
    `above-blend`: everywhere, mixed with a share of the uniform law.

    Args:
        batch_size, max_window_size, vocab_size: B, W, V.
        grid: of the images.
        uniform: share of the uniform law, in [0, 1).

    Attributes:
        tensors: what it carries from pass to pass.
    """

    def __init__(self, batch_size: int, max_window_size: int, vocab_size: int, grid: ops.Grid, *, uniform: float = 0.0):
        self._rows_apart, self._uniform = rows_apart(grid), uniform
        shape, device = (batch_size, self._rows_apart + max_window_size), grid.above.device
        # Of position t at t modulo the length. An image writes all that it reads.
        self.tensors = {
            "scores": torch.zeros(*shape, vocab_size, device=device),
            "laws": torch.zeros(*shape, 4, device=device),
        }

    @staticmethod
    def is_needed(init: str, window_size: int, max_window_size: int, grid: ops.Grid) -> bool:
        """There is a row above, and for `above-law` some windows may be shorter than a row: the first, or one that
        comes later."""
        if max_window_size == 1 or not rows_apart(grid):
            return False
        return BY_ROW_ABOVE[init] > 0 or window_size < max(rows_apart(grid), max_window_size)

    def __call__(self, drafts: Drafts) -> None:
        scores, laws = self.tensors["scores"], self.tensors["laws"]
        sequences = drafts.unfinished
        if not len(sequences):
            return
        first, device, length, each = drafts.first[sequences, None], scores.device, scores.shape[1], sequences[:, None]
        slots = (first + torch.arange(drafts.window_size, device=device)) % length
        scores[each, slots], laws[each, slots] = drafts.scores(sequences), drafts.laws(sequences)
        if drafts.window_size >= self._rows_apart and not self._uniform:
            return

        row = max(0, drafts.num_drafts - MOST)
        positions = drafts.positions[sequences, row:].clamp_max(drafts.grid.num_tokens - 1)
        above = drafts.grid.above[positions]
        slots = above.clamp_min(0) % length
        weights = ops.law_weights(scores[each, slots], laws[each, slots])
        left_out = first
        if self._uniform:
            law = weights / weights.sum(-1, keepdim=True).clamp_min(1)  # its peak is 1
            weights = (1 - self._uniform) * law + self._uniform / law.shape[-1]
            left_out = first + drafts.window_size  # of the window of this pass, too
        where = drafts.entered[sequences, row:] & (above >= 0) & (above < left_out)
        drafts.redraw(row, weights, where, sequences)


def rows_apart(grid: ops.Grid) -> int:
    """The most positions between a token and the one above it; 0 in an image of one row."""
    positions = torch.arange(grid.num_tokens, device=grid.above.device)
    return int(torch.where(grid.above >= 0, positions - grid.above, 0).max())  # sync: once for a decoder

"""The static plan of an image: which positions are forced, and where each image token lies in the grid."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from sjd_engine.ops import Grid


@dataclass(frozen=True)
class Schedule:
    """`rows` x `cols` image tokens in raster order, with forced tokens between them.

    Args:
        rows, cols: the latent grid, each >= 1.
        forced: position -> token id that the grammar fixes there (line breaks, size and end tokens). Every other
            position takes the next image token. Ids from 0 to vocab_size - 1 are image codes; larger ids mean whatever
            the caller's embedding makes of them.

    Raises: ValueError where a forced position lies outside the image.
    """

    rows: int
    cols: int
    forced: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"schedule: rows and cols must be >= 1, got {self.rows} x {self.cols}")
        for position, token in self.forced.items():
            if not 0 <= position < self.num_tokens:
                raise ValueError(
                    f"schedule: forced position {position} lies outside the image's {self.num_tokens} tokens"
                )
            if token < 0:
                raise ValueError(f"schedule: forced token at position {position} must be >= 0, got {token}")

    @classmethod
    def line(cls, num_tokens: int) -> "Schedule":
        """One row of free tokens: a sequence without a grid."""
        return cls(rows=1, cols=num_tokens)

    @classmethod
    def with_line_breaks(cls, rows: int, cols: int, token: int, end_tokens: Sequence[int] = ()) -> "Schedule":
        """A forced `token` after every row, then `end_tokens`."""
        forced = {(row + 1) * (cols + 1) - 1: token for row in range(rows)}
        forced.update({rows * (cols + 1) + i: end for i, end in enumerate(end_tokens)})
        return cls(rows, cols, forced)

    def of_codes(self, codes: range) -> "Schedule":
        """A schedule of vocabulary ids as one of image codes, which are the ids `codes`: those are counted from 0, any
        other id t is len(codes) + t, as `ImageModel.window_embeddings` reads it."""
        tokens = {
            position: token - codes.start if token in codes else token + len(codes)
            for position, token in self.forced.items()
        }
        return Schedule(self.rows, self.cols, tokens)

    @property
    def num_tokens(self) -> int:
        """T: image tokens and forced tokens."""
        return self.rows * self.cols + len(self.forced)

    @cached_property
    def image_positions(self) -> Tensor:
        """[rows * cols] int64: the position of each image token, in raster order."""
        return torch.tensor([t for t in range(self.num_tokens) if t not in self.forced])

    def grid(self, device: torch.device | str = "cpu") -> Grid:
        """The plan as tensors on `device`, as the ops read it."""
        positions = self.image_positions
        row_start = torch.full((self.num_tokens,), -1)
        above = torch.full((self.num_tokens,), -1)
        by_row = positions.view(self.rows, self.cols)
        row_start[positions] = by_row[:, :1].expand_as(by_row).flatten()
        above[positions[self.cols :]] = positions[: -self.cols]
        forced_ids = None
        if self.forced:
            forced_ids = torch.full((self.num_tokens,), -1)
            forced_ids[list(self.forced)] = torch.tensor(list(self.forced.values()))
            forced_ids = forced_ids.to(device)
        return Grid(forced_ids, row_start.to(device), above.to(device), self.cols)


def with_forced(codes: Tensor, schedule: Schedule) -> Tensor:
    """Image codes [N, rows * cols] -> token ids [N, T] with the forced tokens between them."""
    ids = codes.new_empty(len(codes), schedule.num_tokens)
    for position, token in schedule.forced.items():
        ids[:, position] = token
    ids[:, schedule.image_positions] = codes
    return ids

"""Tables of which image codes stand side by side: a model's own images in so few numbers that a draft costs no pass.

    P(x | left, above)  ~  P(x | left) P(x | above) / P(x)

as if, given x, its two neighbours knew nothing of each other. Of each row of the two tables only the codes that its
token makes likely are stored; the others share what is left of it as P(x) has them.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from sjd_engine.drafting import MOST, Drafts
from sjd_engine.files import written_whole

MOST_LISTED = 64  # codes of a row
PSEUDO_COUNT = 5.0  # tokens as P(x) has them, beside those that were counted
LEFT, ABOVE = 0, 1


@dataclass(frozen=True)
class NeighbourTables:
    """P(x | neighbour) of both neighbours: P(x) rest[neighbour], and P(x) lift more for the codes that are listed.

    prior: [V] float32, P(x).
    rest: [2, V] float32, left and above; of a neighbouring code.
    codes: [2, V, M] int32, listed; lift: [2, V, M] float32, theirs, 0 where fewer are likely.
    """

    prior: Tensor
    rest: Tensor
    codes: Tensor
    lift: Tensor

    @classmethod
    def fit(cls, images: Tensor, num_codes: int) -> "NeighbourTables":
        """From the codes [N, rows, cols] int64 of images.

        Raises: ValueError where there is none, or a code that the model does not have.
        """
        if images.ndim != 3 or not images.numel():
            raise ValueError(f"fit: images must be [N, rows, cols] and not empty, got {list(images.shape)}")
        if not 0 <= images.min() <= images.max() < num_codes:
            raise ValueError(f"fit: expected codes in 0..{num_codes - 1}, got {images.min()}..{images.max()}")
        counts = torch.bincount(images.flatten(), minlength=num_codes).float() + 1
        prior = counts / counts.sum()
        sides = [
            likely_codes(images[:, :, :-1], images[:, :, 1:], prior),
            likely_codes(images[:, :-1], images[:, 1:], prior),
        ]
        return cls(prior, *(torch.stack(parts) for parts in zip(*sides, strict=True)))

    @property
    def num_codes(self) -> int:
        return len(self.prior)

    def factor(self, side: int, neighbours: Tensor) -> Tensor:
        """[..., V] float32, P(x | neighbour) / P(x).

        Args:
            side: LEFT or ABOVE.
            neighbours: [...] int64; 1 where it is -1, no neighbour.
        """
        known = neighbours.clamp_min(0)
        factor = self.rest[side][known][..., None].expand(*neighbours.shape, self.num_codes).clone()
        factor.scatter_add_(-1, self.codes[side][known].long(), self.lift[side][known])
        return torch.where((neighbours >= 0)[..., None], factor, 1.0)

    def weights(self, left: Tensor, above: Tensor) -> Tensor:
        """[..., V] float32 in [0, 1]: P(x | left, above), scaled so that its largest is 1.

        Args:
            left, above: [...] int64 codes, -1 where there is none.
        """
        weights = self.prior * self.factor(LEFT, left) * self.factor(ABOVE, above)
        return weights / weights.amax(-1, keepdim=True)

    def to(self, device: torch.device) -> "NeighbourTables":
        return NeighbourTables(*(tensor.to(device) for tensor in vars(self).values()))

    def save(self, path: Path) -> None:
        """Write a file that `load_neighbours` reads, whole or not at all."""
        with written_whole(path) as file:
            file.write(save({name: tensor.contiguous() for name, tensor in vars(self).items()}))


def likely_codes(neighbours: Tensor, codes: Tensor, prior: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rest [V], codes [V, M], lift [V, M]) of one side; `codes` follow `neighbours`, tensors of one shape."""
    num_codes = len(prior)
    listed = min(MOST_LISTED, num_codes)
    pairs, counts = (neighbours * num_codes + codes).unique(return_counts=True)
    # Pairs with the most frequent first, neighbour by neighbour; then each one's place among its neighbour's.
    order = counts.argsort(descending=True, stable=True)
    order = order[(pairs[order] // num_codes).argsort(stable=True)]
    pairs, counts = pairs[order], counts[order].float()
    owners = pairs // num_codes
    sizes = torch.bincount(owners, minlength=num_codes)
    places = torch.arange(len(pairs)) - (sizes.cumsum(0) - sizes)[owners]
    total = torch.zeros(num_codes).index_add_(0, owners, counts) + PSEUDO_COUNT
    share = counts / total[owners]
    kept = places < listed
    owners, places, pairs, share = owners[kept], places[kept], pairs[kept], share[kept]
    table, lift = torch.zeros(num_codes, listed, dtype=torch.int32), torch.zeros(num_codes, listed)
    table[owners, places] = (pairs % num_codes).int()
    lift[owners, places] = share / prior[pairs % num_codes]
    return 1 - torch.zeros(num_codes).index_add_(0, owners, share), table, lift


class Neighbours:
    """`neighbours`: drafts enter by the tables, from left to right, so that each reads the one before it."""

    def __init__(self, tables: NeighbourTables):
        self._tables = tables

    def __call__(self, drafts: Drafts) -> None:
        sequences = drafts.unfinished
        if not len(sequences):
            return
        grid, first_row = drafts.grid, max(0, drafts.num_drafts - MOST)
        entered = drafts.entered[sequences]
        for row in range(first_row, drafts.num_drafts):
            here = slice(row, row + 1)
            if entered.device.type == "cpu" and not entered[:, here].any():
                continue
            positions = drafts.positions[:, here].clamp_max(grid.num_tokens - 1)
            above, in_row = grid.above[positions], positions > grid.row_start[positions]
            left = torch.where(in_row, drafts.tokens(positions - 1), -1)[sequences]
            above = torch.where(above >= 0, drafts.tokens(above), -1)[sequences]
            where = entered[:, here] & (grid.row_start[positions] >= 0)[sequences]
            drafts.redraw(row, self._tables.weights(left, above), where, sequences)

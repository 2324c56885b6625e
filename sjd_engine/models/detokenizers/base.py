"""What every detokenizer is, and how its tensors come from a checkpoint."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from sjd_engine.errors import CheckpointError
from sjd_engine.models.weights import assign

CODEBOOK = "quantize.embedding.weight"  # as all checkpoints with a codebook name it
MAX_PIXELS = 1 << 20  # decoded together; a larger image is decoded alone


class Detokenizer(nn.Module, ABC):
    """Image codes to pixels.

    Attributes:
        codebook_size: number of codes.
        patch_size: pixels per side that one code becomes.

    Memory is bounded by decoding few images together, and by attention that holds no score matrix. One image is never
    cut into tiles: group norm takes the mean of the whole image and attention looks at all of it, so tiles would
    differ in colour and show their borders.
    """

    codebook_size: int
    patch_size: int

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """codes [N, rows, cols] -> images [N, 3, H, W] in the dtype of the weights, before clamping."""

    def code_vectors(self) -> Tensor:
        """[codebook_size, E] float32: what a code stands for, so that near codes look alike."""
        return self.get_parameter(CODEBOOK).detach().float()

    def load(self, tensors: Mapping[str, Tensor], origin: Path, dtype: torch.dtype) -> Self:
        """Take exactly these tensors as the weights, in memory of their own.

        Raises: CheckpointError naming the missing, unknown or misshapen ones.
        """
        assign(self, {name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}, origin)
        return self

    @torch.inference_mode()
    def forward(self, codes: Tensor) -> Tensor:
        """The images of grids of codes.

        Args:
            codes: [N, rows, cols] int64 in 0..codebook_size-1.
        Returns: [N, 3, rows * patch_size, cols * patch_size] float32 in [-1, 1].
        Raises: ValueError where the codes are none of this codebook.
        """
        op, last = type(self).__name__, self.codebook_size - 1
        if codes.ndim != 3 or codes.dtype != torch.int64:
            raise ValueError(f"{op}: codes must be [N, rows, cols] int64, got {list(codes.shape)} {codes.dtype}")
        if codes.numel() == 0:
            raise ValueError(f"{op}: codes must hold at least one code, got {list(codes.shape)}")
        lowest, highest = torch.stack(codes.aminmax()).tolist()  # sync: a code past the codebook reads foreign memory
        if lowest < 0 or highest > last:
            raise ValueError(
                f"{op}: codes must be in 0..{last}, got {lowest}..{highest}; give codes, not vocabulary ids"
            )
        pixels = codes[0].numel() * self.patch_size**2
        parts = codes.split(max(1, MAX_PIXELS // pixels))
        return torch.cat([self.decode(part).float().clamp_(-1, 1) for part in parts])


def own_tensors(tensors: Mapping[str, Tensor], anchor: str, ignored: str, origin: Path) -> dict[str, Tensor]:
    """The tensors that decoding needs, without the prefix of their names.

    Args:
        tensors: with or without a common prefix, such as "model.vqmodel.".
        anchor: a tensor every layout has; what stands before it is the prefix.
        ignored: pattern of the beginnings of names, prefix removed, that decoding has no use for.
        origin: named in errors.
    Raises: CheckpointError where the anchor is missing or there are two.
    """
    prefixes = [name.removesuffix(anchor) for name in tensors if name.endswith(anchor)]
    if len(prefixes) != 1:
        raise CheckpointError(f"{origin}: expected one {anchor}, got {len(prefixes)}; not the tensors of a detokenizer")
    bare = {name.removeprefix(prefixes[0]): tensor for name, tensor in tensors.items()}
    if len(bare) != len(tensors):
        raise CheckpointError(f"{origin}: tensors with and without the prefix {prefixes[0]}")
    return {name: tensor for name, tensor in bare.items() if not re.match(ignored, name)}


def renamed(tensors: Mapping[str, Tensor], rename: Callable[[str], str], origin: Path) -> dict[str, Tensor]:
    """Every tensor under its new name. Raises: CheckpointError where two have one name."""
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        target = rename(name)
        if target in own:
            raise CheckpointError(f"{origin}: two tensors for {target}, one of them {name}; two layouts are mixed")
        own[target] = tensor
    return own


def shape_of(tensors: Mapping[str, Tensor], name: str, num_dims: int, origin: Path) -> tuple[int, ...]:
    """The shape of a tensor. Raises: CheckpointError where it is missing or has other dimensions."""
    if name not in tensors:
        raise CheckpointError(f"{origin}: missing {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != num_dims:
        raise CheckpointError(f"{origin}: {name}: expected {num_dims} dimensions, got {list(shape)}")
    return shape

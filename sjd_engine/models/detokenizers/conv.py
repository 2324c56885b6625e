"""The convolutional decoder of VQGAN, MoVQ and Cosmos: latents of a grid to pixels, doubling it level by level.

    conv_in, mid (block, attention, block), levels from coarse to fine (blocks, attentions, upsampling), norm, conv_out

One class with a few switches. Its parameters have the names of the VQGAN checkpoints, `up.0` being the finest level.
Source: Esser et al., "Taming Transformers for High-Resolution Image Synthesis", 2021 (arXiv 2012.09841).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sjd_engine.errors import CheckpointError
from sjd_engine.models.detokenizers.base import shape_of

NORM_EPS = 1e-6


@dataclass(frozen=True)
class ConvConfig:
    """Sizes and switches.

    latent_channels: of the input.
    level_channels: of every level, the finest first; each level but the finest ends by doubling the grid.
    num_blocks: residual blocks of a level.
    attention_levels: levels with attention behind every block.
    out_channels: of the output.
    norm_groups: groups of every norm.
    condition_channels: where there are any, norms are scaled and shifted by a condition on the grid (MoVQ).
    temporal: what one frame leaves of a video decoder's temporal layers: a map of every position by itself behind each
        attention, and a 1x1 convolution before each upsampling but the coarsest (Cosmos).
    """

    latent_channels: int
    level_channels: tuple[int, ...]
    num_blocks: int
    attention_levels: tuple[int, ...] = ()
    out_channels: int = 3
    norm_groups: int = 32
    condition_channels: int = 0
    temporal: bool = False

    @property
    def scale(self) -> int:
        """Pixels of the output per side and latent."""
        return 2 ** (len(self.level_channels) - 1)

    def norm(self, channels: int) -> nn.Module:
        if self.condition_channels:
            return SpatialNorm(channels, self)
        return GroupNorm(self.norm_groups, channels, NORM_EPS)


class GroupNorm(nn.GroupNorm):
    """Group norm called like `SpatialNorm`."""

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return super().forward(x)


class SpatialNorm(nn.Module):
    """Group norm, then scale and shift by 1x1 maps of the condition, brought to the size of x by repetition.

    Source: Zheng et al., "MoVQ: Modulating Quantized Vectors for High-Fidelity Image Generation", 2022
    (arXiv 2209.09002), equation 4.
    """

    def __init__(self, channels: int, config: ConvConfig):
        super().__init__()
        self.norm_layer = nn.GroupNorm(config.norm_groups, channels, NORM_EPS)
        self.conv_y = nn.Conv2d(config.condition_channels, channels, 1)
        self.conv_b = nn.Conv2d(config.condition_channels, channels, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x: [N, C, k * rows, k * cols]; condition: [N, condition_channels, rows, cols] -> like x."""
        # The maps are made on the small grid and broadcast: repetition commutes with a 1x1 convolution.
        scale, shift = (conv(condition)[:, :, :, None, :, None] for conv in (self.conv_y, self.conv_b))
        rows, cols = condition.shape[2:]
        h = self.norm_layer(x).unflatten(3, (cols, -1)).unflatten(2, (rows, -1))
        return torch.addcmul(shift, h, scale).flatten(4, 5).flatten(2, 3)


class ResBlock(nn.Module):
    """Two 3x3 convolutions behind norms around a skip: [N, C_in, H, W] -> [N, C_out, H, W].

    `norm` makes a norm for a number of channels; norms take x and the condition.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.norm1, self.conv1 = norm(in_channels), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x, condition), inplace=True))
        h = self.conv2(F.silu(self.norm2(h, condition), inplace=True))
        return h.add_(x if self.nin_shortcut is None else self.nin_shortcut(x))


class Attention(nn.Module):
    """Attention of every position to all of its image, one head, around a skip: [N, C, H, W] -> the same."""

    def __init__(self, channels: int, config: ConvConfig):
        super().__init__()
        self.norm = config.norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Linear(channels, channels) for _ in range(4))
        self.temporal_norm = config.norm(channels) if config.temporal else None
        self.temporal = nn.Linear(channels, channels) if config.temporal else None

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.norm(x, condition).flatten(2).mT
        q, k, v = (projection(h)[:, None] for projection in (self.q, self.k, self.v))
        x = x + self._image(self.proj_out(F.scaled_dot_product_attention(q, k, v)[:, 0]), x)
        if self.temporal_norm is not None and self.temporal is not None:
            x = x + self._image(self.temporal(self.temporal_norm(x).flatten(2).mT), x)
        return x

    @staticmethod
    def _image(rows: Tensor, like: Tensor) -> Tensor:
        return rows.mT.unflatten(2, like.shape[2:])


class Upsample(nn.Module):
    """Every position repeated into 2x2, then a 3x3 convolution: [N, C, H, W] -> [N, C, 2H, 2W]."""

    def __init__(self, channels: int, pointwise: bool):
        super().__init__()
        self.pointwise = nn.Conv2d(channels, channels, 1) if pointwise else None
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.pointwise is not None:
            x = self.pointwise(x)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution."""

    def __init__(self, config: ConvConfig, level: int):
        super().__init__()
        coarsest = len(config.level_channels) - 1
        channels, before = config.level_channels[level], config.level_channels[min(level + 1, coarsest)]
        self.block = nn.ModuleList(
            ResBlock(before if i == 0 else channels, channels, config.norm) for i in range(config.num_blocks)
        )
        attentions = config.num_blocks if level in config.attention_levels else 0
        self.attn = nn.ModuleList(Attention(channels, config) for _ in range(attentions))
        self.upsample = Upsample(channels, config.temporal and level != coarsest) if level else None

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x, condition)
            if self.attn:
                x = self.attn[i](x, condition)
        return x if self.upsample is None else self.upsample(x)


class ConvDecoder(nn.Module):
    """See the module."""

    def __init__(self, config: ConvConfig):
        super().__init__()
        channels = config.level_channels
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.mid = nn.ModuleDict(
            {
                "block_1": ResBlock(channels[-1], channels[-1], config.norm),
                "attn_1": Attention(channels[-1], config),
                "block_2": ResBlock(channels[-1], channels[-1], config.norm),
            }
        )
        self.up = nn.ModuleList(Level(config, level) for level in range(len(channels)))
        self.norm_out = config.norm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor, condition: Tensor | None = None) -> Tensor:
        """latents [N, latent_channels, rows, cols], condition [N, condition_channels, rows, cols] where the norms take
        one -> [N, out_channels, scale * rows, scale * cols]."""
        x = self.conv_in(latents)
        for module in self.mid.values():
            x = module(x, condition)
        for level in reversed(self.up):
            x = level(x, condition)
        return self.conv_out(F.silu(self.norm_out(x, condition), inplace=True))


def read_config(tensors: Mapping[str, Tensor], origin: Path, **switches: Any) -> ConvConfig:
    """The sizes of the decoder whose tensors these are, under the names of `ConvDecoder` behind "decoder.".

    Args:
        tensors: of the checkpoint.
        origin: named in errors.
        switches: the fields of `ConvConfig` that tensors do not tell.
    Raises: CheckpointError where a tensor that tells a size is missing.
    """
    indices: dict[str, set[tuple[int, int]]] = {"block": set(), "attn": set()}
    for name in tensors:
        if found := re.match(r"decoder\.up\.(\d{1,2})\.(block|attn)\.(\d{1,2})\.", name):
            indices[found[2]].add((int(found[1]), int(found[3])))
    levels = 1 + max((level for level, _ in indices["block"]), default=0)
    names = [f"decoder.up.{level}.block.0.conv1.weight" for level in range(levels)]
    config = ConvConfig(
        latent_channels=shape_of(tensors, "decoder.conv_in.weight", 4, origin)[1],
        level_channels=tuple(shape_of(tensors, name, 4, origin)[0] for name in names),
        num_blocks=sum(level == 0 for level, _ in indices["block"]),
        attention_levels=tuple(sorted({level for level, _ in indices["attn"]})),
        out_channels=shape_of(tensors, "decoder.conv_out.weight", 4, origin)[0],
        **switches,
    )
    if any(channels % config.norm_groups for channels in config.level_channels):
        raise CheckpointError(
            f"{origin}: expected channels in multiples of {config.norm_groups}, got {config.level_channels}"
        )
    return config


def check_config(config: Mapping[str, Any], codebook: tuple[int, ...], decoder: ConvConfig, origin: Path) -> None:
    """Refuse a config.json that says other sizes than the tensors.

    Args:
        config: under Hugging Face's or taming's names; sizes that it leaves out are not compared.
        codebook: (codes, dimensions).
        decoder: as the tensors have it.
        origin: named in errors.
    Raises: CheckpointError listing what differs.
    """
    told: dict[str, Any] = {
        "codebook_size": codebook[0],
        "num_embeddings": codebook[0],
        "embed_dim": codebook[1],
        "latent_channels": decoder.latent_channels,
        "z_channels": decoder.latent_channels,
        "out_channels": decoder.out_channels,
        "num_res_blocks": decoder.num_blocks - 1,
        "num_attention_heads": 1,
    }
    problems = [f"{key} {config[key]}, got {value}" for key, value in told.items() if config.get(key, value) != value]
    for width, factors in (("base_channels", "channel_multiplier"), ("ch", "ch_mult")):
        if width in config and factors in config:
            try:
                channels = [config[width] * factor for factor in config[factors]]
            except TypeError:
                channels = None
            if channels != list(decoder.level_channels):
                problems.append(f"{width} {config[width]} x {factors} {config[factors]}, got {decoder.level_channels}")
    if problems:
        raise CheckpointError(f"{origin}: the weights do not fit the config: expected {'; '.join(problems)}")


def attention_matrix(name: str, tensor: Tensor) -> Tensor:
    """`tensor`; as a matrix where `name` is one of the 1x1 convolutions that `Attention` has as linear maps."""
    return tensor.flatten(1) if re.search(r"\.attn(_1|\.\d+)\.(q|k|v|proj_out|temporal)\.weight$", name) else tensor

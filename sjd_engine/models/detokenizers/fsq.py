"""FSQ detokenizer: image codes to pixels.

Finite scalar quantisation has no codebook table: code `c` written in the mixed base `levels` gives one small integer
per channel, which is scaled to [-1, 1]. Source: Mentzer et al., "Finite Scalar Quantization", 2023 (arXiv 2309.15505).
"""

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sjd_engine.models.detokenizers.base import Detokenizer


@dataclass(frozen=True)
class FSQConfig:
    """Shape of an FSQ autoencoder; `patch_size` pixels per side become one code."""

    levels: tuple[int, ...] = (8, 5, 5, 5)
    patch_size: int = 4
    channels: int = 96
    num_res_blocks: int = 2

    @property
    def codebook_size(self) -> int:
        return prod(self.levels)


def codes_to_values(codes: Tensor, levels: tuple[int, ...]) -> Tensor:
    """The FSQ values of `codes`: [...] int64 in 0..prod(levels)-1 -> [..., len(levels)] float32 in [-1, 1]."""
    sizes = torch.tensor(levels, device=codes.device)
    basis = torch.cumprod(torch.cat([sizes.new_ones(1), sizes[:-1]]), 0)
    digits = (codes[..., None] // basis) % sizes
    half = sizes // 2
    return (digits - half) / half


class ResBlock(nn.Module):
    """Two 3x3 convolutions with group norm around a skip: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class FSQDecoder(Detokenizer):
    """The values of a code, residual blocks, and two doublings by pixel shuffle."""

    def __init__(self, config: FSQConfig):
        super().__init__()
        if config.patch_size != 4:
            raise ValueError(f"FSQDecoder: patch_size must be 4, got {config.patch_size}")
        self.config = config
        self.codebook_size, self.patch_size = config.codebook_size, config.patch_size
        channels = config.channels
        self.conv_in = nn.Conv2d(len(config.levels), channels, 3, padding=1)
        self.blocks = nn.Sequential(*(ResBlock(channels) for _ in range(config.num_res_blocks)))
        self.up1 = nn.Conv2d(channels, channels // 2 * 4, 3, padding=1)
        self.up2 = nn.Conv2d(channels // 2, channels // 2 * 4, 3, padding=1)
        self.conv_out = nn.Conv2d(channels // 2, 3, 3, padding=1)

    def code_vectors(self) -> Tensor:
        codes = torch.arange(self.codebook_size, device=self.conv_in.weight.device)
        return codes_to_values(codes, self.config.levels)

    def decode_values(self, values: Tensor) -> Tensor:
        """The image of FSQ values [B, len(levels), rows, cols], before clamping."""
        h = self.blocks(self.conv_in(values))
        h = F.silu(F.pixel_shuffle(self.up1(h), 2))
        h = F.silu(F.pixel_shuffle(self.up2(h), 2))
        return self.conv_out(h)

    def decode(self, codes: Tensor) -> Tensor:
        values = codes_to_values(codes, self.config.levels).permute(0, 3, 1, 2)
        return self.decode_values(values.to(self.conv_in.weight.dtype))

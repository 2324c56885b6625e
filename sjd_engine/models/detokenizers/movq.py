"""MoVQ detokenizer of Emu3, for images.

The model decodes video, four frames to a code. Its convolutions over time see zeros before the first frame, so the
frame that an image is needs only their last tap: the temporal layers are two-dimensional here.

Layouts, each with or without a prefix ("model.vqmodel.", ...):
    official    decoder.mid.block_1, decoder.mid.attn_1.{norm,q,k,v,proj_out}, decoder.up.N
    HF          decoder.middle_block.{block_1,attn_norm}, ...attn_1.{q_proj,...,out_proj}, decoder.up_block.up.N
In both `up.0` is the finest level.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sjd_engine.errors import CheckpointError
from sjd_engine.models.detokenizers.base import CODEBOOK, Detokenizer, own_tensors, renamed, shape_of
from sjd_engine.models.detokenizers.conv import (
    ConvConfig,
    ConvDecoder,
    ResBlock,
    attention_matrix,
    check_config,
    read_config,
)

IGNORED = r"encoder\.|quant_conv\.|.*\.num_batches_tracked$"
BATCH_NORM_EPS = 1e-5
RENAMES = (
    (r"^decoder\.middle_block\.attn_norm\.", "decoder.mid.attn_1.norm."),
    (r"^decoder\.middle_block\.", "decoder.mid."),
    (r"^decoder\.up_block\.up\.(\d+)\.attn_norms\.(\d+)\.", r"decoder.up.\1.attn.\2.norm."),
    (r"^decoder\.up_block\.", "decoder."),
    (r"\.(q|k|v)_proj\.", r".\1."),
    (r"\.out_proj\.", ".proj_out."),
    (r"^decoder\.(time_res_stack\.\d+\.conv[12])\.conv\.", r"\1."),
    (r"^decoder\.(time_conv\.\d+)\.conv\.conv\.", r"\1."),
    (r"^decoder\.time_", "time_"),
    (r"^post_quant_conv\.conv\.", "post_quant_conv."),
)


@dataclass(frozen=True)
class MoVQConfig:
    """Shape of a MoVQ decoder. Codes have as many dimensions as latents have channels."""

    codebook_size: int
    num_time_blocks: int
    num_time_convs: int
    decoder: ConvConfig


class Affine(nn.Module):
    """Scale and shift of every channel: what batch norm is when it does not learn."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])


class MoVQDecoder(Detokenizer):
    """Rows of a codebook; they and their 1x1 convolution through the temporal layers; the convolutional decoder, whose
    norms are conditioned on the first."""

    def __init__(self, config: MoVQConfig):
        super().__init__()
        channels = config.decoder.latent_channels
        self.codebook_size, self.patch_size = config.codebook_size, config.decoder.scale
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(config.codebook_size, channels)})
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)
        self.time_res_stack = nn.ModuleList(ResBlock(channels, channels, Affine) for _ in range(config.num_time_blocks))
        self.time_conv = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in range(config.num_time_convs)
        )
        self.decoder = ConvDecoder(config.decoder)

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        origin: Path,
        *,
        config: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "MoVQDecoder":
        """The decoder of a checkpoint.

        Args:
            tensors: of the autoencoder alone, in one of the layouts of this module; the encoder's are ignored.
            origin: file or folder, named in errors.
            config: the autoencoder's sizes as config.json has them, compared with the tensors.
            dtype: of the weights.
        Raises: CheckpointError naming the missing, unknown or misshapen tensors.
        """
        own = canonical(tensors, origin)
        codebook = shape_of(own, CODEBOOK, 2, origin)
        sizes = read_config(own, origin, condition_channels=codebook[1])
        check_config(config or {}, codebook, sizes, origin)
        with torch.device("meta"):
            decoder = cls(MoVQConfig(codebook[0], count(own, "time_res_stack"), count(own, "time_conv"), sizes))
        return decoder.load(own, origin, dtype)

    def decode(self, codes: Tensor) -> Tensor:
        vectors = self.quantize["embedding"](codes).permute(0, 3, 1, 2)
        x = torch.cat([self.post_quant_conv(vectors), vectors])
        for block in self.time_res_stack:
            x = block(x)
        for conv in self.time_conv:
            x = F.silu(conv(x))
        latents, condition = x.chunk(2)
        return self.decoder(latents, condition)


def canonical(tensors: Mapping[str, Tensor], origin: Path) -> dict[str, Tensor]:
    """The decoder's tensors under the names of `MoVQDecoder`, for one frame. Raises: CheckpointError."""

    def rename(name: str) -> str:
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        return name

    own = renamed(own_tensors(tensors, CODEBOOK, IGNORED, origin), rename, origin)
    norms = [found[1] for name in own if (found := re.match(r"(time_res_stack\.\d+\.norm\d)\.weight$", name))]
    for norm in norms:
        names = [f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        shapes = [shape_of(own, name, 1, origin) for name in names]
        if len(set(shapes)) > 1:
            raise CheckpointError(f"{origin}: {norm}: expected tensors of one length, got {shapes}")
        weight, bias, mean, variance = (own.pop(name).float() for name in names)
        scale = weight / (variance + BATCH_NORM_EPS).sqrt()
        own[f"{norm}.weight"], own[f"{norm}.bias"] = scale, bias - mean * scale
    return {name: attention_matrix(name, last_tap(name, tensor)) for name, tensor in own.items()}


def last_tap(name: str, tensor: Tensor) -> Tensor:
    """`tensor`; cut to its last tap over time where it is one of the causal convolutions over three frames."""
    causal = tensor.ndim == 5 and tensor.shape[2] == 3 and re.match(r"time_|post_quant_conv\.", name)
    return tensor[:, :, -1] if causal else tensor


def count(tensors: Mapping[str, Tensor], name: str) -> int:
    """The number of modules in the list `name`."""
    return len({found[1] for key in tensors if (found := re.match(rf"{name}\.(\d+)\.", key))})

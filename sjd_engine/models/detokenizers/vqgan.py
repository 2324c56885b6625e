"""VQGAN detokenizer: Chameleon, Lumina-mGPT, Anole, Janus and LlamaGen (VQ-16, VQ-8).

Layouts, each with or without a prefix ("gen_vision_model.", "model.vqmodel.", ...):
    taming      decoder.mid.block_1, decoder.up.N.block.M       up.0 is the finest level    Chameleon, Lumina, Anole
    LlamaGen    decoder.mid.0, decoder.conv_blocks.N.res.M      0 is the coarsest level     LlamaGen, Janus
    HF Janus    decoder.mid.block_1, decoder.up.N.block.M       up.0 is the coarsest level
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sjd_engine.models.detokenizers.base import CODEBOOK, Detokenizer, own_tensors, renamed, shape_of
from sjd_engine.models.detokenizers.conv import ConvConfig, ConvDecoder, attention_matrix, check_config, read_config

IGNORED = r"encoder\.|quant_conv\.|loss\.|quantize\.codebook_used$"
MID = ("block_1", "attn_1", "block_2")
LEVEL = r"^decoder\.(?:conv_blocks|up)\.(\d{1,2})\.(\w+)\."
FINEST_LAST = r"^decoder\.(?:conv_blocks\.0\.|up\.0\.upsample\.)"


@dataclass(frozen=True)
class VQGANConfig:
    """Shape of a VQGAN decoder."""

    codebook_size: int
    codebook_dim: int
    decoder: ConvConfig


class VQGANDecoder(Detokenizer):
    """Rows of a codebook, a 1x1 convolution, the convolutional decoder."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.codebook_size, self.patch_size = config.codebook_size, config.decoder.scale
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(config.codebook_size, config.codebook_dim)})
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.decoder.latent_channels, 1)
        self.decoder = ConvDecoder(config.decoder)

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        origin: Path,
        *,
        l2_norm: bool,
        config: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "VQGANDecoder":
        """The decoder of a checkpoint.

        Args:
            tensors: of the autoencoder alone, in one of the layouts of this module; the encoder's are ignored.
            origin: file or folder, named in errors.
            l2_norm: whether the model looks up unit vectors (Janus and LlamaGen: yes; Chameleon: no).
            config: the autoencoder's sizes as config.json has them, compared with the tensors.
            dtype: of the weights.
        Raises: CheckpointError naming the missing, unknown or misshapen tensors.
        """
        own = canonical(tensors, origin)
        sizes, codebook = read_config(own, origin), shape_of(own, CODEBOOK, 2, origin)
        check_config(config or {}, codebook, sizes, origin)
        with torch.device("meta"):
            decoder = cls(VQGANConfig(codebook[0], codebook[1], sizes))
        if l2_norm:
            own[CODEBOOK] = F.normalize(own[CODEBOOK].float(), dim=-1)
        return decoder.load(own, origin, dtype)

    def decode(self, codes: Tensor) -> Tensor:
        vectors = self.quantize["embedding"](codes).permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(vectors))


def canonical(tensors: Mapping[str, Tensor], origin: Path) -> dict[str, Tensor]:
    """The decoder's tensors under the names of `VQGANDecoder`. Raises: CheckpointError."""
    own = own_tensors(tensors, CODEBOOK, IGNORED, origin)
    coarsest = max((int(found[1]) for name in own if (found := re.match(LEVEL, name))), default=0)
    finest_last = any(re.match(FINEST_LAST, name) for name in own)

    def level(found: re.Match[str]) -> str:
        index = coarsest - int(found[1]) if finest_last else int(found[1])
        return f"decoder.up.{index}.{'block' if found[2] == 'res' else found[2]}."

    def rename(name: str) -> str:
        name = re.sub(r"^decoder\.mid\.([012])\.", lambda found: f"decoder.mid.{MID[int(found[1])]}.", name)
        return re.sub(LEVEL, level, name)

    own = renamed(own, rename, origin)
    return {name: attention_matrix(name, tensor) for name, tensor in own.items()}

"""Cosmos DV8x16x16 detokenizer of SimpleAR, for images.

The model decodes video. For a single frame everything over time is linear: the causal convolutions see the one frame
at all their taps, so the taps add up; attention over time looks at that frame alone; and of the frames that the inverse
Haar transform makes, the image is the last. `collapse` multiplies out what then stands side by side, and leaves a
two-dimensional decoder of 3x3 convolutions that ends in a pixel shuffle.

Layouts:
    TorchScript  the names of the public decoder.jit: post_quant_conv.conv3d, decoder.conv_in.{0,1}.conv3d, ...
    collapsed    the names of `CosmosDecoder`: what `sjd convert cosmos` writes

The tokenizers of other compressions (4x8x8, 8x8x8) have tensors of the same names and shapes but double the grid
elsewhere; they decode to noise here.
Source: Agarwal et al., "Cosmos World Foundation Model Platform for Physical AI", 2025 (arXiv 2501.03575), section 3.
"""

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from sjd_engine.errors import CheckpointError
from sjd_engine.files import written_whole
from sjd_engine.models.detokenizers.base import Detokenizer, own_tensors, shape_of
from sjd_engine.models.detokenizers.conv import ConvConfig, ConvDecoder, attention_matrix, read_config
from sjd_engine.models.detokenizers.fsq import codes_to_values
from sjd_engine.models.torchscript import read_torchscript

FSQ_LEVELS = (8, 8, 8, 5, 5, 5)
HAAR_PATCH = 4
IGNORED = r"inv_quant\.|decoder\.unpatcher3d\.|.*\.attn(_1|\.\d+)\.1\.[qk]\."
CONV3D = "post_quant_conv.conv3d.weight"

Map = tuple[Tensor, Tensor]  # weight [out, in, height, width] and bias [out] of a convolution


class CosmosDecoder(Detokenizer):
    """Values of FSQ codes, a 1x1 convolution, the convolutional decoder, a pixel shuffle."""

    def __init__(self, config: ConvConfig):
        super().__init__()
        self.codebook_size, self.patch_size = prod(FSQ_LEVELS), config.scale * HAAR_PATCH
        self.post_quant_conv = nn.Conv2d(len(FSQ_LEVELS), config.latent_channels, 1)
        self.decoder = ConvDecoder(config)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], origin: Path, *, dtype: torch.dtype = torch.float32
    ) -> "CosmosDecoder":
        """The decoder of a checkpoint.

        Args:
            tensors: in one of the layouts of this module.
            origin: named in errors.
            dtype: of the weights.
        Raises: CheckpointError naming the missing, unknown or misshapen tensors.
        """
        own = collapse(tensors, origin) if CONV3D in tensors else dict(tensors)
        config = read_config(own, origin, norm_groups=1, temporal=True)
        with torch.device("meta"):
            decoder = cls(config)
        return decoder.load(own, origin, dtype)

    def code_vectors(self) -> Tensor:
        return codes_to_values(torch.arange(self.codebook_size, device=self.post_quant_conv.weight.device), FSQ_LEVELS)

    def decode(self, codes: Tensor) -> Tensor:
        values = codes_to_values(codes, FSQ_LEVELS).permute(0, 3, 1, 2).to(self.post_quant_conv.weight.dtype)
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(values)), HAAR_PATCH)


def convert(archive: Path, target: Path) -> int:
    """Write the collapsed decoder of a TorchScript archive as safetensors; nothing in the archive is run.

    Returns: number of weights written.
    Raises: CheckpointError where the archive is not the decoder; ValueError where the target is no safetensors file.
    """
    if target.suffix != ".safetensors":
        raise ValueError(f"output: expected a .safetensors file, got {str(target)!r}")
    decoder = CosmosDecoder.from_tensors(read_torchscript(archive), archive)
    with written_whole(target) as file:
        file.write(save(decoder.state_dict()))
    return sum(parameter.numel() for parameter in decoder.parameters())


def collapse(tensors: Mapping[str, Tensor], origin: Path) -> dict[str, Tensor]:
    """The tensors of `CosmosDecoder` from those of the video decoder, multiplied out in float64.

    Ignored: the quantiser's and the Haar transform's constants; queries and keys of attention over time, which is
    attention of one frame to itself; the temporal convolution of the coarsest upsampling, which doubles space alone.
    Raises: CheckpointError.
    """
    left = own_tensors(tensors, CONV3D, IGNORED, origin)
    levels = [int(found[1]) for name in left if (found := re.match(r"decoder\.up\.(\d{1,2})\.", name))]
    coarsest = max(levels, default=0)
    for part in ("weight", "bias"):
        left.pop(f"decoder.up.{coarsest}.upsample.conv1.conv3d.{part}", None)
    own: dict[str, Tensor] = {}

    def conv(name: str) -> Map:
        """A convolution of the video decoder as a single frame sees it."""
        weight = f"{name}.conv3d.weight"
        shape_of(left, weight, 5, origin)
        shape_of(left, f"{name}.conv3d.bias", 1, origin)
        return left.pop(weight).double().sum(2), left.pop(f"{name}.conv3d.bias").double()

    def put(name: str, map: Map) -> None:
        own[f"{name}.weight"], own[f"{name}.bias"] = (tensor.float() for tensor in map)

    def put_norm(target: str, source: str) -> None:
        for part in ("weight", "bias"):
            shape_of(left, f"{source}.norm.{part}", 1, origin)
            own[f"{target}.{part}"] = left.pop(f"{source}.norm.{part}")

    def put_block(name: str) -> None:
        for i in (1, 2):
            put_norm(f"{name}.norm{i}", f"{name}.norm{i}")
            put(f"{name}.conv{i}", product(conv(f"{name}.conv{i}.0"), conv(f"{name}.conv{i}.1")))
        if f"{name}.nin_shortcut.conv3d.weight" in left:
            put(f"{name}.nin_shortcut", conv(f"{name}.nin_shortcut"))

    def put_attention(name: str) -> None:
        put_norm(f"{name}.norm", f"{name}.0.norm")
        for projection in ("q", "k", "v", "proj_out"):
            put(f"{name}.{projection}", conv(f"{name}.0.{projection}"))
        put_norm(f"{name}.temporal_norm", f"{name}.1.norm")
        put(f"{name}.temporal", product(conv(f"{name}.1.v"), conv(f"{name}.1.proj_out")))

    def put_upsample(level: int) -> None:
        name = f"decoder.up.{level}.upsample"
        if level != coarsest:
            put(f"{name}.pointwise", with_skip(conv(f"{name}.conv1")))
        put(f"{name}.conv", product(with_skip(conv(f"{name}.conv2")), conv(f"{name}.conv3")))

    try:
        put("post_quant_conv", conv("post_quant_conv"))
        put("decoder.conv_in", product(conv("decoder.conv_in.0"), conv("decoder.conv_in.1")))
        for name in matches(left, r"(decoder\.(?:mid\.block_\d|up\.\d+\.block\.\d+))\."):
            put_block(name)
        for name in matches(left, r"(decoder\.(?:mid\.attn_1|up\.\d+\.attn\.\d+))\."):
            put_attention(name)
        for level in range(1, coarsest + 1):
            put_upsample(level)
        put_norm("decoder.norm_out", "decoder.norm_out")
        put("decoder.conv_out", last_haar_frame(product(conv("decoder.conv_out.0"), conv("decoder.conv_out.1"))))
    except RuntimeError as error:
        raise CheckpointError(f"{origin}: tensors of different sizes where they are multiplied: {error}") from None
    return {name: attention_matrix(name, tensor) for name, tensor in (own | left).items()}


def matches(tensors: Mapping[str, Tensor], pattern: str) -> list[str]:
    """The different first groups of a pattern in the names."""
    return sorted({found[1] for name in tensors if (found := re.match(pattern, name))})


def product(first: Map, then: Map) -> Map:
    """A convolution and the 1x1 convolution behind it as one."""
    matrix = then[0][:, :, 0, 0]
    return (matrix @ first[0].flatten(1)).unflatten(1, first[0].shape[1:]), matrix @ first[1] + then[1]


def with_skip(conv: Map) -> Map:
    """A convolution and the skip around it as one."""
    weight, bias = conv
    weight = weight.clone()
    weight[:, :, weight.shape[2] // 2, weight.shape[3] // 2] += torch.eye(len(weight)).to(weight.device)
    return weight, bias


def last_haar_frame(conv: Map) -> Map:
    """A convolution to the Haar bands of 4x4x4 blocks, as one to the pixels of their last frame, as `pixel_shuffle`
    wants them.

    Two levels, each with 8 bands over (time, row, column); the orthonormal factor 1/sqrt(8) of a level cancels the
    model's own rescaling. Along an axis, (low, high) become low + high and then low - high; the last frame is the
    second at both levels.
    """
    axis = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    level = torch.kron(axis[1:], torch.kron(axis, axis)).view(2, 2, 8)  # [row, column, band]
    pixels = torch.einsum("yxb,vuc->yvxubc", level, level).flatten(4).flatten(0, 3)  # [4 * row + column, 8 * b + c]

    def frame(bands: Tensor) -> Tensor:
        colours = bands.unflatten(0, (HAAR_PATCH**3, -1))  # [8 * b + c, colour, ...]
        images = pixels.to(bands.device) @ colours.flatten(1)
        return images.unflatten(1, colours.shape[1:]).transpose(0, 1).flatten(0, 1)

    return frame(conv[0]), frame(conv[1])

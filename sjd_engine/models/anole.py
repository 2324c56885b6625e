"""The Anole family: Chameleon whose image rows were trained anew; square images, no line breaks.

Prompt:         <s> {prompt} <reserved08706> <racm3:break>
Unconditional:  <s> <racm3:break>
Image:          codes, then <eoss>
Checkpoint:     see sjd_engine.models.chameleon; or, as the authors publish it, in Meta's layout: models/7b with
                consolidated.pth and params.json, and tokenizer
Source: Chern et al., "ANOLE", 2024 (arXiv 2407.06135); Chameleon Team, "Chameleon", 2024 (arXiv 2405.09818).
"""

import re
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sjd_engine.errors import CheckpointError
from sjd_engine.files import write_json
from sjd_engine.models.base import Defaults, Prompt
from sjd_engine.models.chameleon import CONFIG, ChameleonModel, has_decoder
from sjd_engine.models.checkpoint import INDEXES, Checkpoint, read_json
from sjd_engine.models.weights import pair_halves
from sjd_engine.sampling import SamplingParams
from sjd_engine.schedule import Schedule

FAMILY = "anole"
META_FOLDER = "models/7b"
TOKENIZER_FOLDER = "tokenizer"
SIDE = 512
SHARD_NUMEL = 1 << 30  # weights in a file of a converted checkpoint, about
META_NAMES = (  # Meta's name of a tensor -> Hugging Face's
    (r"^tok_embeddings\.", "model.embed_tokens."),
    (r"^norm\.", "model.norm."),
    (r"^output\.", "lm_head."),
    (r"^layers\.", "model.layers."),
    (r"\.attention\.w([qkvo])\.", r".self_attn.\1_proj."),
    (r"\.attention\.([qk])_normalization\.", r".self_attn.\1_norm."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
)
META_UNUSED = "rope.freqs"


class AnoleModel(ChameleonModel):
    """See the module."""

    defaults = Defaults(16, SamplingParams(guidance_scale=3.0, temperature=0.7, top_p=0.9))

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype):
        meta = MetaCheckpoint.inside(checkpoint)
        super().__init__(checkpoint if meta is None else meta, device, dtype)
        self.name, self.image_size, self.sizes = checkpoint.name, (SIDE, SIDE), ((SIDE, SIDE),)

    @staticmethod
    def matches(checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is one of the family. Of the Chameleon checkpoints, those that say so in their name or
        hold a decoder of images, which Lumina-mGPT's do not."""
        if checkpoint.family is not None or MetaCheckpoint.inside(checkpoint) is not None:
            return checkpoint.family in (FAMILY, None)
        if checkpoint.config.get("model_type") != "chameleon" or "lumina" in checkpoint.name.lower():
            return False
        return "anole" in checkpoint.name.lower() or has_decoder(checkpoint)

    def build_prompt(self, prompt: str, negative_prompt: str | None, height: int, width: int) -> Prompt:
        self.refuse_negative(negative_prompt)
        schedule = self.schedule(height, width)
        conditional = [self.beginning, *self.vocabulary.encode(prompt), self.separator, self.image_start]
        unconditional = [self.beginning, self.image_start]
        return Prompt(
            self.token_context("prompt", conditional, schedule), self.token_context("prompt", unconditional, schedule)
        )

    def schedule(self, height: int, width: int) -> Schedule:
        self.check_size(height, width)
        side = SIDE // self.detokenizer.patch_size
        return Schedule(side, side, {side * side: self.num_codes + self.image_end})


class MetaCheckpoint(Checkpoint):
    """A checkpoint in Meta's layout, read as if it were in Hugging Face's: other names, and heads whose rotary pairs
    are half a head apart."""

    def __init__(self, root: Path, name: str):
        super().__init__(root, name)
        self._meta = Checkpoint(root / META_FOLDER / "consolidated.pth")

    @classmethod
    def inside(cls, checkpoint: Checkpoint) -> "MetaCheckpoint | None":
        """That of the folder of `checkpoint`, where there is one."""
        meta = cls(checkpoint.path, checkpoint.name)
        return meta if meta._meta.path.exists() else None

    @cached_property
    def config(self) -> dict[str, Any]:
        """params.json and consolidate_params.json in Hugging Face's words. Raises: CheckpointError."""
        folder = self._meta.folder
        params = read_json(folder / "params.json")
        if (folder / "consolidate_params.json").exists():
            params |= read_json(folder / "consolidate_params.json")
        params = params.get("model", params)
        gate = self._meta.shapes.get("layers.0.feed_forward.w1.weight")
        try:
            return {
                **CONFIG,
                "architectures": ["ChameleonForConditionalGeneration"],
                "model_type": "chameleon",
                "image_generation": {"family": FAMILY},
                "hidden_size": params["dim"],
                "intermediate_size": gate[0] if gate else 0,
                "num_hidden_layers": params["n_layers"],
                "num_attention_heads": params["n_heads"],
                "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
                "rms_norm_eps": params["norm_eps"],
                "rope_theta": params.get("rope_theta", 1e4),
                "swin_norm": params.get("swin_norm", False),
                "vocab_size": params.get("vocab_size", CONFIG["vocab_size"]),
            }
        except KeyError as error:
            raise CheckpointError(f"{folder}: params.json lacks {error}") from None

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        shapes = self._meta.shapes
        return {
            name: self._change(name, torch.empty(shapes[source], device="meta")).shape
            for name, source in self._sources.items()
        }

    def read(self, key: str) -> Tensor:
        return self._change(key, self._meta.read(self._sources[key]))

    def close(self) -> None:
        self._meta.close()

    @cached_property
    def _sources(self) -> dict[str, str]:
        """Meta's name for each of Hugging Face's."""
        sources = {}
        for source in self._meta.shapes:
            name = source
            for pattern, replacement in META_NAMES:
                name = re.sub(pattern, replacement, name)
            if source != META_UNUSED:
                sources[name] = source
        return sources

    def _change(self, name: str, tensor: Tensor) -> Tensor:
        """Meta's tensor as Hugging Face's layout has it. Raises: CheckpointError where it can't be."""
        if not re.search(r"\.[qk]_(proj|norm)\.", name):
            return tensor
        head_dim = self.config["hidden_size"] // self.config["num_attention_heads"]
        try:
            halves = pair_halves(head_dim)(tensor)
        except RuntimeError:
            raise CheckpointError(
                f"{self._meta}: {self._sources[name]}: expected heads of {head_dim} rows, as params.json has it, got "
                f"{list(tensor.shape)}"
            ) from None
        return halves[None] if ".self_attn.q_norm." in name or ".self_attn.k_norm." in name else halves


def convert(source: Path, target: Path) -> int:
    """Write Meta's layout as Hugging Face's: safetensors, config.json and the tokenizer's files.

    Args:
        source: holds models/7b and tokenizer.
        target: a new folder.
    Returns: number of weights written.
    Raises: CheckpointError where the source is damaged; ValueError where it is none, or the target exists.
    """
    checkpoint = MetaCheckpoint.inside(Checkpoint(source))
    if checkpoint is None:
        raise ValueError(f"source: expected a folder with {META_FOLDER}/consolidated.pth, got {str(source)!r}")
    if target.exists():
        raise ValueError(f"output: expected a new folder, but {str(target)!r} exists")
    tokenizer_files = sorted((source / TOKENIZER_FOLDER).iterdir())
    shards: list[list[str]] = [[]]
    filled = 0
    for key, shape in checkpoint.shapes.items():
        if filled + shape.numel() > SHARD_NUMEL and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += shape.numel()
    target.mkdir(parents=True)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, keys in zip(names, shards, strict=True):
        save_file({key: checkpoint.read(key).contiguous() for key in keys}, target / name, {"format": "pt"})
    write_json(target / "config.json", checkpoint.config, indent=2)
    for path in tokenizer_files:
        shutil.copy(path, target)
    # The index last: without it the folder is no checkpoint, so a conversion that was interrupted is none.
    index = {"weight_map": {key: name for name, keys in zip(names, shards, strict=True) for key in keys}}
    write_json(target / INDEXES[0], index)
    return sum(shape.numel() for shape in checkpoint.shapes.values())

"""The Janus family: Janus-1.3B, Janus-Pro-1B and Janus-Pro-7B, a Llama whose image tokens have an embedding and a head
of their own.

Prompt:         <bos> <|User|>: {prompt}\\n\\n<|Assistant|>: <begin_of_image>; Janus-1.3B, whose vocabulary lacks them,
                has User and Assistant instead
Unconditional:  the same with padding in place of all but the first and the last token; the padding is seen
Image:          codes, nothing forced
Embedding:      a code goes through two layers to the width of the transformer, a function of the code alone: it is
                computed once, and stands below the text tokens in one table
Checkpoint:     the authors' (pytorch_model.bin) or Hugging Face's (model.safetensors); tokenizer.json
Source: Chen et al., "Janus-Pro", 2025 (arXiv 2501.17811).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sjd_engine.errors import CheckpointError
from sjd_engine.models.base import Defaults, ImageModel, Prompt
from sjd_engine.models.checkpoint import Checkpoint
from sjd_engine.models.detokenizers.vqgan import VQGANDecoder
from sjd_engine.models.vocabulary import Vocabulary
from sjd_engine.models.weights import Piece, block_config, hf_layout, load_transformer
from sjd_engine.sampling import SamplingParams
from sjd_engine.schedule import Schedule

FAMILY = "janus"
CONFIG = {  # what Hugging Face's LlamaConfig has where config.json is silent
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
IMAGE_SIZE, VISION_PATCH = 384, 16  # where the config is silent
NAMES = {  # part -> its name in the authors' checkpoints, in Hugging Face's
    "text": ("language_model.model", "model.language_model"),
    "embedding": ("gen_embed", "model.generation_embeddings"),
    "aligner_in": ("gen_aligner.layers.0", "model.generation_aligner.fc1"),
    "aligner_out": ("gen_aligner.layers.2", "model.generation_aligner.hidden_layers.0"),
    "head_in": ("gen_head.output_mlp_projector", "model.generation_head.proj_out"),
    "head": ("gen_head.vision_head", "model.generation_head.vision_head"),
    "detokenizer": ("gen_vision_model", "model.vqmodel"),
    "vision": ("vision_model", "model.vision_model"),
    "vision_aligner": ("aligner", "model.aligner"),
    "text_head": ("language_model.lm_head", "lm_head"),
}


class JanusModel(ImageModel):
    """See the module."""

    defaults = Defaults(16, SamplingParams(guidance_scale=5.0))

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype):
        config, official = checkpoint.config, checkpoint.config.get("model_type") == "multi_modality"
        parts = {part: names[0 if official else 1] for part, names in NAMES.items()}
        text = {**CONFIG, **section(config, "language_config" if official else "text_config", checkpoint)}
        codebook = checkpoint.shapes.get(f"{parts['embedding']}.weight")
        head_in = checkpoint.shapes.get(f"{parts['head_in']}.weight")
        if codebook is None or head_in is None:
            raise CheckpointError(f"{checkpoint}: missing {parts['embedding']}.weight or {parts['head_in']}.weight")
        self.name, self.num_codes, self.first_code = checkpoint.name, codebook[0], text["vocab_size"]
        self.vocabulary = Vocabulary(checkpoint, "tokenizer.json")
        self._beginning = self.vocabulary.token("<｜begin▁of▁sentence｜>")
        self._image_start = self.vocabulary.token("<begin_of_image>")
        self._padding = self.vocabulary.token("<｜▁pad▁｜>")
        self.image_size = image_size(config, official, checkpoint)
        self.sizes = (self.image_size,)
        detokenizer = parts["detokenizer"] + "."
        self.detokenizer = VQGANDecoder.from_tensors(checkpoint.part(detokenizer), checkpoint.path, l2_norm=True).to(
            device
        )
        self.check_codes(checkpoint)
        block = block_config(text, checkpoint, theta=1e4)
        self.vocabulary.check_fits(text["vocab_size"])
        layers = [f"{parts[layer]}.{kind}" for layer in ("aligner_in", "aligner_out") for kind in ("weight", "bias")]
        self.transformer = load_transformer(
            checkpoint,
            block,
            lambda block: {
                "embedding": [
                    Piece.of(f"{parts['text']}.embed_tokens.weight"),
                    Piece((f"{parts['embedding']}.weight", *layers), code_table),
                ],
                "head": [Piece.of(f"{parts['head']}.weight")],
                "head_bias": [Piece.of(f"{parts['head']}.bias")],
                "head_in": [Piece.of(f"{parts['head_in']}.weight")],
                "head_in_bias": [Piece.of(f"{parts['head_in']}.bias")],
                **hf_layout(block, parts["text"]),
            },
            vocab_size=text["vocab_size"] + self.num_codes,
            num_codes=self.num_codes,
            head_hidden=head_in[0],
            device=device,
            dtype=dtype,
            ignored=tuple(f"{parts[part]}." for part in ("detokenizer", "vision", "vision_aligner", "text_head")),
        )

    @staticmethod
    def matches(checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is one of the family."""
        config = checkpoint.config
        generates = config.get("model_type") == "multi_modality" and "gen_head_config" in config
        return generates or config.get("model_type") == "janus"

    def build_prompt(self, prompt: str, negative_prompt: str | None, height: int, width: int) -> Prompt:
        self.refuse_negative(negative_prompt)
        marked = "<|User|>" in self.vocabulary
        user, assistant = ("<|User|>", "<|Assistant|>") if marked else ("User", "Assistant")
        text = self.vocabulary.encode(f"{user}: {prompt}\n\n{assistant}:")
        conditional = [self._beginning, *text, self._image_start]
        unconditional = [self._beginning, *[self._padding] * len(text), self._image_start]
        schedule = self.schedule(height, width)
        return Prompt(
            self.token_context("prompt", conditional, schedule), self.token_context("prompt", unconditional, schedule)
        )

    def schedule(self, height: int, width: int) -> Schedule:
        self.check_size(height, width)
        return Schedule(height // self.detokenizer.patch_size, width // self.detokenizer.patch_size)


def code_table(codebook: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """[V, hidden]: the embedding of every code, in float32."""
    hidden = F.gelu(F.linear(codebook.float(), weight1.float(), bias1.float()))
    return F.linear(hidden, weight2.float(), bias2.float())


def section(config: dict[str, Any], name: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """A part of config.json. Raises: CheckpointError where it is missing."""
    value = config.get(name)
    if not isinstance(value, dict):
        raise CheckpointError(f"{checkpoint}: config.json lacks {name!r}")
    return value


def image_size(config: dict[str, Any], official: bool, checkpoint: Checkpoint) -> tuple[int, int]:
    """(height, width) that the model draws: those it sees."""
    vision = section(config, "vision_config", checkpoint)
    side = (vision.get("params", {}) if official else vision).get("image_size", IMAGE_SIZE)
    return side, side

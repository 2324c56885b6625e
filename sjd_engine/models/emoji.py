"""The emoji family: captions to 64x64 pictures of emoji, a Qwen2 transformer over text and FSQ image tokens.

Prompt:         <|bos|> caption <|boi|>, then 256 image tokens in raster order, no forced tokens
Unconditional:  <|bos|> <|boi|>, the captions that training dropped; or the negative prompt
Checkpoint:     config.json (Qwen2 config + "image_generation"), model.safetensors, tokenizer.json,
                detokenizer.safetensors, detokenizer_config.json
"""

from typing import Any

import torch

from sjd_engine.errors import CheckpointError
from sjd_engine.models.base import Context, Defaults, ImageModel, Prompt
from sjd_engine.models.checkpoint import Checkpoint, read_json, read_tensors
from sjd_engine.models.detokenizers.fsq import FSQConfig, FSQDecoder
from sjd_engine.models.vocabulary import Vocabulary
from sjd_engine.models.weights import assign, load_qwen2
from sjd_engine.sampling import SamplingParams
from sjd_engine.schedule import Schedule

FAMILY = "emoji"


class EmojiModel(ImageModel):
    """See the module."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype):
        plan: dict[str, Any] = checkpoint.config["image_generation"]
        detokenizer_config = read_json(checkpoint.folder / "detokenizer_config.json")
        try:
            fsq = FSQConfig(**{**detokenizer_config, "levels": tuple(detokenizer_config["levels"])})
            rows, cols = plan["grid"]
            self.first_code, self.max_prompt_tokens = plan["first_code"], plan["max_prompt_tokens"]
            defaults = dict(plan["defaults"])
            self.defaults = Defaults(defaults.pop("window_size"), SamplingParams(**defaults))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{checkpoint}: config.json or detokenizer_config.json is incomplete: {error}"
            ) from None
        self.name, self.num_codes = checkpoint.config.get("name", checkpoint.name), fsq.codebook_size
        self.image_size = (rows * fsq.patch_size, cols * fsq.patch_size)
        self._grid = (rows, cols)
        self.sizes = (self.image_size,)
        self.tokenizer = Vocabulary(checkpoint, "tokenizer.json").tokenizer
        with torch.device("meta"):
            detokenizer = FSQDecoder(fsq)
        path = checkpoint.folder / "detokenizer.safetensors"
        assign(detokenizer, {name: t.float() for name, t in read_tensors(path).items()}, path)
        self.detokenizer = detokenizer.to(device)
        self.transformer = load_qwen2(
            checkpoint, first_code=self.first_code, num_codes=self.num_codes, device=device, dtype=dtype
        )

    @staticmethod
    def matches(checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is one of the family."""
        return checkpoint.family == FAMILY

    def build_prompt(self, prompt: str, negative_prompt: str | None, height: int, width: int) -> Prompt:
        return Prompt(
            self._encode("prompt", prompt),
            self._encode("negative_prompt", negative_prompt or ""),
        )

    def _encode(self, argument: str, text: str) -> Context:
        ids = self.tokenizer.encode(text).ids
        if len(ids) > self.max_prompt_tokens:
            raise ValueError(
                f"{argument}: expected at most {self.max_prompt_tokens} tokens, got {len(ids)} in {text!r}; shorten it"
            )
        return Context.of_tokens(ids)

    def schedule(self, height: int, width: int) -> Schedule:
        self.check_size(height, width)
        return Schedule(*self._grid)

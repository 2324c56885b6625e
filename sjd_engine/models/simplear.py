"""The SimpleAR family: a Qwen2 whose vocabulary goes on behind the tokenizer's with the codes of Cosmos.

Prompt:         <|t2i|>A highly realistic image of {prompt}<|soi|>
Unconditional:  <|t2i|>{negative prompt}<|soi|>, by default the authors' negative prompt
Image:          codes, nothing forced
Checkpoint:     model.safetensors, tokenizer.json; cosmos.safetensors, which `sjd convert cosmos` makes from decoder.jit
                of nvidia/Cosmos-1.0-Tokenizer-DV8x16x16
Source: Wang et al., "SimpleAR", 2025 (arXiv 2504.11455).
"""

import torch

from sjd_engine.models.base import Context, Defaults, ImageModel, Prompt
from sjd_engine.models.checkpoint import Checkpoint, read_tensors
from sjd_engine.models.detokenizers.cosmos import CosmosDecoder
from sjd_engine.models.vocabulary import Vocabulary
from sjd_engine.models.weights import load_qwen2
from sjd_engine.sampling import SamplingParams
from sjd_engine.schedule import Schedule

FAMILY = "simplear"
SIDE = 1024
TEMPLATE = "A highly realistic image of {}"
NEGATIVE = (
    "An image of aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, "
    "bad eyes, bad limbs, distortion"
)


class SimpleARModel(ImageModel):
    """See the module."""

    defaults = Defaults(16, SamplingParams(guidance_scale=6.0))

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype):
        self.name, self.image_size, self.sizes = checkpoint.name, (SIDE, SIDE), ((SIDE, SIDE),)
        self.vocabulary = Vocabulary(
            checkpoint,
            "tokenizer.json",
            remedy="make it with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
        )
        self._start, self._image_start = self.vocabulary.token("<|t2i|>"), self.vocabulary.token("<|soi|>")
        path = checkpoint.folder / "cosmos.safetensors"
        self.detokenizer = CosmosDecoder.from_tensors(read_tensors(path), path).to(device)
        self.first_code, self.num_codes = len(self.vocabulary), self.detokenizer.codebook_size
        self.transformer = load_qwen2(
            checkpoint, first_code=self.first_code, num_codes=self.num_codes, device=device, dtype=dtype
        )

    @staticmethod
    def matches(checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is one of the family."""
        says = (*(checkpoint.config.get("architectures") or ()), checkpoint.name)
        return checkpoint.family == FAMILY or (
            checkpoint.config.get("model_type") is not None
            and any(word in str(name).lower() for name in says for word in ("simpar", "simplear"))
        )

    def build_prompt(self, prompt: str, negative_prompt: str | None, height: int, width: int) -> Prompt:
        schedule = self.schedule(height, width)
        return Prompt(
            self._context("prompt", TEMPLATE.format(prompt), schedule),
            self._context("negative_prompt", NEGATIVE if negative_prompt is None else negative_prompt, schedule),
        )

    def _context(self, argument: str, text: str, schedule: Schedule) -> Context:
        return self.token_context(argument, [self._start, *self.vocabulary.encode(text), self._image_start], schedule)

    def schedule(self, height: int, width: int) -> Schedule:
        self.check_size(height, width)
        return Schedule(height // self.detokenizer.patch_size, width // self.detokenizer.patch_size)

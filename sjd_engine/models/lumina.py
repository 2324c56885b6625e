"""The Lumina-mGPT family: images of many sizes, whose tokens say where a line ends.

Prompt:         <s> Generate an image of {width}x{height} according to the following prompt:\\n{prompt} <reserved08706>,
                then what begins the image: <racm3:break> and the size tokens of height and width
Unconditional:  what begins the image alone, or <reserved08706> before it
Image:          rows of codes, each closed by <reserved08799>; then <eoss> <reserved08706>
Checkpoint:     see sjd_engine.models.chameleon
Source: Liu et al., "Lumina-mGPT", 2024 (arXiv 2408.02657).
"""

import re

import torch

from sjd_engine.models.base import Defaults, Prompt
from sjd_engine.models.chameleon import ChameleonModel
from sjd_engine.models.checkpoint import Checkpoint
from sjd_engine.sampling import SamplingParams
from sjd_engine.schedule import Schedule

FAMILY = "lumina"
UNCONDITIONAL = ("boi", "sep_boi")
SIDE_IN_NAME = r"-(\d{2,4})(?:-|$)"  # of the images it was trained for: Lumina-mGPT-7B-768, ...-768-Omni
DEFAULT_SIDE = 768
GRID = 32  # pixels a size token counts; two codes
MAX_RATIO = 4


class LuminaModel(ChameleonModel):
    """See the module.

    Attributes:
        uncond: the unconditional context: "boi" as the authors' code has it, or "sep_boi" as the code of the papers on
            speculative decoding has it.
    """

    defaults = Defaults(16, SamplingParams(guidance_scale=4.0, top_k=2000))

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype):
        super().__init__(checkpoint, device, dtype)
        self.name, self.uncond = checkpoint.name, "boi"
        found = re.search(SIDE_IN_NAME, checkpoint.name)
        side = int(found[1]) if found else DEFAULT_SIDE
        self.image_size = (side, side)
        self.sizes = tuple((rows * GRID, cols * GRID) for rows, cols in grids((side // GRID) ** 2))
        self._line_end = self.vocabulary.token("<reserved08799>")

    @staticmethod
    def matches(checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is one of the family."""
        return checkpoint.family == FAMILY or checkpoint.config.get("model_type") == "chameleon"

    def build_prompt(self, prompt: str, negative_prompt: str | None, height: int, width: int) -> Prompt:
        self.refuse_negative(negative_prompt)
        if self.uncond not in UNCONDITIONAL:
            raise ValueError(f"uncond: expected one of {', '.join(UNCONDITIONAL)}, got {self.uncond!r}")
        schedule = self.schedule(height, width)
        text = f"Generate an image of {width}x{height} according to the following prompt:\n{prompt}"
        image = [self.image_start, self._size_token(height), self._size_token(width)]
        conditional = [self.beginning, *self.vocabulary.encode(text), self.separator, *image]
        unconditional = image if self.uncond == "boi" else [self.separator, *image]
        return Prompt(
            self.token_context("prompt", conditional, schedule), self.token_context("prompt", unconditional, schedule)
        )

    def _size_token(self, pixels: int) -> int:
        return self.vocabulary.token(f"<reserved{8800 + pixels // GRID:05d}>")

    def schedule(self, height: int, width: int) -> Schedule:
        self.check_size(height, width)
        patch = self.detokenizer.patch_size
        line_end, *end = (self.num_codes + token for token in (self._line_end, self.image_end, self.separator))
        return Schedule.with_line_breaks(height // patch, width // patch, line_end, end)


def grids(area: int) -> list[tuple[int, int]]:
    """(rows, cols) of the grids that the model was trained with, from the widest to the tallest: for every width as
    many rows as `area` cells allow, down to those that one column more allows; no side longer than `MAX_RATIO` times
    the other."""
    return [
        (rows, cols)
        for cols in range(area, 0, -1)
        for rows in range(max(area // (cols + 1), 1), area // cols + 1)
        if max(rows, cols) <= MAX_RATIO * min(rows, cols)
    ]

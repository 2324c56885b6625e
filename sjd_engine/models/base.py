"""What the engine asks of a model family."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sjd_engine.models.block import Transformer
from sjd_engine.sampling import SamplingParams
from sjd_engine.schedule import Schedule


@dataclass(frozen=True)
class Prompt:
    """Token ids of the two contexts of an image. The last id of each is the anchor of the first window."""

    conditional: list[int]
    unconditional: list[int]


@dataclass(frozen=True)
class Defaults:
    """A family's defaults for the arguments of `generate` that are None."""

    window_size: int
    params: SamplingParams


class ImageModel(ABC):
    """A text-to-image transformer, its tokenizer and its detokenizer.

    Attributes:
        name: for people.
        transformer: blocks, embedding and image head.
        detokenizer: codes to pixels.
        num_codes: V.
        first_code: vocabulary row of image code 0.
        defaults: window and sampling parameters.
        image_size: (height, width) in pixels of the default image.
    """

    name: str
    transformer: Transformer
    detokenizer: nn.Module
    num_codes: int
    first_code: int
    defaults: Defaults
    image_size: tuple[int, int]

    @abstractmethod
    def build_prompt(self, prompt: str, negative_prompt: str | None) -> Prompt:
        """Both contexts. Raises: ValueError where a text is empty or too long."""

    @abstractmethod
    def schedule(self, height: int, width: int) -> Schedule:
        """The plan of an image of this size. Raises: ValueError listing the sizes the model was trained for."""

    def window_token_ids(self, ids: Tensor, anchor_ids: Tensor) -> Tensor:
        """Rows of the embedding for the window ids of a decoder.

        Args:
            ids: [B, W] int64: image codes below `num_codes`; `num_codes + t` for vocabulary token t, as schedules
                force them; -1 for the prompt's last token.
            anchor_ids: [B] int64, the prompt's last token.
        """
        rows = torch.where(ids < self.num_codes, ids + self.first_code, ids - self.num_codes)
        return torch.where(ids < 0, anchor_ids[:, None], rows)

    def decode(self, codes: Tensor) -> Tensor:
        """Image codes [N, rows, cols] -> [N, 3, H, W] float32 in [0, 1]."""
        return (self.detokenizer(codes) + 1) / 2

    @property
    def device(self) -> torch.device:
        return self.transformer.embedding.device

"""What the engine asks of a model family."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sjd_engine.denoise import Denoiser
from sjd_engine.errors import CheckpointError
from sjd_engine.models.block import Transformer
from sjd_engine.models.detokenizers.base import Detokenizer
from sjd_engine.models.draft_head import DraftHead
from sjd_engine.neighbours import NeighbourTables
from sjd_engine.sampling import SamplingParams
from sjd_engine.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Context:
    """What stands before an image in one of its sequences: tokens, or conditioning vectors in their place.

    Attributes:
        key: contexts with equal keys are equal, and share their keys and values.
        ids: vocabulary tokens; empty where there are `embeddings`.
        embeddings: [N, hidden] conditioning vectors, None where there are `ids`.
        first_position: row of the position table of the first token.

    The last token or vector is the anchor of the first window.
    """

    key: Hashable
    ids: tuple[int, ...] = ()
    embeddings: Tensor | None = None
    first_position: int = 0

    @staticmethod
    def of_tokens(ids: Sequence[int]) -> "Context":
        """A context of vocabulary tokens, at least one."""
        return Context(tuple(ids), tuple(ids))

    def __len__(self) -> int:
        return len(self.ids) if self.embeddings is None else len(self.embeddings)


@dataclass(frozen=True)
class Prompt:
    """The two contexts of an image; the unconditional one is read where guidance is on."""

    conditional: Context
    unconditional: Context

    def contexts(self, *, guided: bool) -> list[Context]:
        """Those that an image reads."""
        return [self.conditional, self.unconditional] if guided else [self.conditional]


@dataclass(frozen=True)
class Defaults:
    """A family's defaults for the arguments of `generate` that are None.

    window_size: with which `window_size="auto"` begins.
    max_window_size: how large it may get; a batch keeps the logits of two such windows of each image.
    init: how new drafts enter.
    """

    window_size: int
    params: SamplingParams
    max_window_size: int = 64
    init: str = "above-sample"


class ImageModel(ABC):
    """A text-to-image transformer, its tokenizer and its detokenizer.

    Attributes:
        name: for people.
        transformer: blocks, embedding and image head.
        draft_head: for the method `eagle`; None where the checkpoint has none.
        denoiser: for the method `sjd2`; None where the model was not fine-tuned for it.
        neighbour_tables: for init="neighbours"; None where the checkpoint has none.
        detokenizer: codes to pixels.
        num_codes: V.
        first_code: vocabulary row of image code 0.
        defaults: window and sampling parameters.
        image_size: (height, width) in pixels of the default image.
        sizes: all that the model was trained for.
    """

    name: str
    transformer: Transformer
    draft_head: DraftHead | None = None
    denoiser: Denoiser | None = None
    neighbour_tables: NeighbourTables | None = None
    detokenizer: Detokenizer
    num_codes: int
    first_code: int
    defaults: Defaults
    image_size: tuple[int, int]
    sizes: Sequence[tuple[int, int]]

    @abstractmethod
    def build_prompt(self, prompt: str, negative_prompt: str | None, height: int, width: int) -> Prompt:
        """Both contexts of an image of this size. Raises: ValueError where a text is empty or too long."""

    @abstractmethod
    def schedule(self, height: int, width: int) -> Schedule:
        """The plan of an image of this size. Raises: ValueError listing the sizes the model was trained for."""

    def check_size(self, height: int, width: int) -> None:
        """Raises: ValueError listing `sizes` where this is none of them."""
        if (height, width) not in self.sizes:
            listed = ", ".join(f"{h}x{w}" for h, w in self.sizes)
            raise ValueError(f"height, width: {self.name} draws {listed} pixels, got {height}x{width}")

    def check_codes(self, origin: object) -> None:
        """Raises: CheckpointError, which names `origin`, where the detokenizer is not one of `num_codes` codes."""
        if self.detokenizer.codebook_size != self.num_codes:
            raise CheckpointError(
                f"{origin}: expected a detokenizer of {self.num_codes} codes, got {self.detokenizer.codebook_size}"
            )

    def token_context(self, argument: str, ids: Sequence[int], schedule: Schedule) -> Context:
        """A context of tokens before an image.

        Args:
            argument: where its text came from, for the error.
        Raises: ValueError where it leaves no room for the image.
        """
        room = self.transformer.config.max_positions - schedule.num_tokens
        if len(ids) > room:
            raise ValueError(
                f"{argument}: expected at most {room} tokens with those of the template, got {len(ids)}; shorten it"
            )
        return Context.of_tokens(ids)

    def refuse_negative(self, negative_prompt: str | None) -> None:
        """Raises: ValueError where there is a negative prompt: the model was trained without."""
        if negative_prompt is not None:
            raise ValueError(f"negative_prompt: {self.name} has none; leave it out")

    def context_embeddings(self, context: Context) -> Tensor:
        """[N, hidden]: what the transformer reads for a context."""
        if context.embeddings is not None:
            return context.embeddings.to(self.device, self.transformer.dtype)
        return self.transformer.embed(torch.tensor(context.ids, device=self.device))

    def window_embeddings(self, ids: Tensor, anchors: Tensor) -> Tensor:
        """[S, W, hidden]: what the transformer reads for the windows of a decoder.

        Args:
            ids: [S, W] int64: image codes below `num_codes`; `num_codes + t` for vocabulary token t, as schedules
                force them; -1 for the end of the context.
            anchors: [S, hidden], the last embeddings of the contexts.
        """
        rows = torch.where(ids < self.num_codes, ids + self.first_code, ids - self.num_codes)
        embeddings = self.transformer.embed(rows.clamp_min(0))
        return torch.where((ids < 0)[..., None], anchors[:, None], embeddings)

    def decode(self, codes: Tensor) -> Tensor:
        """Image codes [N, rows, cols] -> [N, 3, H, W] float32 in [0, 1]."""
        return (self.detokenizer(codes) + 1) / 2

    @property
    def device(self) -> torch.device:
        return self.transformer.embedding.device

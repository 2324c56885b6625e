"""What a step reads: tokenised pictures behind their prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from sjd_engine.models.base import Context, ImageModel
from sjd_engine.schedule import Schedule, with_forced


@dataclass(frozen=True)
class Batch:
    """Tensors whose rows are pictures."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Every tensor changed."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items() if tensor is not None})


@dataclass(frozen=True)
class Pictures(Batch):
    """A batch.

    ids: [B, N] int64 rows of the embedding: prompts, the tokens of the pictures but the last, and anything; -1 where
        `vectors` stand.
    first: [B] int64, the slot of `ids` that predicts the first token of a picture.
    codes: [B, T] int64 tokens as schedules have them: image codes, and num_codes + t for vocabulary token t where the
        grammar forces it.
    vectors: [B, N, hidden] conditioning vectors; None where prompts are tokens.
    start: [B] int64, row of the position table of slot 0; None for 0.
    """

    ids: Tensor
    first: Tensor
    codes: Tensor
    vectors: Tensor | None = None
    start: Tensor | None = None


def embedding_rows(codes: Tensor, first_code: int, num_codes: int) -> Tensor:
    """Rows of the embedding of tokens as schedules have them."""
    return torch.where(codes < num_codes, codes + first_code, codes - num_codes)


def collate(model: ImageModel, contexts: Sequence[Context], codes: Tensor, schedule: Schedule) -> Pictures:
    """A batch of any family's pictures.

    Args:
        contexts: one before each picture.
        codes: [B, rows * cols] int64 image codes in raster order.
        schedule: of the pictures.
    """
    tokens = with_forced(codes, schedule)
    count, num_tokens = tokens.shape
    rows = embedding_rows(tokens, model.first_code, model.num_codes)
    ids = torch.zeros(count, max(map(len, contexts)) + num_tokens - 1, dtype=torch.int64)
    vectors = None
    if any(context.embeddings is not None for context in contexts):
        hidden = model.transformer.config.hidden_size
        vectors = torch.zeros(*ids.shape, hidden, dtype=model.transformer.dtype, device=model.device)
    for row, context in enumerate(contexts):
        ids[row, len(context) : len(context) + num_tokens - 1] = rows[row, :-1]
        if context.embeddings is None:
            ids[row, : len(context)] = torch.tensor(context.ids)
        else:
            assert vectors is not None
            ids[row, : len(context)] = -1
            vectors[row, : len(context)] = context.embeddings
    first = torch.tensor([len(context) - 1 for context in contexts])
    return Pictures(ids, first, tokens, vectors, torch.tensor([context.first_position for context in contexts]))

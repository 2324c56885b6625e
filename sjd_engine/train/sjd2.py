"""Fine-tuning for SJD2: the transformer learns to predict the next token behind noisy embeddings.

Every picture is read twice in one pass, so that no row is spent on clean tokens alone:

    prompt  x_0 x_1 ... x_{T-1}   n_0 n_1 ... n_{T-2}

The clean copy is causal. The noisy copy is cut into segments; a slot of it reads the prompt, the clean tokens before
its segment and the noisy ones of its segment up to itself: a window as decoding has it. Noise never falls along a
segment. The loss is the cross-entropy of the clean next token, in both copies.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sjd_engine.denoise import Denoiser
from sjd_engine.models.block import Transformer
from sjd_engine.train.pictures import Batch, Pictures, embedding_rows
from sjd_engine.train.whole_sequence import hidden_states, image_logits

SHORTEST, LONGEST = 4, 64  # slots of a segment
ONLY_NOISE = 0.25  # share of the segments that have just entered a window
NO_TARGET = -100


@dataclass(frozen=True)
class Noise(Batch):
    """The noise of a batch.

    starts: [B, N] int64, the slot that each slot's segment begins with. times: [B, N] in [0, 1], t of each slot; a slot
    at 0 holds its token. eps: [B, N, hidden] float32.
    """

    starts: Tensor
    times: Tensor
    eps: Tensor

    @classmethod
    def sample(cls, batch_size: int, num_slots: int, hidden_size: int, generator: torch.Generator) -> "Noise":
        """Segments of random lengths, whose times are sorted draws between two random ends."""
        starts = torch.stack([segment_starts(num_slots, generator) for _ in range(batch_size)])
        of_segment = torch.rand(batch_size, num_slots, 3, generator=generator).gather(
            1, starts[..., None].expand(-1, -1, 3)
        )
        low, high, entering = of_segment.unbind(-1)
        high = low + (1.5 - low) * high  # what lies above 1 is nothing but noise
        share = sort_in_segments(torch.rand(batch_size, num_slots, generator=generator), starts)
        # The root: at low t an embedding still says which token it is, and there is little to learn.
        times = (low + (high - low) * share).clamp(1e-3, 1).sqrt()
        times = torch.where(entering < ONLY_NOISE, 1.0, times)
        return cls(starts, times, torch.randn(batch_size, num_slots, hidden_size, generator=generator))

    def without(self, slots: Tensor) -> "Noise":
        """None in `slots`, [B, N] bool."""
        return replace(self, times=self.times.masked_fill(slots, 0))


def segment_starts(num_slots: int, generator: torch.Generator) -> Tensor:
    """[N] int64."""
    lengths = torch.randint(SHORTEST, LONGEST + 1, (num_slots // SHORTEST + 1,), generator=generator)
    return torch.arange(num_slots) - offset_in_segment(lengths, num_slots)


def offset_in_segment(lengths: Tensor, num_slots: int) -> Tensor:
    """[N] int64: slots from each slot back to the first of its segment."""
    ends = lengths.cumsum(0)
    slots = torch.arange(num_slots)
    segment = torch.searchsorted(ends, slots, right=True)
    return slots - (ends - lengths)[segment]


def sort_in_segments(values: Tensor, starts: Tensor) -> Tensor:
    """values [B, N] in [0, 1), in ascending order inside each segment."""
    return (values + starts).sort(1).values - starts


class Losses(nn.Module):
    """Nats of the next token. A module, whose parts can be shared among processes.

    Args:
        transformer: in its own dtype.
        denoiser: for its image embeddings.
        first_code: row of image code 0.
        gradient_checkpointing: keep nothing from inside the blocks; the backward pass computes them again.
    """

    def __init__(
        self, transformer: Transformer, denoiser: Denoiser, first_code: int, *, gradient_checkpointing: bool = False
    ):
        super().__init__()
        self.transformer, self.denoiser, self.first_code = transformer, denoiser, first_code
        self.gradient_checkpointing = gradient_checkpointing

    def forward(self, noise: Noise, pictures: Pictures) -> tuple[Tensor, Tensor]:
        """Behind clean tokens [B, T] and behind noisy ones [B, T - 1]; 0 for a forced token, which is not predicted.

        Args:
            noise: of T - 1 slots, none in those of forced tokens.
            pictures: of T tokens.
        """
        transformer, ids, first, codes = self.transformer, pictures.ids, pictures.first, pictures.codes
        num_codes, num_tokens, width = len(transformer.head), codes.shape[1], ids.shape[1]
        columns, slots = (torch.arange(count, device=ids.device)[None] for count in (width, num_tokens - 1))
        clean = F.embedding(ids.clamp_min(0), transformer.embedding)
        if pictures.vectors is not None:
            clean = torch.where((ids < 0)[..., None], pictures.vectors, clean)
        tokens = F.embedding(embedding_rows(codes[:, :-1], self.first_code, num_codes), transformer.embedding)
        noisy = torch.where((noise.times > 0)[..., None], self.denoiser(tokens, noise.eps, noise.times), tokens)
        x = torch.cat((clean.float(), noisy), 1).to(transformer.dtype)
        positions = torch.cat((columns.expand_as(ids), first[:, None] + 1 + slots), 1)
        if pictures.start is not None:
            positions = pictures.start[:, None] + positions
        hidden = hidden_states(
            transformer,
            x,
            positions.clamp_max(len(transformer.cos) - 1),  # only slots that hold anything are clamped
            visible_slots(noise.starts, first, width),
            gradient_checkpointing=self.gradient_checkpointing,
        )
        predicting = torch.cat((first[:, None] + columns[:, :num_tokens], (width + slots).expand(len(ids), -1)), 1)
        hidden = hidden.gather(1, predicting[..., None].expand(-1, -1, hidden.shape[-1]))
        targets = torch.cat((codes, codes[:, 1:]), 1)
        targets = targets.masked_fill(targets >= num_codes, NO_TARGET)
        logits = image_logits(transformer, hidden)
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=NO_TARGET)
        clean, noisy = nats.view_as(targets).split((num_tokens, num_tokens - 1), 1)
        return clean.clone(), noisy.clone()  # FSDP's hooks hang on what is returned, and a view may lose them


def visible_slots(starts: Tensor, first: Tensor, width: int) -> Tensor:
    """[B, N, N] bool, N = width + noisy slots: which slots each slot reads.

    Args:
        starts: [B, T - 1], see `Noise`.
        first: [B], see `Pictures`.
        width: slots before the noisy ones.
    """
    batch_size, num_noisy = starts.shape
    slots = torch.arange(num_noisy, device=first.device)
    clean = slots.new_ones(width, width, dtype=torch.bool).tril().expand(batch_size, -1, -1)
    before = torch.arange(width, device=first.device) <= (first[:, None] + starts)[..., None]
    own = (starts[:, :, None] == starts[:, None, :]) & (slots[:, None] >= slots)
    blind = slots.new_zeros(batch_size, width, num_noisy, dtype=torch.bool)
    return torch.cat((torch.cat((clean, blind), 2), torch.cat((before, own), 2)), 1)

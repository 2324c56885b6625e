"""Fine-tuning for SJD2: the transformer learns to predict the next token behind noisy embeddings.

Every picture is read twice in one pass, so that no row is spent on clean tokens alone:

    prompt  x_0 x_1 ... x_{T-1}   n_0 n_1 ... n_{T-2}

The clean copy is causal. The noisy copy is cut into segments; a slot of it reads the prompt, the clean tokens before
its segment and the noisy ones of its segment up to itself: a window as decoding has it. Noise never falls along a
segment. The loss is the cross-entropy of the clean next token, in both copies.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sjd_engine.denoise import Denoiser
from sjd_engine.models.block import Transformer
from sjd_engine.models.fine_tuned import trained_parameters
from sjd_engine.train.whole_sequence import hidden_states, image_logits

SHORTEST, LONGEST = 4, 64  # slots of a segment
ONLY_NOISE = 0.25  # share of the segments that have just entered a window


@dataclass(frozen=True)
class Noise:
    """The noise of a batch.

    starts: [B, N] int64, the slot that each slot's segment begins with. times: [B, N] in (0, 1], t of each slot.
    eps: [B, N, hidden] float32.
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


def losses(
    transformer: Transformer,
    denoiser: Denoiser,
    noise: Noise,
    ids: Tensor,
    first: Tensor,
    codes: Tensor,
    first_code: int,
) -> tuple[Tensor, Tensor]:
    """Nats of the next token: ([B, T] behind clean tokens, [B, T - 1] behind noisy ones).

    Args:
        noise: of T - 1 slots.
        ids: [B, P] int64 rows of the embedding: prompts, their image tokens but the last, and anything.
        first: [B] int64, the slot of `ids` that predicts the first image token.
        codes: [B, T] int64.
        first_code: row of image code 0.
    """
    num_tokens, width = codes.shape[1], ids.shape[1]
    slots = torch.arange(num_tokens - 1)
    clean = F.embedding(ids, transformer.embedding)
    alpha, sigma = (part[..., None] for part in denoiser.schedule.mixture(noise.times))
    tokens = denoiser.normalise(F.embedding(codes[:, :-1] + first_code, transformer.embedding))
    noisy = denoiser(alpha * tokens + sigma * noise.eps, noise.times)
    x = torch.cat((clean.float(), noisy), 1).to(transformer.dtype)
    noisy_positions = first[:, None] + 1 + slots
    positions = torch.cat((torch.arange(width).expand(len(ids), -1), noisy_positions), 1)
    hidden = hidden_states(transformer, x, positions, visible_slots(noise.starts, first, width))
    predicting = torch.cat((first[:, None] + torch.arange(num_tokens), (width + slots).expand(len(ids), -1)), 1)
    hidden = hidden.gather(1, predicting[..., None].expand(-1, -1, hidden.shape[-1]))
    targets = torch.cat((codes, codes[:, 1:]), 1)
    nats = F.cross_entropy(image_logits(transformer, hidden).flatten(0, 1), targets.flatten(), reduction="none")
    return nats.view_as(targets).split((num_tokens, num_tokens - 1), 1)


def visible_slots(starts: Tensor, first: Tensor, width: int) -> Tensor:
    """[B, N, N] bool, N = width + noisy slots: which slots each slot reads.

    Args:
        starts: [B, T - 1], see `Noise`.
        first: [B], see `losses`.
        width: slots before the noisy ones.
    """
    batch_size, num_noisy = starts.shape
    slots = torch.arange(num_noisy)
    clean = torch.ones(width, width, dtype=torch.bool).tril().expand(batch_size, -1, -1)
    before = torch.arange(width) <= (first[:, None] + starts)[..., None]
    own = (starts[:, :, None] == starts[:, None, :]) & (slots[:, None] >= slots)
    blind = torch.zeros(batch_size, width, num_noisy, dtype=torch.bool)
    return torch.cat((torch.cat((clean, blind), 2), torch.cat((before, own), 2)), 1)


class Trainer:
    """Steps of the fine-tuning. What a step does depends on its number and its pictures alone, so a run that is resumed
    from `state_dict` ends with the weights of one that was not interrupted.

    The blocks, the final norm and the denoiser are trained; embedding and head stay, and so does what a token's
    embedding is. float32 copies are optimised, matrices by Muon and the rest by AdamW.

    Args:
        transformer: trained in place, in its own dtype.
        denoiser: trained in place. Times are drawn from all of (0, 1], for any number of levels.
        first_code: row of image code 0.
        num_steps: of the whole run.
        lr: of both optimisers. It warms up, stays, and falls linearly over the last `decay` of the steps.
        compile: the loss with torch.compile.
    """

    def __init__(
        self,
        transformer: Transformer,
        denoiser: Denoiser,
        first_code: int,
        *,
        num_steps: int,
        lr: float,
        warmup: int = 30,
        decay: float = 0.5,
        seed: int = 0,
        compile: bool = False,
    ):
        self.transformer, self.denoiser, self.first_code = transformer, denoiser, first_code
        self.num_steps, self.lr, self.warmup, self.decay, self.seed = num_steps, lr, warmup, decay, seed
        encoding = [p for name, p in denoiser.named_parameters() if name not in ("mean", "std")]
        self._parts = [*trained_parameters(transformer).values(), *encoding]
        for part in self._parts:
            part.requires_grad_()
        self.copies = nn.ParameterList(nn.Parameter(part.detach().float().clone()) for part in self._parts)
        matrices = [copy for copy in self.copies if copy.ndim == 2]
        vectors = [copy for copy in self.copies if copy.ndim == 1]
        self._optimizers = (
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(vectors, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self._losses = torch.compile(losses, dynamic=False) if compile else losses

    def rate(self, step: int) -> float:
        """Share of `lr` in a step."""
        return min(1.0, (step + 1) / self.warmup, (self.num_steps - step) / (self.decay * self.num_steps))

    def noise(self, step: int, codes: Tensor) -> Noise:
        """That of a step."""
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        return Noise.sample(len(codes), codes.shape[1] - 1, self.transformer.config.hidden_size, generator)

    def step(self, step: int, ids: Tensor, first: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step on the pictures of a batch, see `losses`.

        Returns: nats behind clean tokens [B, T] and behind noisy ones [B, T - 1], and the times [B, T - 1] of these.
        """
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * self.rate(step)
        noise = self.noise(step, codes)
        clean, noisy = self._losses(self.transformer, self.denoiser, noise, ids, first, codes, self.first_code)
        (clean.mean() + noisy.mean()).backward()
        for part, copy in zip(self._parts, self.copies, strict=True):
            assert part.grad is not None
            copy.grad, part.grad = part.grad.float(), None
        nn.utils.clip_grad_norm_(self.copies, 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        self._give_weights()
        return clean.detach(), noisy.detach(), noise.times

    @torch.no_grad()
    def _give_weights(self) -> None:
        for part, copy in zip(self._parts, self.copies, strict=True):
            part.copy_(copy)

    def state_dict(self) -> dict[str, Any]:
        return {
            "copies": self.copies.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.copies.load_state_dict(state["copies"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._give_weights()

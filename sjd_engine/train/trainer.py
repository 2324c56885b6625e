"""Steps of the fine-tuning for SJD2."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sjd_engine.denoise import Denoiser
from sjd_engine.models.block import Transformer
from sjd_engine.models.fine_tuned import trained_parameters
from sjd_engine.models.linear import PRODUCTS
from sjd_engine.train.pictures import Pictures
from sjd_engine.train.sjd2 import Losses, Noise


class Trainer:
    """Steps of the fine-tuning. What a step does depends on its number and its pictures alone, so a run that is resumed
    from `state_dict` ends with the weights of one that was not interrupted.

    The blocks, the final norm and the denoiser are trained; embedding and head stay, and so does what a token's
    embedding is. float32 copies are optimised, the matrices of products by Muon and the rest by AdamW.

    Args:
        transformer: trained in place, in its own dtype.
        denoiser: trained in place. Times are drawn from all of (0, 1], for any number of levels.
        first_code: row of image code 0.
        num_steps: of the whole run.
        lr: of both optimisers. It warms up, stays, and falls linearly over the last `decay` of the steps.
        compile: the loss with torch.compile.
        gradient_checkpointing: see `Losses`.
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
        gradient_checkpointing: bool = False,
    ):
        self.transformer, self.denoiser = transformer, denoiser
        self.num_steps, self.lr, self.warmup, self.decay, self.seed = num_steps, lr, warmup, decay, seed
        self._parts = self._trained()
        for part in self._parts.values():
            part.requires_grad_()
        self.copies = nn.ParameterList(nn.Parameter(p.detach().float().clone()) for p in self._parts.values())
        named = list(zip(self._parts, self.copies, strict=True))
        matrices = [copy for name, copy in named if is_product(name)]
        others = [copy for name, copy in named if not is_product(name)]
        self._optimizers = (
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self._losses = Losses(transformer, denoiser, first_code, gradient_checkpointing=gradient_checkpointing)
        if compile:
            self._losses.compile(dynamic=False)

    def _trained(self) -> dict[str, nn.Parameter]:
        """In the order of checkpoints."""
        encoding = {name: p for name, p in self.denoiser.named_parameters() if name not in ("mean", "std")}
        return trained_parameters(self.transformer) | encoding

    def rate(self, step: int) -> float:
        """Share of `lr` in a step."""
        return min(1.0, (step + 1) / self.warmup, (self.num_steps - step) / (self.decay * self.num_steps))

    def step(self, step: int, pictures: Pictures) -> tuple[Tensor, Tensor, Tensor]:
        """One step on the pictures of a batch. Returns: see `nats`."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * self.rate(step)
        clean, noisy, times = self.nats(pictures, (self.seed << 32) + step)
        (clean.mean() + noisy.mean()).backward()
        for part, copy in zip(self._parts.values(), self.copies, strict=True):
            assert part.grad is not None
            copy.grad, part.grad = part.grad.float(), None
        nn.utils.clip_grad_norm_(self.copies, 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        self._give_weights()
        return clean.detach().cpu(), noisy.detach().cpu(), times

    def nats(self, pictures: Pictures, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the image tokens of a batch, all in one dimension: behind clean tokens, behind noisy ones, and the times
        in the slots of these. seed: of the noise."""
        free = pictures.codes < len(self.transformer.head)
        generator = torch.Generator().manual_seed(seed)
        num_slots, hidden_size = free.shape[1] - 1, self.transformer.config.hidden_size
        noise = Noise.sample(len(free), num_slots, hidden_size, generator).without(~free[:, :-1])
        device = self.transformer.embedding.device
        clean, noisy = self._losses(*(part.map(lambda rows: rows.to(device)) for part in (noise, pictures)))
        return clean[free], noisy[free[:, 1:]], noise.times[free[:, 1:]]

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Pictures]) -> tuple[Tensor, Tensor, Tensor]:
        """`nats` of pictures that are not trained on, under noise that is always the same."""
        results, seed = [], 0
        for pictures in batches:
            results.append(self.nats(pictures, seed))
            seed += len(pictures.codes)
        clean, noisy, times = (torch.cat(parts) for parts in zip(*results, strict=True))
        return clean, noisy, times

    @torch.no_grad()
    def _give_weights(self) -> None:
        for part, copy in zip(self._parts.values(), self.copies, strict=True):
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


def is_product(name: str) -> bool:
    """Whether vectors are multiplied with the parameter of this name: norms of heads are two-dimensional as well."""
    return name.rpartition(".")[2].startswith(PRODUCTS)

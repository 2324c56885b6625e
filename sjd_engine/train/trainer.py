"""Steps of the fine-tuning for SJD2."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sjd_engine.denoise import Denoiser
from sjd_engine.models.block import Transformer
from sjd_engine.models.fine_tuned import trained_parameters
from sjd_engine.models.linear import PRODUCTS
from sjd_engine.request import at_least
from sjd_engine.train.adapters import add_adapters, merge_adapters
from sjd_engine.train.pictures import Pictures
from sjd_engine.train.sharding import all_rows, like, num_processes, own_rows, shard, whole
from sjd_engine.train.sjd2 import Losses, Noise


class Nats(NamedTuple):
    """Of the image tokens of a batch, all in one dimension.

    clean: behind clean tokens. noisy: behind noisy ones; times: in the slots of these.
    """

    clean: Tensor
    noisy: Tensor
    times: Tensor

    def of_all(self) -> "Nats":
        """Those of all processes, on the CPU."""
        return Nats(*(all_rows(part.detach()).cpu() for part in self))


def joined(results: Sequence[Nats]) -> Nats:
    """Those of several batches."""
    return Nats(*(torch.cat(parts) for parts in zip(*results, strict=True)))


class Trainer:
    """Steps of the fine-tuning. What a step does depends on its number and its pictures alone, so a run that is resumed
    from `state_dict` ends with the weights of one that was not interrupted.

    The blocks, the final norm and the denoiser's encoding are trained, or adapters and the encoding; embedding and head
    stay, and so does what a token's embedding is. float32 copies are optimised, the matrices of products by Muon and
    the rest, adapters among it, by AdamW.

    In a torch.distributed group the processes share parameters and copies, see `train.sharding`. All make this trainer
    and the same calls of it, and do what one process would do, but for rounding.

    Args:
        transformer: trained in place, in its own dtype.
        denoiser: trained in place. Times are drawn from all of (0, 1], for any number of levels.
        first_code: row of image code 0.
        num_steps: of the whole run.
        lr: of both optimisers. It warms up, stays, and falls linearly over the last `decay` of the steps.
        compile: the loss with torch.compile; in one process.
        gradient_checkpointing: see `Losses`.
        lora: rank of adapters that are trained in the place of blocks and norm, >= 1.
    Raises: ValueError for bad arguments; RuntimeError for lora without peft.
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
        lora: int | None = None,
    ):
        if compile and num_processes() > 1:
            raise ValueError(f"compile: expected one process, got {num_processes()}; leave it out")
        if not 0 < decay <= 1:
            raise ValueError(f"decay: expected a share of the steps in (0, 1], got {decay}")
        self.transformer, self.denoiser = transformer, denoiser
        self.num_steps, self.warmup = at_least("num_steps", num_steps, 1), at_least("warmup", warmup, 1)
        self.lr, self.decay, self.seed = lr, decay, seed
        self._adapters = None if lora is None else add_adapters(transformer, lora, seed)
        if lora is None:
            for part in trained_parameters(transformer).values():
                part.requires_grad_()
        self._losses = Losses(transformer, denoiser, first_code, gradient_checkpointing=gradient_checkpointing)
        shard([*transformer.blocks, denoiser, self._losses], transformer.embedding.device)
        if compile:
            self._losses.compile(dynamic=False)
        named = trained_parameters(transformer) | dict(denoiser.named_parameters())
        self._parts = {name: part for name, part in named.items() if part.requires_grad}
        self.copies = nn.ParameterList(nn.Parameter(p.detach().float().clone()) for p in self._parts.values())
        self._optimizers = self._new_optimizers()

    def _new_optimizers(self) -> list[torch.optim.Optimizer]:
        named = list(zip(self._parts, self.copies, strict=True))
        products = [] if self._adapters else [copy for name, copy in named if is_product(name)]
        others = [copy for name, copy in named if self._adapters or not is_product(name)]
        adamw = torch.optim.AdamW(others, lr=self.lr, betas=(0.9, 0.98), weight_decay=0.0)
        if not products:
            return [adamw]
        return [torch.optim.Muon(products, lr=self.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"), adamw]

    def rate(self, step: int) -> float:
        """Share of `lr` in a step."""
        return min(1.0, (step + 1) / self.warmup, (self.num_steps - step) / (self.decay * self.num_steps))

    def step(self, step: int, pictures: Pictures) -> Nats:
        """One step on the pictures of a batch."""
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
        return Nats(clean, noisy, times).of_all()

    def nats(self, pictures: Pictures, seed: int) -> Nats:
        """Those of this process's share of a batch. seed: of the noise."""
        count, num_tokens = pictures.codes.shape
        if count % num_processes():
            raise ValueError(f"pictures: expected a number that {num_processes()} processes divide, got {count}")
        hidden_size, device = self.transformer.config.hidden_size, self.transformer.embedding.device
        noise = Noise.sample(count, num_tokens - 1, hidden_size, torch.Generator().manual_seed(seed))
        noise = noise.map(lambda rows: own_rows(rows).to(device))
        pictures = pictures.map(lambda rows: own_rows(rows).to(device))
        free = pictures.codes < len(self.transformer.head)
        noise = noise.without(~free[:, :-1])
        clean, noisy = self._losses(noise, pictures)
        return Nats(clean[free], noisy[free[:, 1:]], noise.times[free[:, 1:]])

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Pictures]) -> Nats:
        """Of pictures that are not trained on, under noise that is always the same."""
        results, seed = [], 0
        for pictures in batches:
            results.append(self.nats(pictures, seed).of_all())
            seed += len(pictures.codes)
        return joined(results)

    @torch.no_grad()
    def _give_weights(self) -> None:
        for part, copy in zip(self._parts.values(), self.copies, strict=True):
            part.copy_(copy)

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors, in the first process alone."""
        return {
            "copies": whole(self.copies.state_dict()),
            "denoiser": whole({"mean": self.denoiser.mean.detach(), "std": self.denoiser.std.detach()}),
            "optimizers": [whole(optimizer.state_dict()) for optimizer in self._optimizers],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of any number of processes. Raises: ValueError where other parameters were trained."""
        if len(state["copies"]) != len(self.copies):
            got = len(state["copies"])
            raise ValueError(f"checkpoint: expected {len(self.copies)} parameters, got {got}: of another model or lora")
        for name, saved in state.get("denoiser", {}).items():
            kept = self.denoiser.get_parameter(name)
            kept.copy_(like(saved, kept))
        for copy, saved in zip(self.copies, state["copies"].values(), strict=True):
            copy.copy_(like(saved, copy))
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            copies = optimizer.param_groups[0]["params"]
            shared = {i: {name: like(t, copies[i]) for name, t in own.items()} for i, own in saved["state"].items()}
            optimizer.load_state_dict({**saved, "state": shared})
        self._give_weights()

    def merge_adapters(self) -> None:
        """Where there are adapters, add them to the matrices: the transformer has its own parameters again."""
        if self._adapters is not None:
            merge_adapters(self._adapters)


def is_product(name: str) -> bool:
    """Whether vectors are multiplied with the parameter of this name: norms of heads are two-dimensional as well."""
    return name.rpartition(".")[2].startswith(PRODUCTS)

"""Images that are decoded together."""

import os
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sjd_engine.decoder import JacobiDecoder
from sjd_engine.models import ImageModel
from sjd_engine.outputs import ImageStats, StepInfo
from sjd_engine.request import Request

POISON = "SJD_POISON"  # environment variable: fill rejected slots of the cache with NaN, so that a stale read shows


class Batch:
    """Decoder, cache and the model between them; every image advances at its own pace.

    Args:
        indices: which images of the request.
        batch_invariant: give the transformer one image at a time, so that its matrix products have the same shapes, and
            hence the same rounding, whatever else is in the batch. Images that are complete then cost nothing.
    """

    def __init__(self, model: ImageModel, request: Request, indices: list[int], *, batch_invariant: bool):
        self.model, self.indices = model, indices
        self.decoder = JacobiDecoder(
            batch_size=len(indices),
            num_tokens=request.schedule.num_tokens,
            vocab_size=model.num_codes,
            window_size=request.window_size,
            method=request.method.name,
            params=request.params,
            seeds=[request.seeds[i] for i in indices],
            schedule=request.schedule,
            init=request.init,
            reuse_threshold=request.reuse_threshold,
            device=model.device,
        )
        prompts = [request.prompts[i] for i in indices]
        if self.decoder.guided:  # the two contexts of an image lie side by side
            contexts = [context for p in prompts for context in (p.conditional, p.unconditional)]
        else:
            contexts = [p.conditional for p in prompts]
        self._copies = len(contexts) // len(indices)
        longest = max(map(len, contexts))
        self._prefix_lengths = [len(context) - 1 for context in contexts]
        self._prompt = torch.zeros(len(contexts), longest, dtype=torch.int64)
        for row, context in zip(self._prompt, contexts, strict=True):
            row[: len(context)] = torch.tensor(context)
        self._anchor_ids = torch.tensor([context[-1] for context in contexts]).to(model.device)
        self._prefix_lens = torch.tensor(self._prefix_lengths, dtype=torch.int32).to(model.device)
        capacity = longest + request.schedule.num_tokens + 2 * self.decoder.window_size
        poison = self.decoder.window_size if os.environ.get(POISON) else 0
        self.kv_cache = model.transformer.new_cache(len(contexts), capacity, poison=poison)
        self._group_size = 1 if batch_invariant else len(indices)
        self._passes = 0
        # Tokens each image has committed, or more: the device is not asked in every pass.
        self._at_most = [0] * len(indices)
        self._seconds: list[float | None] = [None] * len(indices)

    def run(self, poll_every: int = 1) -> Iterator[StepInfo]:
        """Decode to the end, telling of every `poll_every`-th pass; in between the host waits for nothing."""
        started = time.perf_counter()
        while None in self._seconds:
            for _ in range(poll_every):
                self.step()
            seconds = time.perf_counter() - started
            self._at_most = committed = self.decoder.num_committed.tolist()  # sync: the poll
            for row, count in enumerate(committed):
                if count == self.decoder.num_tokens and self._seconds[row] is None:
                    self._seconds[row] = seconds
            yield StepInfo(self.indices, committed, self.decoder.num_tokens, self._passes, seconds)

    def step(self) -> None:
        """One pass: the window through the transformer, verified, and the cache rolled back."""
        ids, _ = self.decoder.window()
        logits = self.forward(ids)
        result = self.decoder.verify(logits)
        self.kv_cache.advance(self._prefix_lens, result.num_committed)
        self._passes += 1
        most = self.decoder.num_tokens
        self._at_most = [min(count + self.decoder.window_size, most) for count in self._at_most]

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the window ids [B, W]: [B, W, V], or [2, B, W, V] with guidance."""
        size = self._group_size
        groups = [self._forward_images(ids[i : i + size], i) for i in range(0, len(ids), size)]
        logits = (torch.cat(groups) if len(groups) > 1 else groups[0]).unflatten(0, (-1, self._copies))
        return logits.transpose(0, 1) if self.decoder.guided else logits.squeeze(1)

    def _forward_images(self, ids: Tensor, first: int) -> Tensor:
        """Logits [copies * images, W, V] of the window ids of some images, `first` the first of them. The first pass
        takes the prompts along, so that they cost no pass of their own."""
        if None not in self._seconds[first : first + len(ids)]:
            return torch.zeros(self._copies * len(ids), ids.shape[1], self.model.num_codes, device=ids.device)
        rows = slice(first * self._copies, (first + len(ids)) * self._copies)
        window = self.model.window_token_ids(ids.repeat_interleave(self._copies, 0), self._anchor_ids[rows])
        prefix = max(self._prefix_lengths[rows])
        longest = prefix + max(self._at_most[first : first + len(ids)])
        slots = None
        if self._passes == 0:
            prompt = F.pad(self._prompt[rows, :prefix], (0, ids.shape[1])).to(ids.device)
            slots = self._prefix_lens[rows, None].long() + torch.arange(ids.shape[1], device=ids.device)
            window, longest = prompt.scatter(1, slots, window), 0
        hidden = self.model.transformer(window, self.kv_cache.narrow(rows, longest))
        if slots is not None:
            hidden = hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1]))
        return self.model.transformer.logits(hidden)

    def codes(self) -> Tensor:
        """[B, rows * cols] int64 image codes: committed, drafted, or without meaning."""
        image = self.decoder.schedule.image_positions.to(self.decoder.device)
        return self.decoder.draft_ids[:, image]

    def stats(self) -> list[ImageStats]:
        """Statistics of every image of the batch."""
        schedule, stats = self.decoder.schedule, self.decoder.stats
        maps = stats.commit_pass[:, schedule.image_positions].view(-1, schedule.rows, schedule.cols)
        return [
            ImageStats(
                nfe=stats.iterations[row],
                num_tokens=schedule.num_tokens,
                committed_per_pass=stats.committed_per_pass[row],
                seconds=self._seconds[row] or 0.0,
                acceptance_map=maps[row].numpy(),
                zero_residual=stats.zero_residual[row],
                nonfinite_rows=stats.nonfinite_rows[row],
                zero_draft_prob=stats.zero_draft_prob[row],
            )
            for row in range(len(self.indices))
        ]

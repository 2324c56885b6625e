"""The engine: prompts in, images out."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sjd_engine.decoder import JacobiDecoder
from sjd_engine.images import convert
from sjd_engine.models import ImageModel, load_model
from sjd_engine.outputs import Generation, ImageStats, StepInfo, StreamEvent
from sjd_engine.request import Request, at_least, make_request

UNKNOWN_GREY = 0.5  # pixels of a preview that have no token yet


class Engine:
    """Text to images on one model, with any of the decoding methods.

    Args:
        model: "emoji" (bundled), a checkpoint folder, or a loaded ImageModel.
        device: None takes CUDA where there is one, else the CPU.
        dtype: of the transformer; None takes bfloat16 where the device computes in it, else float32.
        max_batch_size: images decoded together; more are taken in turn.
    Raises: CheckpointError where the model cannot be loaded, ValueError for bad arguments.

        >>> out = Engine("emoji").generate("a red apple", seed=1)
        >>> out.images[0].save("apple.png")
    """

    def __init__(
        self,
        model: str | Path | ImageModel = "emoji",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_batch_size: int = 8,
    ):
        self.max_batch_size = at_least("max_batch_size", max_batch_size, 1)
        if isinstance(model, ImageModel):
            self.model = model
        elif isinstance(model, str | Path):
            chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            self.model = load_model(model, chosen, dtype or default_dtype(chosen))
        else:
            raise TypeError(f"model: expected a name, a checkpoint folder or an ImageModel, got {model!r}")

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        method: str = "maximal",
        window_size: int | None = None,
        seed: int | Sequence[int] = 0,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        init: str = "random",
        reuse_threshold: float = 0.5,
        output_type: str = "pil",
        callback_on_step: Callable[[StepInfo], None] | None = None,
        progress: bool | None = None,
    ) -> Generation:
        """Decode images. Arguments that are None take the family's default.

        Args:
            prompt: one text or a list.
            method: ar, jacobi, sjd, sjd++, maximal, gumbel or exact; see `sjd_engine.methods`.
            window_size: tokens of a forward pass, >= 1.
            seed: an int (image i uses seed + i) or one int for each image.
            num_images_per_prompt: >= 1; images are ordered prompt by prompt.
            guidance_scale: >= 1; 1 turns guidance off.
            temperature: > 0. top_k: >= 0, 0 keeps all. top_p: in (0, 1].
            negative_prompt: one text, or one for each prompt; takes the place of the empty caption in guidance.
            height, width: pixels; a size the model was trained for.
            init: random, left-repeat, above-repeat, left-sample or above-sample.
            reuse_threshold: tau of sjd++, > 0.
            output_type: pil, np, pt or codes.
            callback_on_step: called after every pass; what it raises ends the call and reaches the caller.
            progress: a bar on stderr; None shows it on a terminal.
        Returns: Generation.
        Raises: ValueError, TypeError for bad arguments, before anything runs.
        """
        request = make_request(
            self.model,
            prompt,
            method=method,
            window_size=window_size,
            seed=seed,
            num_images_per_prompt=num_images_per_prompt,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            init=init,
            reuse_threshold=reuse_threshold,
            output_type=output_type,
        )
        show = sys.stderr.isatty() if progress is None else progress
        total = len(request.seeds) * request.schedule.num_tokens
        token_ids: list[Tensor] = []
        stats: list[ImageStats] = []
        with tqdm(total=total, unit="token", desc=request.method.name, disable=not show) as bar:
            finished = 0
            for batch in self._batches(request):
                for info in batch.run():
                    bar.update(finished * request.schedule.num_tokens + sum(info.num_committed) - bar.n)
                    if callback_on_step is not None:
                        callback_on_step(info)
                finished += len(batch.indices)
                token_ids.append(batch.codes())
                stats += batch.stats()
        codes = torch.cat(token_ids)
        images = None if output_type == "codes" else convert(self._decode(codes, request), output_type)
        return Generation(images, codes, stats, request.seeds)

    def stream(
        self, prompt: str | Sequence[str], *, every: int = 1, output_type: str = "pil", **arguments: Any
    ) -> Iterator[StreamEvent]:
        """Decode images and yield each of them after every `every` passes, and when it is complete.

        Args:
            every: passes between previews, >= 1.
            arguments: those of `generate`, but for callback_on_step and progress: the caller sees every event, and
                ends the call by leaving the loop.
        """
        at_least("every", every, 1)
        request = make_request(self.model, prompt, output_type=output_type, **arguments)
        return self._events(request, every)

    def _events(self, request: Request, every: int) -> Iterator[StreamEvent]:
        for batch in self._batches(request):
            complete: set[int] = set()
            for info in batch.run():
                for row, committed in enumerate(info.num_committed):
                    done = committed == info.num_tokens
                    if row in complete or not (done or info.passes % every == 0):
                        continue
                    if done:
                        complete.add(row)
                    drafted = min(committed + request.window_size - 1, info.num_tokens)
                    image = None
                    if request.output_type != "codes":
                        image = convert(self._preview(batch, row, drafted, request), request.output_type)[0]
                    yield StreamEvent(
                        index=batch.indices[row],
                        image=image,
                        num_committed=committed,
                        num_drafted=drafted,
                        num_tokens=info.num_tokens,
                        nfe=info.passes,
                        stats=batch.stats()[row] if done else None,
                    )

    def _batches(self, request: Request) -> Iterator["Batch"]:
        for first in range(0, len(request.seeds), self.max_batch_size):
            last = min(first + self.max_batch_size, len(request.seeds))
            yield Batch(self.model, request, list(range(first, last)))

    def _decode(self, codes: Tensor, request: Request) -> Tensor:
        """[N, rows * cols] codes -> [N, 3, H, W] pixels, a few images at a time."""
        grids = codes.view(-1, request.schedule.rows, request.schedule.cols).split(self.max_batch_size)
        return torch.cat([self.model.decode(grid) for grid in grids])

    def _preview(self, batch: "Batch", row: int, drafted: int, request: Request) -> Tensor:
        """[1, 3, H, W]: the image as far as its tokens are known or drafted."""
        schedule = request.schedule
        known = (schedule.image_positions < drafted).view(1, 1, schedule.rows, schedule.cols)
        pixels = self._decode(batch.codes()[row : row + 1], request)
        patch = pixels.shape[-1] // schedule.cols
        shown = known.repeat_interleave(patch, 2).repeat_interleave(patch, 3).to(pixels.device)
        return torch.where(shown, pixels, UNKNOWN_GREY)


class Batch:
    """Images that are decoded together, each at its own pace: decoder, cache and the model between them."""

    def __init__(self, model: ImageModel, request: Request, indices: list[int]):
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
        contexts = [request.prompts[i].conditional for i in indices]
        if self.decoder.guided:
            contexts += [request.prompts[i].unconditional for i in indices]
        self._copies = len(contexts) // len(indices)
        longest = max(map(len, contexts))
        padded = torch.zeros(len(contexts), longest, dtype=torch.int64)
        for row, context in zip(padded, contexts, strict=True):
            row[: len(context)] = torch.tensor(context)
        self._prompt = padded.to(model.device)
        self._prefix_lengths = torch.tensor([len(c) - 1 for c in contexts], device=model.device)
        self._anchor_ids = self._prompt.gather(1, self._prefix_lengths[:, None]).squeeze(1)
        capacity = longest + request.schedule.num_tokens + 2 * self.decoder.window_size
        self.kv_cache = model.transformer.new_cache(len(contexts), capacity)
        self._passes = 0
        self._seconds = [0.0] * len(indices)

    def run(self) -> Iterator[StepInfo]:
        """Decode to the end, telling of every pass."""
        started = time.perf_counter()
        while not self.decoder.done:
            self.step()
            seconds = time.perf_counter() - started
            committed = self.decoder.num_committed.tolist()  # sync: progress, callbacks and times
            num_tokens = self.decoder.num_tokens
            for row, count in enumerate(committed):
                if count == num_tokens and not self._seconds[row]:
                    self._seconds[row] = seconds
            yield StepInfo(self.indices, committed, num_tokens, self._passes, seconds)

    def step(self) -> None:
        """One pass: the window through the transformer, verified, and the cache rolled back."""
        ids, _ = self.decoder.window()
        logits = self.forward(ids)
        result = self.decoder.verify(logits)
        self.kv_cache.rollback(self._prefix_lengths + result.num_committed.repeat(self._copies))
        self._passes += 1

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the window ids [B, W]: [B, W, V], or [2, B, W, V] with guidance. The first pass takes the prompt
        along, so that it costs no pass of its own."""
        window = self.model.window_token_ids(ids.repeat(self._copies, 1), self._anchor_ids)
        slots = None
        if self._passes == 0:
            slots = self._prefix_lengths[:, None] + torch.arange(ids.shape[1], device=ids.device)
            prompt = torch.nn.functional.pad(self._prompt[:, :-1], (0, ids.shape[1]))
            window = prompt.scatter(1, slots, window)
        hidden = self.model.transformer(window, self.kv_cache)
        if slots is not None:
            hidden = hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = self.model.transformer.logits(hidden)
        return logits.unflatten(0, (self._copies, -1)) if self._copies > 1 else logits

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
                seconds=self._seconds[row],
                acceptance_map=maps[row].numpy(),
                zero_residual=stats.zero_residual[row],
                nonfinite_rows=stats.nonfinite_rows[row],
                zero_draft_prob=stats.zero_draft_prob[row],
            )
            for row in range(len(self.indices))
        ]


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where `device` computes in it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if supported else torch.float32

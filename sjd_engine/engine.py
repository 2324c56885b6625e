"""The engine: prompts in, images out."""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sjd_engine.batch import Batch
from sjd_engine.images import convert
from sjd_engine.models import ImageModel, load_model
from sjd_engine.outputs import Generation, ImageStats, StepInfo, StreamEvent
from sjd_engine.request import Request, at_least, make_request

POLL_EVERY = 8  # passes that a GPU may run ahead of the host, which needs to know only when an image is complete
UNKNOWN_GREY = 0.5  # pixels of a preview that have no token yet


class Engine:
    """Text to images on one model, with any of the decoding methods.

    Args:
        model: "emoji" (bundled), a checkpoint folder, or a loaded ImageModel.
        device: None takes CUDA where there is one, else the CPU.
        dtype: of the transformer; None takes bfloat16 where the device computes in it, else float32.
        max_batch_size: images decoded together; more are taken in turn.
        batch_invariant: an image is bit for bit the same alone and in any batch, at the price of one transformer call
            for each image of a pass. None takes it in float32, where reproducing an image is worth it. Without it the
            batch changes the rounding of the logits, and now and then a token.
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
        batch_invariant: bool | None = None,
    ):
        self.max_batch_size = at_least("max_batch_size", max_batch_size, 1)
        if isinstance(model, ImageModel):
            self.model = model
        elif isinstance(model, str | Path):
            chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            self.model = load_model(model, chosen, dtype or default_dtype(chosen))
        else:
            raise TypeError(f"model: expected a name, a checkpoint folder or an ImageModel, got {model!r}")
        exact = self.model.transformer.dtype == torch.float32
        self.batch_invariant = exact if batch_invariant is None else batch_invariant

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
        asked = callback_on_step is not None or self.model.device.type == "cpu"
        poll_every = 1 if asked else POLL_EVERY
        show = sys.stderr.isatty() if progress is None else progress
        total = len(request.seeds) * request.schedule.num_tokens
        token_ids: list[Tensor] = []
        stats: list[ImageStats] = []
        with tqdm(total=total, unit="token", desc=request.method.name, disable=not show) as bar:
            finished = 0
            for batch in self._batches(request):
                for info in batch.run(poll_every):
                    bar.update(finished * request.schedule.num_tokens + sum(info.num_committed) - bar.n)
                    if callback_on_step is not None:
                        callback_on_step(info)
                finished += len(batch.indices)
                token_ids.append(batch.codes())
                stats += batch.stats()
        nonfinite = sum(image.nonfinite_rows for image in stats)
        if nonfinite:
            warnings.warn(
                f"{nonfinite} rows of logits had no finite entry and were taken as uniform: damaged weights, or "
                f"overflow in {self.model.transformer.dtype}",
                RuntimeWarning,
                stacklevel=2,
            )
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
                    drafted = min(committed + batch.decoder.window_size - 1, info.num_tokens)
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

    def _batches(self, request: Request) -> Iterator[Batch]:
        for first in range(0, len(request.seeds), self.max_batch_size):
            last = min(first + self.max_batch_size, len(request.seeds))
            yield Batch(self.model, request, list(range(first, last)), batch_invariant=self.batch_invariant)

    def _decode(self, codes: Tensor, request: Request) -> Tensor:
        """[N, rows * cols] codes -> [N, 3, H, W] pixels, a few images at a time."""
        grids = codes.view(-1, request.schedule.rows, request.schedule.cols).split(self.max_batch_size)
        return torch.cat([self.model.decode(grid) for grid in grids])

    def _preview(self, batch: Batch, row: int, drafted: int, request: Request) -> Tensor:
        """[1, 3, H, W]: the image as far as its tokens are known or drafted."""
        schedule = request.schedule
        known = (schedule.image_positions < drafted).view(1, 1, schedule.rows, schedule.cols)
        pixels = self._decode(batch.codes()[row : row + 1], request)
        patch = pixels.shape[-1] // schedule.cols
        shown = known.repeat_interleave(patch, 2).repeat_interleave(patch, 3).to(pixels.device)
        return torch.where(shown, pixels, UNKNOWN_GREY)


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where `device` computes in it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if supported else torch.float32

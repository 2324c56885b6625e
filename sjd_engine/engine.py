"""The engine: prompts in, images out."""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sjd_engine import graph
from sjd_engine.images import convert
from sjd_engine.kv_cache import PAGE_SIZE
from sjd_engine.loading import load
from sjd_engine.models import ImageModel
from sjd_engine.outputs import Finished, Generation, StepInfo, StreamEvent
from sjd_engine.request import AUTO, at_least, make_request
from sjd_engine.schedule import Schedule
from sjd_engine.scheduler import Image, Job, Scheduler

POLL_EVERY = 8  # passes that a GPU may run ahead of the host, which needs to know only when an image is complete
UNKNOWN_GREY = 0.5  # pixels of a preview that have no token yet
SPARE_PROMPT_TOKENS = 256  # of each sequence, in the default size of the cache


class Engine:
    """Text to images on one model, with any of the decoding methods.

    Args:
        model: "emoji" (bundled), a checkpoint folder, a loaded ImageModel, or a model that transformers has loaded from
            a checkpoint of a known family, whose weights are copied; see `hf.AttachedModel` for others.
        device: None takes CUDA where there is one, else the CPU; for a model of transformers its own.
        dtype: of the transformer; None takes bfloat16 where the device computes in it, else float32; for a model of
            transformers its own.
        max_batch_size: images decoded together; more wait, and each begins when another is complete.
        batch_invariant: an image is bit for bit the same alone and in any batch, at the price of one transformer call
            for each image of a pass. None takes it in float32, where reproducing an image is worth it. Without it the
            batch changes the rounding of the logits, and now and then a token.
        page_size: tokens of a page of the key/value cache.
        kv_cache_bytes: size of that cache; None takes what `max_batch_size` guided images of the default size need. It
            is taken with the first request.
        cuda_graphs: replay passes as CUDA graphs; None does on a GPU unless `batch_invariant` forbids it.
        quantization: "int8" stores the matrices of blocks and head in 8 bits, see `sjd_engine.quantize`.
        tensor_parallel: share the transformer among the processes of the default torch.distributed group, see
            `sjd_engine.parallel`. All of them make this engine and the same calls of it, and get the same images.
    Raises: CheckpointError where the model cannot be loaded, ValueError for bad arguments, RuntimeError for
        tensor_parallel without a process group.

        >>> out = Engine("emoji").generate("a red apple", seed=1)
        >>> out.images[0].save("apple.png")
    """

    def __init__(
        self,
        model: str | Path | ImageModel | nn.Module = "emoji",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_batch_size: int = 8,
        batch_invariant: bool | None = None,
        page_size: int = PAGE_SIZE,
        kv_cache_bytes: int | None = None,
        cuda_graphs: bool | None = None,
        quantization: str | None = None,
        tensor_parallel: bool = False,
    ):
        self.max_batch_size = at_least("max_batch_size", max_batch_size, 1)
        self.model = load(model, device, dtype, quantization=quantization, tensor_parallel=tensor_parallel)
        exact = self.model.transformer.dtype == torch.float32
        self.batch_invariant = exact if batch_invariant is None else batch_invariant
        self.page_size = at_least("page_size", page_size, 1)
        self.kv_cache_bytes = None if kv_cache_bytes is None else at_least("kv_cache_bytes", kv_cache_bytes, 1)
        obstacle = "batch_invariant=True" if self.batch_invariant else graph.obstacle(self.model, self.page_size)
        if cuda_graphs and obstacle:
            raise ValueError(f"cuda_graphs: expected passes that can be captured, got {obstacle}")
        self.cuda_graphs = not obstacle if cuda_graphs is None else cuda_graphs
        self._jobs: dict[int, Job] = {}  # submitted, and not collected yet
        self._next_id = 0

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        method: str = "maximal",
        window_size: int | str | None = AUTO,
        seed: int | Sequence[int] = 0,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        init: str | None = None,
        reuse_threshold: float = 0.5,
        tree: tuple[int, int] | None = None,
        relaxation: float | None = None,
        zipar_window: int | None = None,
        steps: int | None = None,
        verify: str | None = None,
        output_type: str = "pil",
        callback_on_step: Callable[[StepInfo], None] | None = None,
        progress: bool | None = None,
    ) -> Generation:
        """Decode images. Arguments that are None take the family's default.

        Args:
            prompt: one text or a list.
            method: ar, jacobi, sjd, sjd++, maximal, gumbel, exact, eagle, sjd2, or for comparison: sjd-block,
                gsd, lantern, zipar, zipar-adaptive; see `sjd_engine.methods`.
            window_size: tokens of a forward pass, >= 1. "auto" measures what passes take and lets each have the window
                that promises most tokens a second. The law of the images is the same; but which image a seed gives
                depends on the windows, unless the method is ar, jacobi or exact. None is the model's default, one
                number. `ar` always takes 1.
            seed: an int (image i uses seed + i) or one int for each image.
            num_images_per_prompt: >= 1; images are ordered prompt by prompt.
            guidance_scale: >= 1; 1 turns guidance off.
            temperature: > 0. top_k: >= 0, 0 keeps all. top_p: in (0, 1].
            negative_prompt: one text, or one for each prompt; takes the place of the empty caption in guidance.
            height, width: pixels; a size the model was trained for.
            init: random, left-repeat, above-repeat, left-sample, above-sample, above-law, above-blend or neighbours;
                see `kernels.reference.fill_window`, `sjd_engine.drafting.RowAbove` and `sjd_engine.neighbours`.
            reuse_threshold: tau of sjd++, > 0.
            tree: (K, D), up to K candidates for each of the first D - 1 tokens of a window, whose tokens count among
                window_size; for maximal, gumbel and sjd. None for one candidate. With a tree "auto" is the model's
                default window.
            relaxation: how much more gsd and lantern accept: ranks >= 0, 7 by default, and a bound >= 1, 2 by default.
            zipar_window: tokens of the row above that zipar waits for, >= 1, from which its window size follows; None
                for a third of the columns.
            steps: levels of noise of sjd2, passes from noise to a draft, >= 1; None for those of its model.
            verify: of sjd2, "clean" accepts drafts behind tokens alone and follows the model exactly, "paper" accepts
                them behind noise too; None for clean.
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
            tree=tree,
            relaxation=relaxation,
            zipar_window=zipar_window,
            steps=steps,
            verify=verify,
            output_type=output_type,
        )
        show = sys.stderr.isatty() if progress is None else progress
        total = len(request.seeds) * request.schedule.num_tokens
        with tqdm(total=total, unit="token", desc=request.method.name, disable=not show) as bar:

            def on_step(info: StepInfo) -> None:
                bar.update(sum(info.num_committed) - bar.n)
                if callback_on_step is not None:
                    callback_on_step(info)

            job = Job(request, on_step, every_pass=callback_on_step is not None)
            for _ in self._run(job):
                pass
        return self._generation(job)

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
        return self._events(Job(request, every_pass=True), every)

    def _events(self, job: Job, every: int) -> Iterator[StreamEvent]:
        told: set[int] = set()
        for _ in self._run(job):
            for image in job.images:
                done = image.codes is not None
                if image.index not in told and image.begun and (done or image.passes % every == 0):
                    yield self._event(image)
                    if done:
                        told.add(image.index)

    # ------------------------------------------------------------------------------------------------- for servers

    def submit(
        self,
        prompt: str | Sequence[str],
        *,
        callback_on_step: Callable[[StepInfo], None] | None = None,
        **arguments: Any,
    ) -> int:
        """Queue a request; `step` decodes it together with all others.

        Args:
            prompt, callback_on_step, arguments: those of `generate`, but for progress. What the callback raises ends
                this request and no other.
        Returns: its number, for `collect` and `cancel`.
        Raises: ValueError, TypeError for bad arguments; nothing is queued then.
        """
        request = make_request(self.model, prompt, **arguments)
        job = Job(request, callback_on_step, every_pass=callback_on_step is not None)
        self.scheduler.submit(job)
        self._next_id += 1
        self._jobs[self._next_id] = job
        return self._next_id

    def step(self) -> bool:
        """Let waiting images join, and decode all that are under way one pass further. Whether there is more to do.

        A request that fails, or whose callback raises, ends alone: `collect` tells why.
        """
        self.scheduler.step()
        return not self.scheduler.idle

    def collect(self) -> list[Finished]:
        """The requests that have ended since the last call, with their images or the error that ended them."""
        ended = [number for number, job in self._jobs.items() if job.done]
        return [self._finished(number, self._jobs.pop(number)) for number in ended]

    def preview(self, request_id: int, index: int = 0) -> StreamEvent | None:
        """Image `index` of a submitted request as far as it has come, as `stream` tells of it. None where the image has
        not begun, or there is no such request, or it was collected already."""
        job = self._jobs.get(request_id)
        image = job.images[index] if job is not None and job.error is None else None
        return self._event(image) if image is not None and image.begun else None

    def cancel(self, request_id: int) -> bool:
        """Give up a submitted request: its pages are free at once, and `collect` will not tell of it. False where there
        is none of this number, or it was collected already."""
        job = self._jobs.pop(request_id, None)
        if job is not None:
            self.scheduler.cancel(job)
        return job is not None

    @cached_property
    def scheduler(self) -> Scheduler:
        """Who decodes when, and the pages; made with the first request."""
        return Scheduler(
            self.model,
            max_batch_size=self.max_batch_size,
            num_pages=self._num_pages(),
            page_size=self.page_size,
            batch_invariant=self.batch_invariant,
            graphs=self.cuda_graphs,
            poll_every=1 if self.model.device.type == "cpu" else POLL_EVERY,
        )

    def _num_pages(self) -> int:
        if self.kv_cache_bytes is not None:
            return max(1, self.kv_cache_bytes // (self.model.transformer.kv_bytes * self.page_size))
        num_tokens = self.model.schedule(*self.model.image_size).num_tokens
        pages = -(-(num_tokens + SPARE_PROMPT_TOKENS) // self.page_size) + -(-SPARE_PROMPT_TOKENS // self.page_size)
        return 2 * self.max_batch_size * pages

    # ------------------------------------------------------------------------------------------------------- parts

    def _run(self, job: Job) -> Iterator[None]:
        """Decode `job` to its end, pass by pass, and whatever else is under way with it. Raises: what ended it."""
        self.scheduler.submit(job)
        try:
            while not job.done:
                self.scheduler.step()
                yield
        finally:
            if not job.done:  # the caller left, or was interrupted
                self.scheduler.cancel(job)
        if job.error is not None:
            raise job.error

    def _finished(self, number: int, job: Job) -> Finished:
        """How a job has ended; images that cannot be made of its codes are an error of its own."""
        generation, error = None, job.error
        if error is None:
            try:
                generation = self._generation(job)
            except Exception as failure:
                error = failure
        return Finished(number, generation, error)

    def _generation(self, job: Job) -> Generation:
        """The images of a job that is complete."""
        request = job.request
        codes = torch.stack([image.codes for image in job.images if image.codes is not None])
        stats = [image.stats for image in job.images if image.stats is not None]
        nonfinite = sum(image.nonfinite_rows for image in stats)
        if nonfinite:
            warnings.warn(
                f"{nonfinite} rows of logits had no finite entry and were taken as uniform: damaged weights, or "
                f"overflow in {self.model.transformer.dtype}",
                RuntimeWarning,
                stacklevel=3,
            )
        images = None
        if request.output_type != "codes":
            images = convert(self._decode(codes, request.schedule), request.output_type)
        return Generation(images, codes, stats, request.seeds, request.arguments)

    def _event(self, image: Image) -> StreamEvent:
        """An image as far as it has come."""
        request, codes = image.job.request, image.codes
        drafted = request.schedule.num_tokens
        if codes is None:
            assert image.batch is not None
            codes = image.batch.codes(image.row)
            drafted = min(image.num_committed + image.batch.decoder.window_size - 1, drafted)
        shown = None
        if request.output_type != "codes":
            shown = convert(self._preview(codes, drafted, request.schedule), request.output_type)[0]
        return StreamEvent(
            index=image.index,
            image=shown,
            num_committed=image.num_committed,
            num_drafted=drafted,
            num_tokens=request.schedule.num_tokens,
            nfe=image.passes,
            stats=image.stats,
        )

    def _decode(self, codes: Tensor, schedule: Schedule) -> Tensor:
        """[N, rows * cols] codes -> [N, 3, H, W] pixels, a few images at a time."""
        grids = codes.view(-1, schedule.rows, schedule.cols).split(self.max_batch_size)
        return torch.cat([self.model.decode(grid) for grid in grids])

    def _preview(self, codes: Tensor, drafted: int, schedule: Schedule) -> Tensor:
        """[1, 3, H, W]: the image as far as its tokens are known or drafted."""
        known = (schedule.image_positions < drafted).view(1, 1, schedule.rows, schedule.cols)
        pixels = self._decode(codes[None], schedule)
        patch = pixels.shape[-1] // schedule.cols
        shown = known.repeat_interleave(patch, 2).repeat_interleave(patch, 3).to(pixels.device)
        return torch.where(shown, pixels, UNKNOWN_GREY)

"""Who decodes when: requests wait, join a batch when pages and a row are free, and leave when they are complete."""

import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from torch import Tensor

from sjd_engine.auto_window import PassCosts
from sjd_engine.batch import Batch
from sjd_engine.kv_cache import PagedKVCache
from sjd_engine.models import ImageModel
from sjd_engine.native import PagesExhausted
from sjd_engine.outputs import ImageStats, StepInfo
from sjd_engine.prompt_cache import PromptCache
from sjd_engine.request import Request


@dataclass(eq=False)
class Image:
    """One image of a job: waiting without a batch, decoding in a row of one, or complete with codes."""

    job: "Job"
    index: int
    batch: Batch | None = None
    row: int = -1
    passes: int = 0
    num_committed: int = 0
    started: float = 0.0
    codes: Tensor | None = None
    stats: ImageStats | None = None

    @property
    def begun(self) -> bool:
        return self.batch is not None or self.codes is not None


@dataclass(eq=False)
class Job:
    """A request and how far it has come.

    on_step: told how far the job is whenever the device was asked; what it raises ends the job.
    every_pass: ask the device after every pass of the job.
    error: why the job has ended without its images; None otherwise.
    """

    request: Request
    on_step: Callable[[StepInfo], None] | None = None
    every_pass: bool = False
    images: list[Image] = field(init=False)
    passes: int = 0
    started: float | None = None
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.images = [Image(self, index) for index in range(len(self.request.seeds))]

    @property
    def done(self) -> bool:
        """Complete, or ended by an error."""
        return self.error is not None or all(image.codes is not None for image in self.images)

    def info(self) -> StepInfo:
        """How far the images that have begun have come."""
        begun = [image for image in self.images if image.begun]
        return StepInfo(
            image_indices=[image.index for image in begun],
            num_committed=[image.num_committed for image in begun],
            num_tokens=self.request.schedule.num_tokens,
            passes=self.passes,
            seconds=time.perf_counter() - (self.started or 0.0),
        )


class Scheduler:
    """Continuous batching on one pool of pages.

    Images wait in one queue and begin in its order. An image begins only when all pages that it will ever need are
    free, so none runs out of them. Requests that differ in method, window, size or the kind of sampling are decoded in
    batches of their own, which take turns pass by pass.

    Args:
        model: decodes.
        max_batch_size: images under way at once.
        num_pages, page_size: of the pool.
        batch_invariant, graphs: see `Batch`.
        poll_every: passes that the device may run ahead of the host, which must know only when an image is complete.
    """

    def __init__(
        self,
        model: ImageModel,
        *,
        max_batch_size: int,
        num_pages: int,
        page_size: int,
        batch_invariant: bool,
        graphs: bool,
        poll_every: int,
    ):
        config = model.transformer.config
        self.model, self.max_batch_size, self.poll_every = model, max_batch_size, poll_every
        self._batch_invariant, self._graphs = batch_invariant, graphs
        # An image holds two prompts at most, and as many stay for those to come.
        kv_cache = PagedKVCache(
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            num_sequences=4 * max_batch_size,
            capacity=config.max_positions,
            num_pages=num_pages,
            page_size=page_size,
            dtype=model.transformer.dtype,
            device=model.device,
        )
        self.prompts = PromptCache(model, kv_cache, share_beginnings=not batch_invariant)
        self.waiting: deque[Image] = deque()
        self.running: list[Image] = []
        self._batches: dict[Hashable, Batch] = {}
        self._costs = PassCosts()
        self._passes = 0

    # ----------------------------------------------------------------------------------------------- jobs come and go

    def submit(self, job: Job) -> None:
        """Queue the images of `job`. Raises: ValueError where one of them could never begin; none is queued then."""
        request, pool = job.request, self.prompts.kv_cache
        for prompt in request.prompts:
            contexts = prompt.contexts(guided=request.params.guidance_scale > 1)
            ends = [context.first_position + len(context) + request.schedule.num_tokens - 1 for context in contexts]
            if max(ends) > pool.capacity:
                raise ValueError(
                    f"prompt: expected at most {pool.capacity - request.schedule.num_tokens} tokens beside the image's "
                    f"{request.schedule.num_tokens}, got {max(map(len, contexts))}; shorten it"
                )
            # The prompt's last page is copied by the image; the full ones are shared.
            needed = sum(pool.pages_of(len(c) - 1) + pool.pages_of(request.num_slots) + 1 for c in contexts)
            if needed > pool.num_pages:
                raise ValueError(
                    f"prompt: an image needs {needed} pages of the key/value cache, which has {pool.num_pages}; "
                    "make the Engine with a larger kv_cache_bytes"
                )
        self.waiting.extend(job.images)

    def cancel(self, job: Job, error: Exception | None = None) -> None:
        """End `job`: its images leave and their pages come back. Others do not notice."""
        job.error = job.error or error
        self.waiting = deque(image for image in self.waiting if image.job is not job)
        for image in [image for image in self.running if image.job is job]:
            self._leave(image)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    # ------------------------------------------------------------------------------------------------------- the loop

    def step(self) -> None:
        """Let waiting images join, and decode every image under way one pass further."""
        self._admit()
        for batch in [batch for batch in self._batches.values() if batch.rows]:
            self._step_batch(batch)
        self._passes += 1
        jobs = list(dict.fromkeys(image.job for image in self.running))
        for job in jobs:
            job.passes += 1
        every_pass = any(job.every_pass for job in jobs)
        if every_pass or self._passes % self.poll_every == 0:
            self._poll(lag=self.poll_every > 1 and not every_pass)
            for job in jobs:
                self._tell(job)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch_size:
            image = self.waiting[0]
            try:
                self._begin(image)
            except PagesExhausted as error:
                prompt = image.job.request.prompts[image.index]
                if self.prompts.evict(keep=(prompt.conditional, prompt.unconditional)):
                    continue
                if not self.running:  # nothing will ever come back
                    self.cancel(image.job, error)
                    continue
                return
            except Exception as error:
                self.cancel(image.job, error)
                continue
            self.waiting.popleft()

    def _begin(self, image: Image) -> None:
        request, started = image.job.request, time.perf_counter()
        batch = self._batch(request)
        image.row = batch.begin(request, image.index)
        image.batch, image.started = batch, started
        image.job.started = image.job.started or started
        self.running.append(image)

    def _batch(self, request: Request) -> Batch:
        if request.group not in self._batches:
            self._batches = {group: batch for group, batch in self._batches.items() if batch.rows}
            self._batches[request.group] = Batch(
                self.model,
                self.prompts,
                request,
                self.max_batch_size,
                batch_invariant=self._batch_invariant,
                graphs=self._graphs,
                costs=self._costs,
            )
        return self._batches[request.group]

    def _step_batch(self, batch: Batch) -> None:
        images = [image for image in self.running if image.batch is batch]
        try:
            batch.step()
        except BaseException as error:  # the batch is somewhere inside a pass
            for image in images:
                self.cancel(image.job, error if isinstance(error, Exception) else None)
            del self._batches[batch.group]
            if not isinstance(error, Exception):
                raise
            return
        for image in images:
            image.passes += 1

    def _poll(self, *, lag: bool) -> None:
        """Learn how far every image is, and let the complete ones leave."""
        committed = {id(batch): batch.poll(lag=lag) for batch in self._batches.values() if batch.rows}
        now = time.perf_counter()
        for image in list(self.running):
            assert image.batch is not None
            image.num_committed = committed[id(image.batch)][image.row]
            if image.num_committed == image.job.request.schedule.num_tokens:
                image.codes = image.batch.codes(image.row)
                image.stats = image.batch.stats(image.row, now - image.started)
                self._leave(image)

    def _tell(self, job: Job) -> None:
        if job.on_step is not None and job.error is None:
            try:
                job.on_step(job.info())
            except Exception as error:
                self.cancel(job, error)

    def _leave(self, image: Image) -> None:
        assert image.batch is not None
        image.batch.end(image.row)
        image.batch = None
        self.running.remove(image)

"""The one thread that drives an engine."""

import logging
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from sjd_engine.engine import Engine
from sjd_engine.outputs import Finished, Generation, StepInfo, StreamEvent
from sjd_engine.serve.metrics import Metrics

logger = logging.getLogger("sjd_engine.serve")

WARM_UP_PROMPT = "0"  # a text, and a class for models that draw classes
LONGEST_RETRY = 60  # seconds


class QueueFullError(RuntimeError):
    """No room for a request; `retry_after` seconds may make some."""

    def __init__(self, retry_after: int):
        super().__init__(f"{retry_after} s")
        self.retry_after = retry_after


class NotServingError(RuntimeError):
    """The loop takes no requests: it is about to end, or has failed."""


class Ticket:
    """A request on its way: written by the loop, read by whoever waits for it.

    Args:
        arguments: of `Engine.submit`, the prompt among them.
        num_images: that they ask for.
        num_previews: of each image at most.
        notify: called by the loop's thread whenever there is something new in `take_previews`.

    Attributes:
        accepted: done once the engine has taken the request; carries its error where it has not.
        result: the images, or what ended the request.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        num_images: int,
        num_previews: int = 0,
        notify: Callable[[], None] = lambda: None,
    ):
        self.arguments, self.num_images, self.num_previews = arguments, num_images, num_previews
        self.accepted: Future[None] = Future()
        self.result: Future[Generation] = Future()
        self.accepted.set_running_or_notify_cancel()  # a waiter that gives up does not cancel them
        self.result.set_running_or_notify_cancel()
        self.number: int | None = None  # the engine's
        self.arrived = time.perf_counter()
        self.info: StepInfo | None = None
        self._notify = notify
        self._told = [0] * num_images  # previews of each image so far
        self._previews: dict[int, StreamEvent] = {}

    def due(self) -> list[int]:
        """Images to be previewed now: whose next share of tokens is committed, and whose last preview was taken. A
        client that reads slowly misses previews, and delays nobody."""
        if self.info is None or not self.num_previews:
            return []
        due = []
        for index, committed in zip(self.info.image_indices, self.info.num_committed, strict=True):
            share = committed * (self.num_previews + 1) // self.info.num_tokens
            if self._told[index] < share <= self.num_previews and index not in self._previews:
                self._told[index] = share
                due.append(index)
        return due

    def show(self, event: StreamEvent) -> None:
        self._previews[event.index] = event
        self._notify()

    def take_previews(self) -> list[StreamEvent]:
        """Those that were not taken yet."""
        return [self._previews.pop(index) for index in list(self._previews)]

    def on_step(self, info: StepInfo) -> None:
        self.info = info


class EngineLoop:
    """Takes requests from any thread and lets one thread decode them all.

    Args:
        engine: driven by nobody else from `start` to `stop`.
        capacity: images that may be under way or wait; a request that would exceed it is refused.
        metrics: told of everything that ends.
    """

    def __init__(self, engine: Engine, *, capacity: int, metrics: Metrics):
        self.engine, self.capacity, self.metrics = engine, capacity, metrics
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}  # by the engine's number; the loop's thread alone
        self._lock = threading.Lock()
        self._under_way: set[Ticket] = set()  # with those still in the inbox; with the lock
        self._open = False  # whether requests are taken; with the lock
        self._stopping = False
        self._counts: Counter[str] = Counter()  # requests accepted, and how they ended
        self._failure: BaseException | None = None
        self._image_seconds = 1.0  # of late
        self._thread = threading.Thread(target=self._run, name="sjd-engine", daemon=True)

    # ------------------------------------------------------------------------------------------------- from any thread

    def start(self, **arguments: Any) -> None:
        """Start the thread and decode one image with the arguments that requests have by default, so that the first
        client does not wait for what is made once. Raises: what ended it."""
        self._thread.start()
        ready: Future[None] = Future()
        self._inbox.put(lambda: self._warm_up(ready, arguments))
        ready.result()
        with self._lock:
            self._open = True

    def stop(self) -> None:
        """Take no more requests, and wait until all that were accepted have ended."""
        with self._lock:
            self._open = False
        self._inbox.put(self._stop)
        self._thread.join()
        accepted, answered = self._counts["accepted"], self._counts["stop"]
        logger.info("%d requests accepted, %d answered with images: %s", accepted, answered, dict(self._counts))

    @property
    def status(self) -> str:
        """ok, stopping, or failed."""
        if self._failure is not None:
            return "failed"
        return "ok" if self._open else "stopping"

    def submit(self, ticket: Ticket) -> None:
        """Queue a request. Raises: QueueFullError, NotServingError; nothing is queued then."""
        with self._lock:
            if not self._open:
                self.metrics.request_refused(self.status)
                raise NotServingError(self.status)
            num_images = sum(other.num_images for other in self._under_way)
            if num_images + ticket.num_images > self.capacity:
                self.metrics.request_refused("queue_full")
                raise QueueFullError(self._retry_after(num_images))
            self._under_way.add(ticket)
            self._inbox.put(lambda: self._begin(ticket))

    def cancel(self, ticket: Ticket, reason: str) -> None:
        """Give up a request, wherever it is; nothing happens where it has ended. reason: abort or timeout."""
        self._inbox.put(lambda: self._cancel(ticket, reason))

    def _retry_after(self, num_images: int) -> int:
        """Seconds until about half of `num_images` have left."""
        rounds = num_images / self.engine.max_batch_size
        return min(max(1, math.ceil(rounds * self._image_seconds / 2)), LONGEST_RETRY)

    # ------------------------------------------------------------------------------------------------ the loop's thread

    def _run(self) -> None:
        try:
            while not (self._stopping and not self._tickets and self._inbox.empty()):
                self._read_inbox()
                if self._tickets:
                    self.engine.step()
                    self._preview()
                    for finished in self.engine.collect():
                        self._finish(finished)
        except BaseException as error:  # a defect of the engine: nobody may wait for ever
            logger.exception("the engine's loop has failed")
            self._fail(error)

    def _read_inbox(self) -> None:
        """Everything in it; waits for something where there is nothing to decode."""
        if not self._tickets:
            self._inbox.get()()
        while not self._inbox.empty():  # nobody else takes from it
            self._inbox.get()()

    def _warm_up(self, ready: "Future[None]", arguments: dict[str, Any]) -> None:
        try:
            self.engine.generate(WARM_UP_PROMPT, progress=False, **arguments)
        except Exception as error:
            ready.set_exception(error)
        else:
            ready.set_result(None)

    def _stop(self) -> None:
        self._stopping = True

    def _begin(self, ticket: Ticket) -> None:
        on_step = ticket.on_step if ticket.num_previews else None
        try:
            ticket.number = self.engine.submit(callback_on_step=on_step, **ticket.arguments)
        except Exception as error:
            self.metrics.request_refused("invalid" if isinstance(error, ValueError | TypeError) else "error")
            ticket.accepted.set_exception(error)
            self._leave(ticket)
            return
        self._tickets[ticket.number] = ticket
        self._counts["accepted"] += 1
        ticket.accepted.set_result(None)

    def _cancel(self, ticket: Ticket, reason: str) -> None:
        if ticket.number is not None and self._tickets.pop(ticket.number, None) is not None:
            self.engine.cancel(ticket.number)
            self._end(ticket, reason, TimeoutError(reason))

    def _preview(self) -> None:
        for number, ticket in list(self._tickets.items()):
            try:
                events = [self.engine.preview(number, index) for index in ticket.due()]
            except Exception as error:  # pixels that cannot be made
                self.engine.cancel(number)
                self._finish(Finished(number, None, error))
                continue
            for event in events:
                if event is not None:
                    ticket.show(event)

    def _finish(self, finished: Finished) -> None:
        ticket = self._tickets.pop(finished.request_id)
        if finished.generation is None:
            logger.error("a request has failed", exc_info=finished.error)
            self._end(ticket, "error", finished.error)
            return
        for stats in finished.generation.stats:
            self._image_seconds += 0.1 * (stats.seconds - self._image_seconds)
            self.metrics.image_done(stats)
        ticket.result.set_result(finished.generation)
        self._end(ticket, "stop")

    def _end(self, ticket: Ticket, reason: str, error: BaseException | None = None) -> None:
        if error is not None:
            ticket.result.set_exception(error)
        self._counts[reason] += 1
        self.metrics.request_ended(reason, time.perf_counter() - ticket.arrived)
        self._leave(ticket)

    def _leave(self, ticket: Ticket) -> None:
        with self._lock:
            self._under_way.remove(ticket)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._open, self._failure = False, error
            for ticket in self._under_way:
                for future in (ticket.accepted, ticket.result):
                    if not future.done():
                        future.set_exception(error)

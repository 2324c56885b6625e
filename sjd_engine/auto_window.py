"""`window_size="auto"`: the window that takes the fewest seconds, not the fewest passes.

    seconds of a token = t(n W) min(1, u + c / W)

    t   seconds of a pass over n sequences, measured at a few windows; straight lines between.
    c   refreshes that a draft needs until it is as good as it gets: W tokens leave a window of W in c + u W passes.
    u   passes that a token costs where windows are endless: how hard the images are. Begins with what the method needs
        on the bundled model and follows what the images at hand have needed so far.

A window of 1 commits a token a pass, and is best where many images share a pass that the machine's arithmetic bounds.
On the bundled model the law gives the passes of an image at windows from 8 to 48 within 1 % (`maximal`: u = 0.15,
c = 2.0). Only counts of committed tokens and passes are read, so the law of the images stays as it is (rules C2, C3).
"""

import math
import time
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sjd_engine.models.block import Transformer

CANDIDATES = (1, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
MEASURED = (1, 8, 16, 32, 64)  # windows at which a pass is timed
DECIDE_EVERY = 4  # passes
ROUNDS, ENOUGH_SECONDS = 4, 1.0  # of timing: rounds, or fewer once they have taken so long
WORTH_A_CHANGE = 0.05  # share of the seconds that a change of windows must save
PRIOR_TOKENS = 64  # of an image's history that weigh as much as what is assumed before
LEAST_PASSES = 0.02  # u is at least this


@dataclass(frozen=True)
class Acceptance:
    """u and c of the module's formula."""

    passes: float
    refreshes: float


# By how drafts are refreshed; fitted on the bundled model.
PRIORS = {
    "fresh": Acceptance(0.29, 1.0),
    "reuse": Acceptance(0.15, 2.0),
    "maximal": Acceptance(0.15, 2.0),
    "gumbel": Acceptance(0.17, 1.8),
    "argmax": Acceptance(0.15, 2.0),
}


@dataclass(frozen=True)
class History:
    """What is known of an image on its way.

    windows: of its passes. num_committed: tokens after them. num_left: tokens still to come.
    """

    windows: Sequence[int]
    num_committed: int
    num_left: int


class PassCosts:
    """Seconds of a pass by the number of its tokens, those of all sequences together."""

    def __init__(self) -> None:
        self._points: list[tuple[int, float]] = []

    def measure(self, num_sequences: int, windows: Sequence[int], timer: Callable[[int], Callable[[], float]]) -> None:
        """Time passes larger than those that were timed before. They take turns, so that a slow moment of the machine
        falls on all of them, and the best time of each counts: the first one of a shape is slow.

        Args:
            windows: ascending. timer: makes what tells the seconds of one pass over windows of that size.
        """
        most = self._points[-1][0] if self._points else 0
        timers = {num_sequences * window: timer(window) for window in windows if num_sequences * window > most}
        seconds, spent = dict.fromkeys(timers, math.inf), 0.0
        for _ in range(ROUNDS):
            for num_tokens, time_pass in timers.items():
                taken = time_pass()
                seconds[num_tokens], spent = min(seconds[num_tokens], taken), spent + taken
            if spent > ENOUGH_SECONDS:
                break
        for num_tokens, least in seconds.items():
            before = self._points[-1][1] if self._points else 0.0
            self._points.append((num_tokens, max(before, least)))  # more tokens never take less time

    def __call__(self, num_tokens: int) -> float:
        """Seconds of a pass, on the straight line through the two nearest measurements."""
        if len(self._points) == 1:
            return self._points[0][1]
        right = min(max(bisect(self._points, (num_tokens, 0.0)), 1), len(self._points) - 1)
        (n0, t0), (n1, t1) = self._points[right - 1 : right + 1]
        return max(t0 + (t1 - t0) * (num_tokens - n0) / (n1 - n0), 0.0)


class AutoWindow:
    """Chooses the window of a batch, pass by pass.

    Args:
        refresh: that of the decoding method.
        largest: window there can be.
        costs: what passes are known to take.
    """

    def __init__(self, refresh: str, largest: int, costs: PassCosts):
        self._prior, self._costs = PRIORS[refresh], costs
        self._candidates = [window for window in CANDIDATES if window <= largest] or [largest]
        self._measured = [window for window in MEASURED if window <= largest] or [largest]

    def measure(self, num_sequences: int, timer: Callable[[int], Callable[[], float]]) -> None:
        """Learn what passes over `num_sequences` take; see `PassCosts.measure` for the timer."""
        self._costs.measure(num_sequences, self._measured, timer)

    def choose(self, current: int, num_sequences: int, histories: Sequence[History]) -> int:
        """The window of the passes to come: `current`, or the one that saves WORTH_A_CHANGE of the seconds.

        Args:
            num_sequences: that the transformer takes at once.
            histories: of the images that are decoded together; at least one.
        """
        passes = passes_of_a_token(self._prior, histories)
        left = max(1, *(image.num_left for image in histories))

        def seconds(window: int) -> float:
            of_a_token = min(1.0, passes + self._prior.refreshes / min(window, left))
            return self._costs(num_sequences * window) * of_a_token

        best = min(self._candidates, key=seconds)
        return best if seconds(best) < (1 - WORTH_A_CHANGE) * seconds(current) else current


def passes_of_a_token(prior: Acceptance, histories: Sequence[History]) -> float:
    """u, from passes and tokens of the images and PRIOR_TOKENS of the prior.

    An image's first c passes commit little, because nothing in its first window has been refreshed; they do not count.
    Neither do passes of one token, which have no drafts.
    """
    tokens, passes = float(PRIOR_TOKENS), PRIOR_TOKENS * prior.passes
    for image in histories:
        windows = [window for window in image.windows if window > 1]
        if windows:
            num_committed = image.num_committed - (len(image.windows) - len(windows))
            mean_inverse = sum(1 / window for window in windows) / len(windows)
            tokens += num_committed
            passes += max(len(windows) - prior.refreshes, 0.0)
            passes -= num_committed * prior.refreshes * mean_inverse
    return max(passes / tokens, LEAST_PASSES)


def seconds_of(run: Callable[[], None], transformer: Transformer) -> float:
    """What `run` takes on the device of `transformer`."""
    device = transformer.embedding.device
    wait(device)
    started = time.perf_counter()
    run()
    wait(device)
    return transformer.slowest(time.perf_counter() - started)


def wait(device: torch.device) -> None:
    """Until everything that was queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # sync: a measurement

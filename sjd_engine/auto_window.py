"""`window_size="auto"`: the window that takes the fewest seconds, not the fewest passes.

    seconds of a token = t(n W) (1 - s saved(W))

    t       seconds of a pass over n sequences, measured at a few windows; straight lines between.
    saved   share of its passes that an image of the bundled model is spared by windows of W, by refresh rule.
    s       how much of that the images at hand are spared: 1 to begin with, then what they have needed so far.

A window of 1 commits a token a pass, and is best where many images share a pass that the machine's arithmetic bounds.
Only counts of committed tokens and passes are read, so the law of the images stays as it is (rules C2, C3).
"""

import statistics
import time
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sjd_engine.models.block import Transformer

CANDIDATES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
# By refresh rule, at these windows: 32 images of 256 tokens, not below what a smaller window saves.
SAVED = {
    "fresh": (0, 0.298, 0.473, 0.572, 0.612, 0.632, 0.632, 0.637, 0.637, 0.637),
    "reuse": (0, 0.298, 0.480, 0.617, 0.697, 0.749, 0.775, 0.799, 0.810, 0.814),
    "maximal": (0, 0.299, 0.480, 0.608, 0.684, 0.730, 0.750, 0.765, 0.779, 0.779),
    "gumbel": (0, 0.282, 0.463, 0.591, 0.668, 0.715, 0.744, 0.754, 0.761, 0.765),  # of gumbel and exact, the middle
    "argmax": (0, 0.282, 0.463, 0.593, 0.680, 0.734, 0.757, 0.772, 0.781, 0.782),
}
MEASURED = (1, 4, 8, 12, 16, 32, 48)  # windows at which a pass is timed
DECIDE_EVERY = 4  # passes
ROUNDS, ENOUGH_SECONDS = 7, 1.0  # of timing: rounds, or fewer once they have taken so long
WORTH_A_CHANGE = 0.02  # share of the seconds that a change of windows must save
PRIOR_SAVED = 48  # passes spared that weigh as much as what is assumed before
START = 2  # tokens of an image that are spared no pass, because nothing in its first window has been refreshed
LEAST_PASSES = 0.02  # of a token

Points = Sequence[tuple[int, float]]


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
        """Time passes larger than those that were timed before. They take turns, and the middle one of their shares of
        a round counts: a slow moment of the machine falls on all of them, and a slower one on none.

        Args:
            windows: ascending. timer: makes what tells the seconds of one pass over windows of that size.
        """
        most = self._points[-1][0] if self._points else 0
        timers = {num_sequences * window: timer(window) for window in windows if num_sequences * window > most}
        rounds: list[list[float]] = []
        while timers and len(rounds) < ROUNDS and sum(map(sum, rounds)) < ENOUGH_SECONDS:
            rounds.append([time_pass() for time_pass in timers.values()])
        for i, num_tokens in enumerate(timers):
            share = statistics.median(seconds[i] / sum(seconds) for seconds in rounds)
            taken = share * statistics.median_low(
                map(sum, rounds)
            )  # of two the shorter one: the first of a shape is slow
            before = self._points[-1][1] if self._points else 0.0
            self._points.append((num_tokens, max(before, taken)))  # more tokens never take less time

    def __call__(self, num_tokens: int) -> float:
        """Seconds of a pass."""
        return max(line(self._points, num_tokens), 0.0)


class AutoWindow:
    """Chooses the window of a batch, pass by pass.

    Args:
        refresh: that of the decoding method.
        largest: window there can be.
        costs: what passes are known to take.
    """

    def __init__(self, refresh: str, largest: int, costs: PassCosts):
        self._saved, self._costs = list(zip(CANDIDATES, SAVED[refresh], strict=True)), costs
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
        scale = share_of(self._saved, histories)
        left = max(1, *(image.num_left for image in histories))

        def seconds(window: int) -> float:
            of_a_token = max(1 - scale * line(self._saved, min(window, left)), LEAST_PASSES)
            return self._costs(num_sequences * window) * of_a_token

        best = min(self._candidates, key=seconds)
        return best if seconds(best) < (1 - WORTH_A_CHANGE) * seconds(current) else current


def share_of(saved: Points, histories: Sequence[History]) -> float:
    """s, from passes and tokens of the images and PRIOR_SAVED. Passes of one token do not count: they have no draft."""
    spared = expected = float(PRIOR_SAVED)
    for image in histories:
        windows = [window for window in image.windows if window > 1]
        if windows:
            num_committed = image.num_committed - (len(image.windows) - len(windows))
            spared += num_committed - len(windows)
            mean = sum(count * line(saved, window) for window, count in Counter(windows).items()) / len(windows)
            expected += max(num_committed - START, 0) * mean
    return max(spared / expected, 0.0)


def line(points: Points, x: int) -> float:
    """The straight line through the two points nearest to x; through one, a level one."""
    if len(points) == 1:
        return points[0][1]
    right = min(max(bisect(points, (x, 0.0)), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1 : right + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


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

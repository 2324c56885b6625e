"""`window_size="auto"`: the window that takes the fewest seconds, not the fewest passes.

    seconds of a token = t(n W) k passes(W), where k passes(W) stays within 1 / W .. 1

    t        seconds of a pass over n sequences, measured at a few windows; straight lines between.
    passes   that a token of the bundled model needs in windows of W, by refresh rule.
    k        how many times as many the images at hand need: 1 to begin with, then what they have needed so far.

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
# By refresh rule, at these windows: 32 images of 256 tokens, not above what a smaller window needs.
PASSES = {
    "fresh": (1, 0.702, 0.527, 0.428, 0.388, 0.368, 0.368, 0.363, 0.363, 0.363),
    "reuse": (1, 0.702, 0.520, 0.383, 0.303, 0.251, 0.225, 0.201, 0.190, 0.186),
    "maximal": (1, 0.701, 0.520, 0.392, 0.316, 0.270, 0.250, 0.235, 0.221, 0.221),
    "gumbel": (1, 0.718, 0.537, 0.409, 0.332, 0.285, 0.256, 0.246, 0.239, 0.235),  # of gumbel and exact, the middle
    "argmax": (1, 0.712, 0.537, 0.407, 0.320, 0.266, 0.243, 0.228, 0.219, 0.218),
}
MEASURED = (1, 4, 8, 12, 16, 32)  # windows at which a pass is timed
DECIDE_EVERY = 4  # passes
ROUNDS, ENOUGH_SECONDS = 5, 1.0  # of timing: rounds, or fewer once they have taken so long
WORTH_A_CHANGE = 0.02  # share of the seconds that a change of windows must save
PRIOR_PASSES = 16  # of the images at hand that weigh as much as what is assumed before
START = 2  # tokens of an image that need a pass each, because nothing in its first window has been refreshed

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
        if not timers:
            return
        rounds: list[list[float]] = []
        while len(rounds) < ROUNDS and sum(map(sum, rounds)) < ENOUGH_SECONDS:
            rounds.append([time_pass() for time_pass in timers.values()])
        whole = statistics.median_low(map(sum, rounds))  # of two the shorter one: the first of a shape is slow
        for i, num_tokens in enumerate(timers):
            share = statistics.median(seconds[i] / sum(seconds) for seconds in rounds)
            before = self._points[-1][1] if self._points else 0.0
            self._points.append((num_tokens, max(before, share * whole)))  # more tokens never take less time

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
        self._passes, self._costs = list(zip(CANDIDATES, PASSES[refresh], strict=True)), costs
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
        times = times_as_many(self._passes, histories)
        left = max(1, *(image.num_left for image in histories))

        def seconds(window: int) -> float:
            filled = min(window, left)
            of_a_token = min(1.0, max(times * line(self._passes, filled), 1 / filled))
            return self._costs(num_sequences * window) * of_a_token

        best = min(self._candidates, key=seconds)
        return best if seconds(best) < (1 - WORTH_A_CHANGE) * seconds(current) else current


def times_as_many(passes: Points, histories: Sequence[History]) -> float:
    """k, from the images and PRIOR_PASSES. Passes of one token do not count: they have no drafts."""
    needed = expected = float(PRIOR_PASSES)
    for image in histories:
        windows = [window for window in image.windows if window > 1]
        if windows:
            num_committed = image.num_committed - (len(image.windows) - len(windows))
            mean = sum(count * line(passes, window) for window, count in Counter(windows).items()) / len(windows)
            needed += len(windows)
            expected += START + max(num_committed - START, 0) * mean
    return needed / expected


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

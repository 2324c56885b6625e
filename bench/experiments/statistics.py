"""Statistics of the experiments: intervals, histograms, and what a pass costs each token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sjd_engine.outputs import ImageStats

DETAIL_NATS = 1.0  # tokens with less entropy are background
RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A statistic and its bootstrap interval of 95 %."""

    value: float
    low: float
    high: float

    def rounded(self, digits: int = 4) -> list[float]:
        """[value, low, high], for documents."""
        return [round(float(x), digits) for x in (self.value, self.low, self.high)]


def interval(statistic: Callable[..., Any], *columns: Sequence[float], seed: int = 0) -> Interval:
    """The percentile bootstrap over prompts: columns are resampled together, so that pairs stay pairs.

    Args:
        statistic: of one array [..., N] for each column, over the last axis.
        columns: N numbers each, one for each prompt.
    """
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    count = len(arrays[0])
    chosen = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(statistic(*(array[chosen] for array in arrays)), (tail, 1 - tail))
    return Interval(float(statistic(*arrays)), float(low), float(high))


def mean(values: np.ndarray) -> np.ndarray:
    return values.mean(-1)


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Of the sums: images that take long count for more, as they do for whoever waits."""
    return above.sum(-1) / below.sum(-1)


def mean_difference(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left - right).mean(-1)


def pass_shares(stats: ImageStats) -> np.ndarray:
    """[rows, cols]: the part of a pass that each image token took; every pass is shared equally by what it commits."""
    return 1.0 / np.asarray(stats.committed_per_pass)[stats.acceptance_map]


def detail_compression(shares: np.ndarray, entropies: np.ndarray) -> float:
    """Tokens for each pass, of tokens with more than DETAIL_NATS of entropy alone; NaN where there are none."""
    detail = entropies.flatten() > DETAIL_NATS
    return float(detail.sum() / shares.flatten()[detail].sum()) if detail.any() else float("nan")


def committed_histogram(per_image: Sequence[Sequence[int]]) -> list[int]:
    """How many passes committed 0, 1, 2, … tokens."""
    return np.bincount([committed for image in per_image for committed in image]).tolist()


class Curve:
    """The mean of a quantity by an index: by distance from the frontier, or by the number of refreshes."""

    def __init__(self, length: int):
        self.sums, self.counts = np.zeros(length), np.zeros(length, dtype=np.int64)

    def add(self, index: np.ndarray, values: np.ndarray) -> None:
        """Indices beyond the length are left out."""
        inside = index < len(self.sums)
        np.add.at(self.sums, index[inside], values[inside])
        np.add.at(self.counts, index[inside], 1)

    def means(self) -> list[float | None]:
        """None where nothing was seen."""
        return [round(float(s / n), 4) if n else None for s, n in zip(self.sums, self.counts, strict=True)]

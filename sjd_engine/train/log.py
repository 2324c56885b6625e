"""The log of a fine-tuning: a line of JSON for every few steps."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from sjd_engine.train.sharding import rank
from sjd_engine.train.trainer import Nats

BANDS = (0.0, 0.3, 0.6, 0.8, 0.999, 1.0)  # times


def append(path: Path, entry: dict[str, Any]) -> None:
    """Add a line. Of several processes the first writes."""
    if rank() == 0:
        with open(path, "a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")


def summary(nats: Nats, prefix: str = "") -> dict[str, Any]:
    """Means, behind noisy tokens in each band of noise."""
    clean, noisy, times = nats
    bands = [noisy[(times > low) & (times <= high)] for low, high in pairwise(BANDS)]
    return {f"{prefix}clean": mean(clean), f"{prefix}noisy": [mean(band) if len(band) else None for band in bands]}


def mean(nats: Tensor) -> float:
    return round(nats.mean().item(), 4)


def read(path: Path) -> list[dict[str, Any]]:
    """Entries in the order of their steps; of a step that was done again after an interruption, the last."""
    lines = path.read_text(encoding="utf-8").splitlines()
    entries = {entry["step"]: entry for entry in map(json.loads, lines)}
    return [entries[step] for step in sorted(entries)]


def plot(path: Path, figure: Path) -> None:
    """Draw the nats of a log over its steps: trained pictures as lines, held-out ones as dots.

    Args:
        figure: file to write, .svg or .png.
    Raises: RuntimeError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError("plot: needs matplotlib; pip install 'sjd-engine[train]'") from None
    entries = read(path)
    canvas = Figure(figsize=(8, 5), layout="constrained")
    axes = canvas.add_subplot(xlabel="step", ylabel="nats per token")
    labels = ["clean", *(f"t {low:g} to {high:g}" for low, high in pairwise(BANDS[:-1])), "t = 1"]
    for column, label in enumerate(labels):
        for prefix, style in (("", "-"), ("held_out_", "o")):
            seen = [entry for entry in entries if f"{prefix}clean" in entry]
            values = [[entry[f"{prefix}clean"], *entry[f"{prefix}noisy"]][column] for entry in seen]
            shown = label if style == "-" else None
            axes.plot([entry["step"] for entry in seen], values, style, color=f"C{column}", label=shown)
    axes.legend()
    canvas.savefig(figure)

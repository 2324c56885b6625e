"""The experiments of bench/generate.py, which loads this folder by its path.

    settings.py     what a row of a table decodes, and which rows each sweep has
    prompts.py      the captions
    measure.py      settings on the same prompts in turns: passes, seconds, likelihood
    trace.py        what happens inside the window: laws of successive passes, drafts that stay
    statistics.py   intervals, histograms, curves
    sweeps.py       methods, window, topk, init, refinement, resolution
    batch.py        images together
    synthetic.py    the engine without a model
    control.py      a language model
    peer.py         transformers' generate
    report.py       tables, and files written whole
    plots.py        figures, from what report.py has written

An experiment takes the arguments of the command line and returns a `report.Result`.
"""

from pathlib import Path
from typing import Any

from . import batch, control, report, sweeps, synthetic

__all__ = ["EXPERIMENTS", "draw", "report"]

EXPERIMENTS = {
    "methods": sweeps.methods,
    "window": sweeps.window,
    "topk": sweeps.topk,
    "init": sweeps.init,
    "refinement": sweeps.refinement,
    "resolution": sweeps.resolution,
    "batch": batch.run,
    "synthetic": synthetic.run,
    "control": control.run,
}


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """The figures of an experiment's document, as files in `folder`."""
    from . import plots  # matplotlib takes a second, and most runs draw nothing

    return plots.draw(document, folder)

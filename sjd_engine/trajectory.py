"""What every pass does to every position: the record behind the plot of a window's way over an image."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sjd_engine.engine import Engine
from sjd_engine.files import written_whole
from sjd_engine.outputs import Generation
from sjd_engine.scheduler import Image
from sjd_engine.statistics import as_record

# A letter for each image token in each pass.
OUTSIDE = "."
NEW = "n"
REDRAWN = "r"
KEPT = "k"
COMMITTED = "c"
BEFORE = "#"


class Trajectory:
    """Watches one image.

    rows: a line for each pass, a letter for each image token in raster order: committed before this pass (#) or in it
        (c), a draft that the pass kept (k), drew again (r) or entered (n), or outside the window (.). The drafts of the
        first window count as entered by the first pass.
    """

    def __init__(self, image: Image):
        self.image, self.rows = image, list[str]()
        self._positions = image.job.request.schedule.image_positions.numpy()
        self._committed, self._drafted, self._codes = 0, 0, np.zeros(len(self._positions), dtype=np.int64)

    def note(self) -> None:
        """The state behind a pass, once for each of them."""
        image, positions = self.image, self._positions
        if image.passes == len(self.rows):  # it waits, or is complete
            return
        batch, codes, drafted = image.batch, image.codes, image.job.request.schedule.num_tokens
        if batch is not None:
            codes = batch.codes(image.row)
            drafted = min(image.num_committed + batch.decoder.window_size - 1, drafted)
        assert isinstance(codes, Tensor)
        now = codes.cpu().numpy()
        letters = np.where(now == self._codes, KEPT, REDRAWN)
        letters[positions >= self._drafted] = NEW
        letters[positions >= drafted] = OUTSIDE
        letters[positions < image.num_committed] = COMMITTED
        letters[positions < self._committed] = BEFORE
        self.rows.append("".join(letters.tolist()))
        self._committed, self._drafted, self._codes = image.num_committed, drafted, now.copy()


def watch(engine: Engine, prompt: str | list[str], **arguments: Any) -> tuple[Generation, list[list[str]]]:
    """Decode images as `Engine.generate` does, and note what every pass does. On a GPU it waits for each pass.

    Args:
        engine: with nothing else to do.
        prompt, arguments: those of `Engine.submit`.
    Returns: the generation, and the rows of each image's `Trajectory`: none where the slots of a window are not
        positions in their order (trees, zipar) or hold no tokens (sjd2).
    Raises: ValueError, TypeError for bad arguments; RuntimeError where the engine is at work.
    """
    if not engine.scheduler.idle:
        raise RuntimeError("watch: expected an engine with nothing to do; collect or cancel its requests first")
    engine.submit(prompt, callback_on_step=lambda info: None, **arguments)
    images = list(engine.scheduler.waiting)
    request = images[0].job.request
    odd = request.tree is not None or bool(request.method.rows_at_once) or request.method.denoises
    trajectories = [Trajectory(image) for image in images]
    more = True
    while more:
        more = engine.step()
        for trajectory in () if odd else trajectories:
            trajectory.note()
    done = engine.collect()[0]
    if done.generation is None:
        assert done.error is not None
        raise done.error
    return done.generation, [trajectory.rows for trajectory in trajectories]


def write_statistics(path: Path, prompt: str, generation: Generation, trajectories: list[list[str]]) -> None:
    """A line of JSON for each image of `generation`, all of `prompt`. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        for i, trajectory in enumerate(trajectories):
            about = {"prompt": prompt, "seed": generation.seeds[i], "method": generation.arguments["method"]}
            record = {**about, **as_record(generation.stats[i], generation.token_ids[i]), "trajectory": trajectory}
            file.write(json.dumps(record).encode() + b"\n")

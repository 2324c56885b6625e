"""Captured passes. CUDA itself runs where there is a GPU; everywhere else a stand-in for it does."""

import itertools
from collections.abc import Callable

import pytest
import torch

from sjd_engine import Engine
from sjd_engine.auto_window import AutoWindow
from sjd_engine.batch import Batch
from sjd_engine.graph import WARM_UP, Progress, StepGraphs
from sjd_engine.request import make_request


class FakeCapture:
    """Captures without executing, as CUDA does, and counts."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, call: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            call()

        return replay


class TestStepGraphs:
    def graphs(self, num_rows: int = 6) -> tuple[StepGraphs, list, FakeCapture]:
        passes, capture = [], FakeCapture()
        run = lambda rows, parity: passes.append((rows.tolist(), parity))  # noqa: E731
        return StepGraphs(run, num_rows, torch.device("cpu"), capture), passes, capture

    def test_every_pass_runs_once_whether_eager_or_replayed(self):
        graphs, passes, capture = self.graphs()
        for step in range(WARM_UP + 5):
            graphs.run([2], step % 2)
        assert passes == [([2], step % 2) for step in range(WARM_UP + 5)]
        assert (capture.captured, capture.replayed) == (2, 5)

    def test_sizes_are_filled_up_with_the_vacant_row(self):
        graphs, passes, _ = self.graphs()
        for rows in ([0], [0, 3], [0, 3, 5], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]):
            graphs.run(rows, 0)
        assert [rows for rows, _ in passes] == [[0], [0, 3], [0, 3, 5, 6], [0, 1, 2, 3, 4, 6], [0, 1, 2, 3, 4, 5]]

    def test_a_graph_reads_the_rows_of_its_pass(self):
        graphs, passes, capture = self.graphs()
        chosen = [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 0], [0, 1]]
        for step, rows in enumerate(chosen):
            graphs.run(rows, step % 2)
        assert [rows for rows, _ in passes] == chosen
        assert capture.captured == 2


class TestProgress:
    def test_a_lagging_poll_tells_what_the_last_one_asked_for(self):
        progress = Progress(2, torch.device("cpu"))
        told = [progress.poll(torch.tensor(counts), lag=True) for counts in ([1, 2], [3, 4], [5, 6])]
        assert told == [[0, 0], [1, 2], [3, 4]]
        assert progress.poll(torch.tensor([7, 8]), lag=False) == [7, 8]

    def test_counts_of_the_image_before_are_not_those_of_the_next(self):
        progress = Progress(2, torch.device("cpu"))
        progress.poll(torch.tensor([256, 9]), lag=True)
        progress.begin(0)
        assert progress.poll(torch.tensor([3, 10]), lag=True) == [0, 9]
        assert progress.poll(torch.tensor([4, 11]), lag=True) == [3, 10]

    def test_a_lagging_engine_draws_the_same_images(self, shallow):
        lagging = Engine(shallow.model, max_batch_size=2)
        lagging.scheduler.poll_every = 4
        arguments = {"num_images_per_prompt": 5, "window_size": 32, "output_type": "codes", "progress": False}
        out, expected = (e.generate("a cat", **arguments) for e in (lagging, shallow))
        assert torch.equal(out.token_ids, expected.token_ids)
        assert [s.nfe for s in out.stats] == [s.nfe for s in expected.stats]


def decode(engine: Engine, capture, **arguments) -> list[torch.Tensor]:
    """Three images of one prompt, begun at different passes, with passes captured by `capture` or eager for None."""
    arguments = {"window_size": 16, **arguments}
    request = make_request(engine.model, "noto red heart", num_images_per_prompt=3, seed=4, **arguments)
    batch = Batch(engine.model, engine.scheduler.prompts, request, 4, batch_invariant=False)
    if capture is not None:
        batch._graphs = StepGraphs(batch._fixed_pass, 4, engine.model.device, capture)
    codes: list[torch.Tensor] = [torch.empty(0)] * 3
    steps, row_of = 0, {}
    while len(row_of) < 3 or batch.rows:
        if steps % 4 == 0 and len(row_of) < 3:
            row_of[len(row_of)] = batch.begin(request, len(row_of))
        batch.step()
        steps += 1
        for index, row in row_of.items():
            if row in batch.rows and batch.poll()[row] == 256:
                codes[index] = batch.codes(row).cpu()
                batch.end(row)
    return codes


def test_captured_passes_give_the_images_of_eager_ones(shallow):
    capture = FakeCapture()
    for mine, eager in zip(decode(shallow, capture), decode(shallow, None), strict=True):
        assert (mine == eager).float().mean() > 0.5  # the number of rows changes the rounding
        assert torch.equal(mine[:8], eager[:8])
    assert capture.captured >= 2


def test_every_window_has_graphs_of_its_own(engine, monkeypatch):
    wanted, capture = itertools.cycle([8, 24]), FakeCapture()
    monkeypatch.setattr(AutoWindow, "choose", lambda *arguments: next(wanted))
    eager = decode(engine, None, method="exact")
    for mine, theirs in zip(decode(engine, capture, method="exact", window_size="auto"), eager, strict=True):
        assert (mine == theirs).float().mean() > 0.5  # the number of rows changes the rounding
        assert torch.equal(mine[:8], theirs[:8])
    assert capture.captured >= 4 + 2 * 4, "two windows, two parities, and what is timed for up to four rows"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnAGPU:
    def test_graphs_give_the_images_of_eager_passes(self):
        captured = Engine("emoji", device="cuda", dtype=torch.float32, batch_invariant=False, cuda_graphs=True)
        eager = Engine(captured.model, batch_invariant=False, cuda_graphs=False)
        images = [
            e.generate("a red apple", window_size=32, num_images_per_prompt=4, output_type="codes").token_ids.cpu()
            for e in (captured, eager)
        ]
        assert (images[0] == images[1]).float().mean() > 0.9

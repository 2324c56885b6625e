"""CUDA graphs of one decoding pass: hundreds of launches become one, and the host may run ahead of the device."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from sjd_engine import attention, native
from sjd_engine.models import ImageModel

WARM_UP = 3  # passes before a capture: Triton compiles and libraries choose their kernels in them


def obstacle(model: ImageModel, page_size: int) -> str:
    """Why passes of `model` cannot be captured; "" where they can."""
    if model.device.type != "cuda":
        return f"the model is on {model.device.type}"
    if not native.has_cuda():
        return "sjd_engine was built without CUDA; `SJD_CUDA=1 pip install .` with nvcc builds it"
    transformer = model.transformer
    head_dim = transformer.config.head_dim
    chosen = attention.backend(model.device, page_size=page_size, dtype=transformer.dtype, head_dim=head_dim)
    return f"{chosen.name} attention waits for the device" if attention.ATTENTIONS[chosen.name].syncs else ""


class StepGraphs:
    """Runs a pass, eagerly at first, then as a captured graph; one pair of graphs for each number of rows and shape.

    A pass writes one of two logits buffers and reads the other, so two graphs take turns. The number of rows is rounded
    up to a power of two and filled up with a row that is always vacant.

    Args:
        run: a pass over rows [R] int64 that writes the buffer of the given parity. It waits for nothing, and its shapes
            depend on R and on the caller's `shape` alone.
        num_rows: most rows of a pass; also the number of the vacant row.
        device: where the rows lie.
        capture: (call) -> what replays it, made without executing `call`.
    """

    def __init__(
        self,
        run: Callable[[Tensor, int], None],
        num_rows: int,
        device: torch.device,
        capture: "Callable[[Callable[[], None]], Callable[[], None]] | None" = None,
    ):
        self._run, self._num_rows, self._device = run, num_rows, device
        self.capture = CudaCapture() if capture is None else capture
        self._rows: dict[int, Tensor] = {}  # by size: where its graphs read the row numbers
        self._chosen: dict[int, list[int]] = {}  # by size: the row numbers that stand there
        self._eager_passes: dict[tuple[int, Hashable], int] = {}
        self._replays: dict[tuple[int, Hashable, int], Callable[[], None]] = {}  # by size, shape and parity

    def size(self, num_rows: int) -> int:
        """Rows of a pass over `num_rows`, those that fill it up among them."""
        return min(1 << (num_rows - 1).bit_length(), self._num_rows)

    def run(self, rows: Sequence[int], parity: int, shape: Hashable = None) -> None:
        """One pass over `rows`; parity 0 and 1 take turns. `shape`: what else the shapes of the pass depend on."""
        size = self.size(len(rows))
        filled = [*rows, *[self._num_rows] * (size - len(rows))]
        if size not in self._rows:
            self._rows[size] = torch.empty(size, dtype=torch.int64, device=self._device)
        if self._chosen.get(size) != filled:
            self._rows[size].copy_(torch.tensor(filled))
            self._chosen[size] = filled
        passes = self._eager_passes.get((size, shape), 0)
        if passes < WARM_UP:
            self._eager_passes[size, shape] = passes + 1
            self._run(self._rows[size], parity)
            return
        if (size, shape, parity) not in self._replays:
            self._replays[size, shape, parity] = self.capture(lambda: self._run(self._rows[size], parity))
        self._replays[size, shape, parity]()


class CudaCapture:
    """Captures calls into CUDA graphs that share one memory pool."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, call: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            call()
        return graph.replay


class Progress:
    """How far every row has come, as far as the host knows.

    A poll that lags tells what the poll before it asked for, so that the device has passes to work on while the host
    reads; only where that is not there yet does the host wait.

    Args:
        num_rows: B.
        device: of the counters.
    """

    def __init__(self, num_rows: int, device: torch.device):
        self._cuda = device.type == "cuda"
        self._counts = torch.zeros(num_rows, dtype=torch.int64, pin_memory=self._cuda)
        self._arrived: Any = None
        self._generations = [0] * num_rows  # images that have begun in a row
        self._asked = [-1] * num_rows  # the generations that the counts belong to

    def begin(self, row: int) -> None:
        """Another image begins in `row`: counts that are under way are not its own."""
        self._generations[row] += 1

    def poll(self, num_committed: Tensor, *, lag: bool) -> list[int]:
        """Tokens of every row, 0 where nothing is known of its image yet.

        Args:
            num_committed: [B] int64 on the device.
            lag: tell what the last poll asked for, and ask again.
        """
        if not lag:
            return num_committed.tolist()  # sync: the caller waits
        if self._arrived is not None:
            self._arrived.synchronize()  # sync: passes that were queued one poll ago
        counts = self._counts.tolist()  # sync: on the host already
        known = [
            count if asked == now else 0
            for count, asked, now in zip(counts, self._asked, self._generations, strict=True)
        ]
        self._counts.copy_(num_committed, non_blocking=True)
        self._asked = list(self._generations)
        if self._cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        return known

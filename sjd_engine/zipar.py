"""ZipDecoder: several grid rows at once, in place of a window of drafts. Lossy, for comparison."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from sjd_engine import ops
from sjd_engine.decoder import JacobiDecoder, Layout
from sjd_engine.methods import get_method
from sjd_engine.schedule import Schedule


class ZipDecoder(JacobiDecoder):
    """ZipAR and adaptive ZipAR, see `kernels.zipar`, with the interface of a JacobiDecoder.

    Its window has one slot for each token from the first one that is not known to the last that can be drawn; they are
    computed again in every pass, so that passes tell how fast the method is, and seconds do not.

    Args:
        local_window: tokens of the row above that a token waits for, from its own column on; >= 1.
        arguments: those of JacobiDecoder; the window size is `window_size_of`.
    """

    row_state = (*JacobiDecoder.row_state, "num_final", "draft_probs", "has_draft")
    decodes_rows = True

    def __init__(self, *, method: str, schedule: Schedule, local_window: int, **arguments: Any):
        device = arguments.get("device", "cpu")
        grid = schedule.grid(device)
        positions = schedule.image_positions.view(schedule.rows, schedule.cols).to(device)
        forced_ids = grid.row_start.new_full((schedule.num_tokens,), -1) if grid.forced_ids is None else grid.forced_ids
        self._plan = ops.ZipPlan(positions, forced_ids, local_window, get_method(method).rows_at_once == "adaptive")
        super().__init__(method=method, schedule=schedule, **arguments)

    @staticmethod
    def window_size_of(schedule: Schedule, local_window: int) -> int:
        """Slots that hold all rows under way: each is at least `local_window` columns behind the one above."""
        positions = schedule.image_positions
        stride = int((positions[schedule.cols :] - positions[: -schedule.cols]).max()) if schedule.rows > 1 else 0
        return min(schedule.num_tokens, (-(-schedule.cols // local_window) + 1) * max(stride, schedule.cols) + 1)

    def _first_state(self, seeds: Tensor) -> ops.WindowState:
        return ops.ZipState.of(super()._first_state(seeds), self._plan, self.vocab_size)

    def window(self) -> tuple[Tensor, Tensor]:
        return ops.zip_window(self._zip_state, self._plan, self.window_size)[:2]

    @property
    def layout(self) -> Layout:
        bias = ops.zip_window(self._zip_state, self._plan, self.window_size)[2]
        return replace(super().layout, window_bias=bias)

    def verify(
        self, logits: Tensor, previous_logits: Tensor | None = None, next_window_size: int | None = None
    ) -> ops.VerifyResult:
        """One pass; the logits of the one before are not read, and the window stays as it is."""
        self._check_logits(logits)
        return ops.zip_verify(logits, self._zip_state, self._plan, seeds=self._seeds, **self.warp_arguments)

    @property
    def _zip_state(self) -> ops.ZipState:
        assert isinstance(self._state, ops.ZipState)
        return self._state

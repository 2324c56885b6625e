"""SJD2: slots of the window begin as noise and are denoised, pass by pass, until they are ordinary drafts."""

from dataclasses import replace

import torch
from torch import Tensor

from sjd_engine import ops
from sjd_engine.denoise import NoiseSchedule
from sjd_engine.drafting import Drafts
from sjd_engine.models import ImageModel

VERIFIED = ("clean", "paper")  # which drafts may be accepted


class NoisyWindow:
    """Keeps the noise of every image, and what the transformer reads in the place of drafts.

    Tokens are drawn and verified as in every other method; this decides what stands in the slots when the next laws are
    computed. With "clean" a draft is accepted only where all slots before it hold tokens, not noise: its law is then
    the model's own, and the images follow the model exactly. With "paper" any draft may be accepted, by a law that
    noise has told, and its keys and values stay.

    Args:
        plan: of the noise, see `noise_plan`.
        grid: of the images.
        batch_size: B, rows of the decoder.
        window_size: W.
        verify: "clean" or "paper".
    Source: see `sjd_engine.kernels.noise`.
    """

    def __init__(self, plan: ops.NoisePlan, grid: ops.Grid, *, batch_size: int, window_size: int, verify: str):
        self._plan, self._grid, self._clean = plan, grid, verify == "clean"
        device, hidden = plan.embeddings.device, plan.embeddings.shape[1]
        self._state = self._first_state(torch.zeros(batch_size, dtype=torch.int64, device=device))
        self._inputs = plan.embeddings.new_zeros(batch_size, window_size - 1, hidden)
        self._levels = torch.zeros(batch_size, window_size - 1, dtype=torch.int32, device=device)

    def _first_state(self, seeds: Tensor) -> ops.NoiseState:
        hidden = self._plan.embeddings.shape[1]
        return ops.NoiseState.new(seeds, self._grid.num_tokens, hidden, self._plan.steps, self._grid.forced_ids)

    def begin(self, rows: slice, seeds: Tensor) -> None:
        """Other images begin in `rows`, with the seeds [R] of the decoder."""
        first, none = self._first_state(seeds), torch.zeros_like(seeds)
        tokens = none.new_zeros(len(seeds), 1 + self._grid.num_tokens)  # nothing is lowered, so none is read
        num_slots = self._levels.shape[1]
        if num_slots:
            self._inputs[rows], self._levels[rows] = ops.denoise(first, self._plan, tokens, none, none, num_slots)
        self._state.levels[rows], self._state.noisy[rows] = first.levels, first.noisy

    @property
    def most_accepted(self) -> Tensor | None:
        """[B] int64, drafts before the first noise of each window; None where noise is no obstacle."""
        return (self._levels == 0).cumprod(1).sum(1) if self._clean else None

    def __call__(self, drafts: Drafts) -> None:
        """Lower the levels of what the pass had a slot for. No sync."""
        num_committed = drafts.state.num_committed
        lowered = drafts.first + drafts.window_size - 1 - num_committed
        inputs, levels = ops.denoise(
            self._state, self._plan, drafts.state.tokens, num_committed, lowered, drafts.num_drafts
        )
        self._inputs.copy_(inputs)
        self._levels.copy_(levels)

    def embed(self, windows: Tensor, rows: Tensor) -> Tensor:
        """What the transformer reads: [R, W, hidden] embeddings of the tokens of some rows, noise in its slots."""
        noisy = (self._levels[rows] > 0)[..., None]
        return torch.cat((windows[:, :1], torch.where(noisy, self._inputs[rows], windows[:, 1:])), 1)


def noise_plan(model: ImageModel, steps: int | None) -> ops.NoisePlan:
    """The constants for a model with a denoiser. steps: K, passes from noise to a draft; None for the denoiser's."""
    assert model.denoiser is not None
    denoiser = model.denoiser
    schedule = denoiser.schedule if steps is None else replace(denoiser.schedule, steps=steps)
    return ops.NoisePlan(
        model.transformer.embedding[model.first_code :][: model.num_codes].detach().contiguous(),
        denoiser.mean.detach(),
        denoiser.std.detach(),
        1 / denoiser.std.detach(),
        denoiser.encode(schedule.times().to(model.device)).detach(),
        *(table.float().to(model.device) for table in steps_down(schedule)),
    )


def steps_down(schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """(keep, pull), both [K + 1] float64: a DDIM step down from level k is keep[k] e_k + pull[k] e_0; 0 for k = 0."""
    alpha, sigma = schedule.mixture(schedule.times())
    keep = torch.cat((sigma[:1], sigma[:-1] / sigma[1:]))
    return keep, torch.cat((sigma[:1], alpha[:-1] - alpha[1:] * keep[1:]))

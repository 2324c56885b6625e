"""What the engine gives back."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class ImageStats:
    """How one image was decoded.

    nfe: forward passes of the transformer, the prompt's and the tail's included; a guided pair counts once.
    num_tokens: tokens generated, forced ones included.
    committed_per_pass: tokens committed by each pass.
    window_sizes: of each pass.
    seconds: from the moment the image began until its last token.
    acceptance_map: [rows, cols] int64, the pass in which each image token was committed, from 0.
    zero_residual, nonfinite_rows, zero_draft_prob: counters of rare events, see `kernels.state.WindowState`.
    """

    nfe: int
    num_tokens: int
    committed_per_pass: list[int]
    window_sizes: list[int]
    seconds: float
    acceptance_map: np.ndarray
    zero_residual: int
    nonfinite_rows: int
    zero_draft_prob: int

    @property
    def step_compression(self) -> float:
        """Tokens for each forward pass; 1.0 is one-token-a-pass sampling."""
        return self.num_tokens / self.nfe


@dataclass(frozen=True)
class Generation:
    """The images of one call, prompt by prompt.

    images: PIL images, an array [N, H, W, 3] ("np") or tensor [N, 3, H, W] ("pt") in [0, 1], or None ("codes").
    token_ids: [N, rows * cols] int64 image codes in raster order, forced tokens removed.
    stats: one for each image.
    seeds: the seed of each image.
    arguments: of `generate` with every default filled in; with a prompt and its seed they draw an image again, unless
        their window_size is "auto".
    """

    images: Any
    token_ids: Tensor
    stats: list[ImageStats]
    seeds: list[int]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Finished:
    """A submitted request that has ended: `generation`, or the `error` that ended it."""

    request_id: int
    generation: Generation | None
    error: Exception | None


@dataclass(frozen=True)
class StepInfo:
    """One pass, for callbacks and progress.

    image_indices: the images of the call that have begun, those that are complete among them.
    num_committed: tokens each of them has so far.
    num_tokens: tokens each of them will have.
    passes: passes since the first of them began.
    seconds: since then.
    """

    image_indices: list[int]
    num_committed: list[int]
    num_tokens: int
    passes: int
    seconds: float


@dataclass(frozen=True)
class StreamEvent:
    """An image while it is decoded: committed tokens, the draft tokens of the window, grey beyond.

    index: which image of the call.
    image: as `output_type` asks; None for "codes".
    num_committed, num_drafted, num_tokens: positions that are final, that carry a draft, and that there will be.
    nfe: passes so far.
    stats: the image's statistics once it is complete, None before.
    """

    index: int
    image: Any
    num_committed: int
    num_drafted: int
    num_tokens: int
    nfe: int
    stats: ImageStats | None

"""SJDPipeline: the engine behind the calls that users of diffusers know."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sjd_engine.engine import Engine
from sjd_engine.outputs import ImageStats, StepInfo
from sjd_engine.request import at_least

OUTPUT_TYPES = ("pil", "np", "pt")


@dataclass(frozen=True)
class PipelineOutput:
    """images: a list ("pil"), an array [N, H, W, 3] ("np") or a tensor [N, 3, H, W] ("pt") in [0, 1]; an empty list
    where the call was interrupted. stats, seeds: one for each image."""

    images: Any
    stats: list[ImageStats]
    seeds: list[int]


class Interrupted(Exception):  # noqa: N818
    """Somebody has set `SJDPipeline._interrupt`."""


class SJDPipeline:
    """Text to images, called as a pipeline of diffusers is.

    Args:
        engine: decodes; it stays where it is.

        >>> pipe = SJDPipeline.from_pretrained("emoji", dtype=torch.float32)
        >>> image = pipe("a red apple", generator=torch.Generator().manual_seed(0)).images[0]
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._interrupt = False
        self._load: Callable[..., Engine] | None = None
        self._progress: bool | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **arguments: Any,
    ) -> "SJDPipeline":
        """Load a checkpoint.

        Args:
            path, dtype, device, arguments: those of `Engine`.
            torch_dtype: an older name of dtype.
        Raises: see `Engine`.
        """
        if dtype is not None and torch_dtype is not None:
            raise ValueError("dtype: expected either dtype or torch_dtype, got both")

        def load(device: torch.device | str | None, dtype: torch.dtype | None) -> Engine:
            return Engine(path, device=device, dtype=dtype, **arguments)

        pipe = cls(load(device, dtype or torch_dtype))
        pipe._load = load
        return pipe

    @property
    def device(self) -> torch.device:
        return self.engine.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformer."""
        return self.engine.model.transformer.dtype

    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> "SJDPipeline":
        """Go to a device, a dtype or both. The checkpoint is loaded again there, for weights are packed for where they
        are multiplied.

        Raises: ValueError where the pipeline was made of an engine and would have to move.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        wanted = self.device if device is None else torch.device(device)
        moves = wanted.type != self.device.type or wanted.index not in (None, self.device.index)
        if not moves and dtype in (None, self.dtype):
            return self
        if self._load is None:
            raise ValueError(
                f"to: expected {self.device} and {self.dtype}, where this pipeline's engine is, got {wanted} and "
                f"{dtype or self.dtype}; use SJDPipeline.from_pretrained, or make the engine there"
            )
        self.engine = self._load(wanted, self.dtype if dtype is None else dtype)
        return self

    def set_progress_bar_config(self, *, disable: bool | None = None) -> None:
        """disable: True for no bar, False for one, None for one on a terminal."""
        self._progress = None if disable is None else not disable

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        window_size: int | str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["SJDPipeline", int, int, dict[str, Any]], Any] | None = None,
        **decoding: Any,
    ) -> PipelineOutput | tuple[Any]:
        """Draw images.

        Args:
            prompt, height, width, num_images_per_prompt: those of `Engine.generate`.
            negative_prompt: ignored where guidance is off.
            num_inference_steps: ignored with a warning: an image takes as many passes as its tokens need.
            guidance_scale: 1 and less turn guidance off; None for the model's default.
            generator: what the seeds are drawn from, a 64-bit number for each image: from one generator all of them,
                from a list one each. None draws from torch's own. A generator that has been used gives other images.
            window_size: tokens of a forward pass; None for the model's default. With "auto" the images of a seed depend
                on the machine, see `Engine.generate`.
            output_type: pil, np or pt.
            return_dict: False for a tuple of the images alone.
            callback_on_step_end: called after every pass with this pipeline, the pass from 0 on, the tokens that are
                still missing, and {"num_committed": tokens of each image that has begun, "num_tokens": of a whole one}.
                What it returns is ignored. What it raises reaches the caller.
            decoding: further arguments of `Engine.generate`: method, temperature, top_k, ...
        Returns: PipelineOutput. Where `_interrupt` is set meanwhile, by the callback or another thread, the call ends
            with the pass under way and has no images.
        Raises: ValueError, TypeError for bad arguments, before anything runs.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: expected one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        if num_inference_steps is not None:
            warnings.warn("num_inference_steps: ignored, an image takes the passes that its tokens need", stacklevel=2)
        if guidance_scale is not None and guidance_scale <= 1:
            guidance_scale, negative_prompt = 1.0, None
        num_prompts = len(prompt) if isinstance(prompt, list | tuple) else 1
        num_images = num_prompts * at_least("num_images_per_prompt", num_images_per_prompt, 1)
        self._interrupt = False

        def on_step(info: StepInfo) -> None:
            if callback_on_step_end is not None:
                missing = num_images * info.num_tokens - sum(info.num_committed)
                told = {"num_committed": info.num_committed, "num_tokens": info.num_tokens}
                callback_on_step_end(self, info.passes - 1, missing, told)
            if self._interrupt:
                raise Interrupted

        try:
            out = self.engine.generate(
                prompt,
                negative_prompt=negative_prompt,
                height=height,
                width=width,
                guidance_scale=guidance_scale,
                num_images_per_prompt=num_images_per_prompt,
                seed=draw_seeds(generator, num_images),
                window_size=window_size,
                output_type=output_type,
                callback_on_step=on_step,
                progress=self._progress,
                **decoding,
            )
        except Interrupted:
            return PipelineOutput([], [], []) if return_dict else ([],)
        return PipelineOutput(out.images, out.stats, out.seeds) if return_dict else (out.images,)


def draw_seeds(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[int]:
    """A seed for each of `count` images: all from one generator, or one from each of a list.

    Raises: ValueError where a list has not one generator for each image, TypeError where it is something else.
    """
    if not isinstance(generator, torch.Generator | Sequence | None):
        raise TypeError(f"generator: expected a torch.Generator or a list of them, got {generator!r}")
    if isinstance(generator, Sequence):
        if len(generator) != count:
            raise ValueError(f"generator: expected one or a list of {count}, one for each image, got {len(generator)}")
        return [draw_seeds(one, 1)[0] for one in generator]
    device = "cpu" if generator is None else generator.device
    return torch.randint(-(1 << 63), (1 << 63) - 1, (count,), generator=generator, device=device).tolist()

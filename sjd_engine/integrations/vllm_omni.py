"""`vllm serve MODEL --omni --model-class-name SJDPipeline`: vLLM-Omni's server, this engine.

Interface: a diffusion pipeline out of the tree, `forward(DiffusionRequestBatch) -> list[DiffusionOutput]`
(vllm_omni/diffusion/worker/request_batch.py), registered by the entry point `vllm_omni.general_plugins`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sjd_engine.engine import Engine
from sjd_engine.images import convert
from sjd_engine.pipeline import draw_seeds

ARCHITECTURE = "SJDPipeline"


def register() -> None:
    """Make the pipeline known to the process; it may be called again."""
    from vllm_omni.diffusion.registry import register_diffusion_model

    register_diffusion_model(
        ARCHITECTURE, __name__, OmniPipeline.__name__, post_process_func_name=get_post_process_func.__name__
    )


def get_post_process_func(od_config: Any) -> Any:
    """What turns an output of the pipeline into PIL images."""
    return lambda pixels: convert(pixels, "pil")


class OmniPipeline(nn.Module):
    """All requests of a batch, decoded together by continuous batching; each fails alone.

    Args:
        od_config: the stage's; its `model`, `dtype` and `max_num_seqs` are read.
        prefix: not used.
    """

    supports_request_batch = True
    dummy_run_num_frames = 0  # no request to warm up with: its size need not be one of the model's

    def __init__(self, *, od_config: Any, prefix: str = ""):
        super().__init__()
        self.od_config = od_config

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the checkpoint by this package's own reader. Returns: no names, for this module has no parameters.

        Args:
            weights: not read; vLLM-Omni finds none for a pipeline without `weights_sources`.
        """
        from vllm_omni.diffusion.distributed.utils import get_local_device

        with default_dtype(torch.float32):  # the loader has set the model's, which tables and buffers must not take
            self.engine = Engine(
                self.od_config.model,
                device=get_local_device(),
                dtype=self.od_config.dtype,
                max_batch_size=max(8, self.od_config.max_num_seqs),
            )
        return set()

    def forward(self, req: Any) -> list[Any]:
        """A DiffusionOutput for each request: pixels [N, 3, H, W] in [0, 1], or the text of its error.

        Args:
            req: DiffusionRequestBatch. Of the sampling parameters height, width, num_outputs_per_prompt, seed or
                generator, and guidance_scale are read; `extra_args` are further arguments of `Engine.generate`.
        """
        from vllm_omni.diffusion.data import DiffusionOutput

        with torch.inference_mode(False):  # the engine's state outlives the mode that the runner is in
            return [DiffusionOutput(**found) for found in self._draw(req)]

    def _draw(self, req: Any) -> list[dict[str, Any]]:
        """`output` or `error` of each request."""
        found: list[dict[str, Any]] = [{} for _ in req.prompts]
        numbers = {}
        for i, (prompt, params) in enumerate(zip(req.prompts, req.sampling_params_list, strict=True)):
            try:
                numbers[self.engine.submit(**self._arguments(prompt, params))] = i
            except (ValueError, TypeError) as error:
                found[i] = {"error": str(error)}
        while self.engine.step():
            pass
        for done in self.engine.collect():
            failed = {"error": str(done.error)}
            found[numbers[done.request_id]] = {"output": done.generation.images} if done.generation else failed
        return found

    def _arguments(self, prompt: Any, params: Any) -> dict[str, Any]:
        """Those of `Engine.submit`."""
        texts = {"prompt": prompt} if isinstance(prompt, str) else prompt
        count = params.num_outputs_per_prompt
        guidance_scale = max(1.0, params.guidance_scale) if params.guidance_scale_provided else None
        return {
            "prompt": texts.get("prompt"),
            "negative_prompt": None if guidance_scale == 1 else texts.get("negative_prompt") or None,
            "height": params.height,
            "width": params.width,
            "num_images_per_prompt": count,
            "seed": draw_seeds(params.generator, count) if params.seed is None else params.seed,
            "guidance_scale": guidance_scale,
            "window_size": None,
            "output_type": "pt",
            **(params.extra_args or {}),
        }


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch's default dtype for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)

"""A loader and a sampler. What stands at 0 is the model's default.

ComfyUI runs nodes in torch's inference mode. An engine lives longer than one run, so nothing of it is made in there.
"""

from typing import Any, ClassVar

import comfy.model_management
import comfy.utils
import torch

from sjd_engine import Engine, StepInfo
from sjd_engine.methods import METHODS

DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class SJDLoader:
    """A checkpoint folder, or "emoji", as an engine on ComfyUI's device."""

    CATEGORY = "sjd_engine"
    FUNCTION = "load"
    RETURN_TYPES = ("SJD_ENGINE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"model": ("STRING", {"default": "emoji"}), "dtype": (list(DTYPES),)}}

    @torch.inference_mode(False)
    def load(self, model: str, dtype: str) -> tuple[Engine]:
        return (Engine(model, device=comfy.model_management.get_torch_device(), dtype=DTYPES[dtype]),)


class SJDSampler:
    """Images [N, H, W, 3] in [0, 1] of a prompt; image i has the seed + i."""

    CATEGORY = "sjd_engine"
    FUNCTION = "sample"
    RETURN_TYPES = ("IMAGE",)
    WIDGETS: ClassVar[dict[str, Any]] = {
        "engine": ("SJD_ENGINE",),
        "prompt": ("STRING", {"multiline": True, "default": "a red apple"}),
        "negative_prompt": ("STRING", {"multiline": True, "default": ""}),
        "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}),
        "num_images": ("INT", {"default": 1, "min": 1, "max": 64}),
        "method": (list(METHODS), {"default": "maximal"}),
        "window_size": ("INT", {"default": 0, "min": 0, "max": 1024}),
        "guidance_scale": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 30.0, "step": 0.1}),
        "temperature": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 2.0, "step": 0.05}),
        "width": ("INT", {"default": 0, "min": 0, "max": 4096, "step": 8}),
        "height": ("INT", {"default": 0, "min": 0, "max": 4096, "step": 8}),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": cls.WIDGETS}

    @torch.inference_mode(False)
    def sample(
        self,
        engine: Engine,
        prompt: str,
        negative_prompt: str,
        seed: int,
        num_images: int,
        method: str,
        window_size: int,
        guidance_scale: float,
        temperature: float,
        width: int,
        height: int,
    ) -> tuple[torch.Tensor]:
        """Draw; raises ComfyUI's own exception where the user interrupts."""
        bar = comfy.utils.ProgressBar(num_images)

        def on_step(info: StepInfo) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(sum(info.num_committed), num_images * info.num_tokens)

        out = engine.generate(
            prompt,
            negative_prompt=negative_prompt.strip() or None,
            seed=[(seed + i) % 2**64 for i in range(num_images)],
            num_images_per_prompt=num_images,
            method=method,
            window_size=window_size or None,
            guidance_scale=guidance_scale or None,
            temperature=temperature or None,
            width=width or None,
            height=height or None,
            output_type="np",
            callback_on_step=on_step,
            progress=False,
        )
        return (torch.from_numpy(out.images),)


NODE_CLASS_MAPPINGS = {"SJDLoader": SJDLoader, "SJDSampler": SJDSampler}
NODE_DISPLAY_NAME_MAPPINGS = {"SJDLoader": "SJD loader", "SJDSampler": "SJD sampler"}

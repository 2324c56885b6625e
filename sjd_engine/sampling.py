"""Sampling parameters."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How logits become the law a token is drawn from; applied in the order of the fields below.

    guidance_scale: s >= 1 of classifier-free guidance, uncond + s * (cond - uncond); 1 turns it off.
    temperature: > 0.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the fewest most likely tokens with at least this mass, in (0, 1]; 1 keeps all.

    Raises: ValueError, TypeError naming the argument, what was expected and what it got.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name}: expected a number, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value}")
        if self.guidance_scale < 1:
            raise ValueError(f"guidance_scale: expected >= 1 (1 turns guidance off), got {self.guidance_scale}")
        if self.temperature <= 0:
            raise ValueError(
                f"temperature: expected > 0, got {self.temperature}; for the most likely image use method='jacobi'"
            )
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int):
            raise TypeError(f"top_k: expected an int, got {self.top_k!r}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected >= 0 (0 keeps all tokens), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected 0 < top_p <= 1, got {self.top_p}")

    def in_use(self, vocab_size: int) -> tuple[str, ...]:
        """The parameters that change something; sequences of one batch have the same ones in use."""
        arguments = self.warp_arguments(1, vocab_size, torch.device("cpu"))
        return tuple(name for name, column in arguments.items() if column is not None)

    def warp_arguments(self, batch_size: int, vocab_size: int, device: torch.device) -> dict[str, Tensor | None]:
        """The [B] tensors that `kernels.reference.warp` takes; None where a parameter changes nothing."""

        def column(value: float, neutral: float, dtype: torch.dtype) -> Tensor | None:
            return None if value == neutral else torch.full((batch_size,), value, dtype=dtype, device=device)

        return {
            "guidance_scale": column(self.guidance_scale, 1.0, torch.float32),
            "temperature": column(self.temperature, 1.0, torch.float32),
            "top_k": column(0 if self.top_k >= vocab_size else self.top_k, 0, torch.int64),
            "top_p": column(self.top_p, 1.0, torch.float32),
        }

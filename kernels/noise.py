"""Noisy embeddings of a window, in plain PyTorch: the definition of correct for the fused denoise kernels.

Every position of an image begins as noise at level K. A pass lowers the positions that had a slot in it by one level:

    e_{k-1} = alpha_{k-1} e_0 + sigma_{k-1} (e_k - alpha_k e_0) / sigma_k       (DDIM, eta = 0)

e_0 is the normalised embedding of the token that the pass left at the position. At level 0 that is all: the slot holds
an ordinary draft. Forced positions begin there.

Source: Teng et al., "Speculative Jacobi-denoising decoding" (arXiv 2510.08994); Song et al., "Denoising diffusion
implicit models" (arXiv 2010.02502), equation 12.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import philox


@dataclass(frozen=True)
class NoisePlan:
    """The constants of the noise.

    embeddings: [V, hidden], of the image codes, in the dtype that the transformer reads.
    mean, std, inverse: [hidden] float32, of normalised embeddings e: (embedding - mean) * inverse, inverse = 1 / std.
    encodings: [K + 1, hidden] float32, what tells the transformer the level; row 0 is not read.
    keep, pull: [K + 1] float32, a step down from level k: keep[k] e_k + pull[k] e_0. Row 0 is not read.
    """

    embeddings: Tensor
    mean: Tensor
    std: Tensor
    inverse: Tensor
    encodings: Tensor
    keep: Tensor
    pull: Tensor

    @property
    def steps(self) -> int:
        """K."""
        return len(self.keep) - 1


@dataclass
class NoiseState:
    """What a batch carries from pass to pass.

    levels: [B, T] int32, of every position; 0 is no noise.
    noisy: [B, T, hidden] float32, e of every position, normalised.
    """

    levels: Tensor
    noisy: Tensor

    @classmethod
    def new(
        cls, seeds: Tensor, num_tokens: int, hidden_size: int, steps: int, forced_ids: Tensor | None
    ) -> "NoiseState":
        """Nothing but noise, drawn from the images' seeds [B]. forced_ids: [T] int64, see `state.Grid`."""
        positions = torch.arange(num_tokens, device=seeds.device).expand(len(seeds), -1)
        levels = torch.full_like(positions, steps, dtype=torch.int32)
        if forced_ids is not None:
            levels = torch.where(forced_ids >= 0, 0, levels)
        return cls(levels, gaussian(seeds, positions, hidden_size))


def gaussian(seeds: Tensor, positions: Tensor, size: int) -> Tensor:
    """[B, N, size] float32 standard normal noise of each (seed, position), by Box and Muller: words 0 and 1 of a block
    give two numbers, 2 and 3 two more."""
    words = philox.draw_words(seeds, positions, torch.zeros_like(seeds), philox.NOISE, -(-size // 4))
    uniforms = philox.uniform(words)
    radii = (-2 * uniforms[0::2].log()).sqrt()
    angles = uniforms[1::2] * (2 * math.pi)
    normal = torch.stack((radii * angles.cos(), radii * angles.sin()), -1)  # [2, B, N, blocks, 2]
    return normal.permute(1, 2, 3, 0, 4).flatten(2)[..., :size].float()


def denoise(
    state: NoiseState, plan: NoisePlan, tokens: Tensor, num_committed: Tensor, lowered: Tensor, num_slots: int
) -> tuple[Tensor, Tensor]:
    """Lower the levels of the next window's drafts, and say what the transformer reads in their slots.

    Args:
        state: updated in place, at the positions of the window.
        tokens: [B, 1 + T + 2 W] int64, see `state.WindowState`.
        num_committed: [B] int64. Slots hold positions num_committed + 0 .. num_slots - 1.
        lowered: [B] int64, slots of each window whose positions had a slot in the pass before.
        num_slots: N drafts of the next window.
    Returns: ([B, N, hidden] of the embeddings' dtype, [B, N] int32 levels). At level 0 and past the image's end the
        first has no meaning; compiled backends leave it unwritten.
    Source: module docstring; every operation rounds once, in this order, in every backend.
    """
    last = state.levels.shape[1] - 1
    rows = torch.arange(num_slots, device=tokens.device)
    positions = num_committed[:, None] + rows
    inside, positions = positions <= last, positions.clamp_max(last)
    level = torch.where(inside, state.levels.gather(1, positions), 0)
    wide = positions[..., None].expand(-1, -1, state.noisy.shape[2])
    noisy = state.noisy.gather(1, wide)
    codes = tokens.gather(1, positions + 1).clamp(0, len(plan.embeddings) - 1)
    clean = (plan.embeddings[codes].float() - plan.mean) * plan.inverse
    step = (level > 0) & (rows < lowered[:, None])
    lower = plan.keep[level][..., None] * noisy + plan.pull[level][..., None] * clean
    noisy = torch.where(step[..., None], lower, noisy)
    level = level - step.int()
    inputs = (noisy * plan.std + plan.mean) + plan.encodings[level]
    sequences = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(positions)[inside]
    state.levels[sequences, positions[inside]] = level[inside]
    state.noisy[sequences, positions[inside]] = noisy[inside]
    return inputs.to(plan.embeddings.dtype), level

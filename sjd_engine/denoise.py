"""Noisy embeddings in the place of drafts: the parts that training and decoding by SJD2 share.

A slot of the window holds, instead of a token x, a mixture of its normalised embedding e_0 and noise:

    e_t = alpha(t) e_0 + sigma(t) eps,   t from 1 (nothing but noise) down to 0 (the token itself)

and the transformer reads denormalise(e_t) + encode(t). Every pass says what the token may be, and a DDIM step brings
the slot one level nearer to it.

Source: Teng et al., "Speculative Jacobi-denoising decoding for accelerating autoregressive text-to-image generation"
(arXiv 2510.08994). The paper leaves schedule and encoding open: rectified flow with the spacing of Karras et al.,
"Elucidating the design space of diffusion-based generative models" (arXiv 2206.00364), equation 5, and sinusoids with
a two-layer network.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES = 32  # of the timestep encoding, in pairs of sine and cosine
KINDS = ("flow", "cosine")


@dataclass(frozen=True)
class NoiseSchedule:
    """How much noise each level holds.

    kind: "flow", alpha = 1 - t and sigma = t, or "cosine", alpha = cos(pi t / 2) and sigma = sin(pi t / 2).
    steps: K >= 1 levels above 0.
    rho: > 0, how closely the low levels lie; 1 spaces them evenly, Karras et al. take 7.
    least: t of level 1, in (0, 1].

    Raises: ValueError naming the argument, what was expected and what it got.
    """

    kind: str = "flow"
    steps: int = 25
    rho: float = 7.0
    least: float = 0.02

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.steps < 1:
            raise ValueError(f"steps: expected >= 1, got {self.steps}")
        if not self.rho > 0:
            raise ValueError(f"rho: expected > 0, got {self.rho}")
        if not 0 < self.least <= 1:
            raise ValueError(f"least: expected a time in (0, 1], got {self.least}")

    def times(self) -> Tensor:
        """[K + 1] float64: t of every level, 0 at level 0 and 1 at level K."""
        if self.steps == 1:
            return torch.tensor([0.0, 1.0], dtype=torch.float64)
        share = torch.arange(self.steps, dtype=torch.float64) / (self.steps - 1)
        low = self.least ** (1 / self.rho)
        return torch.cat((share.new_zeros(1), (low + share * (1 - low)) ** self.rho))

    def mixture(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of times in [0, 1]."""
        if self.kind == "flow":
            return 1 - times, times
        return (times * math.pi / 2).cos(), (times * math.pi / 2).sin()


class Denoiser(nn.Module):
    """What a transformer needs beside its weights to read noisy embeddings.

    The last layer of the timestep encoding begins at zero: before the training the transformer reads the noise alone.

    Args:
        hidden_size: of the transformer.
        schedule: of the noise, with the number of levels that decoding takes unless it is told another.

    Attributes:
        mean, std: [hidden], of the image rows of the token embedding that the noise is relative to; 0 and 1 without
            normalisation.
    """

    def __init__(self, hidden_size: int, schedule: NoiseSchedule):
        super().__init__()
        self.schedule = schedule
        self.mean = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.std = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.w_in = nn.Parameter(torch.empty(hidden_size, 2 * FREQUENCIES))
        self.b_in = nn.Parameter(torch.empty(hidden_size))
        self.w_out = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.b_out = nn.Parameter(torch.empty(hidden_size))

    @classmethod
    def new(
        cls, image_embeddings: Tensor, schedule: NoiseSchedule, seed: int = 0, *, normalise: bool = True
    ) -> "Denoiser":
        """Untrained, for the image rows [V, hidden] of a token embedding; without `normalise` the noise is as large for
        every model, whatever its embeddings are."""
        denoiser = cls(image_embeddings.shape[1], schedule)
        rows = image_embeddings.float()
        denoiser.mean.data, denoiser.std.data = rows.mean(0), rows.std(0, correction=0).clamp_min(1e-6)
        if not normalise:
            denoiser.mean.data.zero_()
            denoiser.std.data.fill_(1)
        generator = torch.Generator().manual_seed(seed)
        denoiser.w_in.data.normal_(0, (2 * FREQUENCIES) ** -0.5, generator=generator)
        for zero in (denoiser.b_in, denoiser.w_out, denoiser.b_out):
            zero.data.zero_()
        return denoiser

    def normalise(self, embeddings: Tensor) -> Tensor:
        """[..., hidden] token embeddings -> float32 ones of mean 0 and variance 1 in every dimension."""
        return (embeddings.float() - self.mean) / self.std

    def encode(self, times: Tensor) -> Tensor:
        """times [...] -> [..., hidden] float32."""
        frequencies = torch.exp(torch.arange(FREQUENCIES, device=times.device) * (-math.log(1000.0) / FREQUENCIES))
        angles = times.float()[..., None] * 1000 * frequencies
        waves = torch.cat((angles.sin(), angles.cos()), -1)
        return F.linear(F.silu(F.linear(waves, self.w_in, self.b_in)), self.w_out, self.b_out)

    def forward(self, embeddings: Tensor, eps: Tensor, times: Tensor) -> Tensor:
        """Token embeddings [..., hidden] under noise eps [..., hidden] at times [...] -> [..., hidden] float32, what
        the transformer reads."""
        alpha, sigma = (part[..., None] for part in self.schedule.mixture(times))
        noisy = alpha * self.normalise(embeddings) + sigma * eps
        return noisy * self.std + self.mean + self.encode(times)

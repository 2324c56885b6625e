"""Does a method draw from the model's own law? Tests on the tokens it drew, for models whose law nobody can enumerate.

Tokens are teacher-forced: one causal pass over the finished image gives the law of every token as one-token-a-pass
sampling would have had it. Where the tokens follow these laws, all of this holds whatever the model is:

    T2  surprisal martingale   sum(-log p(x) - H) / sqrt(sum Var) is N(0, 1). Finds images that are too likely or too
                               unlikely: the drift of SJD++, in nats for each token.
    T3  sorted randomised PIT  u = (mass of the tokens more likely than x) + U p(x), U uniform, is uniform, independent
                               from token to token. Finds mass that moved between likely and unlikely tokens with no
                               drift. Tokens are sorted by probability: in the order of the vocabulary it sees little.
                               A chi-square of `BINS` classes in each stratum of entropy; the strata's are added.
    support                    tokens that the law excludes (top-k, top-p): none, but for rounding at the edge.

Every law is known before its token is drawn, so the tests need no independence between tokens or images.

Rounding is the floor of any such claim: passes of W tokens and passes of one token give laws that differ by its
amount, and no method can be nearer to one-token-a-pass sampling than that. `floor` measures it.

Sources: the martingale is standard for a sequence of conditional laws; randomised PIT: Rosenblatt, "Remarks on a
multivariate transformation", 1952, and Brockwell, "Universal residuals: a multivariate transformation", 2007.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sjd_engine.models.base import ImageModel, Prompt
from sjd_engine.ops import warp
from sjd_engine.sampling import SamplingParams
from sjd_engine.testing import Scores, teacher_forced_logits

BINS = 20  # classes of u
STRATA = (0.5, 1.5, 2.5, 4.0)  # nats of entropy that divide the laws
LEAST = 5 * BINS  # tokens of a stratum, else it is left out: five are expected in each class
NO_SPREAD = 1e-6  # nats: all laws are uniform or certain, and what is left is rounding
POWER = 0.99  # with which a law that is off as far as `detectable_...` says is found


@dataclass(frozen=True)
class Evidence:
    """What the tokens of one method say.

    num_tokens: scored, those outside the support left out of T2 and T3.
    drift: mean of -log p(x) - H in nats; > 0 is too unlikely. drift_z, drift_p: T2, two-sided.
    pit_chi_square, pit_freedom, pit_p: T3.
    outside, outside_p: tokens that the law excludes, and the chance of as many through rounding.
    detectable_drift: smallest drift in nats that as many tokens show with 99 % chance at this significance.
    detectable_shift: the same for mass that moved between the classes of T3, as a total variation, where it is spread
        evenly over them; less is enough where it moved between few.
    rejected: one of the three p-values is below `significance` / 3.
    """

    num_tokens: int
    drift: float
    drift_z: float
    drift_p: float
    pit_chi_square: float
    pit_freedom: int
    pit_p: float
    outside: int
    outside_p: float
    detectable_drift: float
    detectable_shift: float
    rejected: bool


def examine(scores: Scores, *, seed: int, significance: float = 1e-3, floor: float = 0.0) -> Evidence:
    """T2, T3 and the support of the scored tokens, Bonferroni-corrected for the three of them.

    Args:
        scores: of images drawn by the method, see `testing.score_tokens`.
        seed: of the uniforms of T3.
        significance: of all three together.
        floor: total variation between the laws that the method drew from and the scored ones, see `floor`.
    Raises: ValueError where no token is left to examine.
    """
    possible = scores.log_probs.isfinite()
    num_tokens, outside = int(possible.sum()), int((~possible).sum())
    if not num_tokens:
        raise ValueError(f"examine: scores must hold possible tokens, got {outside} that their laws exclude")
    alpha = significance / 3
    surprises = (-scores.log_probs - scores.entropies)[possible]
    spread = scores.variances[possible].sum().clamp_min(0).sqrt().item()
    z = surprises.sum().item() / spread if spread > NO_SPREAD else 0.0
    chi_square, freedom = pit_chi_square(pit(scores, seed)[possible], scores.entropies[possible])
    drift_p, pit_p = math.erfc(abs(z) / math.sqrt(2)), chi_square_tail(chi_square, freedom)
    outside_p = poisson_tail(outside, floor * (num_tokens + outside))
    return Evidence(
        num_tokens=num_tokens,
        drift=surprises.mean().item(),
        drift_z=z,
        drift_p=drift_p,
        pit_chi_square=chi_square,
        pit_freedom=freedom,
        pit_p=pit_p,
        outside=outside,
        outside_p=outside_p,
        detectable_drift=detectable_drift(spread, num_tokens, alpha),
        detectable_shift=detectable_shift(freedom, num_tokens, alpha),
        rejected=min(drift_p, pit_p, outside_p) < alpha,
    )


def pit(scores: Scores, seed: int) -> Tensor:
    """u of every token, the shape of the scores, float64; uniform on (0, 1) where the tokens follow their laws."""
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(scores.above.shape, generator=generator, dtype=torch.float64)
    return (scores.above.cpu() + uniforms * scores.log_probs.exp().cpu()).clamp(0, 1 - 1e-12)


def pit_chi_square(u: Tensor, entropies: Tensor) -> tuple[float, int]:
    """(sum of the strata's chi-squares against uniform classes, degrees of freedom), of u and entropies [n]."""
    stratum = torch.bucketize(entropies.cpu(), torch.tensor(STRATA, dtype=torch.float64))
    classes = (stratum * BINS + (u * BINS).long()).bincount(minlength=BINS * (len(STRATA) + 1)).view(-1, BINS).double()
    classes = classes[classes.sum(1) >= LEAST]
    expected = classes.sum(1, keepdim=True) / BINS
    return ((classes - expected) ** 2 / expected).sum().item(), (BINS - 1) * len(classes)


def chi_square_tail(statistic: float, freedom: int) -> float:
    """The chance of at least `statistic`; 1 where nothing was counted."""
    from scipy.stats import chi2

    return float(chi2.sf(statistic, freedom)) if freedom else 1.0


def poisson_tail(count: int, mean: float) -> float:
    """The chance of at least `count` events where `mean` are expected."""
    from scipy.stats import poisson

    return float(poisson.sf(count - 1, mean)) if count else 1.0


def detectable_drift(spread: float, num_tokens: int, alpha: float) -> float:
    """Nats for each token. spread: standard deviation of the sum of all surprisals."""
    from scipy.stats import norm

    return float((norm.isf(alpha / 2) + norm.ppf(POWER)) * spread / num_tokens)


def detectable_shift(freedom: int, num_tokens: int, alpha: float) -> float:
    """Total variation t that moves every class by 2 t / BINS of the tokens: a noncentrality of 4 t^2 for each token.

    Returns: infinity where nothing was counted.
    """
    from scipy.optimize import brentq
    from scipy.stats import chi2, ncx2

    if not freedom:
        return math.inf
    edge = chi2.isf(alpha, freedom)
    noncentrality = brentq(lambda value: ncx2.sf(edge, freedom, value) - POWER, 1e-3, 100 * edge)
    return math.sqrt(noncentrality / (4 * num_tokens))


# ------------------------------------------------------------------------------------------------ the floor of rounding


def floor(
    model: ImageModel, prompt: Prompt, codes: Tensor, params: SamplingParams, window_size: int
) -> tuple[float, float]:
    """Mean total variation between the laws of passes of `window_size` tokens and those of (passes of one token, one
    pass over all): what T4 and what T2 and T3 have to live with.

    Args:
        codes: [N, T] token ids as the window holds them, forced ones included.
    """

    def laws(tokens_a_pass: int | None) -> Tensor:
        contexts = prompt.contexts(guided=params.guidance_scale > 1)
        logits = [teacher_forced_logits(model, context, codes, tokens_a_pass) for context in contexts]
        arguments = params.warp_arguments(len(codes), model.num_codes, codes.device)
        return warp(torch.stack(logits) if len(logits) > 1 else logits[0], **arguments)[0].softmax(-1)

    windows = laws(window_size)
    one, whole = (0.5 * (windows - laws(tokens)).abs().sum(-1).double().mean().item() for tokens in (1, None))
    return one, whole


def oracle_p(num_different: int, num_tokens: int, floor: float) -> float:
    """T4, the chance that rounding alone makes so many images of `exact` leave those of `ar` with the same seeds.

    A draw by shared Gumbel noise from two laws of total variation t differs with probability 2 t / (1 + t) at most, and
    an image leaves its twin at the first such token.

    Args:
        num_tokens: drawn by one of the methods until each image left its twin, or was complete.
        floor: the mean total variation between windows and passes of one token.
    """
    return poisson_tail(num_different, num_tokens * 2 * floor / (1 + floor))

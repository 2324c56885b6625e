"""The arithmetic of a decision, bit for bit the same in every backend.

A draw by inverse CDF turns the last bit of a float sum into another token: for a vocabulary of 16,384 about one draw in
ten thousand. So nothing here depends on the order of a sum or on a library's exp and log:

    exp, log       polynomials of float32 multiplications and additions, written out, never fused (no FMA)
    weights        fixed point: a float32 in [0, 1] counts as the integer floor(w * 2^44); sums of integers are exact
    draw           the first token whose cumulative integer weight exceeds floor(word * total / 2^32)

The C++ twin is csrc/arithmetic.h, the Triton twin kernels/device.py; their constants are checked against these.
"""

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
MAGIC = 12582912.0  # 1.5 * 2^23: adding and subtracting it rounds a float32 to the nearest integer
MIN_EXPONENT = -64.0  # weights below 2^-44 count as nothing; stopping here keeps all numbers normal
# 2^f = 1 + f P(f) on [-1/2, 1/2], relative error 2e-9; ln(1 + r) = r P(r) on [-1/2, 0], relative error 3e-8: Chebyshev
# fits in float64, coefficients rounded to float32, lowest first.
EXP2 = (
    0.6931471824645996,
    0.24022647738456726,
    0.055503323674201965,
    0.00961843691766262,
    0.0013398873852565885,
    0.00015353361959569156,
)
LOG1P = (
    1.0,
    -0.49999284744262695,
    0.33370062708854675,
    -0.2428050935268402,
    0.2696126401424408,
    0.2035384625196457,
    1.2576686143875122,
    1.6958105564117432,
    1.441107153892517,
)
WEIGHT_BITS = 44
ONE = 1 << WEIGHT_BITS


def horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def exp(x: Tensor) -> Tensor:
    """exp(x) of float32 x <= 0, at least 2^-64; exp(0) is 1."""
    t = (x * LOG2_E).clamp_min(MIN_EXPONENT)
    whole = (t + MAGIC) - MAGIC
    f = t - whole
    return torch.ldexp(horner(EXP2, f) * f + 1.0, whole.int())


def minus_log(mantissa_minus_one: Tensor, exponent: Tensor) -> Tensor:
    """-ln((1 + r) 2^k) of float32 r in [-1/2, 0] and integer-valued float32 k."""
    return -(horner(LOG1P, mantissa_minus_one) * mantissa_minus_one + exponent * LN_2)


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel noise -log(-log(1 - x)), float32, of x = (word + 1/2) / 2^32.

    Large noise, which decides an arg-max, comes from small x, where float32 has all its resolution.
    """
    upper = words < 1 << 31
    x = (torch.where(upper, words, WORD - words).float() + 0.5) * 2.0**-32
    mantissa, exponent = torch.frexp(x)
    nothing = torch.zeros_like(x)
    first = minus_log(torch.where(upper, -x, mantissa - 1.0), torch.where(upper, nothing, exponent.float()))
    mantissa, exponent = torch.frexp(first)
    return minus_log(mantissa - 1.0, exponent.float())


def fixed_point(weights: Tensor) -> Tensor:
    """float32 weights in [0, 1] as int64 multiples of 2^-44, rounded down. Sums of up to 2^18 of them fit."""
    return (weights.double() * ONE).long()


def residual(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """max(p - q, 0), unnormalised."""
    return (target_probs - draft_probs).clamp_min_(0)


def normalise(weights: Tensor) -> Tensor:
    """The law that `draw` draws from, float32: what it counts of each weight, scaled to sum to 1; zeros where it counts
    nothing.

    Args:
        weights: [..., V] float32 in [0, 1].
    """
    total = fixed_point(weights).sum(-1, keepdim=True)
    scale = torch.where(total > 0, ONE / total.double(), 0.0).float()
    return (weights * ONE).floor() / ONE * scale  # a float32 that is rounded down is still one


def draw(weights: Tensor, words: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds its share word / 2^32 of the total.

    Args:
        weights: [..., V] float32 in [0, 1], not all below 2^-44.
        words: [...] int64 in 0..2^32-1.
    Returns: [...] int64. A token of zero weight is never drawn.
    """
    cdf = fixed_point(weights).cumsum(-1)
    total = cdf[..., -1]
    # floor(word * total / 2^32) in 64 bits: the low product wraps, and its high half is read unsigned.
    target = words * (total >> 32) + ((words * (total & WORD) >> 32) & WORD)
    return torch.searchsorted(cdf, target[..., None], right=True).squeeze(-1)

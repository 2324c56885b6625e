"""What the fused kernels are made of: `arithmetic` and `philox` for Triton, and a tile of a row of logits.

A row of V logits is read in NUM_TILES tiles of TILE. With one tile its logits stay in registers (`first_tile`); with
more, every sweep reads and combines them again, which costs L2 traffic and no registers.

A constexpr stands right of its operand: to its left, the interpreter loses the type.

Every function equals its namesake in arithmetic.py or reference.py bit for bit. Kernels that use them must be compiled
with enable_fp_fusion=False: a fused multiply-add rounds once where the definition rounds twice.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import arithmetic, philox

LOG2_E = tl.constexpr(arithmetic.LOG2_E)
LN_2 = tl.constexpr(arithmetic.LN_2)
MAGIC = tl.constexpr(arithmetic.MAGIC)
MIN_EXPONENT = tl.constexpr(arithmetic.MIN_EXPONENT)
E0, E1, E2, E3, E4, E5 = (tl.constexpr(c) for c in arithmetic.EXP2)
L0, L1, L2, L3, L4, L5, L6, L7, L8 = (tl.constexpr(c) for c in arithmetic.LOG1P)
HIGH_SCALE = tl.constexpr(2.0**23)  # a float32 in [0, 1] is split in 23 high bits and WEIGHT_BITS - 23 low ones
LOW_BITS = tl.constexpr(arithmetic.WEIGHT_BITS - 23)
LOW_SCALE = tl.constexpr(2.0 ** (arithmetic.WEIGHT_BITS - 23))
ONE = tl.constexpr(float(arithmetic.ONE))
WORD = tl.constexpr(arithmetic.WORD)
WINDOW, GUMBEL = tl.constexpr(philox.WINDOW), tl.constexpr(philox.GUMBEL)
NEGATIVE_INFINITY = tl.constexpr(float("-inf"))
INFINITY = tl.constexpr(float("inf"))

# ---------------------------------------------------------------------------------------------------------- arithmetic


@triton.jit
def exp(x):
    t = tl.maximum(x * LOG2_E, MIN_EXPONENT)
    whole = (t + MAGIC) - MAGIC
    f = t - whole
    series = ((((f * E5 + E4) * f + E3) * f + E2) * f + E1) * f + E0
    bits = (series * f + 1.0).to(tl.int32, bitcast=True) + (whole.to(tl.int32) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def minus_log(r, k):
    series = (((((((r * L8 + L7) * r + L6) * r + L5) * r + L4) * r + L3) * r + L2) * r + L1) * r + L0
    return -(series * r + k * LN_2)


@triton.jit
def frexp(x):
    """(mantissa - 1, exponent) of positive normal x, mantissa in [1/2, 1)."""
    bits = x.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    return mantissa - 1.0, ((bits >> 23) - 126).to(tl.float32)


@triton.jit
def gumbel(words):
    upper = (words >> 31) == 0
    x = (tl.where(upper, words, words ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    r, k = frexp(x)
    first = minus_log(tl.where(upper, -x, r), tl.where(upper, 0.0, k))
    r, k = frexp(first)
    return minus_log(r, k)


@triton.jit
def fixed_point(weights):
    scaled = weights * HIGH_SCALE
    high = scaled.to(tl.int32)
    low = ((scaled - high.to(tl.float32)) * LOW_SCALE).to(tl.int32)
    return (high.to(tl.int64) << LOW_BITS) + low.to(tl.int64)


@triton.jit
def share(word, total):
    """floor(word * total / 2^32): the product's low half wraps, and its high part is read unsigned."""
    low = ((word * (total & WORD)) >> 32) & WORD
    return word * (total >> 32) + low


@triton.jit
def counter_words(seed, position, iteration, PURPOSE: tl.constexpr):
    """The four words of a position in this iteration for a purpose, as int64."""
    zero = position.to(tl.uint32) ^ position.to(tl.uint32)
    c0, c1 = position.to(tl.uint32), zero + iteration.to(tl.uint32)
    k0, k1 = (seed & WORD).to(tl.uint32), ((seed >> 32) & WORD).to(tl.uint32)
    a, b, c, d = tl.philox_impl(c0, c1, zero + PURPOSE, zero, zero + k0, zero + k1)
    return a.to(tl.int64), b.to(tl.int64), c.to(tl.int64), d.to(tl.int64)


@triton.jit
def window_words(seed, position, iteration):
    """Those of the window."""
    return counter_words(seed, position, iteration, WINDOW)


@triton.jit
def gumbel_tile(seed, position, tile, TILE: tl.constexpr):
    """[TILE] float32: the fixed noise of a position for the tokens of a tile."""
    block = (tile * (TILE // 4) + tl.arange(0, TILE // 4)).to(tl.uint32)
    zero = block ^ block
    k0, k1 = (seed & WORD).to(tl.uint32), ((seed >> 32) & WORD).to(tl.uint32)
    a, b, c, d = tl.philox_impl(zero + position.to(tl.uint32), zero, (block << 8) | GUMBEL, zero, zero + k0, zero + k1)
    return tl.interleave(tl.interleave(gumbel(a), gumbel(c)), tl.interleave(gumbel(b), gumbel(d)))


# --------------------------------------------------------------------------------------------------------------- a row


class Row(NamedTuple):
    """A row of logits in memory.

    first: [TILE] float32, its logits after `combine` where one tile holds them; None where sweeps read them.
    ptr, stride: address of token 0 and distance of tokens. pair: distance to the unconditional row.
    guidance, inv_temperature: float32 or None.
    """

    first: Any
    ptr: Any
    stride: Any
    pair: Any
    vocab: Any
    guidance: Any
    inv_temperature: Any


class Law(NamedTuple):
    """See `reference.RowLaw`."""

    peak: Any
    scale: Any
    cut: Any
    cut_id: Any


@triton.jit
def combine(row, ids, mask):
    """Logits of tokens `ids` (a tensor or a scalar) after guidance and temperature; -inf where not finite."""
    offsets = ids.to(tl.int64) * row.stride
    z = tl.load(row.ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if row.guidance is not None:
        unconditional = tl.load(row.ptr + row.pair + offsets, mask=mask, other=0.0).to(tl.float32)
        z = unconditional + row.guidance * (z - unconditional)
    if row.inv_temperature is not None:
        z = z * row.inv_temperature
    finite = mask & (tl.abs(z) < INFINITY)  # false for NaN
    z = tl.where(z == 0.0, 0.0, z)  # no negative zero: ties are bitwise
    return tl.where(finite, z, NEGATIVE_INFINITY)


@triton.jit
def tile_ids(tile, TILE: tl.constexpr):
    return tile * TILE + tl.arange(0, TILE)


@triton.jit
def tile_logits(row, tile, TILE: tl.constexpr, NUM_TILES: tl.constexpr):
    """[TILE] float32 of a row after guidance and temperature; -inf beyond the vocabulary."""
    if NUM_TILES == 1:
        return row.first
    ids = tile_ids(tile, TILE)
    return combine(row, ids, ids < row.vocab)


@triton.jit
def weight(z, ids, law):
    """exp(z - peak) of kept tokens, 0 of others; 1 in a row without a finite logit (peak -inf)."""
    kept = (z > law.cut) | ((z == law.cut) & (ids.to(tl.float32) <= law.cut_id))
    weights = tl.where(kept, exp(tl.where(kept, z - law.peak, 0.0)), 0.0)
    return tl.where(law.peak == NEGATIVE_INFINITY, 1.0, weights)


@triton.jit
def tile_weights(row, law, tile, TILE: tl.constexpr, NUM_TILES: tl.constexpr):
    """[TILE] float32; 0 beyond the vocabulary."""
    ids = tile_ids(tile, TILE)
    return tl.where(ids < row.vocab, weight(tile_logits(row, tile, TILE, NUM_TILES), ids, law), 0.0)


@triton.jit
def order_key(z):
    """int32 keys in the order of float32 z."""
    bits = z.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_order_key(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)

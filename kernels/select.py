"""Where top-k and top-p cut a row: the value of the last token kept, and its id among equals.

Equal to `reference.row_law`, without a sort. Values are compared as int32 keys of the same order. One tile: the rank is
bracketed by bisection over keys, each step a count in registers, beginning next to the cut that the same position had
in the pass before, from which it has seldom moved far. More tiles: a radix search, four digits of eight bits, each one
sweep with a histogram. top-p bisects over the integer weight above a key in both.
"""

import triton
import triton.language as tl

from .device import (
    NEGATIVE_INFINITY,
    Law,
    fixed_point,
    from_order_key,
    order_key,
    tile_ids,
    tile_logits,
    tile_weights,
    weight,
)

LOWEST_KEY = tl.constexpr(-2139095041)  # of -inf
FIRST_STEP = tl.constexpr(1 << 16)  # of the gallop: a 128th of a binade
NUM_DIGITS = tl.constexpr(256)


@triton.jit
def top_k_key_in_registers(z, k, peak, guess):
    """The key of the k-th largest entry: gallop from `guess` until it is bracketed, then bisect."""
    keys = order_key(z)
    low = tl.cast(LOWEST_KEY, tl.int64)  # at least k entries lie at or above it
    high = order_key(peak).to(tl.int64) + 1  # fewer than k do
    probe = tl.minimum(tl.maximum(order_key(guess).to(tl.int64), low + 1), high - 1)
    step = tl.cast(FIRST_STEP, tl.int64)
    while high - low > 1:
        enough = tl.sum((keys >= probe.to(tl.int32)).to(tl.int32)) >= k
        low = tl.where(enough, probe, low)
        high = tl.where(enough, high, probe)
        middle = (low + high) >> 1
        probe = tl.where(enough, tl.minimum(probe + step, middle), tl.maximum(probe - step, middle))
        probe = tl.minimum(tl.maximum(probe, low + 1), high - 1)
        step = tl.minimum(step * 4, 1 << 33)
    return low.to(tl.int32)


@triton.jit
def top_k_key_by_radix(row, k, TILE: tl.constexpr, NUM_TILES: tl.constexpr):
    """The key of the k-th largest entry, most significant digit first."""
    digits = tl.arange(0, NUM_DIGITS)
    prefix = tl.cast(0, tl.int64)  # of keys moved to 0..2^32-1
    for level in tl.static_range(4):
        shift = 24 - 8 * level
        counts = tl.zeros([NUM_DIGITS], tl.int32)
        for tile in range(NUM_TILES):
            keys = order_key(tile_logits(row, tile, TILE, NUM_TILES)).to(tl.int64) + 2147483648
            inside = (tile_ids(tile, TILE) < row.vocab) & ((keys >> (shift + 8)) == (prefix >> (shift + 8)))
            counts += tl.histogram(((keys >> shift) & 255).to(tl.int32), NUM_DIGITS, mask=inside)
        at_least = tl.cumsum(counts, 0, reverse=True)
        digit = tl.max(tl.where(at_least >= k, digits, 0))
        k -= tl.sum(tl.where(digits > digit, counts, 0))
        prefix = prefix | (digit.to(tl.int64) << shift)
    return (prefix - 2147483648).to(tl.int32)


@triton.jit
def mass_from(row, law, key, TILE: tl.constexpr, NUM_TILES: tl.constexpr):
    """Integer weight of the kept entries at or above `key`."""
    mass = tl.cast(0, tl.int64)
    for tile in range(NUM_TILES):
        keys = order_key(tile_logits(row, tile, TILE, NUM_TILES))
        weights = fixed_point(tile_weights(row, law, tile, TILE, NUM_TILES))
        mass += tl.sum(tl.where(keys >= key, weights, 0))
    return mass


@triton.jit
def top_p_key(row, law, enough, TILE: tl.constexpr, NUM_TILES: tl.constexpr):
    """The largest key whose entries, with those above, weigh `enough`."""
    low = order_key(law.cut).to(tl.int64)
    high = order_key(law.peak).to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        reached = mass_from(row, law, middle.to(tl.int32), TILE, NUM_TILES) >= enough
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return low.to(tl.int32)


@triton.jit
def count_above(row, cut, TILE: tl.constexpr, NUM_TILES: tl.constexpr):
    count = tl.cast(0, tl.int32)
    for tile in range(NUM_TILES):
        count += tl.sum((tile_logits(row, tile, TILE, NUM_TILES) > cut).to(tl.int32))
    return count


@triton.jit
def last_tied_id(row, cut, needed, TILE: tl.constexpr, NUM_TILES: tl.constexpr):
    """The id of the `needed`-th entry equal to `cut`, lowest ids first, as float32."""
    before = tl.cast(0, tl.int32)
    found = tl.cast(-1, tl.int32)
    for tile in range(NUM_TILES):
        tied = tile_logits(row, tile, TILE, NUM_TILES) == cut
        rank = before + tl.cumsum(tied.to(tl.int32), 0)
        found = tl.maximum(found, tl.max(tl.where(tied & (rank == needed), tile_ids(tile, TILE), -1)))
        before += tl.sum(tied.to(tl.int32))
    return found.to(tl.float32)


@triton.jit
def select(row, peak, top_k, top_p, guess, TILE: tl.constexpr, NUM_TILES: tl.constexpr):
    """(cut, cut_id), float32, of a row with a finite logit. `guess`: the cut to search from."""
    cut, cut_id = tl.cast(NEGATIVE_INFINITY, tl.float32), tl.cast(-1.0, tl.float32)
    if top_k is not None:
        if (top_k > 0) & (top_k < row.vocab):
            k = top_k.to(tl.int32)
            if NUM_TILES == 1:
                key = top_k_key_in_registers(row.first, k, peak, guess)
            else:
                key = top_k_key_by_radix(row, k, TILE, NUM_TILES)
            if key > LOWEST_KEY:
                cut = from_order_key(key)
                needed = k - count_above(row, cut, TILE, NUM_TILES)
                cut_id = last_tied_id(row, cut, needed, TILE, NUM_TILES)
    if top_p is not None:
        if top_p < 1.0:
            law = Law(peak, 1.0, cut, cut_id)
            total = mass_from(row, law, LOWEST_KEY, TILE, NUM_TILES)
            enough = tl.maximum((top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64), 1)
            key = top_p_key(row, law, enough, TILE, NUM_TILES)
            above = mass_from(row, law, key + 1, TILE, NUM_TILES)
            cut = from_order_key(key)
            each = fixed_point(weight(cut, tl.cast(0, tl.int32), Law(peak, 1.0, cut, 0.0)))
            needed = ((enough - above + each - 1) // each).to(tl.int32)
            cut_id = last_tied_id(row, cut, needed, TILE, NUM_TILES)
    return cut, cut_id

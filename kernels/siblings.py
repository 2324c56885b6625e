"""What a row of the fused kernel does with siblings: `tree` for Triton, where the words and the laws are explained.

Loops over siblings are unrolled. A trial is a sibling's place in them: what was tried before it, what scales both laws
without that, and whether there is such a sibling at all.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import philox
from .device import ONE, combine, counter_words, fixed_point, share, tile_ids, tile_weights, weight

TRY_SIBLINGS, DRAW_SIBLINGS = tl.constexpr(philox.TRY_SIBLINGS), tl.constexpr(philox.DRAW_SIBLINGS)


class Trial(NamedTuple):
    """See above; scalars."""

    before: Any
    target_scale: Any
    draft_scale: Any
    exists: Any


@triton.jit
def level_of(slot, window_size, CANDIDATES: tl.constexpr, DEPTH: tl.constexpr):
    """The level of a slot's node, see `Tree.nodes`."""
    level = slot
    first, nodes = window_size, 1
    for i in tl.static_range(1, DEPTH):
        nodes *= CANDIDATES
        level = tl.where((slot >= first) & (slot < first + nodes - 1), i, level)
        first += nodes - 1
    return level


@triton.jit
def num_extra_inside(left, CANDIDATES: tl.constexpr, DEPTH: tl.constexpr):
    """Extra slots of the levels that lie before the image's end, `left` tokens away."""
    count, nodes = left * 0, 1
    for i in tl.static_range(1, DEPTH):
        nodes *= CANDIDATES
        count += tl.where(left > i, nodes - 1, 0)
    return count


@triton.jit
def counted(weights):
    return tl.floor(weights * ONE) * 5.684341886080802e-14  # 2^-44


@triton.jit
def scale_of(total):
    """What scales weights of this total to sum to 1; 0 where there are none."""
    scale = tl.cast(ONE, tl.float64) / tl.maximum(total, 1).to(tl.float64)
    return tl.where(total > 0, scale, 0.0).to(tl.float32)


@triton.jit
def left_over(p, q, draft_weights, ids, trials, NUM_TRIALS: tl.constexpr):
    """Weights of tokens `ids` that the recovered token has after the first candidate and `trials` are rejected."""
    rest = tl.maximum(p - q, 0.0)
    for i in tl.static_range(NUM_TRIALS):
        trial = trials[i]
        draft_weights = tl.where(ids == trial.before, 0.0, draft_weights)
        again = tl.maximum(counted(rest) * trial.target_scale - counted(draft_weights) * trial.draft_scale, 0.0)
        rest = tl.where(trial.exists, again, rest)
    return rest


@triton.jit
def tile_left_over(
    row, law, previous, q_law, trials, tile, NUM_TRIALS: tl.constexpr, TILE: tl.constexpr, NUM_TILES: tl.constexpr
):
    """[TILE] int64, in fixed point; 0 beyond the vocabulary."""
    ids = tile_ids(tile, TILE)
    p = tile_weights(row, law, tile, TILE, NUM_TILES) * law.scale
    draft_weights = weight(combine(previous, ids, ids < row.vocab), ids, q_law)
    rest = left_over(p, draft_weights * q_law.scale, draft_weights, ids, trials, NUM_TRIALS)
    return fixed_point(tl.where(ids < row.vocab, rest, 0.0))


@triton.jit
def try_siblings(
    row, law, previous, q_law, draft, total, siblings_ptr, seed, position, iteration, residual_word,
    CANDIDATES: tl.constexpr, TILE: tl.constexpr, NUM_TILES: tl.constexpr,
):  # fmt: skip
    """Go on where a row has rejected its draft, whose law is a row of the previous pass: `tree.try_siblings`.

    Args:
        total: of the residual, max(p - q, 0).
    Returns: (child, token, total): the sibling's number and token, or 0 and a token drawn from what is left over, which
        weighs `total`; no token where that is nothing.
    """
    untried = tl.cast(0, tl.int64)
    for tile in range(NUM_TILES):
        ids = tile_ids(tile, TILE)
        draft_weights = weight(combine(previous, ids, ids < row.vocab), ids, q_law)
        untried += tl.sum(fixed_point(tl.where(ids < row.vocab, draft_weights, 0.0)))
    words = counter_words(seed, position, iteration, TRY_SIBLINGS)
    child, token = tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    before, trials = draft, ()
    for j in tl.static_range(CANDIDATES - 1):
        sibling = tl.load(siblings_ptr + j)
        exists, sibling_id = sibling >= 0, tl.maximum(sibling, 0)
        untried -= fixed_point(weight(combine(previous, before, before >= 0), before, q_law))
        target_scale, draft_scale = scale_of(total), scale_of(untried)
        p = weight(combine(row, sibling_id, exists), sibling_id, law) * law.scale
        draft_weight = weight(combine(previous, sibling_id, exists), sibling_id, q_law)
        rest = left_over(p, draft_weight * q_law.scale, draft_weight, sibling_id, trials, j)
        u = (words[j].to(tl.float64) + 0.5) * 2.3283064365386963e-10
        p, q = counted(rest) * target_scale, counted(draft_weight) * draft_scale
        accepted = exists & (child == 0) & (u * q.to(tl.float64) < p.to(tl.float64))
        child, token = tl.where(accepted, j + 2, child), tl.where(accepted, sibling, token)
        trials += (Trial(before, target_scale, draft_scale, exists),)
        before = sibling_id
        total = tl.cast(0, tl.int64)
        for tile in range(NUM_TILES):
            total += tl.sum(tile_left_over(row, law, previous, q_law, trials, tile, j + 1, TILE, NUM_TILES))
    if (child == 0) & (total > 0):
        target = share(residual_word, total)
        passed_by = tl.cast(0, tl.int64)
        for tile in range(NUM_TILES):
            weights = tile_left_over(row, law, previous, q_law, trials, tile, CANDIDATES - 1, TILE, NUM_TILES)
            mass = tl.sum(weights)
            if (passed_by <= target) & (target < passed_by + mass):
                token = tile * TILE + tl.sum((tl.cumsum(weights, 0) <= target - passed_by).to(tl.int64))
            passed_by += mass
    return child, token, total


@triton.jit
def draw_siblings(
    row, law, draft, total, siblings_ptr, seed, position, iteration,
    CANDIDATES: tl.constexpr, TILE: tl.constexpr, NUM_TILES: tl.constexpr,
):  # fmt: skip
    """Write candidates 2..K of a row's position, whose draft is `draft` and whose law weighs `total`:
    `tree.draw_siblings`."""
    words = counter_words(seed, position, iteration, DRAW_SIBLINGS)
    tried = (draft,)
    for j in tl.static_range(CANDIDATES - 1):
        before = tried[j]
        z = combine(row, before, before >= 0)
        total -= tl.where(before >= 0, fixed_point(weight(z, before, law)), 0)
        target, passed_by = share(words[j], total), tl.cast(0, tl.int64)
        sibling = tl.cast(-1, tl.int64)
        for tile in range(NUM_TILES):
            ids = tile_ids(tile, TILE)
            left = tile_weights(row, law, tile, TILE, NUM_TILES)
            for i in tl.static_range(j + 1):
                left = tl.where(ids == tried[i], 0.0, left)
            weights = fixed_point(left)
            mass = tl.sum(weights)
            if (passed_by <= target) & (target < passed_by + mass):
                sibling = tile * TILE + tl.sum((tl.cumsum(weights, 0) <= target - passed_by).to(tl.int64))
            passed_by += mass
        tl.store(siblings_ptr + j, sibling)
        tried += (sibling,)

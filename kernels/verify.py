"""One decoding pass in one launch.

Fused: guidance, temperature, top-k, top-p, softmax, acceptance test, residual and fresh draws, reuse, coupling, refill
of the window, and the bookkeeping of every sequence. A program takes one row of the window of one sequence: it reads
the row's logits, and those of the previous pass where its residual is needed, and publishes a few integers. The one
that draws the last ticket of its sequence reads what all have published, finds the first rejection and moves it on.

Bytes: 2 (4 with guidance) x V for each row, as much again for each row that draws from its residual; nothing of size V
is written. Equal to `reference.verify`, decision for decision.

Only scalars are published before the ticket: they are stored by the thread that takes it, and a barrier stands between,
because a release by one thread does not order the stores of others.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .device import (
    NEGATIVE_INFINITY,
    ONE,
    Law,
    Row,
    combine,
    fixed_point,
    gumbel_tile,
    share,
    tile_ids,
    tile_logits,
    tile_weights,
    weight,
    window_words,
)
from .select import select
from .siblings import draw_siblings, level_of, num_extra_inside, try_siblings
from .state import DRAFTED as DRAFTED_LAW
from .state import ONE_HOT as ONE_HOT_LAW
from .state import UNIFORM as UNIFORM_LAW
from .state import Grid, VerifyResult, WindowState, reads_previous_logits

UNIFORM, ONE_HOT, DRAFTED = tl.constexpr(UNIFORM_LAW), tl.constexpr(ONE_HOT_LAW), tl.constexpr(DRAFTED_LAW)
# What a row publishes: FLAGS, and the tokens it would put out as the first rejected row (of a tree: the last of its
# path), as any later row, and for the position that enters with its law.
FLAGS, RECOVERED, REFRESHED, ENTERING = (tl.constexpr(i) for i in range(4))
# With a tree also the number of the candidate that the row accepts, and the siblings of its position. K columns.
CHILD = tl.constexpr(4)
ACCEPTED, EMPTY, NONFINITE, IMPOSSIBLE = (tl.constexpr(1 << i) for i in range(4))


@triton.jit
def _load_law(laws_ptr):
    """A row's law from its four numbers."""
    peak, scale = tl.load(laws_ptr), tl.load(laws_ptr + 1)
    return Law(peak, scale, tl.load(laws_ptr + 2), tl.load(laws_ptr + 3))


@triton.jit
def _tile_residual(row, law, previous, drafted, q_law, q_row, draft, tile, TILE: tl.constexpr, NUM_TILES: tl.constexpr):
    """[TILE] int64: max(p - q, 0) in fixed point. `drafted`: the row's weights that a drafter gave, or None."""
    ids = tile_ids(tile, TILE)
    p = tile_weights(row, law, tile, TILE, NUM_TILES) * law.scale
    flat = tl.where(q_row == UNIFORM, q_law.scale, 0.0)
    q = tl.where((q_row == ONE_HOT) & (ids == draft), 1.0, flat)
    if q_row >= 0:
        q = weight(combine(previous, ids, ids < row.vocab), ids, q_law) * q_law.scale
    if drafted is not None:
        if q_row == DRAFTED:
            q = tl.load(drafted + ids, mask=ids < row.vocab, other=0.0) * q_law.scale
    return fixed_point(tl.maximum(tl.where(ids < row.vocab, p - q, 0.0), 0.0))


@triton.jit
def _draw_target(row, law, total, word, TILE: tl.constexpr, NUM_TILES: tl.constexpr):
    """A token drawn from the row's law; `total`: its weight."""
    target = share(word, total)
    before, token = tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    for tile in range(NUM_TILES):
        weights = fixed_point(tile_weights(row, law, tile, TILE, NUM_TILES))
        mass = tl.sum(weights)
        if (before <= target) & (target < before + mass):
            token = tile * TILE + tl.sum((tl.cumsum(weights, 0) <= target - before).to(tl.int64))
        before += mass
    return token


@triton.jit
def _draw_residual(
    row, law, previous, drafted, q_law, q_row, draft, total, word, TILE: tl.constexpr, NUM_TILES: tl.constexpr
):
    """A token drawn from the residual; `total`: its weight."""
    target = share(word, total)
    before, token = tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    for tile in range(NUM_TILES):
        weights = _tile_residual(row, law, previous, drafted, q_law, q_row, draft, tile, TILE, NUM_TILES)
        mass = tl.sum(weights)
        if (before <= target) & (target < before + mass):
            token = tile * TILE + tl.sum((tl.cumsum(weights, 0) <= target - before).to(tl.int64))
        before += mass
    return token


@triton.jit
def _coupled(row, law, seed, position, REFRESH: tl.constexpr, TILE: tl.constexpr, NUM_TILES: tl.constexpr):
    """The arg-max of the law under its position's noise ("gumbel") or none, lowest id among equals."""
    best, token = tl.cast(NEGATIVE_INFINITY, tl.float32), tl.cast(0, tl.int64)
    for tile in range(NUM_TILES):
        ids = tile_ids(tile, TILE)
        score = tl.where(law.peak == NEGATIVE_INFINITY, 0.0, tile_logits(row, tile, TILE, NUM_TILES))
        if REFRESH == "gumbel":
            score += gumbel_tile(seed, position, tile, TILE)
        score = tl.where(tile_weights(row, law, tile, TILE, NUM_TILES) > 0, score, NEGATIVE_INFINITY)
        top = tl.max(score)
        if top > best:
            best = top
            token = tl.min(tl.where(score == top, ids, 2147483647)).to(tl.int64)
    return token


@triton.jit
def _neighbour(position, first, last, row_start_ptr, above_ptr, mask, INIT: tl.constexpr, STEPS: tl.constexpr):
    """The nearest position to the left or above that is not right of `last`; -1 where there is none. For above-sample
    not left of `first` either; then the left one."""
    if INIT != "above-repeat":
        row_start = tl.load(row_start_ptr + position, mask=mask, other=-1)
        left = tl.where((row_start >= 0) & (row_start <= last), last, -1)
    if INIT == "left-repeat" or INIT == "left-sample":
        return left
    source = tl.load(above_ptr + position, mask=mask, other=-1)
    for _ in range(STEPS):
        source = tl.load(above_ptr + source, mask=source > last, other=source)
    source = tl.where(source > last, -1, source)
    if INIT == "above-sample":
        source = tl.where(source < first, left, source)
    return source


# Windows change from pass to pass: no number of theirs is worth a compilation.
@triton.jit(do_not_specialize=["window_size", "next_window_size"])
def _verify_kernel(
    logits_ptr,  # [B, W, V], or [2, B, W, V] with guidance
    previous_ptr,  # the same of the pass before
    tokens_ptr,  # [B, 1 + T + 2W] int64
    num_committed_ptr,  # [B] int64
    iteration_ptr,  # [B] int64
    commit_pass_ptr,  # [B, T + W] int64
    law_row_ptr,  # [B, W] int32
    laws_ptr,  # [2, B, W, 4] float32
    zero_residual_ptr,  # [B] int64
    nonfinite_rows_ptr,  # [B] int64
    zero_draft_prob_ptr,  # [B] int64
    siblings_ptr,  # [B, D - 1, K - 1] int64
    published_ptr,  # [B, N, 4 + K] int64
    ticket_ptr,  # [B] int32
    drafted_ptr,  # [B, W, V] float32 or None
    drafted_scale_ptr,  # [B, W] float32 or None
    num_accepted_ptr,  # [B] int64, out
    committed_out_ptr,  # [B] int64, out
    accepted_slots_ptr,  # [B, D - 1] int64, out, or None
    forced_ids_ptr,  # [T] int64 or None
    row_start_ptr,  # [T] int64
    above_ptr,  # [T] int64
    seeds_ptr,  # [B] int64
    guidance_ptr,  # [B] float32 or None, and so are the next
    temperature_ptr,
    top_k_ptr,  # [B] int64 or None
    top_p_ptr,
    reuse_threshold_ptr,
    most_accepted_ptr,  # [B], or None
    stride_pair,
    stride_b,
    stride_w,
    stride_v,
    previous_stride_pair,
    previous_stride_b,
    previous_stride_w,
    previous_stride_v,
    batch_size,
    window_size,
    next_window_size,
    max_window_size,
    vocab,
    num_tokens,
    CANDIDATES: tl.constexpr,  # K, D of a tree; 1, 1 where there is none
    DEPTH: tl.constexpr,
    ACCEPT: tl.constexpr,
    REFRESH: tl.constexpr,
    INIT: tl.constexpr,
    STEPS: tl.constexpr,  # how far above a neighbour may have to be sought
    TILE: tl.constexpr,
    NUM_TILES: tl.constexpr,
    WINDOW_BLOCK: tl.constexpr,  # a power of two >= the largest window
):
    window_slot = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    committed = tl.load(num_committed_ptr + sequence)
    iteration = tl.load(iteration_ptr + sequence)
    left = num_tokens - committed
    num_rows = tl.minimum(left, window_size)
    window_row = level_of(window_slot, window_size, CANDIDATES, DEPTH)  # whose position and draft the slot's row shares
    published_width = 4 + CANDIDATES
    if accepted_slots_ptr is not None:
        accepted_slots_ptr += sequence * (DEPTH - 1)
    if window_row >= num_rows:
        if window_slot == 0:  # a finished sequence
            tl.store(num_accepted_ptr + sequence, 0)
            tl.store(committed_out_ptr + sequence, committed)
            for level in tl.static_range(1, DEPTH):
                tl.store(accepted_slots_ptr + level - 1, level)
        return

    seed = tl.load(seeds_ptr + sequence)
    position = committed + window_row
    tokens_ptr += sequence * (1 + num_tokens + 2 * max_window_size) + 1  # of position 0
    num_extra = tl.num_programs(0) - window_size
    published_ptr += sequence * (max_window_size + num_extra) * published_width
    siblings_ptr += sequence * (DEPTH - 1) * (CANDIDATES - 1)
    mine_ptr = published_ptr + window_slot * published_width
    draft = tl.load(tokens_ptr + position)
    on_chain = window_slot < window_size
    has_draft = tl.where(on_chain, window_slot < window_size - 1, window_row < DEPTH - 1)
    forced = tl.cast(-1, tl.int64)
    if forced_ids_ptr is not None:
        forced = tl.load(forced_ids_ptr + position)

    flags = tl.cast(ACCEPTED, tl.int32)
    recovered, refreshed = forced, forced
    child = tl.cast(1, tl.int64)
    # The law of a forced row is asked for only by a position that enters with it.
    if (forced < 0) | (INIT == "left-sample") | (INIT == "above-sample"):
        guidance, inv_temperature, top_k, top_p = None, None, None, None
        if guidance_ptr is not None:
            guidance = tl.load(guidance_ptr + sequence)
        if temperature_ptr is not None:
            inv_temperature = (1.0 / tl.load(temperature_ptr + sequence).to(tl.float64)).to(tl.float32)
        if top_k_ptr is not None:
            top_k = tl.load(top_k_ptr + sequence)
        if top_p_ptr is not None:
            top_p = tl.load(top_p_ptr + sequence)
        row_ptr = logits_ptr + sequence * stride_b + window_slot.to(tl.int64) * stride_w
        row = Row(None, row_ptr, stride_v, stride_pair, vocab, guidance, inv_temperature)
        if NUM_TILES == 1:
            ids = tile_ids(0, TILE)
            row = Row(combine(row, ids, ids < vocab), row_ptr, stride_v, stride_pair, vocab, guidance, inv_temperature)

        # The law q of the draft.
        q_row = tl.cast(UNIFORM, tl.int32)
        no_cut, no_id = tl.cast(NEGATIVE_INFINITY, tl.float32), tl.cast(-1.0, tl.float32)
        q_law = Law(tl.cast(0.0, tl.float32), (1.0 / vocab.to(tl.float64)).to(tl.float32), no_cut, no_id)
        previous = row
        if previous_ptr is not None:
            q_row_ptr = law_row_ptr + sequence * max_window_size + window_row
            q_row = tl.load(q_row_ptr, mask=has_draft, other=UNIFORM)
            before = tl.maximum(q_row, 0).to(tl.int64)
            if q_row >= 0:
                slot = ((iteration + 1) % 2 * batch_size + sequence) * max_window_size + before
                q_law = _load_law(laws_ptr + slot * 4)
            previous_row_ptr = previous_ptr + sequence * previous_stride_b + before * previous_stride_w
            previous = Row(
                None, previous_row_ptr, previous_stride_v, previous_stride_pair, vocab, guidance, inv_temperature
            )
        drafted = None
        if drafted_ptr is not None:
            drafted_row = sequence * max_window_size + window_row
            drafted = drafted_ptr + drafted_row * vocab
            if q_row == DRAFTED:
                q_law = Law(q_law.peak, tl.load(drafted_scale_ptr + drafted_row), q_law.cut, q_law.cut_id)

        # The law p of the target.
        peak = tl.cast(NEGATIVE_INFINITY, tl.float32)
        for tile in range(NUM_TILES):
            peak = tl.maximum(peak, tl.max(tile_logits(row, tile, TILE, NUM_TILES)))
        nonfinite = peak == NEGATIVE_INFINITY
        cut, cut_id = no_cut, no_id
        if peak > NEGATIVE_INFINITY:
            cut, cut_id = select(row, peak, top_k, top_p, q_law.cut, TILE, NUM_TILES)
        law = Law(peak, 1.0, cut, cut_id)
        total = tl.cast(0, tl.int64)
        for tile in range(NUM_TILES):
            total += tl.sum(fixed_point(tile_weights(row, law, tile, TILE, NUM_TILES)))
        law = Law(peak, (tl.cast(ONE, tl.float64) / total.to(tl.float64)).to(tl.float32), cut, cut_id)
        slot_ptr = laws_ptr + ((iteration % 2 * batch_size + sequence) * max_window_size + window_row) * 4
        tl.store(slot_ptr, peak, mask=on_chain)
        tl.store(slot_ptr + 1, law.scale, mask=on_chain)
        tl.store(slot_ptr + 2, cut, mask=on_chain)
        tl.store(slot_ptr + 3, cut_id, mask=on_chain)

        accept_word, fresh_word, residual_word, _ = window_words(seed, position, iteration)
        empty, impossible = tl.cast(0, tl.int1), tl.cast(0, tl.int1)
        if ACCEPT == "match":
            recovered = _coupled(row, law, seed, position, REFRESH, TILE, NUM_TILES)
            refreshed = recovered
            passed = draft == recovered
        else:
            draft_id = tl.minimum(tl.maximum(draft, 0), vocab - 1)
            z = combine(row, draft_id, draft_id >= 0)
            p_draft = weight(z, draft_id, law) * law.scale
            q_draft = tl.where(q_row == UNIFORM, q_law.scale, 1.0)
            if q_row >= 0:
                z = combine(previous, draft_id, draft_id >= 0)
                q_draft = weight(z, draft_id, q_law) * q_law.scale
            if drafted is not None:
                if q_row == DRAFTED:
                    q_draft = tl.load(drafted + draft_id) * q_law.scale
            u = (accept_word.to(tl.float64) + 0.5) * 2.3283064365386963e-10
            passed = u * q_draft.to(tl.float64) < p_draft.to(tl.float64)
            impossible = has_draft & (q_draft <= 0)
            refreshed = draft
            child = tl.cast(1, tl.int64)
            if not (has_draft & passed & (peak > NEGATIVE_INFINITY)):
                child = tl.cast(0, tl.int64)
                residual_total = tl.cast(0, tl.int64)
                if has_draft & (peak > NEGATIVE_INFINITY):
                    for tile in range(NUM_TILES):
                        residual_total += tl.sum(
                            _tile_residual(row, law, previous, drafted, q_law, q_row, draft_id, tile, TILE, NUM_TILES)
                        )
                    empty = residual_total == 0
                drawn = tl.cast(0, tl.int1)
                if DEPTH > 1:
                    row_siblings_ptr = siblings_ptr + window_row * (CANDIDATES - 1)
                    inner = has_draft & (window_row < DEPTH - 1) & (peak > NEGATIVE_INFINITY) & (q_row >= 0)
                    if tl.load(row_siblings_ptr, mask=inner, other=-1) >= 0:
                        child, recovered, residual_total = try_siblings(
                            row, law, previous, q_law, draft_id, residual_total, row_siblings_ptr, seed, position,
                            iteration, residual_word, CANDIDATES, TILE, NUM_TILES,
                        )  # fmt: skip
                        empty = (child == 0) & (residual_total == 0)
                        drawn = ~empty
                if not drawn:
                    if residual_total > 0:
                        recovered = _draw_residual(
                            row, law, previous, drafted, q_law, q_row, draft_id, residual_total, residual_word, TILE,
                            NUM_TILES,
                        )  # fmt: skip
                    else:
                        recovered = _draw_target(row, law, total, residual_word, TILE, NUM_TILES)
                refreshed = recovered
            if REFRESH == "gumbel" or REFRESH == "argmax":
                refreshed = _coupled(row, law, seed, position, REFRESH, TILE, NUM_TILES)
            elif REFRESH != "maximal":
                keep = tl.cast(0, tl.int1)
                if REFRESH == "reuse":
                    threshold = tl.load(reuse_threshold_ptr + sequence)
                    keep = has_draft & (peak > NEGATIVE_INFINITY) & (p_draft > threshold * q_draft)
                refreshed = draft
                if not keep:
                    refreshed = _draw_target(row, law, total, fresh_word, TILE, NUM_TILES)
        flags = (
            tl.where(passed & (peak > NEGATIVE_INFINITY), ACCEPTED, 0)
            + tl.where(empty, EMPTY, 0)
            + tl.where(nonfinite, NONFINITE, 0)
            + tl.where(impossible, IMPOSSIBLE, 0)
        )

        if INIT == "left-sample" or INIT == "above-sample":
            # The positions that enter with this row's law.
            last = committed + window_size - 1
            for slot in range(next_window_size - 1):
                entering = last + 1 + slot
                inside = entering < num_tokens
                source = _neighbour(entering, committed, last, row_start_ptr, above_ptr, inside, INIT, STEPS)
                if on_chain & (source == position):
                    _, _, _, word = window_words(seed, entering, iteration)
                    token = _draw_target(row, law, total, word, TILE, NUM_TILES)
                    tl.store(published_ptr + slot * published_width + ENTERING, token)

        if DEPTH > 1:
            if on_chain & (forced < 0):
                draft_id = tl.minimum(tl.maximum(refreshed, 0), vocab - 1)
                my_siblings_ptr = mine_ptr + CHILD + 1
                draw_siblings(
                    row, law, draft_id, total, my_siblings_ptr, seed, position, iteration, CANDIDATES, TILE, NUM_TILES
                )

    if forced >= 0:
        flags = tl.cast(ACCEPTED, tl.int32)
        recovered, refreshed = forced, forced
        child = tl.cast(1, tl.int64)
        for i in tl.static_range(CANDIDATES - 1):
            tl.store(mine_ptr + CHILD + 1 + i, -1)
    if DEPTH > 1:
        tl.store(mine_ptr + CHILD, tl.where(has_draft, child, 0))
    tl.store(mine_ptr + FLAGS, tl.where(has_draft, flags, flags & ~ACCEPTED).to(tl.int64))
    tl.store(mine_ptr + RECOVERED, recovered)
    tl.store(mine_ptr + REFRESHED, refreshed)
    tl.debug_barrier()
    ticket = tl.atomic_add(ticket_ptr + sequence, 1, sem="acq_rel")
    if ticket == num_rows + num_extra_inside(left, CANDIDATES, DEPTH) - 1:
        most_accepted = None
        if most_accepted_ptr is not None:
            most_accepted = tl.load(most_accepted_ptr + sequence).to(tl.int32)
        _finish_sequence(
            tokens_ptr, num_committed_ptr + sequence, iteration_ptr + sequence,
            commit_pass_ptr + sequence * (num_tokens + max_window_size), law_row_ptr + sequence * max_window_size,
            zero_residual_ptr + sequence, nonfinite_rows_ptr + sequence, zero_draft_prob_ptr + sequence,
            siblings_ptr, published_ptr, ticket_ptr + sequence, num_accepted_ptr + sequence,
            committed_out_ptr + sequence, accepted_slots_ptr, forced_ids_ptr, row_start_ptr, above_ptr, most_accepted,
            seed, committed, iteration, num_rows, window_size, next_window_size, vocab, num_tokens, CANDIDATES, DEPTH,
            INIT, STEPS, WINDOW_BLOCK,
        )  # fmt: skip


@triton.jit
def _walk(
    published_ptr, accepted_slots_ptr, rows, drafts, num_accepted, num_rows, window_size,
    CANDIDATES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """(num_accepted, last_row, drafts) of the accepted path, and its slots written: `tree.walk`."""
    published_width = 4 + CANDIDATES
    last_row, path, length = num_accepted * 0, num_accepted * 0, num_accepted * 0
    first, nodes = window_size, 1
    for level in tl.static_range(1, DEPTH):
        nodes *= CANDIDATES
        row_ptr = published_ptr + last_row * published_width
        goes_on = (length == level - 1) & (level <= num_rows)
        child = tl.load(row_ptr + CHILD, mask=goes_on, other=0, volatile=True).to(tl.int32)
        goes_on &= child > 0
        sibling = tl.load(row_ptr + RECOVERED, mask=goes_on, other=0, volatile=True)
        drafts = tl.where(goes_on & (child > 1) & (rows == level - 1), sibling, drafts)
        path = tl.where(goes_on, path * CANDIDATES + child - 1, path)
        last_row = tl.where(goes_on, tl.where(path == 0, level, first + path - 1), last_row)
        length += goes_on.to(tl.int32)
        tl.store(accepted_slots_ptr + level - 1, tl.where(goes_on, last_row, level))
        first += nodes - 1
    on_chain = last_row < window_size
    return tl.where(on_chain, num_accepted, length), tl.where(on_chain, num_accepted, last_row), drafts


@triton.jit
def _finish_sequence(
    tokens_ptr, num_committed_ptr, iteration_ptr, commit_pass_ptr, law_row_ptr, zero_residual_ptr, nonfinite_rows_ptr,
    zero_draft_prob_ptr, siblings_ptr, published_ptr, ticket_ptr, num_accepted_ptr, committed_out_ptr,
    accepted_slots_ptr, forced_ids_ptr, row_start_ptr, above_ptr, most_accepted, seed, committed, iteration, num_rows,
    window_size, next_window_size, vocab, num_tokens, CANDIDATES: tl.constexpr, DEPTH: tl.constexpr,
    INIT: tl.constexpr, STEPS: tl.constexpr, WINDOW_BLOCK: tl.constexpr,
):  # fmt: skip
    """All rows have published: commit, refill the window, move the sequence to its next pass."""
    rows = tl.arange(0, WINDOW_BLOCK)
    inside = rows < num_rows
    published_width = 4 + CANDIDATES
    flags = tl.load(published_ptr + rows * published_width + FLAGS, mask=inside, other=0, volatile=True)
    refreshed = tl.load(published_ptr + rows * published_width + REFRESHED, mask=inside, other=0, volatile=True)
    drafts = tl.load(tokens_ptr + committed + rows, mask=inside, other=0)
    num_accepted = tl.min(tl.where(inside & ((flags & ACCEPTED) == 0), rows, num_rows.to(tl.int32)))
    if most_accepted is not None:
        num_accepted = tl.minimum(num_accepted, most_accepted)
    last_row = num_accepted
    if DEPTH > 1:
        num_accepted, last_row, drafts = _walk(
            published_ptr, accepted_slots_ptr, rows, drafts, num_accepted, num_rows, window_size, CANDIDATES, DEPTH
        )
    last_ptr = published_ptr + last_row * published_width
    out = tl.where(rows == num_accepted, tl.load(last_ptr + RECOVERED, volatile=True), refreshed)
    kept_drafts = rows < num_accepted
    if most_accepted is not None:  # the draft behind them may pass as well: with the recovered token, maximal coupling
        kept_drafts |= (rows == num_accepted) & ((flags & ACCEPTED) != 0)
    out = tl.where(kept_drafts, drafts, out)
    num_new = tl.minimum(num_accepted + 1, num_rows.to(tl.int32))
    tl.store(tokens_ptr + committed + rows, out, mask=inside)
    tl.store(commit_pass_ptr + committed + rows, tl.where(rows < num_new, iteration, -1), mask=inside)

    empty = (tl.load(last_ptr + FLAGS, volatile=True) & EMPTY) != 0
    tl.store(zero_residual_ptr, tl.load(zero_residual_ptr) + empty.to(tl.int64))
    nonfinite = tl.sum(((flags & NONFINITE) != 0).to(tl.int64))
    tl.store(nonfinite_rows_ptr, tl.load(nonfinite_rows_ptr) + nonfinite)
    impossible = tl.sum(((flags & IMPOSSIBLE) != 0).to(tl.int64))
    tl.store(zero_draft_prob_ptr, tl.load(zero_draft_prob_ptr) + impossible)

    # Drafts of this window keep the laws of this pass; those that enter come with their neighbour's.
    kept = rows - num_new
    tl.store(law_row_ptr + kept, rows, mask=(kept >= 0) & (kept < next_window_size - 1) & (rows < window_size))
    last = committed + window_size - 1
    entering = last + 1 + rows
    enters = (rows < next_window_size - 1) & (entering < num_tokens)
    _, _, _, words = window_words(seed, entering, iteration)
    tokens = (words * vocab) >> 32
    laws = tl.full([WINDOW_BLOCK], UNIFORM, tl.int32)
    if INIT != "random":
        tl.debug_barrier()  # the tokens stored above are read below, by other threads
        source = _neighbour(entering, committed, last, row_start_ptr, above_ptr, enters, INIT, STEPS)
        if INIT == "left-repeat" or INIT == "above-repeat":
            known = enters & (source >= 0)
            copied = tl.load(tokens_ptr + source, mask=known, other=0, volatile=True)
            laws = tl.where(known, ONE_HOT, laws)
        else:
            known = enters & (source >= 0)
            copied = tl.load(published_ptr + rows * published_width + ENTERING, mask=known, other=0, volatile=True)
            laws = tl.where(known, (source - committed).to(tl.int32), laws)
        tokens = tl.where(known, copied, tokens)
    if forced_ids_ptr is not None:
        forced = tl.load(forced_ids_ptr + entering, mask=enters, other=-1)
        tokens = tl.where(forced >= 0, forced, tokens)
    tl.store(tokens_ptr + entering, tokens, mask=enters)
    slot = window_size + rows - num_new
    tl.store(law_row_ptr + slot, laws, mask=enters & (slot >= 0) & (slot < next_window_size - 1))

    for i in tl.static_range((DEPTH - 1) * (CANDIDATES - 1)):
        row = num_new + i // (CANDIDATES - 1)
        sibling_ptr = published_ptr + row * published_width + CHILD + 1 + i % (CANDIDATES - 1)
        tl.store(siblings_ptr + i, tl.load(sibling_ptr, mask=row < num_rows, other=-1, volatile=True))

    tl.store(num_accepted_ptr, tl.minimum(num_accepted, num_new).to(tl.int64))
    tl.store(committed_out_ptr, committed + num_new)
    tl.store(num_committed_ptr, committed + num_new)
    tl.store(iteration_ptr, iteration + 1)
    tl.store(ticket_ptr, 0)


def verify(
    logits: Tensor,
    state: WindowState,
    grid: Grid,
    *,
    window_size: int,
    next_window_size: int | None = None,
    accept: str,
    refresh: str,
    init: str,
    seeds: Tensor,
    guidance_scale: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    reuse_threshold: Tensor | None = None,
    tree: tuple[int, int] | None = None,
    most_accepted: Tensor | None = None,
) -> VerifyResult:
    """`reference.verify` in one launch, on the current stream, without a host sync. Arguments and result: there."""
    guided = logits.ndim == 4
    if guided != (guidance_scale is not None):
        raise ValueError("verify: logits [2, B, W, V] come with guidance_scale, logits [B, W, V] without")
    batch_size, vocab_size = logits.shape[-3], logits.shape[-1]
    reads_previous = reads_previous_logits(accept, state.max_window_size)
    previous = state.previous_logits if reads_previous else None
    backend = "" if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().backend
    num_accepted, num_committed = torch.empty_like(state.num_committed), torch.empty_like(state.num_committed)
    accepted_slots = None if tree is None else state.siblings.new_empty(state.siblings.shape[:2])
    _verify_kernel[(logits.shape[-2], batch_size)](
        logits,
        previous,
        state.tokens,
        state.num_committed,
        state.iteration,
        state.commit_pass,
        state.law_row,
        state.laws,
        state.zero_residual,
        state.nonfinite_rows,
        state.zero_draft_prob,
        state.siblings,
        state.published,
        state.ticket,
        state.drafted if reads_previous else None,
        state.drafted_scale if reads_previous else None,
        num_accepted,
        num_committed,
        accepted_slots,
        grid.forced_ids,
        grid.row_start,
        grid.above,
        seeds,
        guidance_scale,
        temperature,
        top_k,
        top_p,
        reuse_threshold,
        most_accepted,
        *((0,) if not guided else ()),
        *logits.stride(),
        *((0,) if not guided else ()),
        *(logits if previous is None else previous).stride(),
        batch_size,
        window_size,
        window_size if next_window_size is None else next_window_size,
        state.max_window_size,
        vocab_size,
        grid.num_tokens,
        **launch.constants(accept, refresh, init, state.max_window_size, vocab_size, grid.cols, tree),
        **launch.options(vocab_size, backend),
    )
    if reads_previous:
        state.previous_logits = logits
    return VerifyResult(num_accepted, num_committed, accepted_slots)

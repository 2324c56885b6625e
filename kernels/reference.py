"""The definition of correct: one decoding pass over the Jacobi window, in plain PyTorch.

Glossary (B sequences, W window, V image vocabulary, T tokens of an image):

    anchor token      the last committed token; its K/V is not in the cache yet. Slot 0 of the window.
    draft tokens      slots 1..W-1: guesses for the positions after the anchor.
    row i             the output of slot i: it predicts position C + i, where C tokens are committed. The draft for that
                      position stands in slot i + 1; the last row has no draft in the window.
    target_probs p    the model's law for a position after guidance, temperature, top-k and top-p.
    draft_probs q     the law the draft was drawn from: a row of the previous pass's logits, uniform, one-hot, or what a
                      drafter gave.
    accept            r * q(d) < p(d) with r uniform ("ratio"), or d is the very token the target would draw ("match").
    recovered token   drawn from the residual norm(max(p - q, 0)) where the first draft was rejected.
    bonus token       drawn from p of the last row when every draft was accepted.
    refresh           what happens to the drafts right of the first rejection; afterwards q is the p of this pass for
                      every one of them, kept or redrawn (rule C1).
    forced token      a position whose token the image's grammar fixes; accepted at once, never sampled.

A pass for W = 4, C = 10 and anchor x9: slots [x9, d10, d11, d12] at positions 9..12, rows predict 10..13. d10 accepted,
d11 rejected: commit d10 and the recovered token for 11, so C becomes 12. Position 12 is refreshed, 13 (the last row's)
is drawn from p, and the right edge gets a new draft at 14: the next window is [x11, d12, d13, d14].

Sources: Teng et al., "Accelerating auto-regressive text-to-image generation with training-free speculative Jacobi
decoding" (arXiv 2410.01699), algorithm 1; SJD++ (arXiv 2512.07503); maximal and Gumbel coupling of successive drafts
(arXiv 2510.24211, 2603.18599).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import philox
from .acceptance import Acceptance, Drafted
from .arithmetic import ONE, draw, exp, fixed_point, residual
from .state import DRAFTED, ONE_HOT, UNIFORM, Grid, VerifyResult, WindowState, reads_previous_logits
from .tree import Tree, draw_siblings, try_siblings, walk

NEGATIVE_INFINITY = float("-inf")

# -------------------------------------------------------------------------------------------------------- target law


class RowLaw(NamedTuple):
    """What turns a row of logits z into a law: exp(z - peak) * scale for the tokens that are kept, 0 for the others.

    A token is kept where its logit is finite and lies above `cut`, or equals it and its id is at most `cut_id`. All
    four are [B, W] float32. A row without one finite logit has peak -inf: its law is uniform.
    """

    peak: Tensor
    scale: Tensor
    cut: Tensor
    cut_id: Tensor


def combine(logits: Tensor, guidance_scale: Tensor | None, temperature: Tensor | None) -> Tensor:
    """[B, W, V] float32: guidance and temperature; -inf for what is not finite.

    z = (u + s (c - u)) * (1 / temperature)
    """
    if logits.ndim == 4:
        conditional, unconditional = logits.float()
        scale = 1.0 if guidance_scale is None else guidance_scale[:, None, None]
        z = unconditional + scale * (conditional - unconditional)
    else:
        z = logits.float()
    if temperature is not None:
        z = z * (1.0 / temperature.double()).float()[:, None, None]
    return torch.where(z.isfinite(), z, NEGATIVE_INFINITY) + 0.0  # and no negative zero: ties are bitwise


def row_law(z: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> RowLaw:
    """The law of each row of z [B, W, V] (from `combine`): keep the k largest, then the fewest with mass >= top_p."""
    vocab_size = z.shape[-1]
    peak = z.amax(-1)
    cut, cut_id = torch.full_like(peak, NEGATIVE_INFINITY), torch.full_like(peak, -1.0)
    if top_k is not None or top_p is not None:
        ranked, order = z.sort(dim=-1, descending=True, stable=True)  # equals: lowest id first
        ranks = torch.arange(vocab_size, device=z.device)
        count = torch.full_like(order[..., :1], vocab_size)
        if top_k is not None:
            k = torch.where((top_k <= 0) | (top_k > vocab_size), vocab_size, top_k)
            count = count.minimum(k[:, None, None])
        if top_p is not None:
            weights = fixed_point(masked_exp(ranked, peak, (ranks < count) & (ranked > NEGATIVE_INFINITY)))
            cdf = weights.cumsum(-1)
            enough = (top_p.double()[:, None, None] * cdf[..., -1:].double()).long().clamp_min(1)
            reached = ((cdf - weights) < enough).sum(-1, keepdim=True)
            count = torch.where(top_p[:, None, None] < 1, reached.minimum(count), count)
        some = (count < vocab_size).squeeze(-1)
        last = (count - 1).clamp_min(0)
        cut = torch.where(some, ranked.gather(-1, last).squeeze(-1), cut)
        cut_id = torch.where(cut > NEGATIVE_INFINITY, order.gather(-1, last).squeeze(-1).float(), cut_id)
    nonfinite = peak == NEGATIVE_INFINITY
    total = fixed_point(masked_exp(z, peak, kept_tokens(z, cut, cut_id))).sum(-1)
    total = torch.where(nonfinite, vocab_size * ONE, total)
    return RowLaw(peak, (ONE / total.double()).float(), cut, cut_id)


def kept_tokens(z: Tensor, cut: Tensor, cut_id: Tensor) -> Tensor:
    ids = torch.arange(z.shape[-1], device=z.device)
    tied = (z == cut[..., None]) & (ids <= cut_id[..., None])
    return (z > cut[..., None]) | tied


def masked_exp(z: Tensor, peak: Tensor, kept: Tensor) -> Tensor:
    """exp(z - peak) where kept, 0 elsewhere."""
    return torch.where(kept, exp(torch.where(kept, z - peak[..., None], 0.0)), 0.0)


def row_weights(z: Tensor, law: RowLaw) -> Tensor:
    """[B, W, V] float32 in [0, 1]: the law before it is scaled to sum to 1. The peak weighs 1."""
    weights = masked_exp(z, law.peak, kept_tokens(z, law.cut, law.cut_id))
    return torch.where((law.peak == NEGATIVE_INFINITY)[..., None], 1.0, weights)


def warp(
    logits: Tensor,
    *,
    guidance_scale: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits to the log-weights whose softmax is the target law: guidance, temperature, top-k, top-p, in that order.

        z = u + s (c - u);  z / temperature;  keep the k largest;  keep the smallest set with mass >= top_p

    Ties at the edge of top-k and top-p go to the lowest token id. A logit that is not finite has no mass; a row without
    any finite logit becomes uniform.

    Args:
        logits: [B, W, V], or [2, B, W, V] (conditional, unconditional) with guidance. Any float dtype.
        guidance_scale, temperature: [B] float32, or None for 1.
        top_k: [B] int64, or None; values <= 0 or >= V keep all.
        top_p: [B] float32, or None; values >= 1 keep all.
    Returns: (log-weights [B, W, V] float32, -inf outside the kept set; nonfinite [B, W] bool).
    """
    z = combine(logits, guidance_scale, temperature)
    law = row_law(z, top_k, top_p)
    nonfinite = law.peak == NEGATIVE_INFINITY
    z = torch.where(kept_tokens(z, law.cut, law.cut_id), z, NEGATIVE_INFINITY)
    return torch.where(nonfinite[..., None], 0.0, z), nonfinite


# ---------------------------------------------------------------------------------------------------------- one pass


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
    acceptance: Acceptance | None = None,
    most_accepted: Tensor | None = None,
) -> VerifyResult:
    """Accept, recover, refresh and refill the window of every sequence, and move its state to the next pass.

    Args:
        logits: [B, W, V] or [2, B, W, V] of this pass; row i predicts position num_committed + i. Its values must stay
            as they are until the next pass is verified. With a tree its rows follow, in the order of their slots.
        state: updated in place.
        grid: forced tokens and neighbours of every position.
        window_size: W of this pass, at most the state's.
        next_window_size: that of the next pass, at most the state's; None for the same. A smaller one leaves drafts
            behind, which enter anew where a later window grows. It may depend on committed tokens, not on drafts.
        accept: "ratio" (accept/residual) or "match" (the draft equals the target's own draw).
        refresh: what becomes of drafts right of the first rejection.
            "fresh": drawn anew from p (SJD).
            "reuse": kept where p(d) > reuse_threshold * q(d), else drawn anew from p (SJD++; lossy).
            "maximal": kept where it passes the acceptance test, else drawn from its residual (maximal coupling).
            "gumbel": argmax(log p + g), g the position's fixed noise. With "match" it is also the target's draw.
            "argmax": argmax p. With "match" it is also the target's draw.
        init: how new drafts enter at the right edge, see `fill_window`.
        seeds: [B] int64.
        guidance_scale, temperature, top_k, top_p: see `warp`.
        reuse_threshold: [B] float32, tau of "reuse".
        tree: (K, D), see tree.py; W is then the length of the chain, at least D. For "ratio", and not with "reuse".
        acceptance: what takes the place of r q(d) < p(d) and its residual, for "ratio" and "fresh"; see acceptance.py.
        most_accepted: [B] int64, drafts that may be accepted in this pass. The token behind them is drawn by maximal
            coupling, so that it follows p whether or not its draft would have been accepted. Not with a tree.
    Returns: VerifyResult. A row without one finite logit rejects its draft, draws from the uniform law and is counted.
    Source: module docstring. Rules C1-C5 of exactness are kept by every combination but "reuse"; see acceptance.py for
        what may take the place of the test.
    """
    device = state.tokens.device
    next_window_size = window_size if next_window_size is None else next_window_size
    rows = torch.arange(window_size, device=device)
    offsets, has_child = rows, rows < window_size - 1
    if tree is not None:
        tree = Tree(*tree)
        offsets, has_child = tree.offsets(window_size).to(device), tree.has_child(window_size).to(device)
    positions = state.num_committed[:, None] + offsets  # [B, R], what each row predicts
    inside = positions < grid.num_tokens
    forced_ids = torch.full_like(positions, -1)
    if grid.forced_ids is not None:
        forced_ids = grid.forced_ids[positions.clamp_max(grid.num_tokens - 1)]
    has_draft = inside & has_child
    sampled = inside & (forced_ids < 0)
    drafts = state.tokens.gather(1, positions + 1)
    words = philox.draw_words(seeds, positions, state.iteration, philox.WINDOW).squeeze(-1)

    z = combine(logits, guidance_scale, temperature)
    law = row_law(z, top_k, top_p)
    weights = row_weights(z, law)
    nonfinite = law.peak == NEGATIVE_INFINITY
    trial, accepted_slots = None, None
    if accept == "match":
        recovered = refreshed = coupled_draw(weights, z, refresh, seeds, positions)
        passed = drafts == recovered
    else:
        target_probs = weights * law.scale[..., None]
        draft_weights, draft_scale = draft_laws(state, drafts, offsets, z.shape[-1], guidance_scale, temperature)
        draft_probs = draft_weights * draft_scale[..., None]
        ids = drafts.clamp(0, z.shape[-1] - 1)[..., None]  # a forced id may lie outside the image vocabulary
        p_draft, q_draft = (probs.gather(-1, ids).squeeze(-1) for probs in (target_probs, draft_probs))
        uniforms = philox.uniform(words[philox.ACCEPT])
        if acceptance is None:
            passed, left_over = uniforms * q_draft < p_draft, residual(target_probs, draft_probs)
        else:
            forced = forced_ids >= 0
            drafted = Drafted(target_probs, draft_probs, ids.squeeze(-1), uniforms, has_draft, forced)
            passed, left_over = acceptance(drafted)
        if tree is not None:
            siblings = tree.of_rows(state.siblings, window_size)
            siblings = siblings.where((sampled & ~nonfinite & (state.law_row[:, offsets] >= 0))[..., None], -1)
            words_of_siblings = philox.draw_words(seeds, positions, state.iteration, philox.TRY_SIBLINGS).squeeze(-1)
            trial = try_siblings(left_over, draft_weights, ids.squeeze(-1), passed, siblings, words_of_siblings)
            left_over = trial.left_over
        empty = fixed_point(left_over).sum(-1) == 0
        from_target = ~has_draft | nonfinite | empty
        recovered = draw(torch.where(from_target[..., None], weights, left_over), words[philox.RESIDUAL])
        if trial is not None:
            recovered = torch.where(trial.child > 1, trial.tokens, recovered)
        if refresh == "maximal":
            refreshed = torch.where(passed & has_draft & ~nonfinite, drafts, recovered)
        elif refresh in ("fresh", "reuse"):
            refreshed = draw(weights, words[philox.FRESH])
            if refresh == "reuse":
                reused = has_draft & ~nonfinite & (p_draft > reuse_threshold[:, None] * q_draft)
                refreshed = torch.where(reused, drafts, refreshed)
        else:
            refreshed = coupled_draw(weights, z, refresh, seeds, positions)

    accepted = has_draft & ((passed & ~nonfinite) | (forced_ids >= 0))
    num_accepted = accepted[:, :window_size].cumprod(1).sum(1)
    if most_accepted is not None:
        num_accepted = num_accepted.minimum(most_accepted)
        recovered = torch.where(accepted, drafts, recovered)
    last_row = num_accepted
    if trial is not None:
        child = torch.where(accepted, 1, trial.child.where(trial.child > 1, 0))
        num_accepted, last_row, accepted_slots, path_rows = walk(tree, child, num_accepted, window_size)
        # The drafts of the chain, but for what the path has in their place.
        on_path = torch.where(child > 1, recovered, drafts).gather(1, path_rows)
        drafts = torch.cat((on_path, drafts[:, tree.depth - 1 : window_size]), 1)
    chain = slice(window_size)  # the rows and positions of the chain
    out = torch.where(rows == num_accepted[:, None], recovered.gather(1, last_row[:, None]), refreshed[:, chain])
    out = torch.where(rows < num_accepted[:, None], drafts, out)
    out = torch.where(forced_ids[:, chain] >= 0, forced_ids[:, chain], out)
    num_new = (num_accepted + 1).minimum(grid.num_tokens - state.num_committed)
    if accept == "ratio":
        without_mass = (empty & has_draft & sampled & ~nonfinite & ~accepted).gather(1, last_row[:, None])
        state.zero_residual += without_mass.squeeze(1)
        state.zero_draft_prob += ((q_draft <= 0) & has_draft & sampled)[:, chain].sum(1)
    state.nonfinite_rows += (nonfinite & sampled)[:, chain].sum(1)

    sequences = torch.arange(len(seeds), device=device)
    state.laws[state.iteration % 2, sequences, :window_size] = torch.stack(law, -1)[:, chain]
    if reads_previous_logits(accept, state.max_window_size):
        state.previous_logits = logits
    state.tokens.scatter_(1, positions[:, chain] + 1, out)
    committed_now = rows < num_new[:, None]
    state.commit_pass.scatter_(1, positions[:, chain], torch.where(committed_now, state.iteration[:, None], -1))
    if next_window_size > 1:
        fill_window(state, grid, num_new, next_window_size, init, seeds, weights[:, chain])
    if tree is not None:
        state.siblings.copy_(next_siblings(state, grid, num_new, tree, seeds, weights[:, chain]))
    state.iteration += num_new > 0
    state.num_committed += num_new
    return VerifyResult(num_accepted.minimum(num_new), state.num_committed.clone(), accepted_slots)


def draft_laws(
    state: WindowState,
    drafts: Tensor,
    offsets: Tensor,
    vocab_size: int,
    guidance_scale: Tensor | None,
    temperature: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q of every draft, computed from the previous logits as p was then: ([B, R, V] float32 weights, [B, R] scales)."""
    law_row = state.law_row[:, offsets]
    hot = (law_row == ONE_HOT)[..., None] & (torch.arange(vocab_size, device=drafts.device) == drafts[..., None])
    weights = torch.where((law_row == UNIFORM)[..., None], 1.0, hot.float())
    scale = torch.where(law_row == UNIFORM, torch.tensor(1.0 / vocab_size), 1.0)
    if state.drafted is not None and state.drafted_scale is not None:
        weights = torch.where((law_row == DRAFTED)[..., None], state.drafted[:, offsets], weights)
        scale = torch.where(law_row == DRAFTED, state.drafted_scale[:, offsets], scale)
    if state.previous_logits is None:
        return weights, scale
    sequences = torch.arange(len(drafts), device=drafts.device)
    z = combine(state.previous_logits[..., : state.max_window_size, :], guidance_scale, temperature)
    law = RowLaw(*state.laws[(state.iteration + 1) % 2, sequences, : z.shape[1]].unbind(-1))
    row = law_row.clamp(0, z.shape[1] - 1).long()  # where there is no draft it may be that of an older pass
    known = law_row >= 0
    weights = torch.where(known[..., None], take_rows(row_weights(z, law), row), weights)
    return weights, torch.where(known, law.scale.gather(1, row), scale)


def coupled_draw(weights: Tensor, z: Tensor, refresh: str, seeds: Tensor, positions: Tensor) -> Tensor:
    """[B, W] int64: the arg-max of each law, under its position's fixed noise ("gumbel") or none ("argmax")."""
    score = torch.where((z == NEGATIVE_INFINITY).all(-1, keepdim=True), 0.0, z)
    if refresh == "gumbel":
        score = score + philox.gumbel_noise(seeds, positions, z.shape[-1])
    return torch.where(weights > 0, score, NEGATIVE_INFINITY).argmax(-1)


def law_weights(z: Tensor, laws: Tensor) -> Tensor:
    """`row_weights` of z [..., V] and the four numbers of each law, [..., 4]."""
    return row_weights(z, RowLaw(*laws.unbind(-1)))


def redraft(
    state: WindowState,
    grid: Grid,
    seeds: Tensor,
    first_row: int,
    weights: Tensor,
    where: Tensor,
    sequences: Tensor | None = None,
) -> None:
    """Draw drafts of the next window anew, each from a law of its own, which the next pass verifies it by.

    It stays exact where the choice of drafts and their laws depend on laws and on earlier tokens alone (rules C2, C3).

    Args:
        state: after `verify`; its tokens, law_row, drafted and drafted_scale are written.
        seeds: [B] int64.
        first_row: drafts stand in rows; these are first_row .. first_row + N - 1, of positions num_committed + row.
        weights: [S, N, V] float32 in [0, 1], the laws before they are scaled to sum to 1. What is below 2^-44 counts as
            nothing.
        where: [S, N] bool. The others, forced positions and those past the image's end stay as they are.
        sequences: [S] int64, those that the laws belong to; None for all.
    """
    rows = torch.arange(first_row, first_row + weights.shape[1], device=seeds.device)
    chosen = torch.arange(len(seeds), device=seeds.device) if sequences is None else sequences
    positions = state.num_committed[chosen, None] + rows
    where = where & (positions < grid.num_tokens)
    if grid.forced_ids is not None:
        where = where & (grid.forced_ids[positions.clamp_max(grid.num_tokens - 1)] < 0)
    words = philox.draw_words(seeds[chosen], positions, state.iteration[chosen], philox.WINDOW).squeeze(-1)
    scale = (ONE / fixed_point(weights).sum(-1).double()).float()
    for tensor, columns, value in (
        (state.tokens, positions + 1, draw(weights, words[philox.INIT])),
        (state.law_row, rows, torch.full_like(where, DRAFTED, dtype=torch.int32)),
        (state.drafted, rows, weights),
        (state.drafted_scale, rows, scale),
    ):
        old = tensor[chosen[:, None], columns]
        tensor[chosen[:, None], columns] = torch.where(where[..., None] if value.ndim == 3 else where, value, old)


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows [B, R, V] at index [B, N] -> [B, N, V], a copy."""
    return rows[torch.arange(len(rows), device=rows.device)[:, None], index]


def next_siblings(
    state: WindowState, grid: Grid, num_new: Tensor, tree: Tree, seeds: Tensor, weights: Tensor
) -> Tensor:
    """[B, D - 1, K - 1] int64: siblings of the first drafts of the next window, whose tokens stand in the state.

    A draft has some where it was in this window, is not forced and not past the image's end.

    Args:
        weights: [B, W, V], the laws of this pass's chain.
    """
    rows = num_new[:, None] + torch.arange(tree.depth - 1, device=seeds.device)
    positions = state.num_committed[:, None] + rows
    exists = (rows < weights.shape[1]) & (positions < grid.num_tokens)
    if grid.forced_ids is not None:
        exists &= grid.forced_ids[positions.clamp_max(grid.num_tokens - 1)] < 0
    drafts, laws = state.tokens.gather(1, positions + 1), take_rows(weights, rows.clamp_max(weights.shape[1] - 1))
    return draw_siblings(positions, drafts, laws, exists, seeds, state.iteration, tree.candidates - 1)


# ------------------------------------------------------------------------------------------------------ initialisation


def start(state: WindowState, grid: Grid, *, window_size: int, init: str, seeds: Tensor, vocab_size: int) -> None:
    """Fill the first window: drafts for positions 0..W-2, before any law is known.

    An empty pass whose window ends before position 0 does it: all its positions enter, none has a neighbour.
    """
    if window_size > 1:
        entering = torch.arange(window_size - 1, device=seeds.device).expand(len(seeds), -1)
        enter(state, grid, entering, torch.full_like(entering, -1), init, seeds, None, vocab_size)


def fill_window(
    state: WindowState,
    grid: Grid,
    num_new: Tensor,
    next_window_size: int,
    init: str,
    seeds: Tensor,
    weights: Tensor,
) -> None:
    """The law of every draft of the next window, and new drafts at its right edge.

        random         uniform over the vocabulary, q = 1/V: the true law, not the one-hot of the drawn token
        *-repeat       the neighbour's token, q one-hot
        *-sample       drawn from the neighbour's law of this pass, q = that law

    A neighbour that enters in the same pass hands on its own neighbour's. above-sample takes the left neighbour where
    there is no row above or its token stands left of the window, so that its law is gone. Without a neighbour the draft
    is random. Forced positions get their token.

    Args:
        state: its tokens and law_row are written; num_committed is still that of the pass.
        num_new: [B] tokens that this pass committed.
        next_window_size: drafts enter up to position num_committed + num_new + next_window_size - 2.
        init: random | left-repeat | above-repeat | left-sample | above-sample.
        weights: [B, W, V], the laws of this pass.
    """
    window_size = weights.shape[1]
    first = state.num_committed[:, None]
    last = first + window_size - 1  # the last position with a row in this pass
    entering = last + 1 + torch.arange(next_window_size - 1, device=seeds.device)
    source = neighbour(grid, entering.clamp_max(grid.num_tokens - 1), first, last, init)
    entering_laws = enter(state, grid, entering, source, init, seeds, weights, weights.shape[-1])
    rows = torch.arange(window_size, dtype=torch.int32, device=seeds.device).expand(len(seeds), -1)
    laws = torch.cat((rows, entering_laws), 1)  # of the positions from `first` on
    drafts = torch.arange(next_window_size - 1, device=seeds.device)
    state.law_row[:, : next_window_size - 1] = laws.gather(1, num_new[:, None] + drafts)


def enter(
    state: WindowState,
    grid: Grid,
    entering: Tensor,
    source: Tensor,
    init: str,
    seeds: Tensor,
    weights: Tensor | None,
    vocab_size: int,
) -> Tensor:
    """Write the drafts of the positions `entering` [B, N], whose neighbours are `source`; returns their laws' rows."""
    words = philox.draw_words(seeds, entering, state.iteration, philox.WINDOW).squeeze(-1)[philox.INIT]
    tokens = (words * vocab_size) >> 32
    laws = torch.full_like(entering, UNIFORM)
    if init.endswith("repeat"):
        known = source >= 0
        laws = torch.where(known, ONE_HOT, laws)
        tokens = torch.where(known, state.tokens.gather(1, source + 1), tokens)
    elif init.endswith("sample") and weights is not None:
        row = source - state.num_committed[:, None]
        known = source >= 0
        laws = torch.where(known, row, laws)
        tokens = torch.where(known, draw(take_rows(weights, row.clamp_min(0)), words), tokens)
    if grid.forced_ids is not None:
        forced_ids = grid.forced_ids[entering.clamp_max(grid.num_tokens - 1)]
        tokens = torch.where(forced_ids >= 0, forced_ids, tokens)
    state.tokens.scatter_(1, entering + 1, tokens)
    return laws.int()


def neighbour(grid: Grid, positions: Tensor, first: Tensor, last: Tensor, init: str) -> Tensor:
    """[B, N] int64: the nearest position to the left or above that is not right of `last`, in the same grid row or
    column; -1 where there is none, and for "random". For above-sample not left of `first` either; then the left one."""
    if init == "random":
        return torch.full_like(positions, -1)
    row_start = grid.row_start[positions]
    left = torch.where((row_start >= 0) & (row_start <= last), last, -1)
    if init.startswith("left"):
        return left
    source = grid.above[positions]
    for _ in range(positions.shape[1] // grid.cols):
        source = torch.where(source > last, grid.above[source], source)
    source = torch.where(source > last, -1, source)
    return torch.where(source < first, left, source) if init == "above-sample" else source

"""The definition of correct: one decoding pass over the Jacobi window, in plain PyTorch.

Glossary (B sequences, W window, V image vocabulary, T tokens of an image, R ring size):

    anchor token      the last committed token; its K/V is not in the cache yet. Slot 0 of the window.
    draft tokens      slots 1..W-1: guesses for the positions after the anchor.
    row i             the output of slot i: it predicts position C + i, where C tokens are committed. The draft for that
                      position stands in slot i + 1; the last row has no draft in the window.
    target_probs p    the model's law for a position after guidance, temperature, top-k and top-p.
    draft_probs q     the law the draft was drawn from. Stored for each position in a ring: position t at t mod R.
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

from dataclasses import dataclass

import torch
from torch import Tensor

from . import philox

NEGATIVE_INFINITY = float("-inf")


@dataclass
class WindowState:
    """What a batch of sequences carries from pass to pass. `verify` updates it in place.

    tokens: [B, 1 + T + 2W] int64. Column t + 1 is position t: committed tokens, then drafts. Column 0 is -1, the end of
        the caller's prompt; columns past T are scratch.
    num_committed: [B] int64, C.
    iteration: [B] int64. Passes this sequence has taken part in; a counter of its random draws.
    draft_probs: [B, R, V] float32 ring of laws by position, R >= 2W + grid.reach; None where
        neither the acceptance test nor the initialisation reads a law.
    commit_pass: [B, T + W] int64. The pass in which each token was committed, from 0; -1 before. Columns past T are
        scratch.
    zero_residual, nonfinite_rows, zero_draft_prob: [B] int64 counters: recovered tokens drawn from p because the
        residual had no mass (rounding), rows without one finite logit, and drafts outside their own law (a bug, never
        seen where rules C1 and C2 hold).
    """

    tokens: Tensor
    num_committed: Tensor
    iteration: Tensor
    draft_probs: Tensor | None
    commit_pass: Tensor
    zero_residual: Tensor
    nonfinite_rows: Tensor
    zero_draft_prob: Tensor


@dataclass(frozen=True)
class Grid:
    """The static plan of an image's positions.

    forced_ids: [T] int64, the forced token of each position, -1 where the model chooses; None where nothing is forced.
    row_start: [T] int64, position of the first image token of the same grid row; -1 at forced positions.
    above: [T] int64, position of the token one grid row up; -1 in the first row and at forced positions.
    cols: image tokens in a grid row.
    reach: the largest distance between a token and the one above it; 0 with one row.
    """

    forced_ids: Tensor | None
    row_start: Tensor
    above: Tensor
    cols: int
    reach: int

    @property
    def num_tokens(self) -> int:
        return self.row_start.shape[0]


@dataclass(frozen=True)
class VerifyResult:
    """num_accepted: [B] drafts accepted in this pass; num_committed: [B] tokens committed so far."""

    num_accepted: Tensor
    num_committed: Tensor


# -------------------------------------------------------------------------------------------------------- target law


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
    if logits.ndim == 4:
        conditional, unconditional = logits.float()
        scale = 1.0 if guidance_scale is None else guidance_scale[:, None, None]
        z = unconditional + scale * (conditional - unconditional)
    else:
        z = logits.float()
    if temperature is not None:
        z = z / temperature[:, None, None]
    z = torch.where(z.isfinite(), z, NEGATIVE_INFINITY)
    nonfinite = z.amax(-1) == NEGATIVE_INFINITY
    z = torch.where(nonfinite[..., None], 0.0, z)
    if top_k is not None:
        z = z.masked_fill(~top_k_mask(z, top_k), NEGATIVE_INFINITY)
    if top_p is not None:
        z = z.masked_fill(~top_p_mask(z.softmax(-1), top_p), NEGATIVE_INFINITY)
    return z, nonfinite


def top_k_mask(z: Tensor, top_k: Tensor) -> Tensor:
    """[B, W, V] bool: the top_k[b] largest entries of each row, lowest id first among equals."""
    vocab_size = z.shape[-1]
    k = torch.where((top_k <= 0) | (top_k > vocab_size), vocab_size, top_k)[:, None, None]
    ranked = z.sort(dim=-1, descending=True, stable=True).values
    kth = ranked.gather(-1, (k - 1).expand(*z.shape[:-1], 1))
    above, tied = z > kth, z == kth
    return above | (tied & (tied.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def top_p_mask(probs: Tensor, top_p: Tensor) -> Tensor:
    """[B, W, V] bool: the fewest most likely tokens whose mass reaches top_p[b], lowest id first among equals."""
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ranked.double().cumsum(-1) - ranked  # mass of the tokens ahead
    keep = (before < top_p[:, None, None]) | (top_p[:, None, None] >= 1)
    return torch.zeros_like(keep).scatter(-1, order, keep)


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """Inverse-CDF draw: the first token whose cumulative weight exceeds u times the total, summed in float64.

    Args:
        weights: [..., V] float32, non-negative, not all zero.
        u: [...] float64 in (0, 1).
    Returns: [...] int64. A token of zero weight is never drawn.
    """
    cdf = weights.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cdf, (u * cdf[..., -1])[..., None], right=True).squeeze(-1)


def residual(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """max(p - q, 0), unnormalised."""
    return (target_probs - draft_probs).clamp_min_(0)


# ---------------------------------------------------------------------------------------------------------- one pass


def verify(
    logits: Tensor,
    state: WindowState,
    grid: Grid,
    *,
    window_size: int,
    accept: str,
    refresh: str,
    init: str,
    seeds: Tensor,
    guidance_scale: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    reuse_threshold: float = 0.5,
    gumbel_noise: Tensor | None = None,
) -> VerifyResult:
    """Accept, recover, refresh and refill the window of every sequence, and move its state to the next pass.

    Args:
        logits: [B, W, V] or [2, B, W, V] of this pass; row i predicts position num_committed + i.
        state: updated in place.
        grid: forced tokens and neighbours of every position.
        window_size: W.
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
        reuse_threshold: tau of "reuse".
        gumbel_noise: [B, T, V] float32, the values of `philox.gumbel_noise` for every position, where the caller keeps
            them; computed here for the window otherwise.
    Returns: VerifyResult.
    Source: module docstring. Rules C1-C5 of exactness are kept by every combination but "reuse".
    """
    device = state.tokens.device
    rows = torch.arange(window_size, device=device)
    positions = state.num_committed[:, None] + rows  # [B, W], what each row predicts
    inside = positions < grid.num_tokens
    has_draft = inside & (rows < window_size - 1)
    drafts = state.tokens.gather(1, positions + 1)
    forced_ids = None if grid.forced_ids is None else grid.forced_ids[positions.clamp_max(grid.num_tokens - 1)]
    reach = state.num_committed[:, None] + torch.arange(2 * window_size - 1, device=device)
    words = None  # of the rows, then of the positions that enter; one token a pass with "match" needs none
    if accept == "ratio" or window_size > 1:
        words = philox.draw_words(seeds, reach, state.iteration, philox.WINDOW).squeeze(-1)

    z, nonfinite = warp(logits, guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p)
    target_probs = None if state.draft_probs is None else z.softmax(-1)
    coupled = coupled_draw(z, refresh, seeds, positions, gumbel_noise)
    if accept == "match":
        accepted = accept_drafts(drafts == coupled, forced_ids, has_draft)
        recovered = refreshed = coupled
    else:
        draft_probs = take_rows(state.draft_probs, positions % state.draft_probs.shape[1])
        # The last row has no draft: with an empty q its residual is p itself, and the bonus token needs no extra case.
        draft_probs[:, -1] = 0
        u_accept, u_fresh, u_residual, _ = philox.uniform(words[:, :, :window_size])
        ids = drafts.clamp(0, z.shape[-1] - 1)[..., None]  # a forced id may lie outside the image vocabulary
        p_draft, q_draft = (probs.gather(-1, ids).squeeze(-1) for probs in (target_probs, draft_probs))
        accepted = accept_drafts(u_accept * q_draft < p_draft, forced_ids, has_draft)
        left_over = residual(target_probs, draft_probs)
        empty = left_over.amax(-1) <= 0
        at_first = rows == leading(accepted)[:, None]
        from_residual = at_first if refresh in ("fresh", "reuse") else torch.ones_like(at_first)
        weights = torch.where((from_residual & ~empty)[..., None], left_over, target_probs)
        recovered = refreshed = draw(weights, torch.where(from_residual, u_residual, u_fresh))
        if refresh == "maximal":
            refreshed = torch.where(accepted, drafts, recovered)
        elif refresh == "reuse":
            refreshed = torch.where(has_draft & (p_draft > reuse_threshold * q_draft), drafts, recovered)
        elif coupled is not None:
            refreshed = coupled
        sampled = has_draft if forced_ids is None else has_draft & (forced_ids < 0)
        state.zero_residual += (empty & at_first & sampled).sum(1)
        state.zero_draft_prob += ((q_draft <= 0) & sampled).sum(1)

    num_accepted = leading(accepted)
    out = torch.where(rows == num_accepted[:, None], recovered, refreshed)
    out = torch.where(rows < num_accepted[:, None], drafts, out)
    if forced_ids is not None:
        out = torch.where(forced_ids >= 0, forced_ids, out)

    num_new = (num_accepted + 1).minimum(grid.num_tokens - state.num_committed)
    state.tokens.scatter_(1, positions + 1, out)
    state.commit_pass.scatter_(1, positions, torch.where(rows < num_new[:, None], state.iteration[:, None], -1))
    state.nonfinite_rows += (nonfinite & inside).sum(1)
    if state.draft_probs is not None:
        put_rows(state.draft_probs, positions % state.draft_probs.shape[1], target_probs)
    if window_size > 1:
        entering = reach[:, window_size:]
        fill_window(state, grid, entering, positions[:, -1:], init, words[philox.INIT, :, window_size:], z.shape[-1])
    state.iteration += num_new > 0
    state.num_committed += num_new
    return VerifyResult(num_accepted.minimum(num_new), state.num_committed.clone())


def leading(accepted: Tensor) -> Tensor:
    """[B, W] bool -> [B] int64: how many drafts are accepted before the first rejection."""
    return accepted.cumprod(1).sum(1)


def coupled_draw(
    z: Tensor, refresh: str, seeds: Tensor, positions: Tensor, gumbel_noise: Tensor | None
) -> Tensor | None:
    """[B, W] int64: each row's token under the position's fixed noise ("gumbel") or none ("argmax"); None otherwise."""
    if refresh == "argmax":
        return z.argmax(-1)
    if refresh != "gumbel":
        return None
    if gumbel_noise is None:
        return (z + philox.gumbel_noise(seeds, positions, z.shape[-1])).argmax(-1)
    return (z + take_rows(gumbel_noise, positions.clamp_max(gumbel_noise.shape[1] - 1))).argmax(-1)


def accept_drafts(passed: Tensor, forced_ids: Tensor | None, has_draft: Tensor) -> Tensor:
    """[B, W] bool: drafts that passed their test or are forced."""
    return has_draft & (passed if forced_ids is None else passed | (forced_ids >= 0))


def take_rows(ring: Tensor, index: Tensor) -> Tensor:
    """ring [B, R, V] at index [B, N] -> [B, N, V], a copy."""
    return ring[torch.arange(len(ring), device=ring.device)[:, None], index]


def put_rows(ring: Tensor, index: Tensor, rows: Tensor | float) -> None:
    """Write rows [B, N, V] (or a number) into ring [B, R, V] at index [B, N]."""
    value = rows if isinstance(rows, Tensor) else torch.tensor(rows, device=ring.device)
    ring[torch.arange(len(ring), device=ring.device)[:, None], index] = value


# ------------------------------------------------------------------------------------------------------ initialisation


def start(state: WindowState, grid: Grid, *, window_size: int, init: str, seeds: Tensor, vocab_size: int) -> None:
    """Fill the first window: drafts for positions 0..W-2, before any law is known."""
    if window_size == 1:
        return
    positions = torch.arange(window_size - 1, device=seeds.device).expand(len(seeds), -1)
    words = philox.draw_words(seeds, positions, state.iteration, philox.WINDOW).squeeze(-1)
    fill_window(state, grid, positions, torch.full_like(seeds, -1)[:, None], init, words[philox.INIT], vocab_size)


def fill_window(
    state: WindowState, grid: Grid, entering: Tensor, last: Tensor, init: str, words: Tensor, vocab_size: int
) -> None:
    """Draft tokens and their laws for the positions that enter at the right edge.

        random         uniform over the vocabulary, q = 1/V: the true law, not the one-hot of the drawn token
        *-repeat       the neighbour's token, q one-hot
        *-sample       drawn from the neighbour's last law, q = that law

    A neighbour that entered with this fill hands on its own neighbour's; without one (first column or row) the draft is
    random. Forced positions get their token.

    Args:
        state: its tokens and draft_probs are written.
        entering: [B, N] int64 positions; past T the result is scratch.
        last: [B, 1] int64, the last position that has a law.
        init: random | left-repeat | above-repeat | left-sample | above-sample.
        words: [B, N] int64, the INIT word of each position.
        vocab_size: V.
    """
    clipped = entering.clamp_max(grid.num_tokens - 1)
    tokens = (words * vocab_size) >> 32
    laws: Tensor | float = 1.0 / vocab_size
    if init != "random":
        source = neighbour(grid, clipped, last, init)
        known = source >= 0
        if init.endswith("repeat"):
            copied = torch.where(known, state.tokens.gather(1, source + 1), tokens)
            if state.draft_probs is not None:
                laws = torch.nn.functional.one_hot(copied, vocab_size).float()
        else:
            laws = take_rows(state.draft_probs, source.clamp_min(0) % state.draft_probs.shape[1])
            copied = draw(laws, philox.uniform(words))
        if isinstance(laws, Tensor):
            laws = torch.where(known[..., None], laws, 1.0 / vocab_size)
        tokens = torch.where(known, copied, tokens)
    if grid.forced_ids is not None:
        forced_ids = grid.forced_ids[clipped]
        tokens = torch.where(forced_ids >= 0, forced_ids, tokens)
    state.tokens.scatter_(1, entering + 1, tokens)
    if state.draft_probs is not None:
        put_rows(state.draft_probs, entering % state.draft_probs.shape[1], laws)


def neighbour(grid: Grid, positions: Tensor, last: Tensor, init: str) -> Tensor:
    """[B, N] int64: the nearest position to the left or above that is not right of `last`, in the same grid row or
    column; -1 where there is none."""
    if init.startswith("left"):
        row_start = grid.row_start[positions]
        return torch.where((row_start >= 0) & (row_start <= last), last, -1)
    source = grid.above[positions]
    for _ in range(positions.shape[1] // grid.cols):
        source = torch.where(source > last, grid.above[source], source)
    return torch.where(source > last, -1, source)

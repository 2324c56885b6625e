"""ZipAR: several grid rows at once, one token of each a pass. Lossy; plain PyTorch alone: compare passes, not seconds.

A token may be drawn once its left neighbour is known, and `local_window` tokens of the row above from its own column
on, or all of them up to the row's end. So row r follows row r - 1 at a distance; its laws lack what is not drawn yet.

    row r - 1   k k k k k k k k k . . .      k known, . not yet, d drawn in this pass, local_window = 4
    row r       k k k k k d . . . . . .      its law comes from the slot of its left neighbour
    row r + 1   k d . . . . . . . . . .

The window is the stretch of raster slots from the last token whose keys and values are final on. Slots of tokens that
are not known are hidden from all others. A row's first token is predicted by the slot before it, the end of the row
above: a line break where the grammar has one. While that end is not known, the last known token two rows up stands in
for it, in the second row that of the first. What was drawn with unknown tokens before it is read again in every pass
until all before it is known, so that final keys and values have seen everything; the authors' keep what was seen first.

With `adaptive` a row's first token is a draft while the row above is not complete: the next pass, which sees more of
that row, accepts it or draws it from the residual, and the row goes on once it is accepted.

Source: He et al., "ZipAR: parallel autoregressive image generation through spatial locality" (arXiv 2412.04062), and
its code for LlamaGen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import philox
from .arithmetic import draw, fixed_point, residual
from .reference import NEGATIVE_INFINITY, combine, coupled_draw, row_law, row_weights
from .state import VerifyResult, WindowState


@dataclass(frozen=True)
class ZipPlan:
    """Where the tokens of an image stand. positions: [rows, cols] int64 of the image tokens, in a sequence of T.
    forced_ids: [T] int64, -1 where the model chooses.
    """

    positions: Tensor
    forced_ids: Tensor
    local_window: int
    adaptive: bool


@dataclass(kw_only=True)
class ZipState(WindowState):
    """num_committed: [B] tokens before the first that is not known. `commit_pass` tells which are.

    num_final: [B] int64, tokens before the window's second slot: their keys and values are final, but for the last.
    draft_probs: [B, rows, V] float32, the laws that first tokens of rows were drawn from; [B, 0, V] unless adaptive.
    has_draft: [B, rows] bool.
    """

    num_final: Tensor
    draft_probs: Tensor
    has_draft: Tensor

    @classmethod
    def of(cls, state: WindowState, plan: ZipPlan, vocab_size: int) -> "ZipState":
        batch, rows = len(state.tokens), len(plan.positions)
        state.tokens[:, 1 : 1 + len(plan.forced_ids)] = plan.forced_ids.clamp_min(0)
        zip_state = cls(
            **vars(state),
            num_final=torch.zeros_like(state.num_committed),
            draft_probs=torch.zeros(batch, rows if plan.adaptive else 0, vocab_size, device=state.tokens.device),
            has_draft=torch.zeros(batch, rows, dtype=torch.bool, device=state.tokens.device),
        )
        state.num_committed.copy_(leading(known_tokens(zip_state, plan)))
        return zip_state


def known_tokens(state: ZipState, plan: ZipPlan) -> Tensor:
    """[B, T] bool."""
    num_tokens = len(plan.forced_ids)
    return (state.commit_pass[:, :num_tokens] >= 0) | (plan.forced_ids >= 0)


def leading(known: Tensor) -> Tensor:
    """[B] int64: how many tokens are known before the first that is not."""
    return known.long().cumprod(1).sum(1)


def zip_window(state: ZipState, plan: ZipPlan, window_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [B, W] int64, positions [B, W] int64, window_bias [B, W, W] float32) of the next pass."""
    num_tokens, device = len(plan.forced_ids), state.tokens.device
    known = known_tokens(state, plan)
    grid = known[:, plan.positions]
    counts = grid.sum(-1)
    last = state.tokens[:, plan.positions + 1].gather(-1, (counts - 1).clamp_min(0)[..., None]).squeeze(-1)
    ends = plan.positions[1:, 0] - 1  # the slot before each row but the first
    tokens = state.tokens[:, 1 : num_tokens + 1].where(known, 0)
    two_up = (torch.arange(len(ends), device=device) - 1).clamp_min(0)
    tokens[:, ends] = torch.where(known[:, ends], tokens[:, ends], last[:, two_up])
    anchor, behind = torch.full_like(tokens[:, :1], -1), torch.zeros_like(tokens[:, :1]).expand(-1, window_size)
    slots = state.num_final[:, None] + torch.arange(window_size, device=device)
    ids = torch.cat((anchor, tokens, behind), 1).gather(1, slots)
    seen = torch.cat((anchor < 0, known, behind > 0), 1).gather(1, slots)
    rows = torch.arange(window_size, device=device)
    visible = (seen[:, None] & (rows < rows[:, None])) | (rows == rows[:, None])
    bias = torch.zeros_like(visible, dtype=torch.float32).masked_fill_(~visible, NEGATIVE_INFINITY)
    return ids, (slots - 1).masked_fill(slots > num_tokens, num_tokens), bias


def zip_verify(
    logits: Tensor,
    state: ZipState,
    plan: ZipPlan,
    *,
    seeds: Tensor,
    guidance_scale: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
) -> VerifyResult:
    """Draw every token that may be drawn, and move the state to the next pass.

    Args:
        logits: [B, W, V] or [2, B, W, V] of a window of `zip_window`; row i predicts position num_final + i.
        state: updated in place.
        seeds, guidance_scale, temperature, top_k, top_p: see `reference.verify`.
    Returns: VerifyResult whose num_committed is what the cache may keep: the anchor of the next window follows it.
    """
    num_tokens, (rows, cols) = len(plan.forced_ids), plan.positions.shape
    active = state.num_committed < num_tokens
    counts = known_tokens(state, plan)[:, plan.positions].sum(-1)  # [B, rows]
    above = torch.cat((torch.full_like(counts[:, :1], cols), counts[:, :-1]), 1)
    columns = counts.clamp_max(cols - 1)
    positions = plan.positions[torch.arange(rows, device=seeds.device), columns]  # of the next token of each grid row
    slots = positions - state.num_final[:, None]
    due = (counts < cols) & (above >= (columns + plan.local_window).clamp_max(cols))
    due &= (slots < logits.shape[-2]) & active[:, None]

    index = slots.clamp(0, logits.shape[-2] - 1)[..., None].expand(*logits.shape[:-2], rows, logits.shape[-1])
    z = combine(logits.gather(-2, index), guidance_scale, temperature)
    law = row_law(z, top_k, top_p)
    weights = row_weights(z, law)
    tokens, accepted = coupled_draw(weights, z, "gumbel", seeds, positions), due
    if plan.adaptive:
        drafting, complete = due & (columns == 0), above == cols
        probs = weights * law.scale[..., None]
        tokens, accepted = try_row_starts(state, probs, tokens, due, drafting, complete, positions, seeds)
    state.tokens.scatter_(1, positions + 1, torch.where(due, tokens, state.tokens.gather(1, positions + 1)))
    state.nonfinite_rows += ((law.peak == NEGATIVE_INFINITY) & due).sum(1)
    now = torch.where(accepted, state.iteration[:, None], state.commit_pass.gather(1, positions))
    state.commit_pass.scatter_(1, positions, now)
    # The first unknown token was drawn; everything before it had final keys and values after this pass.
    state.num_final.copy_(torch.where(active, state.num_committed + 1, state.num_final))
    reached = torch.where(active, leading(known_tokens(state, plan)), state.num_committed)
    commit_forced(state, plan, reached)
    state.num_committed.copy_(reached)
    state.iteration += active
    return VerifyResult(torch.zeros_like(reached), state.num_final.clone())


def commit_forced(state: ZipState, plan: ZipPlan, reached: Tensor) -> None:
    """Forced tokens count as committed in the pass that knew everything before them. reached: [B]."""
    passes = state.commit_pass[:, : len(plan.forced_ids)]
    behind = torch.arange(len(plan.forced_ids), device=reached.device) < reached[:, None]
    passes.copy_(torch.where(behind & (passes < 0), state.iteration[:, None], passes))


def try_row_starts(
    state: ZipState,
    probs: Tensor,
    tokens: Tensor,
    due: Tensor,
    drafting: Tensor,
    complete: Tensor,
    positions: Tensor,
    seeds: Tensor,
) -> tuple[Tensor, Tensor]:
    """The first tokens of rows against their laws of this pass: (tokens [B, rows] int64, accepted [B, rows] bool).

    Args:
        probs: [B, rows, V], the laws of this pass. tokens: [B, rows], what is drawn where there is nothing to wait for.
        due: [B, rows] bool. drafting: those that are a row's first. complete: the row above is.
        positions: [B, rows] int64.
    """
    has_draft = state.has_draft & drafting
    drafts = state.tokens.gather(1, positions + 1)
    index = drafts.clamp(0, probs.shape[-1] - 1)[..., None]
    p, q = (laws.gather(-1, index).squeeze(-1) for laws in (probs, state.draft_probs))
    words = philox.draw_words(seeds, positions, state.iteration, philox.WINDOW).squeeze(-1)
    passed = has_draft & (philox.uniform(words[philox.ACCEPT]) * q < p)
    left_over = residual(probs, state.draft_probs)
    from_target = ~has_draft | (fixed_point(left_over).sum(-1) == 0)
    redrawn = draw(torch.where(from_target[..., None], probs, left_over), words[philox.RESIDUAL])
    tried = drafting & (has_draft | ~complete)
    tokens = torch.where(tried, torch.where(passed, drafts, redrawn), tokens)
    pending = drafting & ~complete & ~passed
    state.has_draft.copy_(torch.where(drafting, pending, state.has_draft))
    state.draft_probs.copy_(torch.where(pending[..., None], probs, state.draft_probs))
    return tokens, due & ~pending

"""The nouns of a decoding pass: what a batch carries from pass to pass, the image's plan, and what a pass answers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .tree import Tree

# Values of WindowState.law_row where the draft's law is no row of the previous pass.
UNIFORM, ONE_HOT, DRAFTED = -1, -2, -3


@dataclass
class WindowState:
    """What a batch of sequences carries from pass to pass. `verify` updates it in place.

    W is here the largest window there can be; that of a pass may be smaller, and columns right of it mean nothing then.

    tokens: [B, 1 + T + 2W] int64. Column t + 1 is position t: committed tokens, then drafts. Column 0 is -1, the end of
        the caller's prompt; columns past T are scratch.
    num_committed: [B] int64, C.
    iteration: [B] int64. Passes this sequence has taken part in; a counter of its random draws.
    commit_pass: [B, T + W] int64. The pass in which each token was committed, from 0; -1 before. Columns past T are
        scratch.
    law_row: [B, W] int32. The law q that the draft of row i was drawn from: row `law_row` of the previous pass's
        logits, or UNIFORM, or ONE_HOT on the draft, or DRAFTED: row i of `drafted`. The last row of a window has no
        draft.
    laws: [2, B, W, 4] float32. What turns a row of logits into a law, see `reference.RowLaw`; those of iteration n lie
        at n % 2. No probability is stored: q is computed again from the previous logits, and is bitwise what p was.
    previous_logits: the logits of the last pass, the caller's own tensor; None before, and where no method reads it.
    zero_residual, nonfinite_rows, zero_draft_prob: [B] int64 counters: recovered tokens drawn from p because the
        residual had no mass (rounding), rows without one finite logit, and drafts outside their own law (a bug, never
        seen where rules C1 and C2 hold).
    siblings: [B, D - 1, K - 1] int64. Candidates 2..K of the next D - 1 positions, see tree.py; -1 where there is none.
        Empty without a tree.
    drafted: [B, W, V] float32 in [0, 1] and drafted_scale: [B, W] float32. Laws that a drafter gave the drafts of the
        next pass: q = drafted * drafted_scale. None without a drafter.
    published: [B, N, 4 + K] int64 and ticket: [B] int32, scratch of the fused kernel: what the programs of its N rows
        tell the one that finishes a sequence.
    """

    tokens: Tensor
    num_committed: Tensor
    iteration: Tensor
    commit_pass: Tensor
    law_row: Tensor
    laws: Tensor
    previous_logits: Tensor | None
    zero_residual: Tensor
    nonfinite_rows: Tensor
    zero_draft_prob: Tensor
    siblings: Tensor
    published: Tensor
    ticket: Tensor
    drafted: Tensor | None = None
    drafted_scale: Tensor | None = None

    @property
    def max_window_size(self) -> int:
        return self.law_row.shape[1]

    @classmethod
    def new(
        cls,
        batch_size: int,
        num_tokens: int,
        max_window_size: int,
        device: torch.device | str,
        *,
        drafted_codes: int = 0,
        tree: tuple[int, int] | None = None,
    ) -> "WindowState":
        """Nothing committed, and no drafts yet: `start` enters them. `drafted_codes`: V where there is a drafter."""
        candidates, depth = (1, 1) if tree is None else tree
        num_rows = max_window_size + (0 if tree is None else Tree(*tree).num_extra)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        tokens = zeros(batch_size, 1 + num_tokens + 2 * max_window_size)
        tokens[:, 0] = -1
        return cls(
            tokens=tokens,
            num_committed=zeros(batch_size),
            iteration=zeros(batch_size),
            commit_pass=zeros(batch_size, num_tokens + max_window_size) - 1,
            law_row=torch.full((batch_size, max_window_size), UNIFORM, dtype=torch.int32, device=device),
            laws=torch.zeros(2, batch_size, max_window_size, 4, device=device),
            previous_logits=None,
            zero_residual=zeros(batch_size),
            nonfinite_rows=zeros(batch_size),
            zero_draft_prob=zeros(batch_size),
            siblings=zeros(batch_size, depth - 1, candidates - 1) - 1,
            published=zeros(batch_size, num_rows, 4 + candidates),
            ticket=torch.zeros(batch_size, dtype=torch.int32, device=device),
            drafted=torch.zeros(batch_size, max_window_size, drafted_codes, device=device) if drafted_codes else None,
            drafted_scale=torch.zeros(batch_size, max_window_size, device=device) if drafted_codes else None,
        )


def reads_previous_logits(accept: str, max_window_size: int) -> bool:
    """The next pass will compute the law of its drafts from this pass's logits."""
    return accept == "ratio" and max_window_size > 1


@dataclass(frozen=True)
class Grid:
    """The static plan of an image's positions.

    forced_ids: [T] int64, the forced token of each position, -1 where the model chooses; None where nothing is forced.
    row_start: [T] int64, position of the first image token of the same grid row; -1 at forced positions.
    above: [T] int64, position of the token one grid row up; -1 in the first row and at forced positions.
    cols: image tokens in a grid row.
    """

    forced_ids: Tensor | None
    row_start: Tensor
    above: Tensor
    cols: int

    @property
    def num_tokens(self) -> int:
        return self.row_start.shape[0]


@dataclass(frozen=True)
class VerifyResult:
    """num_accepted: [B] drafts accepted in this pass; num_committed: [B] tokens committed so far.

    accepted_slots: [B, D - 1] int64 with a tree: the slot of the window whose keys and values belong in slot 1, 2, ..
        before the cache is rolled back; the very slot where nothing is to be moved. None without.
    """

    num_accepted: Tensor
    num_committed: Tensor
    accepted_slots: Tensor | None = None

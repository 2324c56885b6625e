"""EAGLE: a trained head drafts a chain of tokens after every pass, and the next pass verifies them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sjd_engine import ops
from sjd_engine.drafting import Drafts
from sjd_engine.kv_cache import PagedKVCache
from sjd_engine.models import ImageModel
from sjd_engine.models.block import Pass


@dataclass(frozen=True)
class Seen:
    """What the transformer made of the windows of some rows.

    rows: [R] int64. sequences: [S] int64, theirs.
    hidden: [S, W, hidden], before the final norm.
    longest: tokens that the sequences held before the pass, or more.
    """

    rows: Tensor
    sequences: Tensor
    hidden: Tensor
    longest: int


@dataclass
class Chain:
    """The drafts of some rows, as far as they have come.

    cache: of the head, for the rows' sequences.
    guess: [S, 1, hidden] of the slot before the next draft.
    """

    rows: Tensor
    cache: PagedKVCache
    guess: Tensor


class EagleDrafter:
    """Draws every draft of the next window from the law that the head gives it.

    The head reads pairs: the hidden state of a slot, and the token that follows it. Those of a pass that were committed
    are appended to its own cache, and the last of them begins a chain, whose later pairs are drafts and the head's own
    guesses. So the law of a draft depends on tokens before it alone, as it must.

    Args:
        model: with the head.
        batch_size: B, rows of the decoder.
        guided: each row has two sequences, side by side.
        capacity: tokens that a sequence of the transformer's cache may hold.
        window_size: most slots of a pass.
    Source: see `sjd_engine.models.draft_head`.
    """

    def __init__(
        self,
        model: ImageModel,
        *,
        batch_size: int,
        guided: bool,
        capacity: int,
        window_size: int,
    ):
        assert model.draft_head is not None
        self.model, self.head, self._copies = model, model.draft_head, 2 if guided else 1
        config = self.head.config
        self._kv_cache = PagedKVCache(
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            num_sequences=self._copies * batch_size,
            capacity=capacity + window_size,  # the pairs of a pass, and a chain behind them
            dtype=model.transformer.dtype,
            device=model.device,
        )
        self._seen: list[Seen] = []

    def begin(self, sequence: int, first_position: int) -> None:
        """Another image begins in `sequence`, with its first token at `first_position`."""
        self._kv_cache.context_lens[sequence] = 0
        self._kv_cache.first_positions[sequence] = first_position

    def see(self, seen: Seen) -> None:
        """Remember a pass until it is verified."""
        self._seen.append(seen)

    @torch.inference_mode()
    def __call__(self, drafts: Drafts) -> None:
        """Draft for the rows that were seen. No sync."""
        chains = [self._begin_chain(drafts, seen) for seen in self._seen]
        self._seen = []
        where = torch.zeros_like(drafts.positions[:, :1], dtype=torch.bool)
        where[torch.cat([chain.rows for chain in chains])] = True
        for row in range(drafts.num_drafts):
            weights = torch.ones(len(where), 1, self.model.num_codes, device=where.device)
            for chain in chains:
                weights[chain.rows] = self._weights(drafts, chain)
            drafts.redraw(row, weights, where)
            if row + 1 < drafts.num_drafts:
                tokens = drafts.tokens(drafts.positions[:, row : row + 1])
                for chain in chains:
                    chain.guess = self._guess(chain.cache, tokens[chain.rows], chain.guess)
                    chain.cache.context_lens += 1

    def _begin_chain(self, drafts: Drafts, seen: Seen) -> Chain:
        """Append the pairs of a pass, and forget those that were not committed."""
        window_size = seen.hidden.shape[1]
        cache = self._kv_cache.select(seen.sequences, seen.longest)
        last = drafts.grid.num_tokens - 1
        slots = drafts.first[:, None] + torch.arange(window_size, device=seen.rows.device)
        guesses = self._guess(cache, drafts.tokens(slots.clamp_max(last))[seen.rows], seen.hidden)
        committed = drafts.state.num_committed[seen.rows].repeat_interleave(self._copies)
        chosen = (committed - cache.context_lens - 1).clamp_min(0)  # an image that was complete before has none
        guess = guesses.gather(1, chosen[:, None, None].expand(-1, 1, guesses.shape[-1]))
        self._kv_cache.context_lens[seen.sequences] = committed.int()
        room = window_size + drafts.num_drafts
        return Chain(seen.rows, self._kv_cache.select(seen.sequences, seen.longest + room), guess)

    def _weights(self, drafts: Drafts, chain: Chain) -> Tensor:
        """[R, 1, V] float32: the law of the next draft of every row, before it is scaled to sum to 1."""
        logits = self.model.transformer.logits(chain.guess).unflatten(0, (-1, self._copies))
        logits = logits.transpose(0, 1) if self._copies == 2 else logits.squeeze(1)
        own = {name: None if value is None else value[chain.rows] for name, value in drafts.warp_arguments.items()}
        z, _ = ops.warp(logits, **own)
        return (z - z.amax(-1, keepdim=True)).exp()

    def _guess(self, cache: PagedKVCache, ids: Tensor, hidden: Tensor) -> Tensor:
        """[S, N, hidden]: slots after the pairs of the tokens `ids` [R, N] and `hidden` [S, N, hidden]."""
        transformer = self.model.transformer
        embeddings = self.model.window_embeddings(ids.repeat_interleave(self._copies, 0), hidden[:, 0])
        positions, span = cache.positions(hidden.shape[1])
        rows = positions.clamp_max(len(transformer.cos) - 1)
        cos, sin = (table[rows][:, :, None] for table in (transformer.cos, transformer.sin))
        run = Pass(cache, span, cos, sin, None, ops.layer_ops(hidden))
        return self.head(embeddings, hidden, run)

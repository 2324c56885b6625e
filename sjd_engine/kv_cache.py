"""The key/value cache: pages that sequences share and give back. Rejected tokens are forgotten by moving a length."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sjd_engine import native, ops

PAGE_SIZE = 64


class PagedKVCache:
    """Paged cache of S sequences that grow and roll back at their own pace.

    Token t of sequence s stands in slot `t % page_size` of page `block_table[s, t // page_size]`, in every layer. All
    pages of a sequence are reserved when it is admitted, so the tables stand still while it is decoded.

    Args:
        num_layers, num_kv_heads, head_dim: L, KH, D.
        num_sequences: S. With guidance the two sequences of an image lie side by side.
        capacity: tokens a sequence may hold, those of a window that will be rejected included.
        num_pages: of the pool that `admit` takes from; None gives every sequence pages of its own from the start.
        page_size: tokens of a page, >= 1.
        poison: slots behind every length that `rollback` and `advance` fill with NaN, so that a stale read shows; 0 for
            none. At least the window size finds every read of a rejected token.
    Raises: RuntimeError where `num_pages` is given and the compiled module is missing.

    Attributes:
        pages: [L, num_pages, 2, page_size, KH, D], keys and values of a page.
        block_table: [S, pages of the capacity] int32 page numbers; -1 where there is none.
        context_lens: [S] int32 valid tokens.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_sequences: int,
        capacity: int,
        num_pages: int | None = None,
        page_size: int = PAGE_SIZE,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        poison: int = 0,
    ):
        for name, value in {"num_sequences": num_sequences, "capacity": capacity, "page_size": page_size}.items():
            if value < 1:
                raise ValueError(f"PagedKVCache: {name} must be >= 1, got {value}")
        self.capacity, self.page_size, self.poison = capacity, page_size, poison
        self.longest: int | None = None
        width = -(-capacity // page_size)
        self._allocator = None if num_pages is None else native.page_allocator(num_pages, page_size)
        self._sequences: list[int | None] = [None] * num_sequences
        count = num_sequences * width if num_pages is None else num_pages
        # Not zeroed: no slot is read before it is written.
        self.pages = torch.empty(
            num_layers, count, 2, page_size, num_kv_heads, head_dim, dtype=dtype, device=torch.device(device)
        )
        if poison:
            self.pages.fill_(float("nan"))
        self._layers = self.pages.unbind()
        self.context_lens = torch.zeros(num_sequences, dtype=torch.int32, device=device)
        self.block_table = torch.full((num_sequences, width), -1, dtype=torch.int32, device=device)
        if num_pages is None:
            self.block_table.flatten().copy_(torch.arange(count, dtype=torch.int32))
        self._ops = ops.kv_ops(self.pages.device)

    # ------------------------------------------------------------------------------------------------------ a pass

    def narrow(self, rows: slice, longest: int | None = None) -> "PagedKVCache":
        """The sequences `rows` as a cache of their own, on the same storage.

        Args:
            longest: an upper bound of their lengths, where the host knows one; None asks the device.
        """
        part = object.__new__(PagedKVCache)
        part.__dict__.update(self.__dict__)
        part.longest = longest
        part.context_lens, part.block_table = self.context_lens[rows], self.block_table[rows]
        return part

    def positions(self, num_new: int) -> tuple[Tensor, int]:
        """Where the next tokens of each sequence go, [S, num_new] int64, and the tokens the longest may then hold.

        Raises: ValueError past the capacity.
        """
        longest = self.longest
        if longest is None:
            longest = int(self.context_lens.amax())  # sync: the span of the attention
        if longest + num_new > self.capacity:
            raise ValueError(f"PagedKVCache: {longest} + {num_new} tokens exceed the capacity of {self.capacity}")
        return self.context_lens.long()[:, None] + torch.arange(num_new, device=self.pages.device), longest + num_new

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write keys and values [S, N, KH, D] behind every context. The lengths move once the pass is verified."""
        self._ops.append_kv(self._layers[layer], self.block_table, self.context_lens, keys, values)

    def attend(self, layer: int, queries: Tensor, span: int, window_bias: Tensor | None = None) -> Tensor:
        """Attention of the N tokens that were appended last; see `kernels.reference.window_attention`.

        Args:
            queries: [S, N, H, D].
            span: tokens the longest sequence holds, these N among them, or more.
        Returns: [S, N, H, D], contiguous.
        """
        return self._ops.window_attention(
            queries, self._layers[layer], self.block_table, self.context_lens, span=span, window_bias=window_bias
        )

    def gather(self, layer: int, span: int, num_new: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values [S, span, KH, D] of one layer in the order of their tokens, zeros behind the last valid one.

        Args:
            num_new: tokens behind every length that were appended and count as valid.
        """
        return self._ops.gather_kv(self._layers[layer], self.block_table, self.context_lens, num_new=num_new, span=span)

    def rollback(self, lengths: Tensor) -> None:
        """Keep the first lengths[s] tokens of sequence s; the next pass overwrites what lies behind them."""
        self.context_lens.copy_(lengths)
        self._poison()

    def advance(self, prefix_lens: Tensor, num_committed: Tensor) -> None:
        """Move the lengths to what a verified pass has committed: everything before the anchor. No sync.

        Args:
            prefix_lens: [S] int32 prompt tokens of a sequence but the last.
            num_committed: [B] int64; S / B sequences belong to each image.
        """
        self._ops.advance_rollback(self.context_lens, prefix_lens, num_committed)
        self._poison()

    def _poison(self) -> None:
        if self.poison:
            self._ops.poison_kv(self.pages, self.block_table, self.context_lens, num_slots=self.poison)

    # --------------------------------------------------------------------------------------- sequences come and go

    def pages_needed(self, capacity: int, prompt_ids: Sequence[int] = ()) -> int:
        """Free pages that `admit` would take; it can while `num_free_pages` are as many."""
        return self._pool().pages_needed(prompt=list(prompt_ids), capacity=capacity)

    @property
    def num_free_pages(self) -> int:
        return self._pool().num_free

    def admit(self, row: int, capacity: int, prompt_ids: Sequence[int] = ()) -> int:
        """Reserve the pages of a new sequence, and let it be `row`.

        Args:
            capacity: tokens it may hold, up to that of the cache.
            prompt_ids: its first tokens. Full pages of them that another sequence has published are shared.
        Returns: prompt tokens whose keys and values are there already, which is its length.
        Raises: PagesExhausted (a RuntimeError) where too few pages are free; nothing has changed then.
        """
        self._check_row("admit", row, taken=False)
        if capacity > self.capacity:
            raise ValueError(f"admit: capacity must be at most the cache's {self.capacity}, got {capacity}")
        sequence, num_cached = self._pool().admit(prompt=list(prompt_ids), capacity=capacity)
        self._seat(row, sequence)
        self.context_lens[row] = num_cached
        return num_cached

    def publish(self, row: int, num_tokens: int) -> None:
        """The first `num_tokens` tokens of the prompt are written: sequences admitted later share their full pages."""
        self._pool().publish(self._check_row("publish", row), num_tokens=num_tokens)

    def fork(self, row: int, into: int, num_tokens: int, capacity: int) -> None:
        """Let row `into` be a new sequence of at most `capacity` tokens that begins with the first `num_tokens` of
        `row`. Their full pages are shared, the page that both write next is copied.

        Raises: PagesExhausted.
        """
        parent = self._check_row("fork", row)
        self._check_row("fork", into, taken=False)
        if capacity > self.capacity:
            raise ValueError(f"fork: capacity must be at most the cache's {self.capacity}, got {capacity}")
        child, copies = self._pool().fork(parent, num_tokens=num_tokens, capacity=capacity)
        self._copy(copies)
        self._seat(into, child)
        self.context_lens[into] = num_tokens

    def own(self, row: int, first: int) -> None:
        """Copy on write: let `row` write from token `first` on, where it may share pages. Raises: PagesExhausted."""
        sequence = self._check_row("own", row)
        self._copy(self._pool().own(sequence, first=first))
        self._seat(row, sequence)

    def release(self, row: int) -> None:
        """Give the pages of `row` back; it can be admitted to again."""
        self._pool().release(self._check_row("release", row))
        self._sequences[row] = None
        self.block_table[row] = -1
        self.context_lens[row] = 0

    def check_invariants(self) -> None:
        """Raises: RuntimeError where references, free pages and tables do not agree."""
        self._pool().check_invariants()

    def _pool(self) -> native.PageAllocator:
        if self._allocator is None:
            raise RuntimeError(
                "PagedKVCache: its sequences have pages of their own; make it with num_pages to admit some"
            )
        return self._allocator

    def _check_row(self, op: str, row: int, *, taken: bool = True) -> int:
        """The allocator's number of the sequence in `row`; 0 where there should be none."""
        if not 0 <= row < len(self._sequences):
            raise ValueError(f"{op}: row must be in 0..{len(self._sequences) - 1}, got {row}")
        sequence = self._sequences[row]
        if (sequence is not None) != taken:
            raise ValueError(f"{op}: row must be {'taken' if taken else 'free'}, got {row}")
        return sequence or 0

    def _seat(self, row: int, sequence: int) -> None:
        pages = self._pool().pages(sequence)
        self._sequences[row] = sequence
        self.block_table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        if copies:
            pairs = torch.tensor(copies, dtype=torch.int32, device=self.pages.device)
            self._ops.copy_pages(self.pages, pairs)

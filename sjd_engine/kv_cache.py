"""The key/value cache: pages that sequences share and give back. Rejected tokens are forgotten by moving a length."""

import copy
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

    Attributes:
        pages: [L, num_pages, 2, page_size, KH, D], keys and values of a page.
        block_table: [S, pages of the capacity] int32 page numbers; -1 where there is none.
        context_lens: [S] int32 valid tokens.
        first_positions: [S] int64, the position of each sequence's first token.
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
        self._allocator = None if num_pages is None else new_allocator(num_pages, page_size)
        count = num_sequences * -(-capacity // page_size) if num_pages is None else num_pages
        # Not zeroed: no slot is read before it is written.
        self.pages = torch.empty(
            num_layers, count, 2, page_size, num_kv_heads, head_dim, dtype=dtype, device=torch.device(device)
        )
        if poison:
            self.pages.fill_(float("nan"))
        self._layers = self.pages.unbind()
        self._ops = ops.kv_ops(self.pages.device)
        self._new_tables(num_sequences)
        if num_pages is None:
            self.block_table.flatten().copy_(torch.arange(count, dtype=torch.int32))

    def _new_tables(self, num_sequences: int) -> None:
        device, width = self.pages.device, -(-self.capacity // self.page_size)
        self._sequences: list[int | None] = [None] * num_sequences
        self.context_lens = torch.zeros(num_sequences, dtype=torch.int32, device=device)
        self.first_positions = torch.zeros(num_sequences, dtype=torch.int64, device=device)
        self.block_table = torch.full((num_sequences, width), -1, dtype=torch.int32, device=device)

    def sibling(self, num_sequences: int, capacity: int) -> "PagedKVCache":
        """Rows for other sequences on the same pages, of at most `capacity` tokens each."""
        self._pool()
        other = copy.copy(self)
        other.capacity = capacity
        other._new_tables(num_sequences)
        return other

    # ------------------------------------------------------------------------------------------------------ a pass

    def select(self, rows: slice | Tensor, longest: int | None = None) -> "PagedKVCache":
        """The sequences `rows` as a cache of their own, on the same pages.

        Args:
            rows: a slice; or int64 indices, whose lengths are copies, not to be moved by `advance` and `rollback`.
            longest: an upper bound of their lengths, where the host knows one; None asks the device.
        """
        part = copy.copy(self)
        part.longest = longest
        part.context_lens, part.first_positions = self.context_lens[rows], self.first_positions[rows]
        part.block_table = self.block_table[rows]
        return part

    def positions(self, num_new: int) -> tuple[Tensor, int]:
        """Positions of the next tokens of each sequence, [S, num_new] int64, and the tokens the longest may then hold.

        Raises: ValueError past the capacity.
        """
        longest = self.longest
        if longest is None:
            longest = int(self.context_lens.amax())  # sync: the span of the attention
        if longest + num_new > self.capacity:
            raise ValueError(f"PagedKVCache: {longest} + {num_new} tokens exceed the capacity of {self.capacity}")
        first = self.first_positions + self.context_lens
        return first[:, None] + torch.arange(num_new, device=self.pages.device), longest + num_new

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write keys and values [S, N, KH, D] behind every context. The lengths move once the pass is verified."""
        self._ops.append_kv(self._layers[layer], self.block_table, self.context_lens, keys, values)

    def attend(self, layer: int, queries: Tensor, span: int, window_bias: Tensor | None = None) -> Tensor:
        """Attention of the N tokens that were appended last; see `kernels.reference.window_attention`.

        Args:
            queries: [S, N, H, D].
            span: tokens the longest sequence holds, these N among them, or more.
            window_bias: [N, N] or [S, N, N] float32, what stands in place of the causal rule; None for that rule.
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

    def compact(self, accepted_slots: Tensor) -> None:
        """Move the keys and values of a tree's accepted path to their places; before the lengths move. No sync.

        Args:
            accepted_slots: [B, D - 1] int64, see `VerifyResult`; S / B sequences belong to each image.
        """
        self._ops.compact_kv(self.pages, self.block_table, self.context_lens, accepted_slots)

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

    @property
    def num_free_pages(self) -> int:
        return self._pool().num_free

    @property
    def num_pages(self) -> int:
        return self.pages.shape[1]

    def pages_of(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def admit(self, row: int, capacity: int, prompt_ids: Sequence[int] = (), first_position: int = 0) -> int:
        """Reserve the pages of a new sequence, and let it be `row`.

        Args:
            capacity: tokens it may hold, up to that of the cache.
            prompt_ids: its first tokens. Full pages of them that another sequence has published are shared.
            first_position: position of its first token.
        Returns: prompt tokens whose keys and values are there already, which is its length.
        Raises: PagesExhausted (a RuntimeError) where too few pages are free; nothing has changed then.
        """
        self._check_row("admit", row, taken=False)
        self._check_capacity("admit", capacity)
        sequence, num_cached = self._pool().admit(prompt=list(prompt_ids), capacity=capacity)
        self._seat(row, sequence, num_cached, first_position)
        return num_cached

    def publish(self, row: int, num_tokens: int) -> None:
        """The first `num_tokens` tokens of the prompt are written: sequences admitted later share their full pages."""
        self._pool().publish(self._check_row("publish", row), num_tokens=num_tokens)

    def fork(
        self, row: int, into: int, num_tokens: int, capacity: int, *, parent: "PagedKVCache | None" = None
    ) -> None:
        """Make row `into` a twin of `row` with its first `num_tokens` tokens. Full pages are shared, the page that both
        write next is copied.

        Args:
            capacity: tokens the twin may hold.
            parent: the sibling that holds `row`; None for this cache.
        Raises: PagesExhausted; nothing has changed then.
        """
        parent = self if parent is None else parent
        original = parent._check_row("fork", row)
        self._check_row("fork", into, taken=False)
        self._check_capacity("fork", capacity)
        child, copies = self._pool().fork(original, num_tokens=num_tokens, capacity=capacity)
        self._copy(copies)
        self._seat(into, child, num_tokens, parent.first_positions[row])

    def own(self, row: int, first: int) -> None:
        """Copy on write: let `row` write from token `first` on, where it may share pages. Raises: PagesExhausted."""
        sequence = self._check_row("own", row)
        self._copy(self._pool().own(sequence, first=first))
        self._write_table(row, sequence)

    def release(self, row: int) -> None:
        """Give the pages of `row` back; it can be admitted to again."""
        self._pool().release(self._check_row("release", row))
        self._sequences[row] = None
        self.block_table[row] = -1
        self.context_lens[row] = 0

    def check_invariants(self) -> None:
        """Raises: RuntimeError where references, free pages and tables do not agree."""
        self._pool().check_invariants()

    def _pool(self) -> "native.PageAllocator | UnsharedPages":
        if self._allocator is None:
            raise RuntimeError(
                "PagedKVCache: its sequences have pages of their own; make it with num_pages to admit some"
            )
        return self._allocator

    def _check_capacity(self, op: str, capacity: int) -> None:
        if capacity > self.capacity:
            raise ValueError(f"{op}: capacity must be at most the cache's {self.capacity}, got {capacity}")

    def _check_row(self, op: str, row: int, *, taken: bool = True) -> int:
        """The allocator's number of the sequence in `row`; 0 where there should be none."""
        if not 0 <= row < len(self._sequences):
            raise ValueError(f"{op}: row must be in 0..{len(self._sequences) - 1}, got {row}")
        sequence = self._sequences[row]
        if (sequence is not None) != taken:
            raise ValueError(f"{op}: row must be {'taken' if taken else 'free'}, got {row}")
        return sequence or 0

    def _seat(self, row: int, sequence: int, length: int, first_position: int | Tensor) -> None:
        self._sequences[row] = sequence
        self._write_table(row, sequence)
        self.context_lens[row] = length
        self.first_positions[row] = first_position
        if self.poison:  # the page's last owner has left tokens there
            table, lens = self.block_table[row : row + 1], self.context_lens[row : row + 1]
            self._ops.poison_kv(self.pages, table, lens, num_slots=self.capacity)

    def _write_table(self, row: int, sequence: int) -> None:
        pages = self._pool().pages(sequence)
        self.block_table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        if copies:
            pairs = torch.tensor(copies, dtype=torch.int32, device=self.pages.device)
            self._ops.copy_pages(self.pages, pairs)


def new_allocator(num_pages: int, page_size: int) -> "native.PageAllocator | UnsharedPages":
    """The compiled allocator; without it, one that shares nothing."""
    return native.page_allocator(num_pages, page_size) if native.available() else UnsharedPages(num_pages, page_size)


class UnsharedPages:
    """The books of a pool where every sequence has pages of its own: what stands in for `native.PageAllocator` on a
    machine without the compiled module."""

    def __init__(self, num_pages: int, page_size: int):
        self.page_size, self._free = page_size, list(range(num_pages))
        self._held: dict[int, list[int]] = {}
        self._next = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages(self, sequence: int) -> list[int]:
        return self._held[sequence]

    def admit(self, *, prompt: list[int], capacity: int) -> tuple[int, int]:
        """(sequence, 0): nothing of the prompt is there. Raises: PagesExhausted; nothing has changed then."""
        needed = -(-capacity // self.page_size)
        if needed > len(self._free):
            raise native.PagesExhausted(f"admit: needs {needed} free pages, but {len(self._free)} are free")
        self._next += 1
        self._held[self._next] = [self._free.pop() for _ in range(needed)]
        return self._next, 0

    def fork(self, sequence: int, *, num_tokens: int, capacity: int) -> tuple[int, list[tuple[int, int]]]:
        """(child, copies): every page of the first `num_tokens` tokens is copied. Raises: PagesExhausted."""
        child, _ = self.admit(prompt=[], capacity=capacity)
        filled = -(-num_tokens // self.page_size)
        return child, list(zip(self._held[sequence][:filled], self._held[child], strict=False))

    def own(self, sequence: int, *, first: int) -> list[tuple[int, int]]:
        return []

    def publish(self, sequence: int, *, num_tokens: int) -> None:
        """Nobody shares."""

    def release(self, sequence: int) -> None:
        self._free += self._held.pop(sequence)

    def check_invariants(self) -> None:
        """Raises: RuntimeError where a page is held twice or lost."""
        held = [page for pages in self._held.values() for page in pages]
        if len(set(held + self._free)) != len(held) + len(self._free):
            raise RuntimeError("UnsharedPages: a page is held twice")

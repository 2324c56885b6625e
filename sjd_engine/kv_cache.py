"""The key/value cache. Rejected tokens are forgotten by moving a length; tensors stay where they are."""

import torch
from torch import Tensor


class KVCache:
    """Contiguous cache of S sequences that grow and roll back at their own pace.

    Args:
        num_layers: L.
        num_sequences: S. With guidance the two sequences of an image lie side by side.
        capacity: tokens a sequence may hold, those of a window that will be rejected included.
        num_kv_heads, head_dim: KH, D.
    """

    def __init__(
        self,
        num_layers: int,
        num_sequences: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.capacity = capacity
        self.longest: int | None = None
        self.lengths = torch.zeros(num_sequences, dtype=torch.int64, device=device)
        # One token's keys and values lie together: a pass writes each layer with one copy.
        self.tokens = torch.zeros(
            num_layers, num_sequences, capacity, 2, num_kv_heads, head_dim, dtype=dtype, device=device
        )

    def narrow(self, rows: slice, longest: int | None = None) -> "KVCache":
        """The sequences `rows` as a cache of their own, on the same storage.

        Args:
            longest: an upper bound of their lengths, where the host knows one; None asks the device.
        """
        part = object.__new__(KVCache)
        part.capacity, part.longest = self.capacity, longest
        part.lengths, part.tokens = self.lengths[rows], self.tokens[:, rows]
        return part

    def positions(self, num_new: int) -> tuple[Tensor, int]:
        """Where the next tokens of each sequence go, [S, num_new] int64, and the tokens the longest may then hold.

        Raises: ValueError past the capacity.
        """
        longest = self.longest
        if longest is None:
            longest = int(self.lengths.amax())  # sync: the span of the attention
        if longest + num_new > self.capacity:
            raise ValueError(f"KVCache: {longest} + {num_new} tokens exceed the capacity of {self.capacity}")
        return self.lengths[:, None] + torch.arange(num_new, device=self.lengths.device), longest + num_new

    def slot_mapping(self, positions: Tensor) -> Tensor:
        """[S * N] int64: the row of each new token in a layer's flat storage."""
        first = torch.arange(len(self.lengths), device=positions.device)[:, None] * self.capacity
        return (first + positions).flatten()

    def append(self, layer: int, kv: Tensor, slot_mapping: Tensor) -> None:
        """Write kv [S * N, 2 * KH * D]. The lengths move with `rollback`, once the pass is verified."""
        self.tokens[layer].flatten(0, 1).flatten(1).index_copy_(0, slot_mapping, kv)

    def read(self, layer: int, span: int) -> tuple[Tensor, Tensor]:
        """The first `span` tokens of every sequence: keys and values, [S, KH, span, D] views."""
        keys, values = self.tokens[layer, :, :span].transpose(1, 3).unbind(2)
        return keys, values

    def rollback(self, lengths: Tensor) -> None:
        """Keep the first lengths[s] tokens of sequence s; the next pass overwrites what lies behind them."""
        self.lengths.copy_(lengths)

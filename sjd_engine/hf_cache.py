"""A model of transformers under a decoder: sequences that advance at their own pace over one DynamicCache."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class CachedRows:
    """R sequences of a model.

    A DynamicCache has one length for all of its rows. After a pass it is cut behind the longest row; slots of rejected
    drafts that remain in shorter ones are hidden by the mask, and the positions are given to the model, so that they
    leave no trace.

    Args:
        forward: keyword arguments as a model of transformers takes them -> [R, N, V] logits.
        embed: [R, W] tokens of a decoder -> what the model reads for them, input_ids or inputs_embeds.
        mask: [R, P], 0 at the prompts' padding.
        positions: [R, P] positions of the prompts' tokens, or [3, R, P].
        behind: [3, R, N] positions of the tokens behind the prompts; None for those that follow.
        cache: an empty DynamicCache; None for a new one.
        num_copies: 2 with guidance, for which the unconditional rows follow the conditional ones; else 1.
    """

    def __init__(
        self,
        forward: Callable[..., Tensor],
        embed: Callable[[Tensor], dict[str, Tensor]],
        mask: Tensor,
        positions: Tensor,
        behind: Tensor | None = None,
        cache: Any = None,
        *,
        num_copies: int = 1,
    ):
        from transformers import DynamicCache

        self._forward, self._embed, self._mask, self._copies = forward, embed, mask, num_copies
        self._positions, self._behind = positions, behind
        self._cache = DynamicCache() if cache is None else cache
        self._window_size = 0

    def prefill(self, **inputs: Any) -> None:
        """The prompts but for their last tokens, of which there may be none.

        Args:
            inputs: input_ids or inputs_embeds, and what the model reads beside them.
        """
        self._mask = self._mask[:, :-1]
        if self._mask.shape[1]:
            self._run(self._mask, self._positions[..., :-1], **inputs)

    def logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        """[B, W, V], or [2, B, W, V] with guidance, of the windows ids [B, W] at positions [B, W], see
        `JacobiDecoder.window`."""
        self._window_size = ids.shape[1]
        ids, positions = ids.repeat(self._copies, 1), positions.repeat(self._copies, 1)
        mask = torch.cat((self._mask, self._mask.new_ones(ids.shape)), 1)
        logits = self._run(mask, self._places(positions), **self._embed(ids))
        return logits.unflatten(0, (2, -1)) if self._copies == 2 else logits

    def keep(self, num_new: Tensor) -> None:
        """Forget the last window but for its first num_new [B] slots; 0 for sequences that have ended."""
        num_new = num_new.clamp_max(self._window_size).repeat(self._copies)
        longest = int(num_new.amax())  # sync: the cache is cut there
        if longest < self._window_size:
            self._cache.crop(longest - self._window_size)
        slots = torch.arange(longest, device=num_new.device) < num_new[:, None]
        self._mask = torch.cat((self._mask, slots.to(self._mask.dtype)), 1)

    def _places(self, positions: Tensor) -> Tensor:
        """The model's positions of a decoder's."""
        last = self._positions[..., -1:]
        if self._behind is None:
            return last + 1 + positions
        places = positions.clamp(0, self._behind.shape[-1] - 1).expand(len(self._behind), -1, -1)
        return torch.where(positions < 0, last, self._behind.gather(-1, places))

    def _run(self, mask: Tensor, positions: Tensor, **inputs: Any) -> Tensor:
        return self._forward(attention_mask=mask, position_ids=positions, past_key_values=self._cache, **inputs)


def prompt_positions(mask: Tensor) -> Tensor:
    """[R, P] positions of tokens that are padded on the left, where the mask is 0."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def check_cache(cache: Any) -> Any:
    """`cache` itself, or None. Raises: ValueError where rejected drafts cannot be cut from it, or it is in use."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if cache is None:
        return None
    if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise ValueError(
            f"past_key_values: expected a DynamicCache whose layers keep all tokens, got {type(cache).__name__}; "
            "leave out cache_implementation, and take a model without sliding windows"
        )
    if cache.get_seq_length():
        raise ValueError(f"past_key_values: expected an empty cache, got {cache.get_seq_length()} tokens")
    return cache

"""A transformer over whole sequences, with gradients."""

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sjd_engine.models.block import Pass, Transformer
from sjd_engine.models.linear import linear
from sjd_engine.ops import layer_ops

# Attention with a mask is written out for fewer: on a CPU the backward pass of PyTorch's operator takes three times as
# long. For more they would fill the memory, which the operator need not.
FEW_SCORES = 1 << 26


class WholeSequence:
    """Stands in for the cache of a pass over whole sequences.

    Args:
        visible: [B, N, N] bool, which slots each slot reads; None for the causal rule.
    """

    def __init__(self, visible: Tensor | None = None):
        self._visible = visible

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values

    def attend(self, layer: int, queries: Tensor, span: int, window_bias: Tensor | None) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (queries, self._keys, self._values))
        if self._visible is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        q = q.unflatten(1, (k.shape[1], -1))
        if q.shape[:4].numel() * k.shape[2] > FEW_SCORES:
            keys, values = (t.repeat_interleave(q.shape[2], 1) for t in (k, v))
            out = F.scaled_dot_product_attention(q.flatten(1, 2), keys, values, self._visible[:, None])
            return out.transpose(1, 2)
        scores = (q @ k[:, :, None].transpose(-1, -2)) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~self._visible[:, None, None], float("-inf"))
        return (scores.float().softmax(-1).to(v.dtype) @ v[:, :, None]).flatten(1, 2).transpose(1, 2)


def hidden_states(
    transformer: Transformer,
    x: Tensor,
    positions: Tensor,
    visible: Tensor | None = None,
    *,
    gradient_checkpointing: bool = False,
) -> Tensor:
    """[B, N, hidden] before the final norm.

    Args:
        x: [B, N, hidden] embeddings.
        positions: [B, N] int64, rows of the position table.
        visible: see `WholeSequence`.
        gradient_checkpointing: the backward pass computes every block again, from what it was given.
    """
    cos, sin = (table[positions][:, :, None].to(x.dtype) for table in (transformer.cos, transformer.sin))
    run = Pass(WholeSequence(visible), x.shape[1], cos, sin, None, layer_ops(x))  # type: ignore[arg-type]
    for block in transformer.blocks:
        if gradient_checkpointing:
            x = checkpoint(block, x, run, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, run)
    return x


def image_logits(transformer: Transformer, hidden: Tensor) -> Tensor:
    """`Transformer.logits`, with gradients."""
    hidden = F.rms_norm(hidden.float(), hidden.shape[-1:], transformer.norm.float(), transformer.config.norm_eps)
    if transformer.head_in is not None:
        hidden = F.gelu(linear(hidden, transformer.head_in, transformer.head_in_bias))
    return linear(hidden, transformer.head, transformer.head_bias)

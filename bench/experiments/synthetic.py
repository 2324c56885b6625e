"""The engine without a model: what a pass costs outside the transformer, at a chosen rate of acceptance.

The transformer is replaced by one that answers at once. Its laws are uniform over a set of the vocabulary, of which two
take turns from pass to pass. With P the chance of acceptance, each has P V tokens, and P * P V tokens are in both. A
draft that was drawn from one is accepted against the other with chance P, and so is one that was drawn uniformly:

    sum min(p, p') = P * P V / (P V) = P        sum min(p, 1 / V) = P V / V = P

so that a pass of W rows commits (1 - P^W) / (1 - P) tokens on average, with every method of the ratio test.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sjd_engine import Engine
from sjd_engine.methods import METHODS

from . import measure, prompts
from .report import Column, Result
from .sweeps import BEST_EXACT

LEAST_PASSES = 4  # of an image, with all drafts accepted
IMPOSSIBLE = -200.0  # a logit without any mass
COLUMNS = (
    Column("method", "method"),
    Column("W", "window", "d"),
    Column("batch", "batch", "d"),
    Column("µs/pass", "us_per_pass", ".0f"),
    Column("tok/pass", "step_compression", ".2f"),
    Column("expected", "expected", ".2f"),
    Column("µs/token", "us_per_token", ".1f"),
    Column("passes", "passes", "d"),
)


def laws(vocab_size: int, accept: float) -> Tensor:
    """[2, V] logits of the two laws."""
    size = max(1, round(accept * vocab_size))
    begin = size - round(accept * size)
    both = torch.full((2, vocab_size), IMPOSSIBLE)
    both[0, :size] = 0.0
    both[1, begin : begin + size] = 0.0
    return both


def expected(accept: float, window: int) -> float:
    """Tokens that a pass commits on average, where the image does not end."""
    return sum(accept**i for i in range(window))


@contextmanager
def answering_at_once(engine: Engine, accept: float) -> Iterator[None]:
    """The engine's transformer answers without looking; its laws take turns from pass to pass."""
    transformer, rows = engine.model.transformer, laws(engine.model.num_codes, accept)
    passes = 0

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x

    def logits(hidden: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return rows[passes % 2].expand(*hidden.shape[:2], -1)

    transformer.forward, transformer.logits = forward, logits
    try:
        yield
    finally:
        del transformer.forward, transformer.logits


def run(args: argparse.Namespace) -> Result:
    """Microseconds of a pass for every batch and every window that an image has several of."""
    accept, method = args.synthetic_accept, (args.methods or [BEST_EXACT])[0]
    if METHODS[method].accept != "ratio":
        raise SystemExit(f"synthetic: expected a method of the ratio test, got {method}")
    model = measure.load(args.model, args.dtype).model
    num_tokens = model.schedule(*model.image_size).num_tokens
    windows = [w for w in args.windows or (1, 8, 16, 32, 64) if LEAST_PASSES * w <= num_tokens]
    rows = []
    for size in args.sizes:
        engine = Engine(model, max_batch_size=size, batch_invariant=False)
        for window in windows:
            with answering_at_once(engine, accept):
                one_row(engine, method, window, 1)  # warms up
                row = one_row(engine, method, window, args.repeats)
            rows.append(row | {"expected": round(expected(accept, window), 3)})
    setup = measure.setup(args, args.model, accept=accept, num_codes=model.num_codes)
    note = (
        f"{args.model} without its transformer, {model.num_codes} codes, drafts accepted with chance {accept}, "
        f"guidance {model.defaults.params.guidance_scale}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}; median of the passes of a full batch"
    )
    return Result({"setup": setup, "rows": rows}, COLUMNS, (note,))


def one_row(engine: Engine, method: str, window: int, repeats: int) -> dict[str, Any]:
    """Passes of a full batch, `repeats` times from its second pass until the first image is complete."""
    size, seconds, committed = engine.max_batch_size, [], 0
    arguments = {"method": method, "window_size": window, "output_type": "codes"}
    for repeat in range(repeats):
        number = engine.submit(prompts.take(size), seed=size * repeat, **arguments)
        engine.step()  # admits the images, too
        before = so_far(engine)
        while True:
            started = time.perf_counter()
            engine.step()
            taken = time.perf_counter() - started
            if len(engine.scheduler.running) < size:
                break
            seconds.append(taken)
            committed, before = committed + so_far(engine) - before, so_far(engine)
        engine.cancel(number)
    per_pass = 1e6 * statistics.median(seconds)
    return {
        "method": method,
        "window": window,
        "batch": size,
        "us_per_pass": round(per_pass, 1),
        "step_compression": round(committed / len(seconds) / size, 3),
        "us_per_token": round(per_pass * len(seconds) / committed, 2),
        "passes": len(seconds),
    }


def so_far(engine: Engine) -> int:
    """Tokens of the images under way."""
    return sum(image.num_committed for image in engine.scheduler.running)

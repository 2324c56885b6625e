"""Images together: rate, latency and memory against how many are under way at once."""

import argparse
import statistics
import time
from typing import Any

import torch

from sjd_engine import Engine

from . import measure, prompts
from .report import Column, Result
from .settings import Setting
from .sweeps import BEST_EXACT, against_best_window, grid

Turns = list[list[tuple[float, float]]]  # of every group of images and turn: seconds of all, latency

COLUMNS = (
    Column("method", "method"),
    Column("W", "window"),
    Column("at once", "batch", "d"),
    Column("images/s", "images_per_second", ".2f"),
    Column("vs one at a time", "vs_one", ".2f"),
    Column("vs ar", "vs_ar", ".2f"),
    Column("s vs best W", "seconds_vs_best_window", ".3f", bounds=True),
    Column("s/image", "seconds_per_image", ".3f"),
    Column("latency s", "latency", ".2f"),
    Column("MB/image", "mb_per_image", ".3f"),
    Column("MB/image, one prompt", "mb_per_image_shared", ".3f"),
)


def run(args: argparse.Namespace) -> Result:
    """The same images, so many at once, for every size and method; drafts enter as the family has them. The cases take
    turns every few images, each time from another one on, and the middle turn of those images counts: a slow moment of
    the machine falls on one turn."""
    model = measure.load(args.model, args.dtype).model
    texts = prompts.take(max(*args.sizes, args.prompts))
    settings = grid(args.methods or ("sjd", BEST_EXACT), args.windows or [4, 16, "auto"], [None])
    engines = {size: Engine(model, max_batch_size=size, page_size=args.page_size) for size in args.sizes}
    cases = [(setting, size) for setting in settings for size in args.sizes]
    group_size = 2 * max(args.sizes)
    groups = [texts[first : first + group_size] for first in range(0, len(texts), group_size)]
    runs: dict[tuple[Setting, int], Turns] = {case: [[] for _ in groups] for case in cases}
    for setting, size in cases:
        generate(engines[size], setting, texts[:size], args.seed)  # warms up
    ends, num_turns = time.monotonic() + 60 * args.minutes, 0
    while num_turns < args.repeats and (not num_turns or time.monotonic() < ends):
        for i, group in enumerate(groups):
            start = (num_turns + i) % len(cases)
            for setting, size in cases[start:] + cases[:start]:
                runs[setting, size][i].append(generate(engines[size], setting, group, args.seed))
        num_turns += 1
    seconds = {
        case: sum(statistics.median(taken for taken, _ in turns) for turns in of_groups)
        for case, of_groups in runs.items()
    }
    rows = [
        {
            "method": setting.label,
            "window": setting.window,
            "batch": size,
            "images_per_second": round(len(texts) / seconds[setting, size], 3),
            "seconds_per_image": round(seconds[setting, size] / len(texts), 4),
            "vs_one": round(seconds[setting, args.sizes[0]] / seconds[setting, size], 3),
            "vs_ar": round(seconds[settings[0], size] / seconds[setting, size], 3),
            "seconds_vs_best_window": against_best_window(setting, of_all_turns(runs, size)),
            "latency": round(statistics.median(latency for turns in runs[setting, size] for _, latency in turns), 3),
            "mb_per_image": round(megabytes(engines[size], setting, texts[:size]), 3),
            "mb_per_image_shared": round(megabytes(engines[size], setting, texts[:1] * size), 3),
            "runs": [[round(taken, 3) for taken, _ in turns] for turns in runs[setting, size]],
        }
        for setting in settings
        for size in args.sizes
    ]
    dtype = model.transformer.dtype
    setup = measure.setup(args, args.model, prompts=texts, dtype=str(dtype), page_size=args.page_size)
    note = (
        f"{args.model}, {len(texts)} images, {dtype}, {torch.get_num_threads()} threads, pages of {args.page_size} "
        f'tokens, median of {num_turns} turns; "vs one" is against {args.sizes[0]} at once, "vs best W" against the '
        "method's fastest fixed window, turn by turn, with its 95 % interval"
    )
    return Result({"setup": setup, "rows": rows}, COLUMNS, (note,))


def of_all_turns(runs: dict[tuple[Setting, int], Turns], size: int) -> dict[Setting, list[float]]:
    """Seconds of each turn, of so many images at once."""
    return {
        setting: [seconds for turns in of_groups for seconds, _ in turns]
        for (setting, at_once), of_groups in runs.items()
        if at_once == size
    }


def generate(engine: Engine, setting: Setting, texts: list[str], seed: int) -> tuple[float, float]:
    """(seconds of all images, mean seconds from the moment one begins until it is complete)."""
    measure.forget_prompts(engine)
    started = time.perf_counter()
    out = engine.generate(texts, seed=seed, output_type="codes", progress=False, **setting.arguments)
    return time.perf_counter() - started, statistics.fmean(stats.seconds for stats in out.stats)


def megabytes(engine: Engine, setting: Setting, texts: list[str]) -> float:
    """Of the cache, for each of so many images under way at once."""
    pool = engine.scheduler.prompts.kv_cache
    measure.forget_prompts(engine)
    arguments: dict[str, Any] = setting.arguments
    number = engine.submit(texts, output_type="codes", **arguments)
    engine.step()
    used = pool.num_pages - pool.num_free_pages
    engine.cancel(number)
    return used * pool.pages[:, 0].nbytes / 1e6 / len(texts)

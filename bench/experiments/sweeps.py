"""The experiments that decode the same prompts with many settings, one image at a time."""

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from sjd_engine import Engine
from sjd_engine.methods import INITS, METHODS, TRAINING_FREE
from sjd_engine.models import ImageModel

from . import measure, prompts, statistics
from .measure import Row
from .peer import TransformersGenerate
from .report import Column, Result
from .settings import Setting
from .statistics import interval

BEST_EXACT = "maximal"
REFRESHES = ("sjd", "sjd++", BEST_EXACT, "gumbel", "exact")  # one of each way to refresh
KEPT_SHARES = (1.0, 0.5, 0.25, 0.1, 0.025)  # of the vocabulary; 1 is no top-k
TOP_K_SHARE = 0.25  # the papers keep 2000 of 8192 codes
TRACED_PROMPTS = 4
CURVES = {"overlap_by_distance": "overlap of laws", "kept_by_distance": "drafts that stay"}
SHOWN_DISTANCES = (0, 1, 2, 4, 8, 12, 16, 24, 30)
COLUMNS = (
    Column("model", "model"),
    Column("tokens", "num_tokens", "d"),
    Column("method", "method"),
    Column("law", "law"),
    Column("W", "window"),
    Column("init", "init"),
    Column("top-k", "top_k", "d"),
    Column("NFE", "nfe", ".1f", bounds=True),
    Column("tok/pass", "step_compression", ".2f"),
    Column("detail", "step_compression_detail", ".2f"),
    Column("seconds", "seconds", ".3f"),
    Column("s vs ar", "seconds_vs_ar", ".2f", bounds=True),
    Column("vs HF", "seconds_vs_transformers", ".2f"),
    Column("NFE vs sjd", "nfe_vs_sjd", ".2f", bounds=True),
    Column("s vs sjd", "seconds_vs_sjd", ".2f"),
    Column("NFE vs sjd++", "nfe_vs_sjd++", ".2f", bounds=True),
    Column("s vs best W", "seconds_vs_best_window", ".3f", bounds=True),
    Column("log p", "log_prob", ".3f"),
    Column("sd", "log_prob_deviation", ".2f"),
    Column("drift z", "drift_z", "+.1f"),
    Column("= ar", "equal_to_ar", ".0%"),
    Column("overhead", "overhead", ".0%"),
)


def columns(*left_out: str) -> list[Column]:
    return [column for column in COLUMNS if column.key not in left_out]


def grid(
    methods: Iterable[str],
    windows: Iterable[int | str],
    inits: Iterable[str | None] = ("random",),
    top_ks: Iterable[int] = (0,),
) -> list[Setting]:
    """Every combination, and `ar` for each top-k before it."""
    windows, inits = list(windows), list(inits)
    several = [method for method in methods if not METHODS[method].one_token]
    settings = []
    for top_k in top_ks:
        settings.append(Setting("ar", 1, "random", top_k))
        settings += [Setting(m, window, init, top_k) for m in several for init in inits for window in windows]
    return settings


def fraction(model: ImageModel, share: float) -> int:
    """The top-k that keeps `share` of the vocabulary; 0 for all of it."""
    return 0 if share >= 1 else max(1, round(share * model.num_codes))


def execute(
    args: argparse.Namespace,
    engine: Engine,
    settings: list[Setting],
    *,
    traced: int = 0,
    minutes: float | None = None,
    also: Callable[[str, int], None] | None = None,
) -> tuple[list[Row], list[dict[str, Any]]]:
    """See `measure.run`."""
    return measure.run(
        engine,
        list(dict.fromkeys(settings)),
        prompts.take(args.prompts),
        seed=args.seed,
        minutes=args.minutes if minutes is None else minutes,
        traced=traced,
        name=args.experiment,
        also=also,
    )


def result(
    args: argparse.Namespace,
    engine: Engine,
    rows: list[Row],
    skipped: list[dict],
    *left_out: str,
    documents: list[dict[str, Any]] | None = None,
    notes: Sequence[str] = (),
) -> Result:
    """What every sweep reports, and the machine it ran on."""
    params, dtype = engine.model.defaults.params, engine.model.transformer.dtype
    documents = [row.document(rows) for row in rows] if documents is None else documents
    count = len(rows[0].images)
    setup = measure.setup(
        args,
        args.model,
        prompts=prompts.take(count),
        seed=args.seed,
        dtype=str(dtype),
        params=asdict(params),
        confidence=statistics.CONFIDENCE,
    )
    line = (
        f"{args.model}, {count} prompts, one image at a time, {dtype}, {torch.get_num_threads()} threads, guidance "
        f"{params.guidance_scale}, temperature {params.temperature}, torch {torch.__version__}; 95 % intervals in []"
    )
    document = {"setup": setup, "rows": documents, "skipped": skipped}
    return Result(document, columns("model", "num_tokens", *left_out), (line, *notes))


# ------------------------------------------------------------------------------------------------------ experiments


def methods(args: argparse.Namespace) -> Result:
    """Every method at the same windows, without and with top-k, beside transformers' own loop."""
    engine = measure.load(args.model, args.dtype)
    windows = args.windows or [16, 32]
    top_ks = args.top_ks if args.top_ks is not None else [0, fraction(engine.model, TOP_K_SHARE)]
    settings = grid(args.methods or TRAINING_FREE, windows, top_ks=top_ks)
    for top_k in top_ks:
        settings += [Setting(BEST_EXACT, window, init, top_k) for init in args.inits or () for window in windows]
        settings += [Setting.variant(text, window, top_k) for text in args.variants for window in windows]
    peer, notes = None, []
    if args.transformers:
        try:
            peer = TransformersGenerate(args.model, engine)
            fastest, seconds = peer.choose_fastest(prompts.take(1)[0])
            notes.append(f"transformers generate: {fastest}; seconds of each setting {seconds}")
        except (*measure.REFUSALS, ImportError, OSError) as refusal:
            notes.append(f"without transformers' generate: {refusal}")
    also = None if peer is None else peer.take
    rows, skipped = execute(args, engine, settings, traced=TRACED_PROMPTS, also=also)
    documents = [row.document(rows) for row in rows]
    if peer is not None:
        for row, document in zip(rows, documents, strict=True):
            times = interval(statistics.ratio, peer.taken, row.column("seconds"))
            document["seconds_vs_transformers"] = times.rounded()
        taken = interval(statistics.mean, peer.taken)
        notes.append(
            f"transformers generate: {taken.value:.3f} s an image [{taken.low:.3f}, {taken.high:.3f}], no top-k"
        )
    notes += [line for top_k in top_ks for line in verdict(rows, top_k)]
    return result(args, engine, rows, skipped, documents=documents, notes=notes)


def verdict(rows: list[Row], top_k: int) -> list[str]:
    """The best lossless row against the best ones of `sjd` and of `sjd++` with its default threshold."""
    same = [row for row in rows if row.setting.top_k == top_k]
    plain = [row for row in same if not row.setting.options and row.setting.init == "random"]
    lossless = [row for row in same if row.setting.lossless and row.setting.method not in ("ar", "sjd")]
    lines = []
    for what in ("nfe", "seconds"):
        for peer in ("sjd", "sjd++"):
            others = [row for row in plain if row.setting.method == peer]
            if lossless and others:
                best, base = (min(group, key=lambda row: sum(row.column(what))) for group in (lossless, others))
                times = interval(statistics.ratio, base.column(what), best.column(what))
                lines.append(
                    f"top-k {top_k or 'off'}, {what}: {best.setting.title} is {times.value:.2f} [{times.low:.2f}, "
                    f"{times.high:.2f}] times better than {base.setting.title}"
                )
    return lines


def window(args: argparse.Namespace) -> Result:
    """Fixed windows and "auto", against the fastest fixed one of the same method."""
    engine = measure.load(args.model, args.dtype)
    windows = [*(args.windows or (4, 8, 12, 16, 24, 32, 48, 64, 96)), "auto"]
    rows, skipped = execute(args, engine, grid(args.methods or ("sjd", "sjd++", BEST_EXACT), windows))
    taken = {row.setting: row.column("seconds") for row in rows}
    documents = [
        row.document(rows) | {"seconds_vs_best_window": against_best_window(row.setting, taken)} for row in rows
    ]
    return result(args, engine, rows, skipped, "top_k", "init", documents=documents)


def against_best_window(setting: Setting, taken: Mapping[Setting, Sequence[float]]) -> list[float] | None:
    """Seconds as a multiple of those of the method's fastest fixed window, with their interval.

    Args:
        taken: seconds of each setting, paired. None comes back where the method has no fixed window among them.
    """
    fixed = [other for other in taken if other.method == setting.method and isinstance(other.window, int)]
    if not fixed:
        return None
    best = min(fixed, key=lambda other: sum(taken[other]))
    return interval(statistics.ratio, taken[setting], taken[best]).rounded()


def topk(args: argparse.Namespace) -> Result:
    """How passes and likelihood depend on the tokens that are kept."""
    engine = measure.load(args.model, args.dtype)
    top_ks = args.top_ks if args.top_ks is not None else [fraction(engine.model, share) for share in KEPT_SHARES]
    settings = grid(args.methods or ("sjd", "sjd++", BEST_EXACT), args.windows or [32], top_ks=top_ks)
    return result(args, engine, *execute(args, engine, settings), "init")


def init(args: argparse.Namespace) -> Result:
    """Every law of entering drafts."""
    engine = measure.load(args.model, args.dtype)
    settings = grid(args.methods or (BEST_EXACT,), args.windows or [16, 32, 64], args.inits or INITS)
    return result(args, engine, *execute(args, engine, settings, traced=TRACED_PROMPTS), "top_k")


def refinement(args: argparse.Namespace) -> Result:
    """The refresh rules at one window, and what limits them: how far the law of a position moves from pass to pass, by
    its distance from the frontier and by the number of refreshes."""
    engine = measure.load(args.model, args.dtype)
    settings = grid(args.methods or REFRESHES, args.windows or [32])
    rows, skipped = execute(args, engine, settings, traced=args.prompts)
    notes = [f"{'at distance from the frontier':42}" + "".join(f"{d:7}" for d in SHOWN_DISTANCES)]
    for row in rows:
        for curve, meaning in CURVES.items():
            if curve in row.trace:
                cells = (shown(row.trace[curve], distance) for distance in SHOWN_DISTANCES)
                notes.append(f"{row.setting.title + ', ' + meaning:42}" + "".join(cells))
    return result(args, engine, rows, skipped, "top_k", "init", notes=notes)


def shown(curve: list[float | None], distance: int) -> str:
    value = curve[distance] if distance < len(curve) else None
    return f"{'' if value is None else format(value, '.3f'):>7}"


def resolution(args: argparse.Namespace) -> Result:
    """Seconds and passes against the number of tokens: the same settings on models of several image sizes. Time that a
    model leaves over goes to those behind it: name the largest last."""
    rows: list[Row] = []
    skipped: list[dict[str, Any]] = []
    ends = time.monotonic() + 60 * args.minutes
    for i, name in enumerate(args.models):
        engine = measure.load(name, args.dtype)
        settings = grid(args.methods or ("sjd", BEST_EXACT), args.windows or [16, 32, 64])
        minutes = (ends - time.monotonic()) / 60 / (len(args.models) - i)
        found, refused = execute(args, engine, settings, minutes=minutes)
        rows, skipped = rows + found, skipped + refused
    report = result(args, engine, rows, skipped)
    return replace(report, columns=columns("top_k", "init"))

"""Settings on the same prompts, one image at a time. They take turns, each prompt from another one on, so that a slow
moment of the machine falls on all of them."""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sjd_engine import Engine
from sjd_engine.errors import CheckpointError
from sjd_engine.outputs import ImageStats
from sjd_engine.testing import score_tokens

from . import statistics
from .settings import Setting
from .statistics import interval
from .trace import WindowTrace

BASELINES = ("ar", "sjd", "sjd++")
REFUSALS = (ValueError, TypeError, RuntimeError, CheckpointError)


@dataclass(frozen=True)
class Measured:
    """One image of a row. Likelihoods are those of one-token-a-pass sampling, in nats; see `testing.score_tokens`.

    detail: tokens a pass, of tokens that are not background.
    log_prob, log_prob_square: means over tokens that the law allows; `outside` is the share of the others.
    surprise, variance: of the martingale sum(-log p(x) - H).
    equal_to_ar: share of tokens that are those of `ar` with the same seed and sampling.
    overhead: share of the seconds outside the transformer and its head.
    shares: [rows, cols] part of a pass that each token took.
    """

    nfe: int
    seconds: float
    detail: float
    log_prob: float
    log_prob_square: float
    outside: float
    surprise: float
    variance: float
    equal_to_ar: float
    overhead: float
    committed_per_pass: list[int]
    shares: np.ndarray


@dataclass
class Row:
    """A setting and its images, one for each prompt."""

    setting: Setting
    num_tokens: int
    model: str
    images: list[Measured] = field(default_factory=list)
    trace: dict[str, Any] = field(default_factory=dict)

    def column(self, name: str) -> list[float]:
        return [getattr(image, name) for image in self.images]

    def document(self, rows: Sequence["Row"]) -> dict[str, Any]:
        """Numbers of the row, intervals as [value, low, high]; `rows` hold the baselines of its ratios."""
        images, setting = self.images, self.setting
        mean = {name: _mean(self.column(name)) for name in ("detail", "log_prob", "outside", "equal_to_ar", "overhead")}
        squares = _mean(self.column("log_prob_square"))
        surprise, variance = sum(self.column("surprise")), sum(self.column("variance"))
        document = {
            "model": self.model,
            "num_tokens": self.num_tokens,
            "method": setting.label,
            "law": "exact" if setting.lossless else "lossy",
            "window": setting.window,
            "init": setting.init or "default",
            "top_k": setting.top_k,
            "prompts": len(images),
            "nfe": interval(statistics.mean, self.column("nfe")).rounded(),
            "seconds": interval(statistics.mean, self.column("seconds")).rounded(),
            "step_compression": round(self.num_tokens * len(images) / sum(self.column("nfe")), 4),
            "step_compression_detail": mean["detail"],
            "log_prob": mean["log_prob"],
            "log_prob_deviation": round(math.sqrt(max(squares - mean["log_prob"] ** 2, 0)), 4),
            "outside": mean["outside"],
            "drift_z": round(surprise / math.sqrt(variance), 2) if variance > 0 else None,
            "equal_to_ar": mean["equal_to_ar"],
            "overhead": mean["overhead"],
            "per_prompt": {name: self.column(name) for name in ("nfe", "seconds", "log_prob")},
            "committed_histogram": statistics.committed_histogram(self.column("committed_per_pass")),
            "pass_share_map": np.mean(self.column("shares"), 0).round(4).tolist(),
            "trace": self.trace,
        }
        for name in BASELINES:
            base = self.baseline(name, rows)
            if base is not None:
                document |= self.against(base, name)
        return document

    def baseline(self, method: str, rows: Sequence["Row"]) -> "Row | None":
        """The row of a plain `method` on the same model with the same sampling and, but for `ar`, the same window."""
        for row in rows:
            other = row.setting
            same = row.model == self.model and other.top_k == self.setting.top_k and not other.options
            if other.method == method and same and (method == "ar" or other.window == self.setting.window):
                return row
        return None

    def against(self, base: "Row", name: str) -> dict[str, list[float]]:
        """How many times fewer passes and seconds than `base`, and how much likelier the tokens are, in nats."""
        pairs = {f"{what}_vs_{name}": (base.column(what), self.column(what)) for what in ("nfe", "seconds")}
        ratios = {key: interval(statistics.ratio, *pair).rounded() for key, pair in pairs.items()}
        if name == "ar":
            columns = self.column("log_prob"), base.column("log_prob")
            ratios["drift_vs_ar"] = interval(statistics.mean_difference, *columns).rounded()
        return ratios


def _mean(values: Sequence[float]) -> float:
    """The mean of the finite ones."""
    finite = [value for value in values if math.isfinite(value)]
    return round(float(np.mean(finite)), 4) if finite else float("nan")


class TransformerClock:
    """Seconds spent in the transformer and its head while open."""

    def __init__(self, engine: Engine):
        self.transformer, self.seconds = engine.model.transformer, 0.0

    def _timed(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(*arguments: Any, **words: Any) -> Tensor:
            started = time.perf_counter()
            out = call(*arguments, **words)
            self.seconds += time.perf_counter() - started
            return out

        return timed

    def __enter__(self) -> "TransformerClock":
        self.seconds = 0.0
        self.transformer.forward = self._timed(self.transformer.forward)
        self.transformer.logits = self._timed(self.transformer.logits)
        return self

    def __exit__(self, *_: object) -> None:
        del self.transformer.forward, self.transformer.logits


def forget_prompts(engine: Engine) -> None:
    """Every image computes its prompt."""
    while engine.scheduler.prompts.evict():
        pass


def decode(engine: Engine, setting: Setting, prompt: str, seed: int) -> tuple[Tensor, ImageStats, float]:
    """(codes, statistics, seconds in the transformer) of one image."""
    forget_prompts(engine)
    with TransformerClock(engine) as clock:
        out = engine.generate(prompt, seed=seed, output_type="codes", progress=False, **setting.arguments)
    return out.token_ids[0], out.stats[0], clock.seconds


def measured(
    engine: Engine, setting: Setting, prompt: str, codes: Tensor, stats: ImageStats, inside: float, ar: Tensor | None
) -> Measured:
    """The measure of an image that has been decoded."""
    model = engine.model
    params = replace(model.defaults.params, top_k=setting.top_k)
    size = model.image_size
    scored = score_tokens(model, model.build_prompt(prompt, None, *size), codes[None], params, model.schedule(*size))
    allowed = scored.log_probs.isfinite()
    log_probs, shares = scored.log_probs[allowed], statistics.pass_shares(stats)
    return Measured(
        nfe=stats.nfe,
        seconds=stats.seconds,
        detail=statistics.detail_compression(shares, scored.entropies[0].numpy()),
        log_prob=log_probs.mean().item(),
        log_prob_square=log_probs.square().mean().item(),
        outside=1 - allowed.float().mean().item(),
        surprise=(-log_probs - scored.entropies[allowed]).sum().item(),
        variance=scored.variances[allowed].sum().item(),
        equal_to_ar=float("nan") if ar is None else (codes == ar).float().mean().item(),
        overhead=1 - inside / stats.seconds,
        committed_per_pass=stats.committed_per_pass,
        shares=shares,
    )


def usable(engine: Engine, settings: Sequence[Setting], prompt: str) -> tuple[list[Setting], list[dict[str, Any]]]:
    """The settings that decode, each warmed up with an image, and the reasons of the others."""
    kept, skipped = [], []
    for setting in settings:
        try:
            decode(engine, setting, prompt, 0)
            kept.append(setting)
        except REFUSALS as refusal:
            skipped.append({"method": setting.label, "window": setting.window, "reason": str(refusal)})
    return kept, skipped


@contextmanager
def bar(total: int, name: str) -> Iterator[tqdm]:
    with tqdm(total=total, desc=name, unit="image", file=sys.stderr, disable=not sys.stderr.isatty()) as progress:
        yield progress


def run(
    engine: Engine,
    settings: Sequence[Setting],
    prompts: Sequence[str],
    *,
    seed: int,
    minutes: float,
    traced: int,
    name: str = "",
    also: Callable[[str, int], None] | None = None,
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Decode every prompt with every setting, and trace the first few once more.

    Args:
        seed: prompt i is decoded from seed + i.
        minutes: no further prompt begins after them; every row has the same prompts.
        traced: prompts to trace.
        also: called once for each prompt, in turn with the settings.
    Returns: (rows, settings that were skipped and why).
    """
    ends = time.monotonic() + 60 * minutes
    settings, skipped = usable(engine, settings, prompts[0])
    num_tokens = engine.model.schedule(*engine.model.image_size).num_tokens
    rows = [Row(setting, num_tokens, engine.model.name) for setting in settings]
    with bar(len(prompts) * len(rows), name) as progress:
        for i, prompt in enumerate(prompts):
            if i and time.monotonic() > ends:
                break
            decoded: dict[Setting, tuple[Tensor, ImageStats, float]] = {}
            for turn in range(len(rows)):
                setting = settings[(turn + i) % len(rows)]
                decoded[setting] = decode(engine, setting, prompt, seed + i)
                progress.update()
            if also is not None:
                also(prompt, seed + i)
            ar = {s.top_k: codes for s, (codes, *_) in decoded.items() if s.method == "ar"}
            for row in rows:
                image = decoded[row.setting]
                row.images.append(measured(engine, row.setting, prompt, *image, ar.get(row.setting.top_k)))
    for row in rows:
        row.trace = trace(engine, row.setting, prompts[: min(traced, len(row.images))], seed)
    return rows, skipped


def trace(engine: Engine, setting: Setting, prompts: Sequence[str], seed: int) -> dict[str, Any]:
    """The curves of `trace.WindowTrace`; none where slots of the window are not positions in their order."""
    if not prompts or not isinstance(setting.window, int) or setting.options or setting.method == "ar":
        return {}
    with WindowTrace(setting.window) as watch:
        for i, prompt in enumerate(prompts):
            engine.generate(prompt, seed=seed + i, output_type="codes", progress=False, **setting.arguments)
    return watch.document()


def setup(args: argparse.Namespace, model: str, **more: Any) -> dict[str, Any]:
    """What an experiment's document tells of `model`, of what is measured of it and of the machine."""
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    return {"experiment": args.experiment, "model": model, **more, **machine}


def load(model: str, dtype: str | None) -> Engine:
    """The engine that decodes one image at a time."""
    return Engine(model, device="cpu", dtype=getattr(torch, dtype) if dtype else None, max_batch_size=1)

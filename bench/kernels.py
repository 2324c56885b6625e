"""One pass of `verify`, timed for every implementation on the same logits; or the ops of the paged cache.

    python bench/kernels.py                                       # on the CPU; minutes, most of them in torch.compile
    python bench/kernels.py --op kv                               # rollback, append and attention over pages: kv.py
    python bench/kernels.py --device cuda --batch-sizes 1 8
    python bench/kernels.py --shapes 96x8192 --methods maximal --backends c++ --json new.json --compare old.json

Backends:
    eager         `kernels.reference.verify`, the definition; everything else must decide as it does
    compiled      the same under torch.compile
    four-kernel   the layout of serving stacks in PyTorch operators: block statistics, rejection, resampling and
                  insertion as stages of their own, each computing the probabilities it needs again
    c++           `sjd_engine.native.verify`, on the CPU
    triton        `kernels.verify`, on CUDA; its interpreter is an oracle of meaning and is never timed

Columns:
    accept        accepted drafts over tested ones; successive logits differ by --drift, which controls it
    us            of a call, percentiles over passes in steady state; the logits were just written, so caches are warm
    launches      CUDA: kernels, counted by the profiler. CPU: operators that compute; of the compiled reference the
                  generated loops, library calls such as sort come on top
    syncs         waits for the device
    MB            the least to read: logits of every row, and those of the pass before for rows that need their residual
    GB/s, peak    MB over the median, and that over the memory bandwidth: of the device, or on a CPU of a measured copy
    vs eager      times faster than eager

A backend whose decisions differ from eager's in any pass gets FAIL and no time. On a CPU the registers, spills and
shared memory of the Triton kernel follow, compiled for GPUs that are not here. The last line is one JSON document.
"""

import sys
from pathlib import Path

# Python puts this folder first, where this file would be found as `kernels`.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import argparse  # noqa: E402
import functools  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import re  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from dataclasses import asdict, dataclass  # noqa: E402
from importlib.metadata import version  # noqa: E402
from importlib.util import find_spec, module_from_spec, spec_from_file_location  # noqa: E402
from types import ModuleType  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from sjd_engine import SamplingParams, Schedule, native  # noqa: E402
from sjd_engine.kernels import compile as offline  # noqa: E402
from sjd_engine.kernels import philox, reference  # noqa: E402
from sjd_engine.kernels.state import Grid, VerifyResult, WindowState  # noqa: E402
from sjd_engine.methods import get_method  # noqa: E402

Verify = Callable[..., VerifyResult]
SHAPES = ((96, 8192), (96, 16384), (64, 32768), (32, 65536))
METHODS = ("maximal", "sjd", "exact")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FUSED = ("c++", "triton")
PEAK_GBPS = {  # data sheets; matched as a part of the device's name, the first that fits
    "B200": 8000,
    "H200": 4800,
    "H100 PCIe": 2039,
    "H100 NVL": 3938,
    "H100": 3352,
    "A100-SXM4-80GB": 2039,
    "A100 80GB PCIe": 1935,
    "A100": 1555,
    "L40S": 864,
    "L4": 300,
    "A10": 600,
    "T4": 320,
    "RTX 5090": 1792,
    "RTX 4090": 1008,
    "RTX 3090": 936,
    "MI300X": 5300,
    "MI250": 3277,
}


# ------------------------------------------------------------------------------------------------ the four-kernel port


def four_kernel_port(
    logits: Tensor,
    state: WindowState,
    grid: Grid,
    *,
    window_size: int,
    accept: str,
    refresh: str,
    init: str,
    seeds: Tensor,
    guidance_scale: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    reuse_threshold: Tensor | None = None,
) -> VerifyResult:
    """`reference.verify` in four stages that share the rows' statistics and no probabilities.

    For the methods of this bench, finite logits, no forced tokens, and a window inside the image. Keeps no counters.
    """
    warping = (guidance_scale, temperature)
    rows = torch.arange(window_size, device=logits.device)
    positions = state.num_committed[:, None] + rows
    drafts = state.tokens.gather(1, positions + 1)
    words = philox.draw_words(seeds, positions, state.iteration, philox.WINDOW).squeeze(-1)

    # 1. Block statistics: peak, mass and cut of every row.
    law = reference.row_law(reference.combine(logits, *warping), top_k, top_p)

    # 2. Rejection: the test of every draft.
    if accept == "match":
        passed = drafts == coupled(logits, law, warping, refresh, seeds, positions)
    else:
        p, q = target_probs(logits, law, warping), draft_probs(state, drafts, rows, logits.shape[-1], warping)
        p_draft, q_draft = (probs.gather(-1, drafts[..., None]).squeeze(-1) for probs in (p, q))
        passed = philox.uniform(words[philox.ACCEPT]) * q_draft < p_draft
    passed &= rows < window_size - 1
    num_accepted = passed.cumprod(1).sum(1)

    # 3. Resampling: a recovered and a fresh token for every row.
    if accept == "match":
        recovered = refreshed = coupled(logits, law, warping, refresh, seeds, positions)
    else:
        p, q = target_probs(logits, law, warping), draft_probs(state, drafts, rows, logits.shape[-1], warping)
        left_over = reference.residual(p, q)
        empty = (reference.fixed_point(left_over).sum(-1) == 0) | (rows == window_size - 1)
        weights = reference.row_weights(reference.combine(logits, *warping), law)
        recovered = reference.draw(torch.where(empty[..., None], weights, left_over), words[philox.RESIDUAL])
        fresh = refresh == "fresh"
        refreshed = reference.draw(weights, words[philox.FRESH]) if fresh else torch.where(passed, drafts, recovered)

    # 4. Insertion: tokens, laws and the window's next drafts.
    out = torch.where(rows < num_accepted[:, None], drafts, refreshed)
    out = torch.where(rows == num_accepted[:, None], recovered, out)
    state.laws[state.iteration % 2, torch.arange(len(seeds), device=logits.device)] = torch.stack(law, -1)
    state.previous_logits = logits if accept == "ratio" else None
    state.tokens.scatter_(1, positions + 1, out)
    weights = reference.row_weights(reference.combine(logits, *warping), law)
    reference.fill_window(state, grid, num_accepted + 1, window_size, init, seeds, weights)
    state.iteration += 1
    state.num_committed += num_accepted + 1
    return VerifyResult(num_accepted, state.num_committed.clone())


def draft_probs(
    state: WindowState, drafts: Tensor, rows: Tensor, vocab_size: int, warping: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    weights, scale = reference.draft_laws(state, drafts, rows, vocab_size, *warping)
    return weights * scale[..., None]


def target_probs(logits: Tensor, law: reference.RowLaw, warping: tuple[Tensor | None, Tensor | None]) -> Tensor:
    return reference.row_weights(reference.combine(logits, *warping), law) * law.scale[..., None]


def coupled(
    logits: Tensor,
    law: reference.RowLaw,
    warping: tuple[Tensor | None, Tensor | None],
    refresh: str,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    z = reference.combine(logits, *warping)
    return reference.coupled_draw(reference.row_weights(z, law), z, refresh, seeds, positions)


# ------------------------------------------------------------------------------------------------------------- workload


@dataclass(frozen=True)
class Workload:
    """A batch in steady state: logits belong to positions, and change a little from pass to pass."""

    method: str
    batch_size: int
    window_size: int
    vocab_size: int
    dtype: str
    drift: float
    params: SamplingParams
    seed: int

    @property
    def pair(self) -> int:
        return 2 if self.params.guidance_scale > 1 else 1

    @property
    def row_bytes(self) -> int:
        """Of the logits of one row."""
        return self.pair * self.vocab_size * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Pass:
    """What one pass decided: tokens [B, 1 + T + 2W] up to its last draft, num_accepted and num_committed [B].

    kept: [B, W - 1], the drafts that stood where they were.
    """

    tokens: Tensor
    num_accepted: Tensor
    num_committed: Tensor
    kept: Tensor
    seconds: float


class Run:
    """One backend on one workload: its state, and the logits that its progress asks for."""

    def __init__(self, workload: Workload, verify: Verify, num_passes: int, device: str):
        self.workload, self.verify, self.device = workload, verify, device
        window, batch = workload.window_size, workload.batch_size
        schedule = Schedule.line((num_passes + 1) * window)  # no pass reaches the end
        self.grid, self.seeds = schedule.grid(device), workload.seed + torch.arange(batch, device=device)
        self.state = WindowState.new(batch, schedule.num_tokens, window, device)
        common = {"window_size": window, "init": "random", "seeds": self.seeds}
        reference.start(self.state, self.grid, vocab_size=workload.vocab_size, **common)
        method = get_method(workload.method)
        warping = workload.params.warp_arguments(batch, workload.vocab_size, torch.device(device))
        self.arguments = common | warping | {"accept": method.accept, "refresh": method.refresh}
        generator = torch.Generator().manual_seed(workload.seed)
        shape = (workload.pair, batch, 2 * window, workload.vocab_size)
        self.rows, self.noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))

    def logits(self, iteration: int) -> Tensor:
        """[B, W, V], or [2, B, W, V] with guidance, of the window's positions."""
        positions = self.state.num_committed[:, None] + torch.arange(self.workload.window_size, device=self.device)
        sequences, period = torch.arange(self.workload.batch_size, device=self.device)[:, None], self.rows.shape[2]
        rows = 2.0 * self.rows[:, sequences, positions % period]
        rows += self.workload.drift * self.noise[:, sequences, (positions + 31 * iteration) % period]
        return rows.to(DTYPES[self.workload.dtype]).squeeze(0)

    def call(self, logits: Tensor) -> VerifyResult:
        return self.verify(logits, self.state, self.grid, **self.arguments)

    def one_pass(self, iteration: int) -> Pass:
        logits, window = self.logits(iteration), self.workload.window_size
        positions = self.state.num_committed[:, None] + torch.arange(window - 1, device=self.device)
        drafts = self.state.tokens.gather(1, positions + 1)
        synchronize(self.device)
        started = time.perf_counter()
        result = self.call(logits)
        synchronize(self.device)
        seconds = time.perf_counter() - started
        columns = torch.arange(self.state.tokens.shape[1], device=self.device)
        defined = columns < self.state.num_committed[:, None] + window
        return Pass(
            tokens=self.state.tokens.where(defined, 0),
            num_accepted=result.num_accepted.clone(),
            num_committed=result.num_committed.clone(),
            kept=self.state.tokens.gather(1, positions + 1) == drafts,
            seconds=seconds,
        )


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def same_decisions(left: list[Pass], right: list[Pass]) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(left, right, strict=True)
        for name in ("tokens", "num_accepted", "num_committed")
    )


# ------------------------------------------------------------------------------------------------------------- counting


class CountOperators(TorchDispatchMode):
    """Operators that compute something, and those whose result the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.syncs = 0, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        view = any(
            output.alias_info is not None and not output.alias_info.is_write for output in operator._schema.returns
        )
        self.syncs += name in ("_local_scalar_dense", "nonzero", "masked_select", "equal")
        self.launches += not (view or name.startswith(("empty", "new_empty")) or name == "_local_scalar_dense")
        return operator(*args, **(kwargs or {}))


def count(name: str, run: Run, iteration: int) -> tuple[int | None, int | None]:
    """(launches, syncs) of one more call; None where this device cannot tell."""
    logits = run.logits(iteration)
    if run.device == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run.call(logits)
            torch.cuda.synchronize()
        launches = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
        return launches, count_cuda_syncs(run, iteration + 1)
    if name in FUSED:
        run.call(logits)
        return 1, 0
    if isinstance(run.verify, CompiledReference):  # a dispatch mode would turn the compiled code off
        return run.verify.launches, None
    with CountOperators() as operators:
        run.call(logits)
    return operators.launches, operators.syncs


def count_cuda_syncs(run: Run, iteration: int) -> int:
    logits = run.logits(iteration)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.call(logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


class CompiledReference:
    """The reference under torch.compile; `launches`: loops that Inductor generated for the graph it compiled last."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.verify, self.launches = torch.compile(reference.verify, dynamic=False), 0

    def __call__(self, *args, **kwargs) -> VerifyResult:
        from torch._inductor import metrics

        before = metrics.generated_kernel_count
        result = self.verify(*args, **kwargs)
        self.launches = metrics.generated_kernel_count - before or self.launches
        return result


# ------------------------------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class Row:
    """One line of the table; times in microseconds, None where the decisions were wrong."""

    op: str
    backend: str
    method: str
    batch_size: int
    window_size: int
    vocab_size: int
    dtype: str
    accept: float
    correct: bool
    us_p20: float | None = None
    us_p50: float | None = None
    us_p80: float | None = None
    launches: int | None = None
    syncs: int | None = None
    min_bytes: int | None = None
    gbps: float | None = None
    of_peak: float | None = None
    vs_eager: float | None = None

    @property
    def key(self) -> str:
        return f"{self.backend} {self.method} B{self.batch_size} W{self.window_size} V{self.vocab_size} {self.dtype}"


def backends(names: Sequence[str]) -> dict[str, Callable[[], Verify]]:
    """What makes each backend, anew for every workload."""

    def triton() -> Verify:
        from sjd_engine.kernels import verify

        return verify

    every: dict[str, Callable[[], Verify]] = {
        "compiled": CompiledReference,
        "four-kernel": lambda: four_kernel_port,
        "c++": lambda: native.verify,
        "triton": triton,
    }
    return {name: every[name] for name in names if name != "eager"}


def measure(
    workload: Workload, makers: dict[str, Callable[[], Verify]], args: argparse.Namespace, peak: float
) -> list[Row]:
    """Eager first: its decisions are everyone's."""
    expected: list[Pass] = []
    rows: list[Row] = []
    for name, make in ({"eager": lambda: reference.verify} | makers).items():
        total = args.warmup + args.passes
        run = Run(workload, make(), total + 2, args.device)
        passes = [run.one_pass(n) for n in range(total)]
        expected = expected or passes
        eager_us = rows[0].us_p50 if rows else None
        row = describe(name, workload, passes[args.warmup :], same_decisions(expected, passes), peak, eager_us)
        if row.correct:
            launches, syncs = count(name, run, total)
            row = Row(**asdict(row) | {"launches": launches, "syncs": syncs})
        rows.append(row)
    return rows


def describe(
    name: str, workload: Workload, passes: list[Pass], correct: bool, peak: float, eager_us: float | None
) -> Row:
    drafts = workload.window_size - 1
    num_accepted = torch.stack([p.num_accepted for p in passes])
    tested = (num_accepted + 1).clamp_max(drafts).sum()
    fields = {key: getattr(workload, key) for key in ("method", "batch_size", "window_size", "vocab_size", "dtype")}
    row = Row(op="verify", backend=name, accept=round(float(num_accepted.sum() / tested), 4), correct=correct, **fields)
    if not correct:
        return row
    low, middle, high = np.percentile([p.seconds * 1e6 for p in passes], (20, 50, 80)).tolist()
    size = int(np.mean([least_bytes(workload, p) for p in passes]))
    gbps = size / middle / 1e3
    return Row(
        **asdict(row)
        | {
            "us_p20": round(low, 1),
            "us_p50": round(middle, 1),
            "us_p80": round(high, 1),
            "min_bytes": size,
            "gbps": round(gbps, 3),
            "of_peak": round(gbps / peak, 4),
            "vs_eager": round((eager_us or middle) / middle, 2),
        }
    )


def least_bytes(workload: Workload, done: Pass) -> int:
    """Every row's logits once; the previous pass's for each row whose residual is drawn from.

    "maximal" draws from the residual of every rejected draft, other ratio tests only from the first one's, exact match
    from none.
    """
    method = get_method(workload.method)
    rows = workload.batch_size * workload.window_size
    if method.refresh == "maximal":
        rows += int((~done.kept).sum())
    elif method.accept == "ratio":
        rows += int((done.num_accepted < workload.window_size - 1).sum())
    return rows * workload.row_bytes


def peak_bandwidth(args: argparse.Namespace) -> tuple[float, str]:
    """(GB/s, where the figure is from)."""
    if args.peak_gbps:
        return args.peak_gbps, "--peak-gbps"
    if args.device == "cuda":
        name = torch.cuda.get_device_name()
        for part, gbps in PEAK_GBPS.items():
            if part in name:
                return float(gbps), f"data sheet of {part}"
        raise SystemExit(f"kernels: the memory bandwidth of {name!r} is not in PEAK_GBPS; pass --peak-gbps")
    source, target = torch.ones(32 << 20), torch.empty(32 << 20)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(seconds) / 1e9, "a measured copy, bytes read and written"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.machine()


def linear_fit(rows: list[Row]) -> dict[str, float] | None:
    """Least squares of the C++ median over B * W * V, method by shape; None below three shapes."""
    points = [
        (row.batch_size * row.window_size * row.vocab_size, row.us_p50)
        for row in rows
        if row.backend == "c++" and row.method == "maximal" and row.us_p50 is not None
    ]
    if len({x for x, _ in points}) < 3:
        return None
    x, y = np.array(points).T
    slope, intercept = np.polyfit(x, y, 1)
    error = ((y - slope * x - intercept) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    return {"us_per_million": round(slope * 1e6, 3), "intercept_us": round(intercept, 1), "r2": round(1 - error, 5)}


# ------------------------------------------------------------------------------------------------------------- printing


def show(rows: list[Row], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("op", "backend", "method", "B", "W", "V", "dtype", "accept", "us p20", "p50", "p80", "launches"):
        table.add_column(name, justify="left" if name in ("op", "backend", "method") else "right")
    for name in ("syncs", "MB", "GB/s", "peak", "vs eager"):
        table.add_column(name, justify="right")

    def text(value: float | None, pattern: str) -> str:
        return "–" if value is None else format(value, pattern)

    for row in rows:
        shape = (str(row.batch_size), str(row.window_size), str(row.vocab_size), row.dtype)
        first = (row.op, row.backend, row.method, *shape, f"{row.accept:.1%}")
        if not row.correct:
            table.add_row(*first, "[red]FAIL")
            continue
        table.add_row(
            *first,
            *(text(us, ".0f") for us in (row.us_p20, row.us_p50, row.us_p80)),
            text(row.launches, "d"),
            text(row.syncs, "d"),
            text((row.min_bytes or 0) / 1e6, ".1f"),
            text(row.gbps, ".2f"),
            text(row.of_peak, ".1%"),
            text(row.vs_eager, ".2f"),
        )
    console.print(table)


def show_resources(targets: Sequence[str], console: Console) -> dict[str, dict]:
    """Compile the Triton kernel for `targets` and print what it takes of them."""
    cases = [case for case in offline.matrix() if case.target in targets and case.dtype == "bf16"]
    resources = {str(case): found for case, found in zip(cases, offline.compile_cases(cases), strict=True)}
    table = Table(box=None, pad_edge=False, title="Triton kernel, compiled offline", title_justify="left")
    for name in (
        "target",
        "launch",
        "variant",
        "threads",
        "registers",
        "stack B",
        "spills",
        "shared B",
        "16-byte loads",
    ):
        table.add_column(name, justify="left" if name in ("target", "launch", "variant") else "right")
    for case in cases:
        found = resources[str(case)]
        figures = (
            found.threads,
            found.registers,
            found.stack_bytes,
            found.spills,
            found.shared_bytes,
            found.wide_loads,
        )
        table.add_row(case.target, case.row, case.variant, *map(str, figures))
    console.print(table)
    return {name: asdict(found) for name, found in resources.items()}


def show_comparison(rows: list[Row], old: dict, console: Console) -> None:
    before = {Row(**row).key: row["us_p50"] for row in old["rows"]}
    for row in rows:
        then = before.get(row.key)
        if then and row.us_p50:
            console.print(f"{row.key}: {then:.0f} -> {row.us_p50:.0f} us, {then / row.us_p50:.2f} times as fast")


# ----------------------------------------------------------------------------------------------------------------- main


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def shape(text: str) -> tuple[int, int]:
        window_size, vocab_size = text.split("x")
        return int(window_size), int(vocab_size)

    parser.add_argument("--op", choices=["verify", "kv"], default="verify")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="WxV", help="default: for maximal four, else one")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1])
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16; of kv fp32 and bf16")
    parser.add_argument("--backends", nargs="*", choices=["eager", "compiled", "four-kernel", *FUSED])
    parser.add_argument(
        "--drift", type=float, default=0.3, help="standard deviation of what changes; that of logits is 2"
    )
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--top-k", type=int, default=2000)
    parser.add_argument("--passes", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-gbps", type=float, help="memory bandwidth; default: a table, on a CPU a measured copy")
    parser.add_argument("--targets", nargs="*", choices=offline.TARGETS, default=["sm_80", "sm_90", "gfx942"])
    parser.add_argument("--json", type=Path, help="write the last line's document there, too")
    parser.add_argument("--compare", type=Path, help="a document of an earlier run")
    kv = parser.add_argument_group("kv")
    kv.add_argument("--lengths", nargs="+", type=int, default=[64, 256, 1024, 4096], help="tokens in the cache")
    kv.add_argument("--windows", nargs="+", type=int, default=[1, 16, 32, 64])
    kv.add_argument("--sequences", nargs="+", type=int, default=[1, 2])
    kv.add_argument("--layers", type=int, default=32, help="of the cache that is rolled back")
    args = parser.parse_args(argv)
    if args.op == "kv":
        if args.device == "cuda" or not native.available():
            parser.error("kv runs on the CPU, and needs the compiled module")
        return args
    args.dtype = args.dtype or "bf16"
    if args.backends is None:
        args.backends = ["compiled", "four-kernel", "c++" if args.device == "cpu" else "triton"]
    if ("triton" if args.device == "cpu" else "c++") in args.backends:
        parser.error("c++ runs on the CPU, triton on CUDA")
    if "c++" in args.backends and not native.available():
        parser.error(f"c++ is not built: {native.why_not()}")
    return args


def workloads(args: argparse.Namespace) -> list[Workload]:
    params = SamplingParams(guidance_scale=args.guidance, top_k=args.top_k)
    return [
        Workload(method, batch_size, *shape, args.dtype, args.drift, params, args.seed)
        for method in args.methods
        for batch_size in args.batch_sizes
        for shape in args.shapes or (SHAPES if method == "maximal" else SHAPES[:1])
    ]


def bench_verify(
    args: argparse.Namespace, console: Console, peak: float, extra: dict[str, Callable[[], Verify]]
) -> tuple[dict, bool]:
    """Measure and print. Returns: what the document holds, and whether all backends decided alike."""
    rows: list[Row] = []
    for workload in workloads(args):
        rows += measure(workload, backends(args.backends) | extra, args, peak)
    show(rows, console)
    fit = linear_fit(rows)
    if fit:
        console.print("c++, maximal: {intercept_us} us + {us_per_million} us per million B*W*V, R^2 {r2}".format(**fit))
    resources = show_resources(args.targets, console) if args.device == "cpu" and args.targets else None
    if args.compare:
        show_comparison(rows, json.loads(args.compare.read_text()), console)
    document = {"rows": [asdict(row) for row in rows], "fit": fit, "resources": resources}
    return document, all(row.correct for row in rows)


@functools.cache
def kv_module() -> ModuleType:
    """kv.py, by its path: this folder is not searched."""
    spec = spec_from_file_location("bench_kv", Path(__file__).with_name("kv.py"))
    sys.modules[spec.name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(argv: Sequence[str] | None = None, extra: dict[str, Callable[[], Verify]] | None = None) -> int:
    """`extra`: more backends of verify. Returns the exit status: 1 where a result was wrong."""
    args = parse(argv)
    console = Console(width=160)
    peak, origin = peak_bandwidth(args)
    setup = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "peak_gbps": round(peak, 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else None,
        "isa": native.isa() if native.available() else None,
        "arguments": {name: str(value) for name, value in vars(args).items()},
    }
    console.print(", ".join(f"{name} {value}" for name, value in setup.items() if name != "arguments"), f"({origin})")
    if args.op == "kv":
        document, correct = kv_module().bench(args, console)
    else:
        document, correct = bench_verify(args, console, peak, extra or {})
    line = json.dumps({"setup": setup, **document})
    if args.json:
        args.json.write_text(line + "\n")
    print(line)
    return int(not correct)


if __name__ == "__main__":
    sys.exit(main())

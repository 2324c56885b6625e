"""The paged cache of `bench/kernels.py --op kv`: rollback, append and window attention on the CPU.

Results are checked before they are timed; a wrong one gets FAIL and no time. Times are medians of calls taken in turn
with those of the peer, Python's share included: it is most of what a rollback or a short append takes. torch's threads
wait for each other after every operator, so on a machine that does other work, too, only OMP_NUM_THREADS=1 is fair to
the peers.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sjd_engine import native

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCE = {"bf16": 2e-2, "fp16": 2e-3, "fp32": 1e-4}  # absolute, of averages of standard normal values
HEADS = ((32, 8, 128), (16, 16, 64))  # H, KH, D: grouped queries and plain ones
PAGE_SIZE = 64
LEAST_SECONDS = 0.3  # of calls that are compared


@dataclass(frozen=True)
class Comparison:
    """Medians of one shape in microseconds, and how many times faster the first is; None where the results differ.

    num_bytes: read and written by each, where bandwidth is what counts.
    """

    what: str
    shape: str
    dtype: str
    us: float | None
    peer_us: float | None
    ratio: float | None
    num_bytes: int = 0


class Cache:
    """Pages of one layer for S sequences of `length` tokens and a window behind them, in scattered order."""

    def __init__(self, num_sequences: int, length: int, window: int, kv_heads: int, head_dim: int, dtype: torch.dtype):
        width = -(-(length + window) // PAGE_SIZE)
        self.pages = torch.randn(num_sequences * width, 2, PAGE_SIZE, kv_heads, head_dim).to(dtype)
        self.block_table = torch.randperm(num_sequences * width).int().view(num_sequences, width)
        self.context_lens = torch.full((num_sequences,), length, dtype=torch.int32)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.pages, self.block_table, self.context_lens


def medians(calls: list[Callable[[], object]], least_repeats: int) -> list[float]:
    """Microseconds of each call, taken in turn so that a disturbance meets all of them."""
    seconds: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    while len(seconds[0]) < least_repeats or sum(map(sum, seconds)) < LEAST_SECONDS:
        for call, taken in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) * 1e6 for taken in seconds]


def compare(
    what: str,
    shape: str,
    dtype: str,
    correct: bool,
    calls: list[Callable[[], object]],
    least_repeats: int,
    num_bytes: int = 0,
) -> Comparison:
    """The first call against the fastest of the others."""
    if not correct:
        return Comparison(what, shape, dtype, None, None, None)
    us, *others = medians(calls, least_repeats)
    return Comparison(what, shape, dtype, round(us, 1), round(min(others), 1), round(min(others) / us, 2), num_bytes)


# ------------------------------------------------------------------------------------------------------------ rollback


def rollback_times(args: argparse.Namespace) -> list[dict[str, float]]:
    """Microseconds of one `advance_rollback` that takes back some tokens of a cache of some length."""
    rows = []
    for length in args.lengths:
        for rejected in args.windows:
            lens = torch.full((1,), length, dtype=torch.int32)
            prefix, committed = torch.zeros_like(lens), torch.tensor([max(0, length - rejected)])

            def roll_back(lens: Tensor = lens, prefix: Tensor = prefix, committed: Tensor = committed) -> None:
                native.advance_rollback(lens, prefix, committed)

            (us,) = medians([roll_back], args.passes)
            rows.append({"length": length, "rejected": rejected, "us": round(us, 2)})
    return rows


def against_dynamic_cache(args: argparse.Namespace, dtype: str) -> list[Comparison]:
    """Undoing a rejected window, and writing the next one, in all layers: a length and appends into pages against
    transformers' `DynamicCache.crop` and `update`."""
    from transformers import DynamicCache

    _, kv_heads, head_dim = HEADS[0]
    length, window = max(args.lengths), max(args.windows)
    cache = Cache(1, length, window, kv_heads, head_dim, DTYPES[dtype])
    layers = [cache.pages.clone() for _ in range(args.layers)]
    keys, values = torch.randn(2, 1, window, kv_heads, head_dim).to(DTYPES[dtype])
    prefix, committed = torch.zeros_like(cache.context_lens), torch.tensor([length])
    theirs = DynamicCache()
    filled = [x.transpose(1, 2) for x in native.gather_kv(*cache.arguments, num_new=window, span=length + window)]
    new = [x.transpose(1, 2) for x in (keys, values)]
    for layer in range(args.layers):
        theirs.update(*filled, layer)

    def roll_back() -> None:
        native.advance_rollback(cache.context_lens, prefix, committed)

    def roll_back_and_append() -> None:
        roll_back()
        for pages in layers:
            native.append_kv(pages, cache.block_table, cache.context_lens, keys, values)

    def crop_and_update() -> list[tuple[Tensor, Tensor]]:
        theirs.crop(-window)
        return [theirs.update(*new, layer) for layer in range(args.layers)]

    roll_back_and_append()
    mine = native.gather_kv(layers[-1], *cache.arguments[1:], num_new=window, span=length + window)
    correct = all(torch.equal(a, b.transpose(1, 2)) for a, b in zip(mine, crop_and_update()[-1], strict=True))
    shape = f"{length} + {window} tokens x {args.layers} layers"
    return [
        compare("rollback", shape, dtype, correct, [roll_back, crop_and_update], args.passes),
        compare("rollback + append", shape, dtype, correct, [roll_back_and_append, crop_and_update], args.passes),
    ]


# -------------------------------------------------------------------------------------------------------------- append


def append_bandwidth(args: argparse.Namespace, dtype: str) -> list[Comparison]:
    """Windows and a prompt into scattered pages, against a copy of as many bytes; the ratio is that of bandwidths."""
    _, kv_heads, head_dim = HEADS[0]
    rows = []
    for num_new in (*args.windows, max(args.lengths)):
        cache = Cache(1, 0, num_new, kv_heads, head_dim, DTYPES[dtype])
        new = torch.randn(2, 1, num_new, kv_heads, head_dim).to(DTYPES[dtype])
        into = torch.empty_like(new)

        def append(cache: Cache = cache, new: Tensor = new) -> None:
            native.append_kv(*cache.arguments, *new)

        def copy(into: Tensor = into, new: Tensor = new) -> None:
            into.copy_(new)

        append()
        correct = torch.equal(torch.stack(native.gather_kv(*cache.arguments, num_new=num_new, span=num_new)), new)
        rows.append(compare("append", f"{num_new} tokens", dtype, correct, [append, copy], args.passes, 2 * new.nbytes))
    return rows


# ----------------------------------------------------------------------------------------------------------- attention


def attention(args: argparse.Namespace, dtype: str) -> list[Comparison]:
    """Over pages where they lie, against a gather and SDPA under the same mask, in the faster of two ways to group
    query heads: SDPA's own, and as more rows of their kv head."""
    rows = []
    for heads, kv_heads, head_dim in HEADS:
        group = heads // kv_heads
        for num_sequences in args.sequences:
            for length in args.lengths:
                for window in args.windows:
                    span = length + window
                    cache = Cache(num_sequences, length, window, kv_heads, head_dim, DTYPES[dtype])
                    queries = torch.randn(num_sequences, window, heads, head_dim).to(DTYPES[dtype])
                    seen = torch.arange(span) <= length + torch.arange(window)[:, None]
                    mask = torch.zeros(window, span, dtype=queries.dtype).masked_fill_(~seen, float("-inf"))
                    grouped_mask = mask.repeat(group, 1)

                    def paged(cache: Cache = cache, queries: Tensor = queries, span: int = span) -> Tensor:
                        return native.window_attention(queries, *cache.arguments, span=span)

                    def dense(cache: Cache = cache, window: int = window, span: int = span) -> list[Tensor]:
                        gathered = native.gather_kv(*cache.arguments, num_new=window, span=span)
                        return [x.transpose(1, 2) for x in gathered]

                    def sdpa(dense=dense, queries: Tensor = queries, mask: Tensor = mask, group: int = group) -> Tensor:
                        out = F.scaled_dot_product_attention(
                            queries.transpose(1, 2), *dense(), attn_mask=mask, enable_gqa=group > 1
                        )
                        return out.transpose(1, 2)

                    def sdpa_of_rows(
                        dense=dense, queries: Tensor = queries, mask: Tensor = grouped_mask, group: int = group
                    ) -> Tensor:
                        more = queries.unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
                        out = F.scaled_dot_product_attention(more, *dense(), attn_mask=mask)
                        return out.unflatten(2, (group, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)

                    peers = [sdpa, sdpa_of_rows] if group > 1 else [sdpa]
                    correct = all(
                        torch.allclose(paged().float(), peer().float(), rtol=0, atol=TOLERANCE[dtype]) for peer in peers
                    )
                    shape = f"{heads}/{kv_heads} x {head_dim}, S {num_sequences}, {length} + {window}"
                    rows.append(compare("attention", shape, dtype, correct, [paged, *peers], args.passes))
    return rows


# ------------------------------------------------------------------------------------------------------------ printing


def show(title: str, rows: list[Comparison], console: Console) -> None:
    table = Table("what", "shape", "dtype", box=None, pad_edge=False, title=title, title_justify="left")
    for name in ("us", "peer us", "times faster", "GB/s", "peer GB/s"):
        table.add_column(name, justify="right")
    for row in rows:
        figures = ["[red]FAIL"]
        if row.us is not None and row.peer_us is not None:
            figures = [f"{row.us:.0f}", f"{row.peer_us:.0f}", f"{row.ratio:.2f}"]
            figures += [f"{row.num_bytes / us / 1e3:.2f}" for us in (row.us, row.peer_us) if row.num_bytes]
        table.add_row(row.what, row.shape, row.dtype, *figures)
    console.print(table)


def show_rollback(rows: list[dict[str, float]], console: Console) -> None:
    table = Table(box=None, pad_edge=False, title="advance_rollback", title_justify="left")
    for name in ("tokens in the cache", "rolled back", "us"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)


def bench(args: argparse.Namespace, console: Console) -> tuple[dict, bool]:
    """Measure and print. Returns: what the document holds, and whether all results were right."""
    torch.manual_seed(args.seed)
    dtypes = [args.dtype] if args.dtype else ["fp32", "bf16"]
    rollback = rollback_times(args)
    show_rollback(rollback, console)
    rows: list[Comparison] = []
    for title, measure in {
        "Rollback against DynamicCache.crop and update": against_dynamic_cache,
        "append_kv against a copy of as many bytes": append_bandwidth,
        "window_attention against gather_kv and SDPA": attention,
    }.items():
        found = [row for dtype in dtypes for row in measure(args, dtype)]
        show(title, found, console)
        rows += found
    return {"rollback": rollback, "rows": [asdict(row) for row in rows]}, all(row.us is not None for row in rows)

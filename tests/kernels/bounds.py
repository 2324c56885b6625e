"""Run kernels in Triton's interpreter and stop at the first address that is no element of an argument.

    TRITON_INTERPRET=1 python tests/kernels/bounds.py verify-tiled canary-store

The check is of every lane that a mask lets through, of every load, store and atomic: the address must be that of an
element of a tensor that the launch got, so that the gaps of a strided tensor are out of bounds, too. A line for each
run tells whether and where it was stopped; the exit status is 1 if one was.
"""

import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from sjd_engine import SamplingParams, Schedule
from sjd_engine.kernels import verify
from sjd_engine.kernels.attention import window_attention
from sjd_engine.testing import AttentionCase, VerifyCase


class OutOfBoundsError(Exception):
    """An address that is no element of an argument of the launch."""


def is_element(addresses: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Which int64 addresses are those of elements of `tensor`. Its dimensions must not overlap."""
    offsets, misaligned = np.divmod(addresses - tensor.data_ptr(), tensor.element_size())
    inside = misaligned == 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True), reverse=True):
        if stride > 0:  # an expanded dimension has one element
            indices, offsets = np.divmod(offsets, stride)
            inside &= (indices >= 0) & (indices < size)
    return inside & (offsets == 0)


@contextmanager
def guarded() -> Iterator[None]:
    """Inside, launches raise OutOfBoundsError instead of touching what is not theirs."""
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    arguments: dict[str, Tensor] = {}
    to_host = executor._init_args_hst

    def note_arguments(self: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        on_host = to_host(self, args, kwargs)
        bound = inspect.getcallargs(self.fn, *on_host[0], **on_host[1])
        arguments.clear()
        arguments.update({name: value for name, value in bound.items() if isinstance(value, Tensor)})
        return on_host

    def check(what: str, pointers: Any, mask: Any) -> None:
        addresses = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)].astype(np.int64)
        inside = np.zeros(addresses.shape, bool)
        for tensor in arguments.values():
            inside |= is_element(addresses, tensor)
        if not inside.all():
            wild = int(addresses[~inside][0])
            near = min(arguments, key=lambda name: abs(wild - arguments[name].data_ptr()))
            offset = wild - arguments[near].data_ptr()
            raise OutOfBoundsError(
                f"{what}: {int((~inside).sum())} of {inside.size} addresses are no element of an argument; the first "
                f"lies {offset} bytes from {near} {list(arguments[near].shape)}"
            )

    def before(operation: Callable[..., Any], what: str, pointer: int, mask: int) -> Callable[..., Any]:
        def checked(*args: Any, **kwargs: Any) -> Any:
            check(what, args[pointer], args[mask])
            return operation(*args, **kwargs)

        return checked

    executor._init_args_hst = note_arguments
    builder.create_masked_load = before(builder.create_masked_load, "load", 0, 1)
    builder.create_masked_store = before(builder.create_masked_store, "store", 0, 2)
    builder.create_atomic_rmw = before(builder.create_atomic_rmw, "atomic", 1, 3)
    try:
        yield
    finally:
        executor._init_args_hst = to_host
        del builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw


# -------------------------------------------------------------------------------------------------------------- runs


@triton.jit
def _canary_kernel(x_ptr, out_ptr, ticket_ptr, stride, size, BREAK: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0)
    ids = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + ids, mask=ids < size + (BREAK == "load"), other=0)
    tl.store(out_ptr + row + tl.where(BREAK == "store", 1, 0), tl.sum(x))
    tl.atomic_add(ticket_ptr + (tl.max(x) if BREAK == "atomic" else 0), 1)


def run_canary(broken: str) -> None:
    """Sums of rows of a view with gaps; `broken` reads a gap, writes past the end, or trusts an index it has read."""
    x = torch.ones(3, 8, dtype=torch.int32)[:, :5]
    out, ticket = torch.zeros(3, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    _canary_kernel[(3,)](x, out, ticket, x.stride(0), x.shape[1], BREAK=broken, BLOCK=8)
    assert out.tolist() == [5, 5, 5]
    assert ticket.item() == 3


EVERYTHING = SamplingParams(guidance_scale=2.0, temperature=0.7, top_k=40, top_p=0.9)
LINES = Schedule.with_line_breaks(3, 3, token=70_000, end_tokens=[70_001])
VERIFY_CASES = {
    "row": [
        VerifyCase(method, 257, 4, 1, params=EVERYTHING, schedule=LINES, init=init, strided=True)
        for method, init in (("maximal", "random"), ("sjd++", "left-repeat"), ("exact", "above-sample"))
    ],
    "tiled": [VerifyCase("sjd", 4099, 3, 1, params=replace(EVERYTHING, top_k=300), init="left-sample", drift=0.1)],
    "past-the-end": [VerifyCase("maximal", 7, 30, init=init, drift=0.0) for init in ("random", "above-repeat")],
    "tree": [VerifyCase("maximal", 60, 3, 1, tree=(3, 3), schedule=Schedule.line(4))],
    "not-finite": [VerifyCase("maximal", 256, 4, params=EVERYTHING, bad=0.3, drift=0.0)],
}


def run_verify(cases: list[VerifyCase]) -> None:
    for case in cases:
        case.run(padded_logits, 2)


def padded_logits(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`verify` on logits whose rows, or columns, have a gap behind them."""
    inner = logits.ndim - 1 if logits.stride(-1) == 1 else logits.ndim - 2
    wider = logits.new_zeros([size + 3 * (dim == inner) for dim, size in enumerate(logits.shape)])
    view = (wider if inner == logits.ndim - 1 else wider.mT.contiguous().mT).narrow(inner, 0, logits.shape[inner])
    return verify(view.copy_(logits), *args, **kwargs)


def run_verify_with_short(name: str) -> None:
    """The real kernel, with one tensor of its state an element shorter than it says."""

    def shortened(logits: Tensor, state: Any, *args: Any, **kwargs: Any) -> Any:
        setattr(state, name, getattr(state, name).flatten()[:-1].clone())
        return verify(logits, state, *args, **kwargs)

    VerifyCase("maximal", 64, 4, 1, drift=0.0).run(shortened)


WINDOW = AttentionCase((0, 90, 33), num_new=17, head_dim=24, group=3)
ATTENTION_CASES = {
    "page1": replace(WINDOW, page_size=1, num_new=3),
    "page64": replace(WINDOW, page_size=64, dtype=torch.float16),
    "tree": replace(WINDOW, bias="own"),
    "no-page": replace(WINDOW, without_page=4, bias="shared"),
    "chunks": replace(WINDOW, lens=(600, 0)),
}


def with_gap(tensor: Tensor) -> Tensor:
    """The same numbers with a gap behind every row."""
    wider = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 3)
    return wider[..., : tensor.shape[-1]].copy_(tensor)


def run_attention(case: AttentionCase) -> None:
    arguments = case.arguments()
    gaps = {name: with_gap(arguments[name]) for name in ("queries", "pages", "block_table")}
    bias = arguments["window_bias"]
    window_attention(**arguments | gaps | {"window_bias": None if bias is None else with_gap(bias)})


def run_attention_with_wild_page() -> None:
    """A table that names a page far behind those there are, where no other argument lies."""
    arguments = WINDOW.arguments()
    arguments["block_table"][1, 2] = len(arguments["pages"]) + (1 << 20)
    window_attention(**arguments)


RUNS: dict[str, Callable[[], None]] = {
    **{f"verify-{name}": partial(run_verify, cases) for name, cases in VERIFY_CASES.items()},
    **{f"attention-{name}": partial(run_attention, case) for name, case in ATTENTION_CASES.items()},
    "attention-wild-page": run_attention_with_wild_page,
    **{f"canary-{broken}": partial(run_canary, broken) for broken in ("nothing", "load", "store", "atomic")},
    **{f"short-{name}": partial(run_verify_with_short, name) for name in ("num_committed", "published", "ticket")},
}


def main(names: list[str]) -> int:
    stopped = [name for name in names if not in_bounds(name)]
    return 1 if stopped else 0


def in_bounds(name: str) -> bool:
    """Whether a run touches nothing else than its arguments; prints what it did."""
    try:
        with guarded():
            RUNS[name]()
    except interpreter.InterpreterError as error:
        cause = error.__cause__
        if not isinstance(cause, OutOfBoundsError):
            raise
        frames = [f for f in traceback.extract_tb(cause.__traceback__) if not f.filename.startswith(sys.prefix)]
        place = next(frame for frame in reversed(frames) if frame.filename != __file__ or "kernel" in frame.name)
        print(f"{name}: {cause} (in {place.name}, line {place.lineno})")
        return False
    print(f"{name}: in bounds")
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(RUNS)))

"""The ops the decoder calls, what runs them and why. With `native` and `attention` the only importer of
`sjd_engine.kernels`.

    triton     one launch on a GPU                        kernels/verify.py
    cpu        one call of the compiled module            csrc/verify_cpu.cpp
    reference  plain PyTorch, the definition of correct   kernels/reference.py

They decide alike, bit for bit. The ops of the paged cache run in the compiled module or in plain PyTorch, and attention
over its pages where attention.py says. For graphs that are traced they are `torch.ops.sjd.verify`, `append_kv` and
`window_attention`. Products with matrices in panels, and what stands between the products of a block, are fused in the
compiled module on a CPU, and plain PyTorch elsewhere.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sjd_engine import attention, kernels, native
from sjd_engine.kernels import layers, noise, paged, reference
from sjd_engine.kernels.acceptance import Acceptance, acceptance
from sjd_engine.kernels.layers import to_panels
from sjd_engine.kernels.noise import NoisePlan, NoiseState
from sjd_engine.kernels.reference import combine, law_weights, redraft, start, warp
from sjd_engine.kernels.state import Grid, VerifyResult, WindowState, reads_previous_logits
from sjd_engine.kernels.tree import MOST_CANDIDATES, Tree
from sjd_engine.kernels.zipar import ZipPlan, ZipState, zip_verify, zip_window

__all__ = [
    "MOST_CANDIDATES",
    "Acceptance",
    "Backend",
    "Grid",
    "KVOps",
    "NoisePlan",
    "NoiseState",
    "Tree",
    "VerifyResult",
    "WindowState",
    "ZipPlan",
    "ZipState",
    "acceptance",
    "backend",
    "combine",
    "denoise",
    "kv_ops",
    "law_weights",
    "layer_ops",
    "linear",
    "multiplies_panels",
    "reads_previous_logits",
    "redraft",
    "start",
    "to_panels",
    "verify",
    "warp",
    "zip_verify",
    "zip_window",
]

BACKENDS = ("triton", "cpu", "reference")
OVERRIDE = "SJD_BACKEND"


@dataclass(frozen=True)
class Backend:
    """What runs `verify` and `denoise` on a device: its name, why it was chosen, and the functions themselves."""

    name: str
    reason: str
    verify: Callable[..., VerifyResult]
    denoise: Callable[..., tuple[Tensor, Tensor]]


def backend(device: torch.device | str) -> Backend:
    """What runs `verify` on `device`: the fastest backend there is, or the one named in the variable SJD_BACKEND.

    Raises: ValueError where the variable names none; RuntimeError where the one it names cannot run.
    """
    return _backend(torch.device(device).type, os.environ.get(OVERRIDE, ""))


@functools.cache
def _backend(device: str, wanted: str) -> Backend:
    name, reason = attention.choose(
        "verify", BACKENDS, device, lambda name: attention.missing(name, device), OVERRIDE, wanted
    )
    return Backend(name, reason, *implementations(name))


def implementations(name: str) -> tuple[Callable[..., VerifyResult], Callable[..., tuple[Tensor, Tensor]]]:
    """`verify` and `denoise` of backend `name`."""
    if name == "triton":
        return kernels.verify, kernels.denoise
    return (native.verify, native.denoise) if name == "cpu" else (reference.verify, noise.denoise)


def verify(
    logits: Tensor, state: WindowState, grid: Grid, *, acceptance: Acceptance | None = None, **arguments: Any
) -> VerifyResult:
    """One decoding pass, see `kernels.reference.verify` for the arguments, on the backend of the logits' device; with
    an acceptance of its own on the reference, which alone has them."""
    if acceptance is not None:
        return reference.verify(logits, state, grid, acceptance=acceptance, **arguments)
    if torch.compiler.is_compiling():
        return _verify_traced(logits, state, grid, **arguments)
    return backend(logits.device).verify(logits, state, grid, **arguments)


def denoise(
    state: NoiseState, plan: NoisePlan, tokens: Tensor, num_committed: Tensor, lowered: Tensor, num_slots: int
) -> tuple[Tensor, Tensor]:
    """The denoise update of a window, see `kernels.noise.denoise`, on the backend of the tokens' device."""
    return backend(tokens.device).denoise(state, plan, tokens, num_committed, lowered, num_slots)


@dataclass(frozen=True)
class KVOps:
    """The ops of the paged cache on a device, see `kernels.paged` for each: what runs them, and why."""

    name: str
    reason: str
    append_kv: Callable[..., None]
    gather_kv: Callable[..., tuple[Tensor, Tensor]]
    window_attention: Callable[..., Tensor]
    advance_rollback: Callable[..., None]
    compact_kv: Callable[..., None]
    copy_pages: Callable[..., None]
    poison_kv: Callable[..., None]


def kv_ops(device: torch.device | str) -> KVOps:
    """The ops on `device`: those of the compiled module where it has them, unless SJD_BACKEND asks for the reference.
    Attention is chosen by itself, see attention.py."""
    device = torch.device(device)
    obstacle = page_obstacle(device)
    runs = paged if obstacle else native
    return KVOps(
        "reference" if obstacle else "compiled",
        obstacle or f"the fastest on {device.type}",
        append_kv,
        runs.gather_kv,
        window_attention,
        runs.advance_rollback,
        runs.compact_kv,
        runs.copy_pages,
        runs.poison_kv,
    )


def page_obstacle(device: torch.device) -> str:
    """Why the compiled module does not run the ops of the paged cache on `device`; "" where it does."""
    if os.environ.get(OVERRIDE) == "reference":
        return f"{OVERRIDE} asks for it"
    if device.type == "cpu":
        return attention.missing("cpu", "cpu")
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the compiled module has no ops for {'HIP' if device.type == 'cuda' else device.type}"
    return (
        "" if native.has_cuda() else "the compiled module has no CUDA; `SJD_CUDA=1 pip install .` with nvcc builds it"
    )


def append_kv(
    pages: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    keys: Tensor,
    values: Tensor,
    num_valid: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> None:
    """See `kernels.paged.append_kv`."""
    arguments = (pages, block_table, context_lens, keys, values, num_valid, cos, sin)
    if torch.compiler.is_compiling():
        torch.ops.sjd.append_kv(*arguments)
    else:
        _append_kv(*arguments)


def window_attention(
    queries: Tensor,
    pages: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    span: int,
    scale: float | None = None,
    window_bias: Tensor | None = None,
) -> Tensor:
    """See `kernels.paged.window_attention`."""
    arguments = (queries, pages, block_table, context_lens, span, scale, window_bias)
    if torch.compiler.is_compiling():
        return torch.ops.sjd.window_attention(*arguments)
    return _window_attention(*arguments)


def layer_ops(x: Tensor) -> ModuleType:
    """What runs the ops of `kernels.layers` in a pass over x: their twins in the compiled module for a tensor on a CPU
    that nothing traces, casts or differentiates, else the definition itself."""
    fused = (
        x.is_cpu
        and x.dtype in native.DTYPES
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not page_obstacle(x.device)
    )
    return native if fused else layers


def linear(x: Tensor, panels: Tensor, num_outputs: int, bias: Tensor | None = None) -> Tensor:
    """See `kernels.layers.linear`."""
    runs = layers if torch.compiler.is_compiling() or page_obstacle(x.device) else native
    return runs.linear(x, panels, num_outputs, bias)


def multiplies_panels() -> bool:
    """Matrices in panels are what this CPU multiplies bfloat16 with fastest, and the compiled module does it."""
    return not page_obstacle(torch.device("cpu")) and native.multiplies_panels()


# ---------------------------------------------------------------------------------------------------- torch.ops.sjd

# `Library.define` and `impl`, not `custom_op`: an eighth of its overhead for each call.
_library = torch.library.Library("sjd", "DEF")
_library.define(
    "verify(Tensor logits, Tensor? previous_logits, Tensor(a!) tokens, Tensor(b!) num_committed, Tensor(c!) iteration, "
    "Tensor(d!) commit_pass, Tensor(e!) law_row, Tensor(f!) laws, Tensor(g!) zero_residual, "
    "Tensor(h!) nonfinite_rows, Tensor(i!) zero_draft_prob, Tensor(j!) siblings, Tensor(k!) published, "
    "Tensor(l!) ticket, Tensor? drafted, Tensor? drafted_scale, "
    "Tensor? forced_ids, Tensor row_start, Tensor above, int cols, Tensor seeds, Tensor? guidance_scale, "
    "Tensor? temperature, Tensor? top_k, Tensor? top_p, Tensor? reuse_threshold, "
    "Tensor? most_accepted, int window_size, "
    "int? next_window_size, str accept, str refresh, str init, int[]? tree) "
    "-> (Tensor num_accepted, Tensor num_committed, Tensor accepted_slots)"
)
STATE = tuple(field.name for field in fields(WindowState) if field.name != "previous_logits")
GRID = ("forced_ids", "row_start", "above", "cols")
ARGUMENTS = ("seeds", "guidance_scale", "temperature", "top_k", "top_p", "reuse_threshold", "most_accepted")
WORDS = ("window_size", "next_window_size", "accept", "refresh", "init", "tree")


def _verify_flat(logits: Tensor, previous_logits: Tensor | None, *values: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op's arguments put together again. Without a tree its accepted slots are empty."""
    named = dict(zip(STATE + GRID + ARGUMENTS + WORDS, values, strict=True))
    state = WindowState(previous_logits=previous_logits, **{name: named[name] for name in STATE})
    grid = Grid(**{name: named[name] for name in GRID})
    arguments = {name: named[name] for name in ARGUMENTS + WORDS}
    result = backend(logits.device).verify(logits, state, grid, **arguments)
    slots = state.siblings.new_empty(len(state.siblings), 0) if result.accepted_slots is None else result.accepted_slots
    return result.num_accepted, result.num_committed, slots


def _verify_fake(logits: Tensor, previous_logits: Tensor | None, *values: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_committed, siblings = (values[STATE.index(name)] for name in ("num_committed", "siblings"))
    return torch.empty_like(num_committed), torch.empty_like(num_committed), siblings.new_empty(siblings.shape[:2])


_library.impl("verify", _verify_flat, "CompositeExplicitAutograd")
torch.library.register_fake("sjd::verify", _verify_fake, lib=_library)


def _verify_traced(logits: Tensor, state: WindowState, grid: Grid, **arguments: Any) -> VerifyResult:
    """`verify` as one node of a traced graph."""
    values = [getattr(state, name) for name in STATE] + [getattr(grid, name) for name in GRID]
    values += [arguments.get(name) for name in ARGUMENTS + WORDS]
    result = torch.ops.sjd.verify(logits, state.previous_logits, *values)
    if reads_previous_logits(arguments["accept"], state.max_window_size):
        state.previous_logits = logits
    num_accepted, num_committed, accepted_slots = result
    return VerifyResult(num_accepted, num_committed, None if arguments.get("tree") is None else accepted_slots)


_library.define(
    "append_kv(Tensor(a!) pages, Tensor block_table, Tensor context_lens, Tensor keys, Tensor values, "
    "Tensor? num_valid, Tensor? cos, Tensor? sin) -> ()"
)
_library.define(
    "window_attention(Tensor queries, Tensor pages, Tensor block_table, Tensor context_lens, SymInt span, "
    "float? scale, Tensor? window_bias) -> Tensor"
)


def _append_kv(pages: Tensor, *arguments: Tensor | None) -> None:
    (paged if page_obstacle(pages.device) else native).append_kv(pages, *arguments)


def _window_attention(
    queries: Tensor,
    pages: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    span: int,
    scale: float | None,
    window_bias: Tensor | None,
) -> Tensor:
    return attention.window_attention(
        queries, pages, block_table, context_lens, span=span, scale=scale, window_bias=window_bias
    )


_library.impl("append_kv", _append_kv, "CompositeExplicitAutograd")
_library.impl("window_attention", _window_attention, "CompositeExplicitAutograd")
torch.library.register_fake("sjd::append_kv", lambda *arguments: None, lib=_library)
torch.library.register_fake("sjd::window_attention", lambda queries, *_: queries.new_empty(queries.shape), lib=_library)

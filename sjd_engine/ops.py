"""The ops the decoder calls, what runs them and why. The only importer of `sjd_engine.kernels` beside `native`.

    triton     one launch on a GPU                        kernels/verify.py
    cpu        one call of the compiled module            csrc/verify_cpu.cpp
    reference  plain PyTorch, the definition of correct   kernels/reference.py

They decide alike, bit for bit. Registered as `torch.ops.sjd.verify` for graphs that are traced.
"""

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sjd_engine import kernels, native
from sjd_engine.kernels import paged, reference
from sjd_engine.kernels.reference import start, warp
from sjd_engine.kernels.state import Grid, VerifyResult, WindowState, reads_previous_logits

__all__ = [
    "Backend",
    "Grid",
    "VerifyResult",
    "WindowState",
    "backend",
    "kv_ops",
    "reads_previous_logits",
    "start",
    "verify",
    "warp",
]

BACKENDS = ("triton", "cpu", "reference")
OVERRIDE = "SJD_BACKEND"


@dataclass(frozen=True)
class Backend:
    """What runs `verify` on a device: its name, why it was chosen, and the function itself."""

    name: str
    reason: str
    verify: Callable[..., VerifyResult]


def backend(device: torch.device | str) -> Backend:
    """What runs `verify` on `device`: the fastest backend there is, or the one named in the variable SJD_BACKEND.

    Raises: ValueError where the variable names none; RuntimeError where the one it names cannot run.
    """
    return _backend(torch.device(device).type, os.environ.get(OVERRIDE, ""))


@functools.cache
def _backend(device: str, wanted: str) -> Backend:
    if wanted and wanted not in BACKENDS:
        raise ValueError(f"{OVERRIDE}: unknown {wanted!r}; known backends: {', '.join(BACKENDS)}")
    name = wanted or ("cpu" if device == "cpu" else "triton")
    obstacle = missing(name, device)
    if not obstacle:
        reason = f"{OVERRIDE} asks for it" if wanted else f"the fastest on {device}"
        return Backend(name, reason, implementation(name))
    if wanted:
        raise RuntimeError(f"{OVERRIDE}={wanted}: {obstacle}")
    warnings.warn(f"the slow reference runs `verify`: {obstacle}", RuntimeWarning, stacklevel=3)
    return Backend("reference", obstacle, reference.verify)


def missing(name: str, device: str) -> str:
    """What keeps backend `name` from running on `device`, with the remedy; "" where nothing does."""
    if name == "cpu":
        if device != "cpu":
            return f"the compiled module works on a CPU, not on {device}"
        return "" if native.available() else f"{native.why_not()}; `pip install .` with a C++17 compiler builds it"
    if name == "triton":
        try:
            triton = importlib.import_module("triton")
        except ImportError as error:
            return f"{error}; `pip install triton`"
        if device == "cpu" and not triton.knobs.runtime.interpret:
            return "Triton needs a GPU, or TRITON_INTERPRET=1 to be interpreted slowly"
    return ""


def implementation(name: str) -> Callable[..., VerifyResult]:
    """`verify` of backend `name`."""
    if name == "triton":
        return kernels.verify
    return native.verify if name == "cpu" else reference.verify


def verify(logits: Tensor, state: WindowState, grid: Grid, **arguments: Any) -> VerifyResult:
    """One decoding pass, see `kernels.reference.verify` for the arguments, on the backend of the logits' device."""
    if torch.compiler.is_compiling():
        return _verify_traced(logits, state, grid, **arguments)
    return backend(logits.device).verify(logits, state, grid, **arguments)


def kv_ops(device: torch.device) -> ModuleType:
    """The ops of the paged cache on `device`: the compiled module's on a CPU, else `kernels.paged`. Same signatures."""
    wanted = os.environ.get(OVERRIDE, "")
    compiled = device.type == "cpu" and native.available() and wanted in ("", "cpu")
    return native if compiled else paged


# ---------------------------------------------------------------------------------------------------- torch.ops.sjd

# `Library.define` and `impl`, not `custom_op`: an eighth of its overhead for each call.
_library = torch.library.Library("sjd", "DEF")
_library.define(
    "verify(Tensor logits, Tensor? previous_logits, Tensor(a!) tokens, Tensor(b!) num_committed, Tensor(c!) iteration, "
    "Tensor(d!) commit_pass, Tensor(e!) law_row, Tensor(f!) laws, Tensor(g!) zero_residual, "
    "Tensor(h!) nonfinite_rows, Tensor(i!) zero_draft_prob, Tensor(j!) published, Tensor(k!) ticket, "
    "Tensor? forced_ids, Tensor row_start, Tensor above, int cols, Tensor seeds, Tensor? guidance_scale, "
    "Tensor? temperature, Tensor? top_k, Tensor? top_p, Tensor? reuse_threshold, int window_size, str accept, "
    "str refresh, str init) -> (Tensor num_accepted, Tensor num_committed)"
)
STATE = tuple(field.name for field in fields(WindowState) if field.name != "previous_logits")
GRID = ("forced_ids", "row_start", "above", "cols")
ARGUMENTS = ("seeds", "guidance_scale", "temperature", "top_k", "top_p", "reuse_threshold")
WORDS = ("window_size", "accept", "refresh", "init")


def _verify_flat(logits: Tensor, previous_logits: Tensor | None, *values: Any) -> tuple[Tensor, Tensor]:
    """The op's arguments put together again."""
    named = dict(zip(STATE + GRID + ARGUMENTS + WORDS, values, strict=True))
    state = WindowState(previous_logits=previous_logits, **{name: named[name] for name in STATE})
    grid = Grid(**{name: named[name] for name in GRID})
    arguments = {name: named[name] for name in ARGUMENTS + WORDS}
    result = backend(logits.device).verify(logits, state, grid, **arguments)
    return result.num_accepted, result.num_committed


def _verify_fake(logits: Tensor, previous_logits: Tensor | None, *values: Any) -> tuple[Tensor, Tensor]:
    num_committed = values[STATE.index("num_committed")]
    return torch.empty_like(num_committed), torch.empty_like(num_committed)


_library.impl("verify", _verify_flat, "CompositeExplicitAutograd")
torch.library.register_fake("sjd::verify", _verify_fake, lib=_library)


def _verify_traced(logits: Tensor, state: WindowState, grid: Grid, **arguments: Any) -> VerifyResult:
    """`verify` as one node of a traced graph."""
    values = [getattr(state, name) for name in STATE] + [getattr(grid, name) for name in GRID]
    values += [arguments.get(name) for name in ARGUMENTS + WORDS]
    result = torch.ops.sjd.verify(logits, state.previous_logits, *values)
    if reads_previous_logits(arguments["accept"], arguments["window_size"]):
        state.previous_logits = logits
    return VerifyResult(*result)

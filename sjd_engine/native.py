"""The compiled ops, `sjd_engine._C`: the only importer of it. Without it the package works, only slower."""

from typing import Any

import torch
from torch import Tensor

from sjd_engine.kernels.state import Grid, VerifyResult, WindowState, reads_previous_logits

_C: Any = None
_import_error = ""
try:
    from sjd_engine import _C  # type: ignore[attr-defined, no-redef]
except ImportError as error:
    _import_error = str(error)

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def available() -> bool:
    """The compiled module can be used."""
    return _C is not None


def why_not() -> str:
    """Why it cannot: the text of the ImportError, "" where it can."""
    return _import_error


def isa() -> str:
    """The instruction set that the CPU ops run with."""
    return _module().isa()


def cuda_archs() -> tuple[str, ...]:
    """The CUDA architectures that were compiled in, such as "sm_90"; "compute_120" is PTX. Empty without CUDA."""
    return _module().cuda_archs


def cuda_devices() -> list[tuple[str, tuple[int, int], int]]:
    """(name, compute capability, memory in bytes) of every device. Raises: RuntimeError with CUDA's own message."""
    return _module().cuda_devices()


def verify(
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
    """`kernels.reference.verify` on a CPU, decision for decision, in one call that makes no tensor of probabilities.

    Runs on torch.get_num_threads() threads; the result does not depend on their number. Laws and columns that are never
    read (rows past the image's end, forced rows, scratch) may differ from the reference's.

    Args: those of the reference; logits float32, float16 or bfloat16, any strides.
    Raises: ValueError naming the argument that lies on another device, has another dtype or is not contiguous;
        RuntimeError where the compiled module is missing.
    """
    if logits.dtype not in DTYPES or not logits.is_cpu:
        raise ValueError(
            f"verify: logits must be float32, float16 or bfloat16 on a CPU, got {logits.dtype} on {logits.device}"
        )
    guided = logits.ndim == 4
    previous = state.previous_logits
    num_accepted = torch.empty_like(state.num_committed)
    _module().verify_cpu(
        logits=logits.data_ptr(),
        dtype=DTYPES[logits.dtype],
        guided=guided,
        strides=_strides(logits),
        previous_logits=0 if previous is None else previous.data_ptr(),
        previous_strides=(0, 0, 0, 0) if previous is None else _strides(previous),
        batch_size=len(seeds),
        window_size=window_size,
        vocab_size=logits.shape[-1],
        num_tokens=grid.num_tokens,
        tokens=_address("tokens", state.tokens, torch.int64),
        num_committed=_address("num_committed", state.num_committed, torch.int64),
        iteration=_address("iteration", state.iteration, torch.int64),
        commit_pass=_address("commit_pass", state.commit_pass, torch.int64),
        law_row=_address("law_row", state.law_row, torch.int32),
        laws=_address("laws", state.laws, torch.float32),
        zero_residual=_address("zero_residual", state.zero_residual, torch.int64),
        nonfinite_rows=_address("nonfinite_rows", state.nonfinite_rows, torch.int64),
        zero_draft_prob=_address("zero_draft_prob", state.zero_draft_prob, torch.int64),
        num_accepted=num_accepted.data_ptr(),
        forced_ids=_address("forced_ids", grid.forced_ids, torch.int64),
        row_start=_address("row_start", grid.row_start, torch.int64),
        above=_address("above", grid.above, torch.int64),
        seeds=_address("seeds", seeds, torch.int64),
        guidance_scale=_address("guidance_scale", guidance_scale, torch.float32),
        temperature=_address("temperature", temperature, torch.float32),
        top_k=_address("top_k", top_k, torch.int64),
        top_p=_address("top_p", top_p, torch.float32),
        reuse_threshold=_address("reuse_threshold", reuse_threshold, torch.float32),
        accept=accept,
        refresh=refresh,
        init=init,
        num_threads=torch.get_num_threads(),
    )
    if reads_previous_logits(accept, window_size):
        state.previous_logits = logits
    return VerifyResult(num_accepted, state.num_committed.clone())


def _module() -> Any:
    if _C is None:
        raise RuntimeError(
            f"sjd_engine._C is missing ({_import_error}); build it with `pip install .`, which needs a C++17 compiler"
        )
    return _C


def _strides(logits: Tensor) -> tuple[int, ...]:
    """Those of (pair, batch, row, vocab), in elements."""
    return logits.stride() if logits.ndim == 4 else (0, *logits.stride())


def _address(name: str, tensor: Tensor | None, dtype: torch.dtype) -> int:
    """Where `tensor` lies; 0 for None."""
    if tensor is None:
        return 0
    if tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(
            f"verify: {name} must be contiguous {dtype} on a CPU, "
            f"got {tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
        )
    return tensor.data_ptr()

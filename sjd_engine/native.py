"""The compiled ops, `sjd_engine._C`: the only importer of it. Without it the package works, only slower."""

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from sjd_engine.kernels import layers
from sjd_engine.kernels.noise import NoisePlan, NoiseState
from sjd_engine.kernels.state import Grid, VerifyResult, WindowState, reads_previous_logits

_C: Any = None
_import_error = ""
try:
    from sjd_engine import _C  # type: ignore[attr-defined, no-redef]
except ImportError as error:
    _import_error = str(error)

if TYPE_CHECKING or _C is None:
    PageAllocator: TypeAlias = Any

    class PagesExhausted(RuntimeError):  # noqa: N818
        """Fewer pages are free than are needed; nothing has changed."""
else:
    PageAllocator, PagesExhausted = _C.PageAllocator, _C.PagesExhausted

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
    next_window_size: int | None = None,
    accept: str,
    refresh: str,
    init: str,
    seeds: Tensor,
    guidance_scale: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    reuse_threshold: Tensor | None = None,
    tree: tuple[int, int] | None = None,
    most_accepted: Tensor | None = None,
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
    accepted_slots = None if tree is None else state.siblings.new_empty(state.siblings.shape[:2])
    candidates, depth = (1, 1) if tree is None else tree
    _module().verify_cpu(
        logits=logits.data_ptr(),
        dtype=DTYPES[logits.dtype],
        guided=guided,
        strides=_strides(logits),
        previous_logits=0 if previous is None else previous.data_ptr(),
        previous_strides=(0, 0, 0, 0) if previous is None else _strides(previous),
        batch_size=len(seeds),
        window_size=window_size,
        next_window_size=window_size if next_window_size is None else next_window_size,
        max_window_size=state.max_window_size,
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
        candidates=candidates,
        depth=depth,
        siblings=_address("siblings", state.siblings, torch.int64),
        num_accepted=num_accepted.data_ptr(),
        accepted_slots=_address("accepted_slots", accepted_slots, torch.int64),
        drafted=_address("drafted", state.drafted, torch.float32),
        drafted_scale=_address("drafted_scale", state.drafted_scale, torch.float32),
        forced_ids=_address("forced_ids", grid.forced_ids, torch.int64),
        row_start=_address("row_start", grid.row_start, torch.int64),
        above=_address("above", grid.above, torch.int64),
        seeds=_address("seeds", seeds, torch.int64),
        guidance_scale=_address("guidance_scale", guidance_scale, torch.float32),
        temperature=_address("temperature", temperature, torch.float32),
        top_k=_address("top_k", top_k, torch.int64),
        top_p=_address("top_p", top_p, torch.float32),
        reuse_threshold=_address("reuse_threshold", reuse_threshold, torch.float32),
        most_accepted=_address("most_accepted", most_accepted, torch.int64),
        accept=accept,
        refresh=refresh,
        init=init,
        num_threads=torch.get_num_threads(),
    )
    if reads_previous_logits(accept, state.max_window_size):
        state.previous_logits = logits
    return VerifyResult(num_accepted, state.num_committed.clone(), accepted_slots)


def denoise(
    state: NoiseState, plan: NoisePlan, tokens: Tensor, num_committed: Tensor, lowered: Tensor, num_slots: int
) -> tuple[Tensor, Tensor]:
    """`kernels.noise.denoise` on a CPU, bit for bit, in one call.

    Args: those of the reference.
    Raises: ValueError naming the argument that lies on another device, has another dtype or is not contiguous;
        RuntimeError where the compiled module is missing.
    """
    op, cpu, (batch_size, num_tokens) = "denoise", torch.device("cpu"), state.levels.shape
    vocab_size, hidden = plan.embeddings.shape
    inputs = plan.embeddings.new_empty(batch_size, num_slots, hidden)
    levels = state.levels.new_empty(batch_size, num_slots)
    if plan.embeddings.dtype not in DTYPES:
        raise ValueError(f"{op}: embeddings must be float32, float16 or bfloat16, got {plan.embeddings.dtype}")
    floats = ("mean", "std", "inverse", "encodings", "keep", "pull")
    _module().denoise_cpu(
        dtype=DTYPES[plan.embeddings.dtype],
        batch_size=batch_size,
        num_slots=num_slots,
        num_tokens=num_tokens,
        tokens_width=tokens.shape[1],
        vocab_size=vocab_size,
        hidden=hidden,
        levels=_checked(op, "levels", state.levels, torch.int32, cpu),
        noisy=_checked(op, "noisy", state.noisy, torch.float32, cpu),
        embeddings=_checked(op, "embeddings", plan.embeddings, plan.embeddings.dtype, cpu),
        **{name: _checked(op, name, getattr(plan, name), torch.float32, cpu) for name in floats},
        tokens=_checked(op, "tokens", tokens, torch.int64, cpu),
        num_committed=_checked(op, "num_committed", num_committed, torch.int64, cpu),
        lowered=_checked(op, "lowered", lowered, torch.int64, cpu),
        inputs=inputs.data_ptr(),
        out_levels=levels.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    return inputs, levels


# --------------------------------------------------------------------------------------------------------- paged cache
# The ops of kernels/paged.py, where the arguments are explained, with the same signatures.


def has_cuda() -> bool:
    """The compiled module moves pages on CUDA devices too."""
    return _C is not None and _C.has_cuda


def bfloat16_isa() -> str:
    """What multiplies bfloat16 in attention on a CPU: "avx512_bf16" or "float32"."""
    return _module().bfloat16_isa()


def page_allocator(num_pages: int, page_size: int) -> PageAllocator:
    """The books of a pool of pages: free list, references, published prompts."""
    return _module().PageAllocator(num_pages=num_pages, page_size=page_size)


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
    """`paged.append_kv`: one copy for each token, no slot mapping. Strides that keys and values do not share, or heads
    that are not contiguous, cost a copy more."""
    op, device = "append_kv", pages.device
    expected = (len(block_table), keys.shape[1], *pages.shape[-2:])
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.dtype != pages.dtype or tensor.device != device or tensor.shape != expected:
            raise ValueError(
                f"{op}: {name} must be {list(expected)} {pages.dtype} on {device}, "
                f"got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    table = {"cos": 0, "sin": 0}
    if cos is not None or sin is not None:
        expected = (*keys.shape[:2], keys.shape[3])
        for name, rows in (("cos", cos), ("sin", sin)):
            if rows is None or rows.shape != expected or expected[2] % 2:
                raise ValueError(
                    f"{op}: cos and sin must both be {list(expected)} of an even head dim, "
                    f"got {name} {None if rows is None else list(rows.shape)}"
                )
            table[name] = _checked(op, name, rows, torch.float32, device)
    if keys.stride() != values.stride() or keys.stride()[2:] != (keys.shape[3], 1):
        keys, values = keys.contiguous(), values.contiguous()
    size = pages.element_size()
    _module().append_kv(
        _pages(op, pages, block_table),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        sequence_stride=keys.stride(0) * size,
        token_stride=keys.stride(1) * size,
        context_lens=_checked(op, "context_lens", context_lens, torch.int32, device),
        num_valid=0 if num_valid is None else _checked(op, "num_valid", num_valid, torch.int32, device),
        **table,
        num_new=keys.shape[1],
        place=_place(device),
    )


def gather_kv(
    pages: Tensor, block_table: Tensor, context_lens: Tensor, *, num_new: int, span: int
) -> tuple[Tensor, Tensor]:
    """`paged.gather_kv` in one pass over the pages."""
    out = pages.new_empty(2, len(block_table), span, *pages.shape[-2:])
    _module().gather_kv(
        _pages("gather_kv", pages, block_table),
        out=out.data_ptr(),
        context_lens=_checked("gather_kv", "context_lens", context_lens, torch.int32, pages.device),
        num_new=num_new,
        span=span,
        place=_place(pages.device),
    )
    return out[0], out[1]


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
    """`paged.window_attention` on a CPU, reading pages where they lie. float32 sums; each row's rounding depends on its
    own sequence and position alone, so not on the window, the batch, the page size or the number of threads.

    Args: `span` is not needed and ignored; queries of any strides over contiguous heads.
    """
    op, (num_seqs, num_new, num_heads, head_dim) = "window_attention", queries.shape
    if (
        queries.dtype != pages.dtype
        or not queries.is_cpu
        or head_dim != pages.shape[-1]
        or num_seqs != len(block_table)
    ):
        raise ValueError(
            f"{op}: queries must be [{len(block_table)}, N, H, {pages.shape[-1]}] {pages.dtype} on a CPU, "
            f"got {list(queries.shape)} {queries.dtype} on {queries.device}"
        )
    if queries.stride(3) != 1:
        queries = queries.contiguous()
    bias, bias_stride = 0, 0
    if window_bias is not None:
        if window_bias.shape not in ((num_new, num_new), (num_seqs, num_new, num_new)):
            raise ValueError(
                f"{op}: window_bias must be [N, N] or [S, N, N] = {[num_seqs, num_new, num_new]}, "
                f"got {list(window_bias.shape)}"
            )
        bias = _checked(op, "window_bias", window_bias, torch.float32, queries.device)
        bias_stride = num_new * num_new if window_bias.ndim == 3 else 0
    out = torch.empty(queries.shape, dtype=queries.dtype)
    _module().window_attention(
        _pages(op, pages, block_table),
        queries=queries.data_ptr(),
        strides=queries.stride()[:3],
        out=out.data_ptr(),
        context_lens=_checked(op, "context_lens", context_lens, torch.int32, queries.device),
        window_bias=bias,
        bias_sequence_stride=bias_stride,
        num_new=num_new,
        num_heads=num_heads,
        scale=head_dim**-0.5 if scale is None else scale,
        num_threads=torch.get_num_threads(),
    )
    return out


def advance_rollback(context_lens: Tensor, prefix_lens: Tensor, num_committed: Tensor) -> None:
    """`paged.advance_rollback`; the host learns nothing and waits for nothing."""
    op, device = "advance_rollback", context_lens.device
    _module().advance_rollback(
        context_lens=_checked(op, "context_lens", context_lens, torch.int32, device),
        prefix_lens=_checked(op, "prefix_lens", prefix_lens, torch.int32, device),
        num_committed=_checked(op, "num_committed", num_committed, torch.int64, device),
        num_sequences=len(context_lens),
        copies=len(context_lens) // len(num_committed),
        place=_place(device),
    )


def compact_kv(pages: Tensor, block_table: Tensor, context_lens: Tensor, from_slots: Tensor) -> None:
    """`paged.compact_kv`, in one pass over all layers; the host learns nothing and waits for nothing."""
    op, device = "compact_kv", pages.device
    _module().compact_kv(
        _pages(op, pages, block_table),
        context_lens=_checked(op, "context_lens", context_lens, torch.int32, device),
        from_slots=_checked(op, "from_slots", from_slots, torch.int64, device),
        copies=len(context_lens) // len(from_slots),
        num_levels=from_slots.shape[1],
        place=_place(device),
    )


def copy_pages(pages: Tensor, copies: Tensor) -> None:
    """`paged.copy_pages`."""
    _module().copy_pages(
        _pages("copy_pages", pages, None),
        copies=_checked("copy_pages", "copies", copies, torch.int32, pages.device),
        num_copies=len(copies),
        place=_place(pages.device),
    )


def poison_kv(pages: Tensor, block_table: Tensor, context_lens: Tensor, *, num_slots: int) -> None:
    """`paged.poison_kv`."""
    _module().poison_kv(
        _pages("poison_kv", pages, block_table),
        context_lens=_checked("poison_kv", "context_lens", context_lens, torch.int32, pages.device),
        num_slots=num_slots,
        place=_place(pages.device),
    )


def _pages(op: str, pages: Tensor, block_table: Tensor | None) -> Any:
    """Pages of one layer or of all, and the tables: addresses and sizes."""
    if pages.dtype not in DTYPES or not pages.is_contiguous() or pages.ndim not in (5, 6):
        raise ValueError(
            f"{op}: pages must be contiguous [P, 2, page_size, KH, D] or [L, P, 2, page_size, KH, D] of float32, "
            f"float16 or bfloat16, got {list(pages.shape)} {pages.dtype} with strides {pages.stride()}"
        )
    table = 0 if block_table is None else _checked(op, "block_table", block_table, torch.int32, pages.device)
    return _module().Pages(
        pages=pages.data_ptr(),
        block_table=table,
        dtype=DTYPES[pages.dtype],
        num_layers=len(pages) if pages.ndim == 6 else 1,
        num_pages=pages.shape[-5],
        page_size=pages.shape[-3],
        num_kv_heads=pages.shape[-2],
        head_dim=pages.shape[-1],
        num_sequences=1 if block_table is None else len(block_table),
        table_width=1 if block_table is None else block_table.shape[1],
    )


def _place(device: torch.device) -> Any:
    """The current stream of a CUDA device, else the threads of torch."""
    cuda = device.type == "cuda"
    stream = torch.cuda.current_stream(device).cuda_stream if cuda else 0
    return _module().Place(
        cuda=cuda, device=device.index if cuda else 0, stream=stream, num_threads=torch.get_num_threads()
    )


def _checked(op: str, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> int:
    """Where `tensor` lies."""
    if tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous {dtype} on {device}, "
            f"got {tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
        )
    return tensor.data_ptr()


# -------------------------------------------------------------------------------------------------------------- layers
# The ops of kernels/layers.py, where the arguments are explained, with the same signatures, on a CPU. float32
# arithmetic, rounded once; a row's result does not depend on the rows beside it or the number of threads.


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`layers.rms_norm` in one pass over each row."""
    return _add_rms_norm("rms_norm", x, None, weight, eps)[1]


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`layers.add_rms_norm` in one pass over each row."""
    if y.shape != x.shape or y.dtype != x.dtype or not y.is_cpu:
        raise ValueError(
            f"add_rms_norm: y must be {list(x.shape)} {x.dtype} on a CPU, got {list(y.shape)} {y.dtype} on {y.device}"
        )
    return _add_rms_norm("add_rms_norm", x, y.contiguous(), weight, eps)


def _add_rms_norm(op: str, x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + y or x, its norm)."""
    dtype, (hidden,) = _cpu_dtype(op, "x", x), x.shape[-1:]
    if weight.shape != (hidden,):
        raise ValueError(f"{op}: weight must be [{hidden}], got {list(weight.shape)}")
    x = x.contiguous()
    total = x if y is None else torch.empty_like(x)
    out = torch.empty_like(x)
    _module().add_rms_norm(
        x=x.data_ptr(),
        y=0 if y is None else y.data_ptr(),
        weight=_checked(op, "weight", weight, x.dtype, x.device),
        sum=total.data_ptr(),
        out=out.data_ptr(),
        dtype=dtype,
        rows=x.numel() // hidden,
        hidden=hidden,
        eps=eps,
        num_threads=torch.get_num_threads(),
    )
    return total, out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`layers.rotate` in place, where the heads of a token lie side by side."""
    op, (num_seqs, num_new, num_heads, head_dim) = "rotate", x.shape
    dtype, rows = _cpu_dtype(op, "x", x), (num_seqs, num_new, 1, head_dim)
    if x.stride()[2:] != (head_dim, 1):
        x = x.contiguous()
    if cos.shape != rows or sin.shape != rows:
        cos, sin = cos.expand(rows).contiguous(), sin.expand(rows).contiguous()
    _module().rotate(
        x=x.data_ptr(),
        sequence_stride=x.stride(0),
        token_stride=x.stride(1),
        cos=_checked(op, "cos", cos, x.dtype, x.device),
        sin=_checked(op, "sin", sin, x.dtype, x.device),
        dtype=dtype,
        sizes=(num_seqs, num_new, num_heads, head_dim),
        num_threads=torch.get_num_threads(),
    )
    return x


def silu_mul(gate_up: Tensor) -> Tensor:
    """`layers.silu_mul` in one pass."""
    dtype, width = _cpu_dtype("silu_mul", "gate_up", gate_up), gate_up.shape[-1] // 2
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    _module().silu_mul(
        gate_up=gate_up.data_ptr(),
        out=out.data_ptr(),
        dtype=dtype,
        rows=out.numel() // width,
        width=width,
        num_threads=torch.get_num_threads(),
    )
    return out


def multiplies_panels() -> bool:
    """Whether `linear` is the fastest product of bfloat16 on this CPU: it multiplies it in vectors, not in tiles."""
    return _module().multiplies_panels()


def linear(x: Tensor, panels: Tensor, num_outputs: int, bias: Tensor | None = None) -> Tensor:
    """`layers.linear`, its sums in the order of the inputs: a row does not depend on the rows beside it."""
    depth, dtype = x.shape[-1], x.dtype
    if not x.is_contiguous():
        x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], num_outputs)
    if dtype not in (torch.float32, torch.bfloat16) or not x.is_cpu:
        raise ValueError(f"linear: x must be float32 or bfloat16 on a CPU, got {dtype} on {x.device}")
    steps = -(-depth * dtype.itemsize // 4)
    shape = (-(-num_outputs // layers.PANEL), steps, layers.PANEL, 4 // dtype.itemsize)
    if panels.shape != shape:
        raise ValueError(f"linear: panels must be {list(shape)}, got {list(panels.shape)}; see `layers.to_panels`")
    if bias is not None and bias.shape != (num_outputs,):
        raise ValueError(f"linear: bias must be [{num_outputs}], got {list(bias.shape)}")
    _module().linear(
        x.data_ptr(),
        _checked("linear", "panels", panels, dtype, x.device),
        0 if bias is None else _checked("linear", "bias", bias, dtype, x.device),
        out.data_ptr(),
        DTYPES[dtype],
        x.numel() // depth,
        depth,
        num_outputs,
        torch.get_num_threads(),
    )
    return out


def _cpu_dtype(op: str, name: str, tensor: Tensor) -> str:
    """What the compiled module calls the dtype of a tensor on a CPU."""
    if tensor.dtype not in DTYPES or not tensor.is_cpu:
        raise ValueError(
            f"{op}: {name} must be float32, float16 or bfloat16 on a CPU, got {tensor.dtype} on {tensor.device}"
        )
    return DTYPES[tensor.dtype]


# --------------------------------------------------------------------------------------------------------------- parts


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

"""Attention of a window over pages: what can run it, what each asks for, and why one was chosen.

    cpu           the compiled module                               csrc/attention_cpu.cpp
    triton        our kernel                                        kernels/attention.py
    flash_attn_2  flash_attn.flash_attn_with_kvcache
    flash_attn_3  flash_attn_interface.flash_attn_with_kvcache
    varlen        torch.nn.attention.varlen.varlen_attn
    flashinfer    flashinfer.BatchPrefillWithPagedKVCacheWrapper
    reference     plain PyTorch, the definition of correct          kernels/paged.py

On a GPU it is Triton: it takes every page size, dtype and tree, never waits for the device, and gives a sequence the
same result in any batch. The libraries promise less, and nothing here was timed on a GPU, so they run only where the
variable SJD_ATTENTION names them. They may cut the keys of a sequence as suits the whole batch.
"""

import functools
import importlib
import inspect
import os
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sjd_engine import native
from sjd_engine.kernels import launch, paged

OVERRIDE = "SJD_ATTENTION"
HALF = (torch.float16, torch.bfloat16)
FLASHINFER_WORKSPACE_BYTES = 128 << 20


@dataclass(frozen=True)
class Attention:
    """What an implementation runs and asks for.

    run: `kernels.paged.window_attention`, but for `window_bias` where it takes no trees.
    device: the type of device it runs on; "" for any.
    library: what it calls, "module:name", with how to install that; "" for nothing.
    page_size: pages hold a multiple of that many tokens.
    head_dims: those it takes; None for any.
    syncs: the host waits for the device, so no CUDA graph can hold it.
    trees: it takes a `window_bias`; Triton takes those of the others.
    """

    run: Callable[..., Tensor]
    device: str = ""
    library: str = ""
    install: str = ""
    page_size: int = 1
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALF)
    head_dims: Sequence[int] | None = None
    syncs: bool = False
    trees: bool = True

    def __str__(self) -> str:
        sizes = "any size" if self.page_size == 1 else f"{self.page_size}n tokens"
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        host = "host sync, no CUDA graph" if self.syncs else "no host sync"
        return f"pages of {sizes}; {dtypes}; {host}; {'trees' if self.trees else 'trees by triton'}"


@dataclass(frozen=True)
class AttentionBackend:
    """What runs `window_attention`: its name, why it was chosen, and the function itself."""

    name: str
    reason: str
    window_attention: Callable[..., Tensor]


# ------------------------------------------------------------------------------------------------------------- choice


def backend(device: torch.device | str, *, page_size: int, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
    """What runs attention over pages on `device`: our own kernel, or what the variable SJD_ATTENTION names.

    Raises: ValueError where the variable names none; RuntimeError where what it names cannot run.
    """
    return _backend(torch.device(device).type, page_size, dtype, head_dim, os.environ.get(OVERRIDE, ""))


@functools.cache
def _backend(device: str, page_size: int, dtype: torch.dtype, head_dim: int, wanted: str) -> AttentionBackend:
    def obstacle(name: str) -> str:
        return missing(name, device) or unsuitable(name, device, page_size, dtype, head_dim)

    name, reason = choose("window_attention", ATTENTIONS, device, obstacle, OVERRIDE, wanted)
    return AttentionBackend(name, reason, implementation(name))


def choose(
    op: str, known: Collection[str], device: str, obstacle: Callable[[str], str], override: str, wanted: str
) -> tuple[str, str]:
    """What runs an op, and why: what the variable names, else our own kernel, else with a warning the reference.

    Args:
        known: names of what there is.
        obstacle: what keeps one of them from running; "" where nothing does.
        override, wanted: the variable and its value, "" where it is not set.
    Raises: ValueError where the variable names none; RuntimeError where what it names cannot run.
    """
    if wanted and wanted not in known:
        raise ValueError(f"{override}: unknown {wanted!r}; known: {', '.join(known)}")
    name = wanted or ("cpu" if device == "cpu" else "triton")
    found = obstacle(name)
    if not found:
        return name, f"{override} asks for it" if wanted else f"our own kernel on {device}"
    if wanted:
        raise RuntimeError(f"{override}={wanted}: {found}")
    warnings.warn(f"the slow reference runs `{op}`: {found}", RuntimeWarning, stacklevel=4)
    return "reference", found


def missing(name: str, device: str) -> str:
    """What keeps an implementation from running on `device`, with the remedy; "" where nothing does. Of those that have
    the other ops, too, it is the same for them."""
    spec = ATTENTIONS[name]
    if spec.device not in ("", device):
        return f"it runs on {spec.device}, not on {device}"
    if name == "cpu" and not native.available():
        return f"{native.why_not()}; `pip install .` with a C++17 compiler builds it"
    if spec.library:
        try:
            function = imported(name)
        except (ImportError, AttributeError) as error:
            return f"{error}; `{spec.install}`"
        if name == "varlen" and "block_table" not in inspect.signature(function).parameters:
            return f"varlen_attn of torch {torch.__version__} takes no block_table; `{spec.install}`"
    if name == "triton" and device == "cpu" and not importlib.import_module("triton").knobs.runtime.interpret:
        return "Triton needs a GPU, or TRITON_INTERPRET=1 to be interpreted slowly"
    return ""


def unsuitable(name: str, device: str, page_size: int, dtype: torch.dtype, head_dim: int) -> str:
    """Which of these pages' properties an implementation does not take; "" where it takes all."""
    spec = ATTENTIONS[name]
    if page_size % spec.page_size:
        return f"page_size must be a multiple of {spec.page_size}, got {page_size}"
    if dtype not in spec.dtypes:
        return f"dtype must be {' or '.join(map(str, spec.dtypes))}, got {dtype}"
    if spec.head_dims is not None and head_dim not in spec.head_dims:
        return f"head_dim must be in {spec.head_dims}, got {head_dim}"
    if name == "triton" and device == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies the bits of bfloat16; choose float32 or float16"
    return ""


def imported(name: str) -> Any:
    """What the implementation calls. Raises: ImportError or AttributeError where there is no such thing."""
    module, _, attribute = ATTENTIONS[name].library.partition(":")
    return getattr(importlib.import_module(module), attribute)


def implementation(name: str) -> Callable[..., Tensor]:
    """`window_attention` by `name`, trees included."""
    spec = ATTENTIONS[name]
    return spec.run if spec.trees else functools.partial(_causal_or_tree, spec.run)


def _causal_or_tree(causal: Callable[..., Tensor], *args: Tensor, window_bias: Tensor | None, **options: Any) -> Tensor:
    if window_bias is not None:
        return triton(*args, window_bias=window_bias, **options)
    return causal(*args, **options)


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
    """`kernels.paged.window_attention`, where the arguments are explained, by what was chosen for these pages."""
    page_size, _, head_dim = pages.shape[2:]
    chosen = backend(pages.device, page_size=page_size, dtype=pages.dtype, head_dim=head_dim)
    return chosen.window_attention(
        queries, pages, block_table, context_lens, span=span, scale=scale, window_bias=window_bias
    )


# ----------------------------------------------------------------------------------------------------------- adapters


def triton(*args: Tensor, **options: Any) -> Tensor:
    """Our kernel, which is not imported before it is needed."""
    return imported("triton")(*args, **options)


def whole_table(block_table: Tensor, page_size: int, span: int) -> Tensor:
    """A table of pages for `span` tokens without -1, for libraries that would read whatever page it names.

    A sequence's first page stands in for the pages it lacks. Only rows whose own token has no page see the tokens in
    them; and if a second page is asked for, the first is full of numbers, so no NaN spreads from there.
    """
    first = block_table[:, :1].clamp_min(0)
    width = -(-span // page_size)
    table = F.pad(block_table, (0, max(0, width - block_table.shape[1])), value=-1)
    return torch.where(table < 0, first, table)


def hide_pageless(out: Tensor, block_table: Tensor) -> Tensor:
    """Zeros in `out` [S, N, H, D] for sequences without any page, where libraries have read a page of another's."""
    return out.masked_fill_((block_table[:, 0] < 0)[:, None, None, None], 0)


def flash_attn(
    name: str,
    table_argument: str,
    queries: Tensor,
    pages: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    span: int,
    scale: float | None,
) -> Tensor:
    """`flash_attn_with_kvcache` of either library, whose names for the block table differ.

    FlashAttention 2 reads the longest length on the host to choose its splits. In 3, Hopper's, pages that are no
    multiple of its blocks of keys are copied without the tensor memory accelerator.
    """
    keys, values = pages.unbind(1)
    out = imported(name)(
        queries,
        keys,
        values,
        cache_seqlens=context_lens + queries.shape[1],
        softmax_scale=scale,
        causal=True,
        **{table_argument: whole_table(block_table, pages.shape[2], span)},
    )
    return hide_pageless(out, block_table)


def varlen(
    queries: Tensor, pages: Tensor, block_table: Tensor, context_lens: Tensor, *, span: int, scale: float | None
) -> Tensor:
    """FlashAttention 2 as PyTorch ships it, which refuses a number of splits."""
    num_seqs, num_new, num_heads = queries.shape[:3]
    keys, values = pages.unbind(1)
    lens = context_lens + num_new
    out = imported("varlen")(
        queries.flatten(0, 1),
        keys,
        values,
        torch.arange(0, (num_seqs + 1) * num_new, num_new, dtype=torch.int32, device=queries.device),
        F.pad(lens.cumsum(0, dtype=torch.int32), (1, 0)),
        num_new,
        span,
        scale=scale,
        window_size=(-1, 0),  # causal
        enable_gqa=num_heads != pages.shape[3],
        seqused_k=lens,
        block_table=whole_table(block_table, pages.shape[2], span),
    )
    return hide_pageless(out.unflatten(0, (num_seqs, num_new)), block_table)


def flashinfer(
    queries: Tensor, pages: Tensor, block_table: Tensor, context_lens: Tensor, *, span: int, scale: float | None
) -> Tensor:
    """Plans every call on the host: a plan holds for the lengths it was made of, and no layer knows whether they have
    changed since the last."""
    num_seqs, num_new, num_heads, head_dim = queries.shape
    page_size, num_kv_heads = pages.shape[2:4]
    lens = (context_lens + num_new).cpu()  # sync: the plan
    num_pages = (lens + page_size - 1) // page_size
    table = whole_table(block_table, page_size, span).cpu()
    wrapper = flashinfer_wrapper(pages.device)
    wrapper.plan(
        torch.arange(0, (num_seqs + 1) * num_new, num_new, dtype=torch.int32),
        F.pad(num_pages.cumsum(0, dtype=torch.int32), (1, 0)),
        table[torch.arange(table.shape[1]) < num_pages[:, None]],
        lens - (num_pages - 1) * page_size,
        num_heads,
        num_kv_heads,
        head_dim,
        page_size,
        causal=True,
        sm_scale=scale,
        q_data_type=queries.dtype,
        kv_data_type=pages.dtype,
    )
    out = wrapper.run(queries.flatten(0, 1).contiguous(), pages)
    return hide_pageless(out.unflatten(0, (num_seqs, num_new)), block_table)


@functools.cache
def flashinfer_wrapper(device: torch.device) -> Any:
    """One for a device, with its workspace; [P, 2, page_size, KH, D] is the layout that it calls NHD."""
    workspace = torch.zeros(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return imported("flashinfer")(workspace, "NHD")


ATTENTIONS = {
    "cpu": Attention(native.window_attention, device="cpu"),
    "triton": Attention(
        triton,
        library="sjd_engine.kernels.attention:window_attention",
        install="pip install triton",
        head_dims=range(1, launch.MAX_HEAD_DIM + 1),
    ),
    "flash_attn_2": Attention(
        functools.partial(flash_attn, "flash_attn_2", "block_table"),
        device="cuda",
        library="flash_attn:flash_attn_with_kvcache",
        install="pip install flash-attn",
        page_size=256,
        dtypes=HALF,
        head_dims=range(8, 257, 8),
        syncs=True,
        trees=False,
    ),
    "flash_attn_3": Attention(
        functools.partial(flash_attn, "flash_attn_3", "page_table"),
        device="cuda",
        library="flash_attn_interface:flash_attn_with_kvcache",
        install="pip install flash-attention/hopper",
        dtypes=HALF,
        head_dims=range(8, 257, 8),
        trees=False,
    ),
    "varlen": Attention(
        varlen,
        device="cuda",
        library="torch.nn.attention.varlen:varlen_attn",
        install="pip install 'torch>=2.13'",
        page_size=256,
        dtypes=HALF,
        head_dims=range(8, 257, 8),
        trees=False,
    ),
    "flashinfer": Attention(
        flashinfer,
        device="cuda",
        library="flashinfer:BatchPrefillWithPagedKVCacheWrapper",
        install="pip install flashinfer-python",
        dtypes=HALF,
        head_dims=(64, 128, 256),
        syncs=True,
        trees=False,
    ),
    "reference": Attention(paged.window_attention),
}

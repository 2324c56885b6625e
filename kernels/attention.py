"""Attention of a window over the pages that hold its keys and values.

Fused: the walk through the block table, grouped queries, the bottom-right causal rule or a tree's bias, softmax and the
weighted sum. A program takes one chunk of the keys of one kv head of one sequence, for a block of rows; a row is one
query head of one window token, and the query heads of a kv head are rows of the same block, so that a key is read once
for all of them. Keys and values are read where they lie.

Bytes: 2 x tokens x KH x D of a sequence for every block of rows.

A window is short and a context long, so the keys are cut in chunks to fill a GPU: 2 sequences of 8 kv heads are only 16
programs. Cuts lie at multiples of CHUNK, so what a sequence computes does not depend on its batch, nor on `span`.
A second launch puts the chunks together. A ticket as in verify.py would save it, but here whole tensors would have to
be published before the ticket, tickets need memory that outlives the call, and the last program of a sequence would do
alone what all do together now.

A key without a page is hidden, and neither it nor its value is read: what lies there may be NaN, and 0 x NaN is NaN.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

NEGATIVE_INFINITY = tl.constexpr(float("-inf"))
LOG2_E = tl.constexpr(math.log2(math.e))
CHUNK_BLOCK = tl.constexpr(8)  # chunks that a program of the second launch reads at once


@triton.jit
def _store_rows(
    out_ptr, out, total, pair, rows, num_new, num_kv_heads, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of a kv head to [S, N, H, D]; zeros where every key is hidden."""
    dims = tl.arange(0, BLOCK_D)
    token = (pair // num_kv_heads).to(tl.int64) * num_new + rows // GROUP
    head = (token * num_kv_heads + pair % num_kv_heads) * GROUP + rows % GROUP
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    mask = (rows < num_new * GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out_ptr + head[:, None] * HEAD_DIM + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attend_kernel(
    queries_ptr,  # [S, N, H, D]
    pages_ptr,  # [P, 2, page_size, KH, D]
    block_table_ptr,  # [S, width] int32
    context_lens_ptr,  # [S] int32
    bias_ptr,  # [S, N, N] float32 or None
    out_ptr,  # [S, N, H, D], or, with SPLIT, [chunks, S, KH, rows, D] float32
    peak_ptr,  # [chunks, S, KH, rows] float32 with SPLIT, else None, and so is the next
    total_ptr,
    query_stride_s,
    query_stride_n,
    query_stride_h,
    page_stride,
    kind_stride,  # from keys to values
    slot_stride,
    head_stride,
    table_stride,
    bias_stride_s,
    bias_stride_n,
    bias_stride_k,
    num_new,
    num_kv_heads,
    width,
    scale,  # of scores, in units of ln 2
    GROUP: tl.constexpr,  # query heads of a kv head
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # a power of two >= D
    ALIGNMENT: tl.constexpr,  # every stride is a multiple of so many elements
    PAGE_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,  # there is more than one chunk
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    pair = tl.program_id(0)  # sequence and kv head
    sequence = (pair // num_kv_heads).to(tl.int64)
    kv_head = pair % num_kv_heads
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    context = tl.load(context_lens_ptr + sequence)
    first = tl.program_id(2) * CHUNK
    if first >= context + num_new:  # the second launch does not ask for it
        return

    tokens = rows // GROUP
    dims = tl.arange(0, BLOCK_D)
    valid_rows = tokens < num_new
    in_head = dims < HEAD_DIM
    heads = kv_head * GROUP + rows % GROUP
    query_offsets = sequence * query_stride_s + tokens.to(tl.int64) * query_stride_n + heads * query_stride_h
    query_offsets = tl.multiple_of(query_offsets, ALIGNMENT)
    queries = tl.load(
        queries_ptr + query_offsets[:, None] + dims[None, :],
        mask=valid_rows[:, None] & in_head[None, :],
        other=0.0,
    )
    seen = num_new  # window tokens that some row of the block may see
    if bias_ptr is None:
        seen = tl.minimum(num_new, ((tl.program_id(1) + 1) * BLOCK_ROWS - 1) // GROUP + 1)
    last = tl.minimum(tl.minimum(context + seen, first + CHUNK), width * PAGE_SIZE)
    table_ptr = block_table_ptr + sequence * table_stride

    peak = tl.full([BLOCK_ROWS], NEGATIVE_INFINITY, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    out = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_KEYS):
        positions = start + tl.arange(0, BLOCK_KEYS)
        exists = positions < last
        if PAGE_SIZE % BLOCK_KEYS == 0:
            page = tl.load(table_ptr + start // PAGE_SIZE)  # of all keys of the block
        else:
            page = tl.load(table_ptr + positions // PAGE_SIZE, mask=exists, other=-1)
        exists = exists & (page >= 0)
        offsets = page.to(tl.int64) * page_stride + positions % PAGE_SIZE * slot_stride + kv_head * head_stride
        offsets = tl.multiple_of(offsets, ALIGNMENT)
        keys = tl.load(pages_ptr + offsets[None, :] + dims[:, None], mask=exists[None, :] & in_head[:, None], other=0.0)
        scores = tl.dot(queries, keys, input_precision="ieee") * scale
        new = positions - context  # index in the window
        if bias_ptr is None:
            visible = exists[None, :] & (new[None, :] <= tokens[:, None])
        else:
            visible = exists[None, :]
            bias_offsets = tokens[:, None] * bias_stride_n + new[None, :] * bias_stride_k
            bias = tl.load(
                bias_ptr + sequence * bias_stride_s + bias_offsets,
                mask=valid_rows[:, None] & (exists & (new >= 0))[None, :],
                other=0.0,
            )
            scores += bias * LOG2_E
        scores = tl.where(visible, scores, NEGATIVE_INFINITY)
        top = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(top == NEGATIVE_INFINITY, 0.0, top)  # nothing visible yet: weights of 0, not NaN
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(peak - base)
        values = tl.load(
            pages_ptr + tl.multiple_of(kind_stride, ALIGNMENT) + offsets[:, None] + dims[None, :],
            mask=exists[:, None] & in_head[None, :],
            other=0.0,
        )
        total = total * fade + tl.sum(weights, 1)
        out = tl.dot(weights.to(values.dtype), values, out * fade[:, None], input_precision="ieee")
        peak = top

    if SPLIT:
        part = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + pair) * num_new * GROUP + rows
        tl.store(peak_ptr + part, peak, mask=valid_rows)
        tl.store(total_ptr + part, total, mask=valid_rows)
        part_offsets = part[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_ptr + part_offsets, out, mask=valid_rows[:, None] & in_head[None, :])
    else:
        _store_rows(out_ptr, out, total, pair, rows, num_new, num_kv_heads, GROUP, HEAD_DIM, BLOCK_D)


@triton.jit
def _combine_kernel(
    part_ptr,  # [chunks, S, KH, rows, D] float32
    peak_ptr,  # [chunks, S, KH, rows] float32
    total_ptr,  # the same
    context_lens_ptr,  # [S] int32
    out_ptr,  # [S, N, H, D]
    num_new,
    num_kv_heads,
    num_chunks,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    pair = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_D)
    length = tl.load(context_lens_ptr + pair // num_kv_heads) + num_new
    num_chunks = tl.minimum(tl.cdiv(length, CHUNK), num_chunks)
    peak = tl.full([BLOCK_ROWS], NEGATIVE_INFINITY, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    out = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for start in range(0, num_chunks, CHUNK_BLOCK):
        chunks = start + tl.arange(0, CHUNK_BLOCK)
        parts = (chunks.to(tl.int64) * tl.num_programs(0) + pair)[:, None] * num_new * GROUP + rows[None, :]
        exists = (chunks < num_chunks)[:, None] & (rows < num_new * GROUP)[None, :]
        peaks = tl.load(peak_ptr + parts, mask=exists, other=NEGATIVE_INFINITY)
        totals = tl.load(total_ptr + parts, mask=exists, other=0.0)
        outs = tl.load(
            part_ptr + parts[:, :, None] * HEAD_DIM + dims[None, None, :],
            mask=exists[:, :, None] & (dims < HEAD_DIM)[None, None, :],
            other=0.0,
        )
        top = tl.maximum(peak, tl.max(peaks, 0))
        base = tl.where(top == NEGATIVE_INFINITY, 0.0, top)
        shares = tl.exp2(peaks - base[None, :])
        fade = tl.exp2(peak - base)
        total = total * fade + tl.sum(totals * shares, 0)
        out = out * fade[:, None] + tl.sum(outs * shares[:, :, None], 0)
        peak = top
    _store_rows(out_ptr, out, total, pair, rows, num_new, num_kv_heads, GROUP, HEAD_DIM, BLOCK_D)


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
    """`paged.window_attention` in one launch, or two where `span` exceeds a chunk, on the current stream, without
    a host sync. float32 sums; a sequence's result depends neither on its batch nor on `span`.

    Args: those of the definition; a head dim of at most launch.MAX_HEAD_DIM, pages and queries of any strides over
        contiguous heads.
    Raises: ValueError naming the argument.
    """
    num_seqs, num_new, num_heads, head_dim = queries.shape
    page_size, num_kv_heads = pages.shape[2:4]
    _check(queries, pages, block_table, context_lens, span, window_bias)
    queries = queries if queries.stride(3) == 1 else queries.contiguous()
    out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    if not out.numel():
        return out
    group = num_heads // num_kv_heads
    num_rows, num_chunks = num_new * group, -(-span // launch.CHUNK)
    split = num_chunks > 1
    part, peak, total = out, None, None
    if split:
        part = torch.empty(num_chunks, num_seqs, num_kv_heads, num_rows, head_dim, device=out.device)
        peak, total = torch.empty(2, *part.shape[:-1], device=out.device)
    shape = {"GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": launch.block_dim(head_dim), "CHUNK": launch.CHUNK}
    row = launch.choose_attention(num_rows, queries.dtype)
    bias_strides = (0, 0, 0) if window_bias is None else window_bias.expand(num_seqs, -1, -1).stride()
    _attend_kernel[(num_seqs * num_kv_heads, -(-num_rows // row.rows), num_chunks)](
        queries,
        pages,
        block_table,
        context_lens,
        window_bias,
        part,
        peak,
        total,
        *queries.stride()[:3],
        *pages.stride()[:4],
        block_table.stride(0),
        *bias_strides,
        num_new,
        num_kv_heads,
        block_table.shape[1],
        (head_dim**-0.5 if scale is None else scale) * LOG2_E.value,
        **shape,
        ALIGNMENT=math.gcd(16, *queries.stride()[:3], *pages.stride()[:4]),
        PAGE_SIZE=page_size,
        SPLIT=split,
        BLOCK_ROWS=row.rows,
        BLOCK_KEYS=row.keys,
        num_warps=row.num_warps,
        num_stages=row.num_stages,
    )
    if split:
        block_rows = launch.combine_rows(head_dim)
        _combine_kernel[(num_seqs * num_kv_heads, -(-num_rows // block_rows))](
            part, peak, total, context_lens, out, num_new, num_kv_heads, num_chunks, **shape, BLOCK_ROWS=block_rows
        )
    return out


def _check(
    queries: Tensor,
    pages: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    span: int,
    window_bias: Tensor | None,
) -> None:
    """Raises: ValueError where an argument of `window_attention` is not what the kernels take for granted."""
    op, (num_seqs, num_new, num_heads, head_dim) = "window_attention", queries.shape
    if queries.dtype not in launch.ATTENTION_DTYPES or head_dim > launch.MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: queries must be float32, float16 or bfloat16 with a head dim of at most {launch.MAX_HEAD_DIM}, "
            f"got {queries.dtype} and {head_dim}"
        )
    if pages.ndim != 5 or (pages.shape[1], pages.shape[4]) != (2, head_dim) or pages.stride(4) != 1:
        raise ValueError(
            f"{op}: pages must be [P, 2, page_size, KH, {head_dim}] with contiguous heads, "
            f"got {list(pages.shape)} with strides {pages.stride()}"
        )
    if num_heads % pages.shape[3]:
        raise ValueError(f"{op}: num_heads must be a multiple of num_kv_heads = {pages.shape[3]}, got {num_heads}")
    if block_table.ndim != 2 or len(block_table) != num_seqs or block_table.stride(1) != 1:
        raise ValueError(
            f"{op}: block_table must be [{num_seqs}, width] with contiguous rows, "
            f"got {list(block_table.shape)} with strides {block_table.stride()}"
        )
    if context_lens.shape != (num_seqs,) or not context_lens.is_contiguous():
        raise ValueError(f"{op}: context_lens must be contiguous [{num_seqs}], got {list(context_lens.shape)}")
    if span < num_new:
        raise ValueError(f"{op}: span must be at least the {num_new} tokens of the window, got {span}")
    if window_bias is not None and window_bias.shape not in ((num_new, num_new), (num_seqs, num_new, num_new)):
        raise ValueError(
            f"{op}: window_bias must be [N, N] or [S, N, N] = {[num_seqs, num_new, num_new]}, "
            f"got {list(window_bias.shape)}"
        )
    for name, tensor, dtype in (
        ("pages", pages, queries.dtype),
        ("block_table", block_table, torch.int32),
        ("context_lens", context_lens, torch.int32),
        ("window_bias", window_bias, torch.float32),
    ):
        if tensor is not None and (tensor.dtype != dtype or tensor.device != queries.device):
            raise ValueError(f"{op}: {name} must be {dtype} on {queries.device}, got {tensor.dtype} on {tensor.device}")

"""The paged key/value cache in plain PyTorch: the definition of correct, and what runs where nothing faster does.

pages         [P, 2, page_size, KH, D] of one layer, keys and values of a page; [L, P, ...] of all layers
block_table   [S, width] int32: page of token t of sequence s in column t // page_size, -1 where there is none
context_lens  [S] int32: valid tokens of a sequence, those of the pass under way not among them
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def slots(pages: Tensor, block_table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(page, slot in it, whether there is a page) of the tokens at positions [S, N]; page 0 where there is none."""
    page_size = pages.shape[-3]
    column = positions // page_size
    found = block_table.long().gather(1, column.clamp_max(block_table.shape[1] - 1))
    exists = (column < block_table.shape[1]) & (found >= 0)
    return found.clamp_min(0), positions % page_size, exists


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
    """Write keys and values [S, N, KH, D] behind every context. Tokens without a page are skipped.

    Args:
        num_valid: [S] int32, how many of the N tokens exist; None for all.
        cos, sin: [S, N, D] float32, rows of a rotary table (see `models.rope`) that the keys are rotated by first, in
            float32 and rounded once; None for keys as they are.
    """
    if cos is not None and sin is not None:
        wide = keys.float()
        turned = wide.roll(wide.shape[-1] // 2, -1)
        keys = (wide * cos[:, :, None] + turned * sin[:, :, None]).to(pages.dtype)
    new = torch.arange(keys.shape[1], device=keys.device).expand(len(keys), -1)
    page, slot, written = slots(pages, block_table, context_lens.long()[:, None] + new)
    if num_valid is not None:
        written = written & (new < num_valid[:, None])
    pages[page[written], :, slot[written]] = torch.stack((keys, values), 2)[written].to(pages.dtype)


def gather_kv(
    pages: Tensor, block_table: Tensor, context_lens: Tensor, *, num_new: int, span: int
) -> tuple[Tensor, Tensor]:
    """Keys and values [S, span, KH, D] in the order of their tokens, zeros from context_lens + num_new on."""
    positions = torch.arange(span, device=pages.device).expand(len(block_table), -1)
    page, slot, exists = slots(pages, block_table, positions)
    valid = exists & (positions < context_lens[:, None] + num_new)
    rows = pages[page, :, slot].masked_fill(~valid[..., None, None, None], 0)
    keys, values = rows.unbind(2)
    return keys, values


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
    """softmax(scale * queries . keys) values over a context and the window behind it, bottom-right causal: token i of
    the window sees the whole context and window tokens 0..i. Tokens without a page are hidden; a row that sees nothing
    gives 0.

    Args:
        queries: [S, N, H, D]; query head h reads kv head h // (H / KH).
        span: context_lens + N of the longest sequence, or more.
        scale: None for D ** -0.5.
        window_bias: [N, N] or [S, N, N] float32, added to the scores of (window token, window token) in place of the
            causal rule; -inf hides a token. For trees of drafts.
    Returns: [S, N, H, D], contiguous.
    """
    num_new, num_heads = queries.shape[1:3]
    keys, values = gather_kv(pages, block_table, context_lens, num_new=num_new, span=span)
    positions = torch.arange(span, device=queries.device).expand(len(queries), -1)
    new = positions - context_lens[:, None]  # [S, span]: index in the window
    hidden = ~slots(pages, block_table, positions)[2][:, None]
    if window_bias is None:
        hidden = hidden | (new[:, None] > torch.arange(num_new, device=queries.device)[:, None])
        mask = torch.zeros(hidden.shape, dtype=queries.dtype, device=queries.device)
    else:
        hidden = hidden | (new[:, None] >= num_new)
        column = new.clamp(0, num_new - 1)[:, None].expand(-1, num_new, -1)
        bias = window_bias.expand(len(queries), -1, -1).gather(2, column)
        mask = torch.where(new[:, None] < 0, 0.0, bias).to(queries.dtype)
    mask = mask.masked_fill(hidden, float("-inf"))
    # The query heads of a kv head stand as extra rows of it: no copy of keys or values for grouped queries.
    group = num_heads // keys.shape[2]
    rows = queries.unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    out = F.scaled_dot_product_attention(
        rows, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask[:, None].repeat(1, 1, group, 1), scale=scale
    )
    out = out.unflatten(2, (group, num_new)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return out.masked_fill((mask == float("-inf")).all(-1)[..., None, None], 0).contiguous()


def advance_rollback(context_lens: Tensor, prefix_lens: Tensor, num_committed: Tensor) -> None:
    """context_lens[s] = prefix_lens[s] + num_committed[s / copies], copies = S / B: everything before the anchor, whose
    own keys and values the next pass writes. In place.

    With a prompt of 5 tokens, prefix_lens is 4: the anchor is the prompt's last token. Once 3 tokens are committed, the
    third is the anchor and 4 + 3 = 7 tokens stand before it: 5 of the prompt, 2 of the image.
    """
    copies = len(context_lens) // len(num_committed)
    context_lens.copy_(prefix_lens + num_committed.repeat_interleave(copies))


def compact_kv(pages: Tensor, block_table: Tensor, context_lens: Tensor, from_slots: Tensor) -> None:
    """Move the window's token in slot from_slots[s / copies, l] to its slot l + 1, in all layers: the accepted path of
    a tree joins its context. Tokens without a page are skipped.

    Args:
        pages: [L, P, 2, page_size, KH, D].
        from_slots: [B, D - 1] int64, l + 1 where nothing is to be moved; copies = S / B. No other slot of 1..D - 1.
    """
    copies = len(context_lens) // len(from_slots)
    first = context_lens.long()[:, None]
    from_page, from_slot, found = slots(pages, block_table, first + from_slots.repeat_interleave(copies, 0))
    levels = torch.arange(1, from_slots.shape[1] + 1, device=pages.device).expand(len(context_lens), -1)
    to_page, to_slot, exists = slots(pages, block_table, first + levels)
    moved = found & exists
    pages[:, to_page[moved], :, to_slot[moved]] = pages[:, from_page[moved], :, from_slot[moved]]


def copy_pages(pages: Tensor, copies: Tensor) -> None:
    """Copy whole pages in all layers: copies [N, 2] int32, (from, to)."""
    source, target = copies.long().unbind(1)
    pages[:, target] = pages[:, source]


def poison_kv(pages: Tensor, block_table: Tensor, context_lens: Tensor, *, num_slots: int) -> None:
    """NaN into `num_slots` slots behind every context, in all layers. Slots without a page are skipped."""
    positions = context_lens.long()[:, None] + torch.arange(num_slots, device=pages.device)
    page, slot, exists = slots(pages, block_table, positions)
    pages[:, page[exists], :, slot[exists]] = float("nan")

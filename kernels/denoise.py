"""The denoise update of a whole window in one launch.

Fused: gather of the drafts' embeddings, their normalisation, the DDIM step, its inverse normalisation, the timestep
encoding, and the levels. A program takes one slot of the window of one sequence.

Bytes for each noisy slot: hidden x (4 + 4) of the noise, read and written, and twice the embedding's. Slots without
noise cost a few integers. Equal to `noise.denoise`, bit for bit.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .noise import NoisePlan, NoiseState


@triton.jit
def _denoise_kernel(
    levels_ptr,  # [B, T] int32
    noisy_ptr,  # [B, T, hidden] float32
    embeddings_ptr,  # [V, hidden]
    mean_ptr,  # [hidden] float32, as std and inverse
    std_ptr,
    inverse_ptr,
    encodings_ptr,  # [K + 1, hidden] float32
    keep_ptr,  # [K + 1] float32, as pull
    pull_ptr,
    tokens_ptr,  # [B, tokens_width] int64
    num_committed_ptr,  # [B] int64, as lowered
    lowered_ptr,
    inputs_ptr,  # [B, N, hidden], as the embeddings
    out_levels_ptr,  # [B, N] int32
    num_tokens,
    tokens_width,
    vocab,
    hidden,
    BLOCK: tl.constexpr,  # of the hidden size, which a program holds in registers at once
):
    slot = tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(1).to(tl.int64)
    position = tl.load(num_committed_ptr + sequence) + slot
    out = sequence * tl.num_programs(0) + slot
    inside = position < num_tokens
    place = sequence * num_tokens + position
    level = tl.load(levels_ptr + place, mask=inside, other=0)
    if level == 0:
        tl.store(out_levels_ptr + out, level)
        return
    steps_down = slot < tl.load(lowered_ptr + sequence)
    keep, pull = tl.load(keep_ptr + level), tl.load(pull_ptr + level)
    token = tl.load(tokens_ptr + sequence * tokens_width + position + 1)
    token = tl.minimum(tl.maximum(token, 0), vocab - 1)
    level -= steps_down.to(tl.int32)
    for first in range(0, hidden, BLOCK):
        column = first + tl.arange(0, BLOCK)
        real = column < hidden
        noisy = tl.load(noisy_ptr + place * hidden + column, mask=real, other=0.0)
        mean = tl.load(mean_ptr + column, mask=real, other=0.0)
        if steps_down:
            embedding = tl.load(embeddings_ptr + token * hidden + column, mask=real, other=0.0).to(tl.float32)
            clean = (embedding - mean) * tl.load(inverse_ptr + column, mask=real, other=0.0)
            noisy = keep * noisy + pull * clean
            tl.store(noisy_ptr + place * hidden + column, noisy, mask=real)
        encoding = tl.load(encodings_ptr + level * hidden + column, mask=real, other=0.0)
        read = (noisy * tl.load(std_ptr + column, mask=real, other=0.0) + mean) + encoding
        tl.store(inputs_ptr + out * hidden + column, read.to(inputs_ptr.dtype.element_ty), mask=real)
    tl.store(levels_ptr + place, level)
    tl.store(out_levels_ptr + out, level)


def denoise(
    state: NoiseState, plan: NoisePlan, tokens: Tensor, num_committed: Tensor, lowered: Tensor, num_slots: int
) -> tuple[Tensor, Tensor]:
    """`noise.denoise` in one launch, on the current stream, without a host sync. Arguments and result: there."""
    (batch_size, num_tokens), (vocab_size, hidden) = state.levels.shape, plan.embeddings.shape
    inputs = plan.embeddings.new_empty(batch_size, num_slots, hidden)
    levels = state.levels.new_empty(batch_size, num_slots)
    _denoise_kernel[(num_slots, batch_size)](
        state.levels,
        state.noisy,
        plan.embeddings,
        plan.mean,
        plan.std,
        plan.inverse,
        plan.encodings,
        plan.keep,
        plan.pull,
        tokens,
        num_committed,
        lowered,
        inputs,
        levels,
        num_tokens,
        tokens.shape[1],
        vocab_size,
        hidden,
        BLOCK=launch.denoise_block(hidden),
        num_warps=4,
        enable_fp_fusion=False,
    )
    return inputs, levels

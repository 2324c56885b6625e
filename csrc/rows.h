// The loops over a row of logits. Each is compiled for several x86 instruction sets and chosen at run time; everything
// else of the op is plain control flow in verify_cpu.cpp.
#pragma once

#include <cstdint>

#include "arithmetic.h"
#include "widen.h"

namespace sjd {

constexpr int kBlock = 256;  // tokens of a partial sum; a draw searches the sums, then one block

// A tensor [B, W, V], or [2, B, W, V] (conditional, unconditional) where guided. Strides in elements.
struct Logits {
  const void* data;
  DType dtype;
  bool guided;
  int64_t pair_stride, batch_stride, row_stride, vocab_stride;
};

// What a threshold does to a row: the measure (count or mass) of the keys at or above it, the smallest such key, and
// the largest key below it.
struct Split {
  uint64_t measure;
  int32_t above, below;
};

// Name of the instruction set that the loops run with on this machine.
const char* isa();

// keys[j] = key of u + s (c - u), times 1 / temperature, at element `offset + j * vocab_stride`; returns the largest.
int32_t combine(const Logits& logits, int64_t offset, int n, float guidance_scale, float inverse_temperature,
                int32_t* keys);

Split split_count(const int32_t* keys, int n, int32_t threshold);
Split split_mass(const int32_t* keys, const float* weights, int n, int32_t threshold);

// The index of the `which`-th key that equals `key`, counted from 1. There are at least that many.
int nth_equal(const int32_t* keys, int n, int32_t key, int64_t which);

// weights[j] of token first_id + j under a law. A law without finite logits weighs every token 1.
void weigh(const int32_t* keys, int first_id, int n, const RowLaw& law, float* weights);

// sums[i] = fixed-point sum of block i of the weights; returns the total.
uint64_t sum_blocks(const float* weights, int n, uint64_t* sums);

// target[j] = max(target[j] * target_scale - draft[j] * draft_scale, 0).
void subtract_draft(float* target, float target_scale, const float* draft, float draft_scale, int n);

// The same of the law that a draw from either counts: both are rounded down to it first.
void subtract_counted(float* target, float target_scale, const float* draft, float draft_scale, int n);

// The arg-max of key_value(keys[j]) + Gumbel noise of (seed, position, token j) over the tokens of positive weight,
// lowest id first.
int gumbel_argmax(const int32_t* keys, const float* weights, int n, int64_t seed, int64_t position);

}  // namespace sjd

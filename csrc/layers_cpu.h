// What stands between the products of a transformer block, on a CPU: each op in one pass over its rows. The arithmetic
// is float32, and what is stored is rounded once. A row's result depends on the row alone: not on the rows beside it or
// the number of threads.
#pragma once

#include <cstdint>

#include "widen.h"

namespace sjd {

// out = sum / sqrt(mean(sum^2) + eps) * weight of every row of sum = x + y. Everything is contiguous.
struct AddRmsNorm {
  const void *x, *y;   // [rows, hidden]; y may be null: then sum is x, and is not written
  const void* weight;  // [hidden]
  void *sum, *out;     // [rows, hidden]
  DType dtype;
  int64_t rows, hidden;
  float eps;
};

// x = x * cos + roll(x, head_dim / 2) * sin, in place. Strides in elements; the heads of a token are contiguous.
struct Rotate {
  void* x;  // [S, N, heads, head_dim]
  int64_t sequence_stride, token_stride;
  const void *cos, *sin;  // [S, N, head_dim]
  DType dtype;
  int64_t num_sequences, num_new, num_heads, head_dim;
};

// out = gate / (1 + exp(-gate)) * up. Everything is contiguous.
struct SiluMul {
  const void* gate_up;  // [rows, 2, width]
  void* out;            // [rows, width]
  DType dtype;
  int64_t rows, width;
};

void add_rms_norm_cpu(const AddRmsNorm& op, int num_threads);
void rotate_cpu(const Rotate& op, int num_threads);
void silu_mul_cpu(const SiluMul& op, int num_threads);

}  // namespace sjd

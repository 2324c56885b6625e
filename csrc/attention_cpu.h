// Window attention over pages on a CPU: the tokens of a pass against everything before them, read where it lies.
#pragma once

#include <cstdint>

#include "paged_kv.h"

namespace sjd {

// S sequences, N window tokens, H query heads, KH kv heads, D head dim. Strides in elements; the head dim is
// contiguous.
struct WindowAttention {
  PagedKV kv;  // of one layer, the window's own keys and values among them
  DType dtype;
  const void* queries;                                 // [S, N, H, D]
  int64_t sequence_stride, token_stride, head_stride;  // of the queries
  void* out;                                           // [S, N, H, D], contiguous
  const int32_t* context_lens;                         // [S], without the window
  const float* window_bias;                            // [S, N, N] added to the scores of the window's keys, or null
  int64_t bias_sequence_stride, num_new, num_heads, num_kv_heads, head_dim;
  float scale;
};

// out[s, i, h] = softmax(scale * q . keys) values, over the context and the window's tokens 0..i (bottom-right causal).
// With window_bias all of the window is scored and the bias says what is seen: -inf hides, as a tree of drafts needs.
// Tokens without a page are hidden; a row that sees nothing gives 0.
//
// float32 sums. The result of a row depends on the row's own sequence, position and bias alone: not on the window's
// size, the batch, the page size or the number of threads.
void attend_cpu(const WindowAttention& params, int num_threads);

// What multiplies bfloat16 on this machine.
const char* bfloat16_isa();

}  // namespace sjd

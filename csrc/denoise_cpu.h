// The denoise update of a window on a CPU: the C++ twin of `kernels/noise.denoise`, bit for bit.
#pragma once

#include <cstdint>

#include "widen.h"

namespace sjd {

// B sequences, N slots, T tokens, V vocabulary, K levels. Tensors are contiguous. The words are those of
// kernels/noise.py.
struct DenoiseParams {
  DType dtype;  // of embeddings and inputs
  int64_t batch_size, num_slots, num_tokens, tokens_width, vocab_size, hidden;

  int32_t* levels;  // [B, T]
  float* noisy;     // [B, T, hidden]

  const void* embeddings;  // [V, hidden]
  const float* mean;       // [hidden]
  const float* std;        // [hidden]
  const float* inverse;    // [hidden]
  const float* encodings;  // [K + 1, hidden]
  const float* keep;       // [K + 1]
  const float* pull;       // [K + 1]

  const int64_t* tokens;         // [B, tokens_width], column t + 1 is position t
  const int64_t* num_committed;  // [B]
  const int64_t* lowered;        // [B]

  void* inputs;         // [B, N, hidden], output
  int32_t* out_levels;  // [B, N], output
  int num_threads;
};

// Lower the levels of the window's drafts, and write what the transformer reads in slots with noise; those of the other
// slots are not written.
void denoise_cpu(const DenoiseParams& params);

}  // namespace sjd

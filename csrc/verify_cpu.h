// One decoding pass over the Jacobi window on a CPU: the C++ twin of `kernels/reference.verify`, decision for decision.
#pragma once

#include <cstdint>

#include "rows.h"
#include "tree.h"

namespace sjd {

enum class Accept { kRatio, kMatch };
enum class Refresh { kFresh, kReuse, kMaximal, kGumbel, kArgmax };
enum class Init { kRandom, kLeftRepeat, kAboveRepeat, kLeftSample, kAboveSample };

// B sequences, W the largest window, V vocabulary, T tokens. Tensors are contiguous but for the logits; a null pointer
// is an absent argument. The words are those of kernels/state.py and kernels/reference.py.
struct VerifyParams {
  Logits logits, previous_logits;  // previous_logits.data is null before the first pass
  int64_t batch_size, num_tokens;
  int64_t window_size, next_window_size, max_window_size;  // of this pass, of the next, and W
  int vocab_size;
  Tree tree;

  int64_t* tokens;           // [B, 1 + T + 2W]
  int64_t* num_committed;    // [B]
  int64_t* iteration;        // [B]
  int64_t* commit_pass;      // [B, T + W]
  int32_t* law_row;          // [B, W]
  RowLaw* laws;              // [2, B, W]
  int64_t* zero_residual;    // [B]
  int64_t* nonfinite_rows;   // [B]
  int64_t* zero_draft_prob;  // [B]
  int64_t* siblings;         // [B, D - 1, K - 1]
  int64_t* num_accepted;     // [B], output
  int64_t* accepted_slots;   // [B, D - 1], output

  const float* drafted;        // [B, W, V], or null without a drafter
  const float* drafted_scale;  // [B, W], or null

  const int64_t* forced_ids;  // [T], or null
  const int64_t* row_start;   // [T]
  const int64_t* above;       // [T]

  const int64_t* seeds;          // [B]
  const float* guidance_scale;   // [B], or null for 1
  const float* temperature;      // [B], or null for 1
  const int64_t* top_k;          // [B], or null
  const float* top_p;            // [B], or null
  const float* reuse_threshold;  // [B]; read by Refresh::kReuse alone
  const int64_t* most_accepted;  // [B], or null

  Accept accept;
  Refresh refresh;
  Init init;
  int num_threads;
};

// Accept, recover, refresh and refill the window of every sequence, and move its state to the next pass. The result
// does not depend on num_threads, on the batch or on the instruction set. Rows past the image's end and forced rows are
// not computed; their laws are never read.
void verify_cpu(const VerifyParams& params);

}  // namespace sjd

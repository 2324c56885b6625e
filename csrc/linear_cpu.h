// Products with the matrices of a transformer on a CPU, which are stored in panels: the weights of kPanel outputs lie
// side by side in the order in which a sum reads them, so that a pass of few rows takes little longer than reading them.
#pragma once

#include <cstdint>

#include "widen.h"

namespace sjd {

constexpr int64_t kPanel = 64;  // outputs of a panel

// out = x W^T + bias, float32 or bfloat16. `panels` are [cols / kPanel, steps, kPanel] units, both quotients rounded up
// and filled with zeros; a step is one float32, or two bfloat16.
struct Linear {
  const void* x;       // [rows, depth], contiguous
  const void* panels;
  const void* bias;    // [cols], or null
  void* out;           // [rows, cols], contiguous
  DType dtype;
  int64_t rows, depth, cols;
};

// Whether this is the fastest product of bfloat16 on this CPU: it has instructions for vectors, and none for tiles.
bool multiplies_panels();

// float32 sums in the order of the depth, rounded once. A row's result depends on the row alone: not on the rows beside
// it or the number of threads. Needs `multiplies_panels` for bfloat16.
void linear_cpu(const Linear& op, int num_threads);

}  // namespace sjd

#include "linear_cpu.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "clones.h"
#include "products.h"
#include "thread_pool.h"

namespace sjd {
namespace {

// Steps of a panel that all rows go through before the next: 256 KB, which stay in a core's own cache.
constexpr int64_t kSteps = 1024;

// Fewer products than this are summed before a second thread has begun; to read a weight takes as long as kReading.
constexpr int64_t kProductsForThreads = 1 << 20, kReading = 8;

// A row of sums plus the bias, as it is stored.
template <class T>
SJD_INLINE void store_row(const float* sums, const void* bias, int64_t n, void* to) {
  using Storage = typename T::Storage;
  auto* out = static_cast<Storage*>(to);
  if (bias == nullptr) {
    for (int64_t j = 0; j < n; ++j) out[j] = T::narrow(sums[j]);
  } else {
    for (int64_t j = 0; j < n; ++j) out[j] = T::narrow(sums[j] + T::widen(static_cast<const Storage*>(bias)[j]));
  }
}

SJD_CLONES void store_float32(const float* sums, const void* bias, int64_t n, void* to) {
  store_row<Float32>(sums, bias, n, to);
}

SJD_CLONES void store_bfloat16(const float* sums, const void* bias, int64_t n, void* to) {
  store_row<BFloat16>(sums, bias, n, to);
}

}  // namespace

bool multiplies_panels() { return multiply_bfloat16() != nullptr && !has_bfloat16_tiles(); }

void linear_cpu(const Linear& op, int num_threads) {
  const bool in_pairs = op.dtype == DType::kBFloat16;
  const int64_t size = in_pairs ? 2 : 4, steps = in_pairs ? (op.depth + 1) / 2 : op.depth;
  const Multiply multiply = in_pairs ? multiply_bfloat16() : multiply_float32();

  // Rows of whole units at the addresses of units: copied where they are none.
  std::vector<uint32_t> copy;
  const auto* x = static_cast<const uint32_t*>(op.x);
  if (op.depth * size % 4 != 0 || reinterpret_cast<uintptr_t>(op.x) % 4 != 0) {
    copy.resize(op.rows * steps);
    for (int64_t row = 0; row < op.rows; ++row) {
      std::memcpy(copy.data() + row * steps, static_cast<const char*>(op.x) + row * op.depth * size, op.depth * size);
    }
    x = copy.data();
  }

  const int64_t work = op.cols * op.depth * (op.rows + kReading);
  ThreadPool::run((op.cols + kPanel - 1) / kPanel, work < kProductsForThreads ? 1 : num_threads, [&](int64_t panel) {
    thread_local std::vector<float> sums;
    sums.resize(op.rows * kPanel);
    const auto* weights = static_cast<const uint32_t*>(op.panels) + panel * steps * kPanel;
    for (int64_t first = 0; first < steps; first += kSteps) {
      multiply(x + first, steps, weights + first * kPanel, kPanel, sums.data(), kPanel, static_cast<int>(op.rows),
               kPanel, static_cast<int>(std::min(kSteps, steps - first)), first > 0);
    }
    const int64_t begin = panel * kPanel, count = std::min(kPanel, op.cols - begin);
    const char* bias = op.bias == nullptr ? nullptr : static_cast<const char*>(op.bias) + begin * size;
    for (int64_t row = 0; row < op.rows; ++row) {
      (in_pairs ? store_bfloat16 : store_float32)(sums.data() + row * kPanel, bias, count,
                                                  static_cast<char*>(op.out) + (row * op.cols + begin) * size);
    }
  });
}

}  // namespace sjd

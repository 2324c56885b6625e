#include "layers_cpu.h"

#include <algorithm>
#include <cmath>

#include "arithmetic.h"
#include "clones.h"
#include "thread_pool.h"

namespace sjd {
namespace {

constexpr int kLanes = 16;  // partial sums of a row, added up in a fixed order

// Fewer elements than this are done before a second thread has begun.
constexpr int64_t kElementsForThreads = 1 << 15;

// ------------------------------------------------------------------------------------------------------- the rows

SJD_INLINE float add_up(const float (&lanes)[kLanes]) {
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

template <class T>
SJD_INLINE void norm_rows(const AddRmsNorm& op, int64_t first, int64_t last) {
  using Storage = typename T::Storage;
  const auto* weight = static_cast<const Storage*>(op.weight);
  for (int64_t row = first; row < last; ++row) {
    const auto* x = static_cast<const Storage*>(op.x) + row * op.hidden;
    if (op.y != nullptr) {
      const auto* y = static_cast<const Storage*>(op.y) + row * op.hidden;
      auto* sum = static_cast<Storage*>(op.sum) + row * op.hidden;
#pragma GCC ivdep
      for (int64_t j = 0; j < op.hidden; ++j) sum[j] = T::narrow(T::widen(x[j]) + T::widen(y[j]));
      x = sum;  // as it is stored
    }
    float lanes[kLanes] = {};
    int64_t j = 0;
    for (; j + kLanes <= op.hidden; j += kLanes) {
      for (int i = 0; i < kLanes; ++i) lanes[i] += T::widen(x[j + i]) * T::widen(x[j + i]);
    }
    for (; j < op.hidden; ++j) lanes[j % kLanes] += T::widen(x[j]) * T::widen(x[j]);
    const float scale = 1.0f / std::sqrt(add_up(lanes) / static_cast<float>(op.hidden) + op.eps);
    auto* out = static_cast<Storage*>(op.out) + row * op.hidden;
#pragma GCC ivdep
    for (int64_t k = 0; k < op.hidden; ++k) out[k] = T::narrow(T::widen(x[k]) * scale * T::widen(weight[k]));
  }
}

template <class T>
SJD_INLINE void rotate_rows(const Rotate& op, int64_t first, int64_t last) {
  using Storage = typename T::Storage;
  const int64_t half = op.head_dim / 2;
  for (int64_t row = first; row < last; ++row) {
    const auto* cos = static_cast<const Storage*>(op.cos) + row * op.head_dim;
    const auto* sin = static_cast<const Storage*>(op.sin) + row * op.head_dim;
    auto* token =
        static_cast<Storage*>(op.x) + row / op.num_new * op.sequence_stride + row % op.num_new * op.token_stride;
    for (int64_t head = 0; head < op.num_heads; ++head) {
      Storage *left = token + head * op.head_dim, *right = left + half;
#pragma GCC ivdep
      for (int64_t j = 0; j < half; ++j) {
        const float a = T::widen(left[j]), b = T::widen(right[j]);
        left[j] = T::narrow(a * T::widen(cos[j]) + b * T::widen(sin[j]));
        right[j] = T::narrow(b * T::widen(cos[half + j]) + a * T::widen(sin[half + j]));
      }
    }
  }
}

// x / (1 + exp(-x)) by the exponential of -|x|, which cannot overflow and is at least 2^-64.
SJD_INLINE float silu(float x) {
  const int32_t negative = bits(x) >> 31;
  const float small = exp_of(from_bits(bits(x) | INT32_MIN));
  return x * from_bits(choose(negative, bits(small), bits(1.0f))) / (1.0f + small);
}

template <class T>
SJD_INLINE void silu_mul_rows(const SiluMul& op, int64_t first, int64_t last) {
  using Storage = typename T::Storage;
  for (int64_t row = first; row < last; ++row) {
    const auto* gate = static_cast<const Storage*>(op.gate_up) + row * 2 * op.width;
    const auto* up = gate + op.width;
    auto* out = static_cast<Storage*>(op.out) + row * op.width;
#pragma GCC ivdep
    for (int64_t j = 0; j < op.width; ++j) out[j] = T::narrow(silu(T::widen(gate[j])) * T::widen(up[j]));
  }
}

// ----------------------------------------------------------------------------- for each dtype and instruction set

SJD_CLONES void run_float32(const AddRmsNorm& op, int64_t a, int64_t b) { norm_rows<Float32>(op, a, b); }
SJD_CLONES void run_float16(const AddRmsNorm& op, int64_t a, int64_t b) { norm_rows<Float16>(op, a, b); }
SJD_CLONES void run_bfloat16(const AddRmsNorm& op, int64_t a, int64_t b) { norm_rows<BFloat16>(op, a, b); }

SJD_CLONES void run_float32(const Rotate& op, int64_t a, int64_t b) { rotate_rows<Float32>(op, a, b); }
SJD_CLONES void run_float16(const Rotate& op, int64_t a, int64_t b) { rotate_rows<Float16>(op, a, b); }
SJD_CLONES void run_bfloat16(const Rotate& op, int64_t a, int64_t b) { rotate_rows<BFloat16>(op, a, b); }

SJD_CLONES void run_float32(const SiluMul& op, int64_t a, int64_t b) { silu_mul_rows<Float32>(op, a, b); }
SJD_CLONES void run_float16(const SiluMul& op, int64_t a, int64_t b) { silu_mul_rows<Float16>(op, a, b); }
SJD_CLONES void run_bfloat16(const SiluMul& op, int64_t a, int64_t b) { silu_mul_rows<BFloat16>(op, a, b); }

template <class Op>
void run_rows(const Op& op, int64_t first, int64_t last) {
  switch (op.dtype) {
    case DType::kFloat16:
      return run_float16(op, first, last);
    case DType::kBFloat16:
      return run_bfloat16(op, first, last);
    default:
      return run_float32(op, first, last);
  }
}

template <class Op>
void run(const Op& op, int64_t rows, int64_t row_size, int num_threads) {
  const int64_t parts = rows * row_size < kElementsForThreads ? 1 : std::min<int64_t>(num_threads, rows);
  ThreadPool::run(parts, num_threads,
                  [&](int64_t part) { run_rows(op, part * rows / parts, (part + 1) * rows / parts); });
}

}  // namespace

void add_rms_norm_cpu(const AddRmsNorm& op, int num_threads) { run(op, op.rows, op.hidden, num_threads); }

void rotate_cpu(const Rotate& op, int num_threads) {
  run(op, op.num_sequences * op.num_new, op.num_heads * op.head_dim, num_threads);
}

void silu_mul_cpu(const SiluMul& op, int num_threads) { run(op, op.rows, op.width, num_threads); }

}  // namespace sjd

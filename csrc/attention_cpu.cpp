#include "attention_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "arithmetic.h"
#include "clones.h"
#include "thread_pool.h"

#if defined(SJD_HAS_CLONES)
#include <immintrin.h>
#endif

namespace sjd {
namespace {

constexpr int kKeys = 64;   // keys that are scored together
constexpr int kRows = 64;   // most query rows of a task
constexpr int kLanes = 16;  // 32-bit units that are moved as one vector
constexpr int kTileRows = 8, kTileCols = 32;
constexpr float kNegativeInfinity = -INFINITY;

// Fewer products than this are summed on the caller's thread: torch's own threads still spin after its last op, and a
// second one of ours would share a core with them.
constexpr int64_t kProductsForThreads = 3 << 22;

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// ------------------------------------------------------------------------------------------------ matrix products

// c[rows, cols] (+)= a[rows, steps] b[steps, cols]. Units of a and b are float32, or pairs of bfloat16 whose products
// are summed. `rows` is a multiple of kTileRows, `cols` of kTileCols, c has `ldc` floats a row.
using Multiply = void (*)(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                          int rows, int cols, int steps, bool add);

using Vector = float __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")  // no decision depends on these sums, and fused they take half the time

template <int R, int C>
SJD_INLINE void multiply_tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                              int steps, bool add) {
  Vector sums[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      sums[r][j] = add ? *reinterpret_cast<const Vector*>(c + r * ldc + j * kLanes) : Vector{};
    }
  }
  for (int k = 0; k < steps; ++k) {
    Vector right[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) right[j] = *reinterpret_cast<const Vector*>(b + k * ldb + j * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) sums[r][j] += a[r * lda + k] * right[j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) *reinterpret_cast<Vector*>(c + r * ldc + j * kLanes) = sums[r][j];
  }
}

template <int R, int C>
SJD_INLINE void multiply_tiles(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                               int rows, int cols, int steps, bool add) {
  const float *left = reinterpret_cast<const float*>(a), *right = reinterpret_cast<const float*>(b);
  for (int j = 0; j < cols; j += C * kLanes) {
    for (int r = 0; r < rows; r += R) {
      multiply_tile<R, C>(left + r * lda, lda, right + j, ldb, c + r * ldc + j, ldc, steps, add);
    }
  }
}

#define SJD_MULTIPLY_ARGUMENTS                                                                               \
  const uint32_t *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c, int64_t ldc, int rows, int cols, \
      int steps, bool add

void multiply_any(SJD_MULTIPLY_ARGUMENTS) { multiply_tiles<2, 1>(a, lda, b, ldb, c, ldc, rows, cols, steps, add); }

#if defined(SJD_HAS_CLONES)
__attribute__((target("arch=x86-64-v3"))) void multiply_v3(SJD_MULTIPLY_ARGUMENTS) {
  multiply_tiles<4, 1>(a, lda, b, ldb, c, ldc, rows, cols, steps, add);
}

__attribute__((target("arch=x86-64-v4"))) void multiply_v4(SJD_MULTIPLY_ARGUMENTS) {
  multiply_tiles<8, 2>(a, lda, b, ldb, c, ldc, rows, cols, steps, add);
}

__attribute__((target("arch=x86-64-v4,avx512bf16"))) void multiply_bfloat16(SJD_MULTIPLY_ARGUMENTS) {
  for (int j = 0; j < cols; j += kTileCols) {
    for (int row = 0; row < rows; row += kTileRows) {
      const uint32_t* left = a + row * lda;
      float* to = c + row * ldc + j;
      __m512 sums[kTileRows][2];
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        sums[r][0] = add ? _mm512_loadu_ps(to + r * ldc) : _mm512_setzero_ps();
        sums[r][1] = add ? _mm512_loadu_ps(to + r * ldc + kLanes) : _mm512_setzero_ps();
      }
      for (int k = 0; k < steps; ++k) {
        const auto right0 = (__m512bh)_mm512_loadu_si512(b + k * ldb + j);
        const auto right1 = (__m512bh)_mm512_loadu_si512(b + k * ldb + j + kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r) {
          const auto pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(left[r * lda + k]));
          sums[r][0] = _mm512_dpbf16_ps(sums[r][0], pair, right0);
          sums[r][1] = _mm512_dpbf16_ps(sums[r][1], pair, right1);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        _mm512_storeu_ps(to + r * ldc, sums[r][0]);
        _mm512_storeu_ps(to + r * ldc + kLanes, sums[r][1]);
      }
    }
  }
}
#endif

#pragma GCC pop_options

Multiply multiply_float32() {
#if defined(SJD_HAS_CLONES)
  if (__builtin_cpu_supports("x86-64-v4")) return multiply_v4;
  if (__builtin_cpu_supports("x86-64-v3")) return multiply_v3;
#endif
  return multiply_any;
}

bool has_bfloat16_products() {
#if defined(SJD_HAS_CLONES)
  return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// ------------------------------------------------------------------------------------------------------- packing

// n elements of any dtype as float32.
SJD_CLONES void widen_row(const void* from, DType dtype, int n, float* to) {
  if (dtype == DType::kFloat32) {
    std::memcpy(to, from, n * sizeof(float));
  } else if (dtype == DType::kBFloat16) {
    for (int i = 0; i < n; ++i) to[i] = BFloat16::widen(static_cast<const uint16_t*>(from)[i]);
  } else {
    for (int i = 0; i < n; ++i) to[i] = Float16::widen(static_cast<const uint16_t*>(from)[i]);
  }
}

SJD_CLONES void narrow_row(const float* from, float factor, DType dtype, int n, void* to) {
  if (dtype == DType::kFloat32) {
    for (int i = 0; i < n; ++i) static_cast<float*>(to)[i] = from[i] * factor;
  } else if (dtype == DType::kBFloat16) {
    for (int i = 0; i < n; ++i) static_cast<uint16_t*>(to)[i] = BFloat16::narrow(from[i] * factor);
  } else {
    for (int i = 0; i < n; ++i) static_cast<uint16_t*>(to)[i] = Float16::narrow(from[i] * factor);
  }
}

using Units = uint32_t __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// One step of transposing 16 x 16: rows i and i + Distance swap their off-diagonal halves of 2 * Distance units.
template <int Distance>
SJD_INLINE void exchange(Units (&rows)[kLanes]) {
  Units low, high;  // lanes of the two new rows, counted through both old ones
#pragma GCC unroll 16
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    low[lane] = lane & Distance ? lane - Distance + kLanes : lane;
    high[lane] = lane & Distance ? lane + kLanes : lane + Distance;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & Distance) continue;
    const Units first = rows[i], second = rows[i + Distance];
    rows[i] = __builtin_shuffle(first, second, low);
    rows[i + Distance] = __builtin_shuffle(first, second, high);
  }
}

// to[i * to_stride + key] = rows[key][i] for kKeys keys and n units, a multiple of kLanes.
SJD_CLONES void transpose(const uint32_t* const* keys, int n, uint32_t* to) {
  for (int key = 0; key < kKeys; key += kLanes) {
    for (int i = 0; i < n; i += kLanes) {
      Units rows[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) rows[r] = *reinterpret_cast<const Units*>(keys[key + r] + i);
      exchange<8>(rows);
      exchange<4>(rows);
      exchange<2>(rows);
      exchange<1>(rows);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) *reinterpret_cast<Units*>(to + (i + r) * kKeys + key) = rows[r];
    }
  }
}

// Pairs (first[i], second[i]) of bfloat16.
SJD_CLONES void interleave(const uint16_t* first, const uint16_t* second, int n, uint32_t* to) {
  for (int i = 0; i < n; ++i) to[i] = first[i] | static_cast<uint32_t>(second[i]) << 16;
}

// ------------------------------------------------------------------------------------------------------- softmax

// Products of one row to unscaled weights of scale * product + bias: the row's peak and sum move on, and what was
// summed before is to be scaled by the factor that is returned. Of kKeys keys the first `seen` count that exist, those
// whose word of `exists` is -1 and not 0. NaN goes into every sum.
SJD_CLONES float weigh_scores(float* scores, float scale, const float* bias, const int32_t* exists, int seen,
                              float& peak, float& sum) {
  int32_t key = order_key(peak);
  for (int j = 0; j < kKeys; ++j) {
    const int32_t score = bits(scores[j] * scale + bias[j]);
    const int32_t counts = -static_cast<int32_t>(j < seen) & exists[j];
    scores[j] = from_bits(choose(counts, score, bits(kNegativeInfinity)));
    key = std::max(key, order_key(scores[j]));
  }
  const float highest = key_value(key);
  float partial[kLanes] = {};
  for (int first = 0; first < kKeys; first += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float score = scores[first + j], x = score - highest;
      const int32_t kept = -static_cast<int32_t>(score != kNegativeInfinity);
      const float weight = from_bits(bits(exp_of(x) + (x - x)) & kept);
      scores[first + j] = weight;
      partial[j] += weight;
    }
  }
  float added = 0.0f;
  for (int j = 0; j < kLanes; ++j) added += partial[j];
  const float factor = peak == kNegativeInfinity ? 0.0f : exp_of(peak - highest);
  sum = sum * factor + added;
  peak = highest;
  return factor;
}

SJD_CLONES void scale_row(float* row, float factor, int n) {
  for (int i = 0; i < n; ++i) row[i] *= factor;
}

SJD_CLONES void round_row(const float* from, int n, uint16_t* to) {
  for (int i = 0; i < n; ++i) to[i] = BFloat16::narrow(from[i]);
}

// ------------------------------------------------------------------------------------------------------- one task

// Memory of a task, kept by each thread.
struct Scratch {
  std::vector<uint32_t> queries, keys, values, weights;
  std::vector<float> widened, scores, sums;
  std::vector<uint16_t> zeros;

  static Scratch& of_this_thread(int64_t depth, int64_t cols) {
    thread_local Scratch scratch;
    scratch.queries.assign(kRows * depth, 0);
    scratch.keys.resize(depth * kKeys);
    scratch.values.assign(kKeys * cols, 0);
    scratch.weights.resize(kRows * kKeys);
    scratch.widened.assign(kKeys * depth, 0.0f);
    scratch.scores.resize(kRows * kKeys);
    scratch.sums.assign(kRows * cols, 0.0f);
    scratch.zeros.assign(2 * std::max(depth, cols), 0);
    return scratch;
  }
};

// The query rows of one kv head, kRows at a time; row r is head r % G of window token r / G.
class Task {
 public:
  Task(const WindowAttention& params, int64_t s, int64_t kv_head, int64_t first_row)
      : p_(params),
        s_(s),
        kv_head_(kv_head),
        first_row_(first_row),
        group_(params.num_heads / params.num_kv_heads),
        num_rows_(std::min<int64_t>(kRows, group_ * params.num_new - first_row)),
        tile_rows_(static_cast<int>(round_up(num_rows_, kTileRows))),
        size_(params.dtype == DType::kFloat32 ? 4 : 2),
        in_pairs_(params.dtype == DType::kBFloat16 && params.head_dim % (2 * kLanes) == 0 && has_bfloat16_products()),
        depth_(in_pairs_ ? params.head_dim / 2 : round_up(params.head_dim, kLanes)),
        cols_(round_up(params.head_dim, kTileCols)),
        scratch_(Scratch::of_this_thread(depth_, cols_)),
        context_(params.context_lens[s]) {
#if defined(SJD_HAS_CLONES)
    multiply_ = in_pairs_ ? multiply_bfloat16 : multiply_float32();
#else
    multiply_ = multiply_float32();
#endif
  }

  void run() {
    std::fill_n(peak_, kRows, kNegativeInfinity);
    std::fill_n(sum_, kRows, 0.0f);
    pack_queries();
    const int64_t end = p_.window_bias ? context_ + p_.num_new : last_key(num_rows_ - 1) + 1;
    for (int64_t first = 0; first < end; first += kKeys) {
      pack_keys(first);
      multiply_(scratch_.queries.data(), depth_, scratch_.keys.data(), kKeys, scratch_.scores.data(), kKeys, tile_rows_,
                kKeys, static_cast<int>(depth_), false);
      for (int64_t r = 0; r < num_rows_; ++r) weigh_row(r, first);
      const int64_t steps = in_pairs_ ? kKeys / 2 : kKeys;
      multiply_(weights(), steps, scratch_.values.data(), cols_, scratch_.sums.data(), cols_, tile_rows_,
                static_cast<int>(cols_), static_cast<int>(steps), true);
    }
    for (int64_t r = 0; r < num_rows_; ++r) {
      const int64_t row = (s_ * p_.num_new + token(r)) * p_.num_heads + head(r);
      char* to = static_cast<char*>(p_.out) + row * p_.head_dim * size_;
      if (sum_[r] == 0.0f) {
        std::memset(to, 0, p_.head_dim * size_);
      } else {
        narrow_row(scratch_.sums.data() + r * cols_, 1.0f / sum_[r], p_.dtype, static_cast<int>(p_.head_dim), to);
      }
    }
  }

 private:
  int64_t token(int64_t r) const { return (first_row_ + r) / group_; }
  int64_t head(int64_t r) const { return kv_head_ * group_ + (first_row_ + r) % group_; }
  int64_t last_key(int64_t r) const { return context_ + token(r); }
  const uint32_t* weights() const {
    return in_pairs_ ? scratch_.weights.data() : reinterpret_cast<const uint32_t*>(scratch_.scores.data());
  }

  void pack_queries() {
    for (int64_t r = 0; r < num_rows_; ++r) {
      const char* from = static_cast<const char*>(p_.queries) +
                         (s_ * p_.sequence_stride + token(r) * p_.token_stride + head(r) * p_.head_stride) * size_;
      uint32_t* to = scratch_.queries.data() + r * depth_;
      if (in_pairs_) {
        std::memcpy(to, from, p_.head_dim * size_);
      } else {
        widen_row(from, p_.dtype, static_cast<int>(p_.head_dim), reinterpret_cast<float*>(to));
      }
    }
  }

  // Keys `first` .. first + kKeys - 1 transposed, and their values. What no row sees may hold anything, and counts as
  // 0; so does what has no page.
  void pack_keys(int64_t first) {
    const int64_t end = context_ + p_.num_new;
    const int head_dim = static_cast<int>(p_.head_dim);
    const uint32_t* keys[kKeys];
    const char* values[kKeys];
    const char* const nothing = reinterpret_cast<const char*>(scratch_.zeros.data());
    for (int j = 0; j < kKeys; ++j) {
      const char* key = first + j < end ? p_.kv.row(0, s_, first + j, 0) : nullptr;
      const char* value = key != nullptr ? key + p_.kv.page_size * p_.kv.row_bytes : nullptr;
      exists_[j] = -static_cast<int32_t>(key != nullptr);
      values[j] = value != nullptr ? value + kv_head_ * head_dim * size_ : nothing;
      key = key != nullptr ? key + kv_head_ * head_dim * size_ : nothing;
      if (in_pairs_ || (p_.dtype == DType::kFloat32 && head_dim % kLanes == 0)) {
        keys[j] = reinterpret_cast<const uint32_t*>(key);
      } else {
        float* widened = scratch_.widened.data() + j * depth_;
        widen_row(key, p_.dtype, head_dim, widened);
        keys[j] = reinterpret_cast<const uint32_t*>(widened);
      }
    }
    transpose(keys, static_cast<int>(depth_), scratch_.keys.data());
    if (in_pairs_) {
      for (int j = 0; j < kKeys; j += 2) {
        interleave(reinterpret_cast<const uint16_t*>(values[j]), reinterpret_cast<const uint16_t*>(values[j + 1]),
                   head_dim, scratch_.values.data() + j / 2 * cols_);
      }
    } else {
      float* to = reinterpret_cast<float*>(scratch_.values.data());
      for (int j = 0; j < kKeys; ++j) widen_row(values[j], p_.dtype, head_dim, to + j * cols_);
    }
  }

  void weigh_row(int64_t r, int64_t first) {
    float* scores = scratch_.scores.data() + r * kKeys;
    float bias[kKeys] = {};
    int64_t seen = last_key(r) + 1 - first;
    if (p_.window_bias != nullptr) {
      seen = context_ + p_.num_new - first;
      const float* row = p_.window_bias + s_ * p_.bias_sequence_stride + token(r) * p_.num_new;
      for (int64_t key = std::max(first, context_); key < std::min(first + kKeys, first + seen); ++key) {
        bias[key - first] = row[key - context_];
      }
    }
    const int num_seen = static_cast<int>(std::clamp<int64_t>(seen, 0, kKeys));
    const float factor = weigh_scores(scores, p_.scale, bias, exists_, num_seen, peak_[r], sum_[r]);
    if (factor != 1.0f) scale_row(scratch_.sums.data() + r * cols_, factor, static_cast<int>(cols_));
    if (in_pairs_) round_row(scores, kKeys, reinterpret_cast<uint16_t*>(scratch_.weights.data() + r * kKeys / 2));
  }

  const WindowAttention& p_;
  const int64_t s_, kv_head_, first_row_, group_, num_rows_;
  const int tile_rows_;
  const int64_t size_;  // bytes of an element
  const bool in_pairs_;
  const int64_t depth_, cols_;  // units of a packed query, floats of a packed value
  Scratch& scratch_;
  const int64_t context_;
  Multiply multiply_;
  int32_t exists_[kKeys];  // of the keys that are packed: -1, or 0 where there is no page
  float peak_[kRows], sum_[kRows];
};

}  // namespace

const char* bfloat16_isa() { return has_bfloat16_products() ? "avx512_bf16" : "float32"; }

void attend_cpu(const WindowAttention& params, int num_threads) {
  const int64_t rows = params.num_heads / params.num_kv_heads * params.num_new, tiles = (rows + kRows - 1) / kRows;
  const int64_t num_tasks = params.kv.num_sequences * params.num_kv_heads * tiles;
  int64_t num_keys = 0;
  for (int64_t s = 0; s < params.kv.num_sequences; ++s) num_keys += params.context_lens[s] + params.num_new;
  const int64_t products = 2 * num_keys * params.num_new * params.num_heads * params.head_dim;
  ThreadPool::run(num_tasks, products < kProductsForThreads ? 1 : num_threads, [&](int64_t i) {
    const int64_t pair = i / tiles;
    Task(params, pair / params.num_kv_heads, pair % params.num_kv_heads, i % tiles * kRows).run();
  });
}

}  // namespace sjd

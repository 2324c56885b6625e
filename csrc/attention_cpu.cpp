#include "attention_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "arithmetic.h"
#include "clones.h"
#include "products.h"
#include "thread_pool.h"

namespace sjd {
namespace {

constexpr int kKeys = 64;  // keys that are scored together
constexpr int kRows = 64;  // most query rows of a task
constexpr float kNegativeInfinity = -INFINITY;

// Fewer products than this are summed before a second thread has begun.
constexpr int64_t kProductsForThreads = 1 << 18;

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

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

// to[i * kKeys + key] = keys[key][i] for n units. Both numbers are multiples of kLanes.
SJD_CLONES void transpose(const uint32_t* const* keys, int num_keys, int n, uint32_t* to) {
  for (int key = 0; key < num_keys; key += kLanes) {
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

// Products of one row to unscaled weights of scale * product + bias: the row's peak and kLanes sums move on, and what
// was summed before is to be scaled by the factor that is returned. Of the keys, a multiple of kLanes, the first `seen`
// count that exist: those whose word of `exists` is -1 and not 0. NaN goes into every sum.
SJD_CLONES float weigh_scores(float* scores, int num_keys, float scale, const float* bias, const int32_t* exists,
                              int seen, float& peak, float* sums) {
  int32_t key = order_key(peak);
  for (int j = 0; j < num_keys; ++j) {
    const int32_t score = bits(scores[j] * scale + bias[j]);
    const int32_t counts = -static_cast<int32_t>(j < seen) & exists[j];
    scores[j] = from_bits(choose(counts, score, bits(kNegativeInfinity)));
    key = std::max(key, order_key(scores[j]));
  }
  const float highest = key_value(key);
  for (int j = 0; j < num_keys; ++j) {
    const float x = scores[j] - highest;
    const int32_t kept = -static_cast<int32_t>(scores[j] != kNegativeInfinity);
    scores[j] = from_bits(bits(exp_of(x) + (x - x)) & kept);
  }
  float factor = 1.0f;
  if (peak != highest) {
    factor = peak == kNegativeInfinity ? 0.0f : exp_of(peak - highest);
    peak = highest;
    for (int j = 0; j < kLanes; ++j) sums[j] *= factor;
  }
  for (int first = 0; first < num_keys; first += kLanes) {
    for (int j = 0; j < kLanes; ++j) sums[j] += scores[first + j];
  }
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
  std::vector<uint32_t> queries, keys, values, weights, zeros;
  std::vector<float> widened, scores, sums;

  static Scratch& of_this_thread(int64_t depth, int64_t cols) {
    thread_local Scratch scratch;
    scratch.queries.resize(kRows * depth);
    scratch.keys.resize(depth * kKeys);
    scratch.values.resize(kKeys * cols);
    scratch.weights.resize(kRows * kKeys);
    scratch.widened.resize(kKeys * depth);
    scratch.scores.resize(kRows * kKeys);
    scratch.sums.assign(kRows * cols, 0.0f);
    scratch.zeros.resize(cols);
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
        num_rows_(static_cast<int>(std::min<int64_t>(kRows, group_ * params.num_new - first_row))),
        head_dim_(static_cast<int>(params.head_dim)),
        size_(params.dtype == DType::kFloat32 ? 4 : 2),
        in_pairs_(params.dtype == DType::kBFloat16 && head_dim_ % (2 * kLanes) == 0 && multiply_bfloat16() != nullptr),
        depth_(in_pairs_ ? head_dim_ / 2 : round_up(head_dim_, kLanes)),
        cols_(round_up(head_dim_, kLanes)),
        scratch_(Scratch::of_this_thread(depth_, cols_)),
        context_(params.context_lens[s]),
        multiply_(in_pairs_ ? multiply_bfloat16() : multiply_float32()) {}

  void run() {
    std::fill_n(peak_, kRows, kNegativeInfinity);
    std::fill_n(sums_[0], kRows * kLanes, 0.0f);
    for (int r = 0; r < num_rows_; ++r) pack_query(r);
    const int64_t end = p_.window_bias ? context_ + p_.num_new : last_key(num_rows_ - 1) + 1;
    for (int64_t first = 0; first < end; first += kKeys) {
      const int num_keys = static_cast<int>(std::min<int64_t>(kKeys, end - first)), width = round_up(num_keys, kLanes);
      const int steps = in_pairs_ ? (num_keys + 1) / 2 : num_keys;
      pack_keys(first, num_keys, width);
      multiply_(scratch_.queries.data(), depth_, scratch_.keys.data(), kKeys, scratch_.scores.data(), kKeys, num_rows_,
                width, depth_, false);
      for (int r = 0; r < num_rows_; ++r) weigh_row(r, first, width);
      multiply_(weights(), in_pairs_ ? kKeys / 2 : kKeys, scratch_.values.data(), cols_, scratch_.sums.data(), cols_,
                num_rows_, cols_, steps, true);
    }
    for (int r = 0; r < num_rows_; ++r) {
      const int64_t row = (s_ * p_.num_new + token(r)) * p_.num_heads + head(r);
      char* to = static_cast<char*>(p_.out) + row * head_dim_ * size_;
      const float sum = std::accumulate(sums_[r], sums_[r] + kLanes, 0.0f);
      if (sum == 0.0f) {
        std::memset(to, 0, head_dim_ * size_);
      } else {
        narrow_row(scratch_.sums.data() + r * cols_, 1.0f / sum, p_.dtype, head_dim_, to);
      }
    }
  }

 private:
  int64_t token(int r) const { return (first_row_ + r) / group_; }
  int64_t head(int r) const { return kv_head_ * group_ + (first_row_ + r) % group_; }
  int64_t last_key(int r) const { return context_ + token(r); }
  const uint32_t* weights() const {
    return in_pairs_ ? scratch_.weights.data() : reinterpret_cast<const uint32_t*>(scratch_.scores.data());
  }

  // A row as float32, with zeros behind it.
  void widen(const char* from, float* to) const {
    widen_row(from, p_.dtype, head_dim_, to);
    std::fill(to + head_dim_, to + depth_, 0.0f);
  }

  void pack_query(int r) {
    const char* from = static_cast<const char*>(p_.queries) +
                       (s_ * p_.sequence_stride + token(r) * p_.token_stride + head(r) * p_.head_stride) * size_;
    uint32_t* to = scratch_.queries.data() + r * depth_;
    if (in_pairs_) {
      std::memcpy(to, from, head_dim_ * size_);
    } else {
      widen(from, reinterpret_cast<float*>(to));
    }
  }

  // Keys `first` .. first + num_keys - 1 transposed, and their values; zeros for what has no page, and up to `width`.
  void pack_keys(int64_t first, int num_keys, int width) {
    const char* rows[kKeys] = {};
    for (int64_t j = 0, left = 0; j < num_keys; ++j, --left) {
      if (left == 0) {  // the next page
        rows[j] = p_.kv.row(0, s_, first + j, 0);
        left = p_.kv.page_size - (first + j) % p_.kv.page_size;
      } else if (rows[j - 1] != nullptr) {
        rows[j] = rows[j - 1] + p_.kv.row_bytes;
      }
    }
    const int64_t head = kv_head_ * head_dim_ * size_, value = p_.kv.page_size * p_.kv.row_bytes;
    const char* const nothing = reinterpret_cast<const char*>(scratch_.zeros.data());
    const uint32_t* keys[kKeys];
    const char* values[kKeys];
    for (int j = 0; j < width; ++j) {
      exists_[j] = -static_cast<int32_t>(rows[j] != nullptr);
      const char* key = rows[j] != nullptr ? rows[j] + head : nothing;
      values[j] = rows[j] != nullptr ? rows[j] + head + value : nothing;
      if (in_pairs_ || (p_.dtype == DType::kFloat32 && head_dim_ == depth_)) {
        keys[j] = reinterpret_cast<const uint32_t*>(key);
      } else {
        float* widened = scratch_.widened.data() + j * depth_;
        widen(key, widened);
        keys[j] = reinterpret_cast<const uint32_t*>(widened);
      }
    }
    transpose(keys, width, depth_, scratch_.keys.data());
    if (in_pairs_) {
      for (int j = 0; j < num_keys; j += 2) {
        interleave(reinterpret_cast<const uint16_t*>(values[j]), reinterpret_cast<const uint16_t*>(values[j + 1]),
                   head_dim_, scratch_.values.data() + j / 2 * cols_);
      }
    } else {
      float* to = reinterpret_cast<float*>(scratch_.values.data());
      for (int j = 0; j < num_keys; ++j) widen_row(values[j], p_.dtype, head_dim_, to + j * cols_);
    }
  }

  void weigh_row(int r, int64_t first, int width) {
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
    const int num_seen = static_cast<int>(std::clamp<int64_t>(seen, 0, width));
    const float factor = weigh_scores(scores, width, p_.scale, bias, exists_, num_seen, peak_[r], sums_[r]);
    if (factor != 1.0f) scale_row(scratch_.sums.data() + r * cols_, factor, head_dim_);
    if (in_pairs_) round_row(scores, width, reinterpret_cast<uint16_t*>(scratch_.weights.data() + r * kKeys / 2));
  }

  const WindowAttention& p_;
  const int64_t s_, kv_head_, first_row_, group_;
  const int num_rows_, head_dim_;
  const int64_t size_;  // bytes of an element
  const bool in_pairs_;
  const int depth_, cols_;  // units of a packed query, floats of a packed value
  Scratch& scratch_;
  const int64_t context_;
  const Multiply multiply_;
  int32_t exists_[kKeys];  // of the keys that are packed: -1, or 0 where there is no page
  float peak_[kRows], sums_[kRows][kLanes];
};

}  // namespace

const char* bfloat16_isa() { return multiply_bfloat16() != nullptr ? "avx512_bf16" : "float32"; }

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

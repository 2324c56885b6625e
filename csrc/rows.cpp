#include "rows.h"

#include <algorithm>

#include "clones.h"
#include "philox.h"

namespace sjd {

const char* isa() {
#if defined(SJD_HAS_CLONES)
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
  return "x86-64";
#else
  return "compiler default";
#endif
}

namespace {

// ------------------------------------------------------------------------------------------------------- combine

template <class T>
SJD_INLINE int32_t combine_guided(const typename T::Storage* conditional, const typename T::Storage* unconditional,
                                  int64_t stride, int n, float scale, float inverse_temperature, int32_t* keys) {
  int32_t peak = INT32_MIN;
  for (int j = 0; j < n; ++j) {
    const float c = T::widen(conditional[j * stride]), u = T::widen(unconditional[j * stride]);
    const int32_t key = logit_key((u + scale * (c - u)) * inverse_temperature);
    keys[j] = key;
    peak = std::max(peak, key);
  }
  return peak;
}

template <class T>
SJD_INLINE int32_t combine_plain(const typename T::Storage* logits, int64_t stride, int n, float inverse_temperature,
                                 int32_t* keys) {
  int32_t peak = INT32_MIN;
  for (int j = 0; j < n; ++j) {
    const int32_t key = logit_key(T::widen(logits[j * stride]) * inverse_temperature);
    keys[j] = key;
    peak = std::max(peak, key);
  }
  return peak;
}

template <class T>
SJD_INLINE int32_t combine_as(const Logits& logits, int64_t offset, int n, float scale, float inverse_temperature,
                              int32_t* keys) {
  const auto* first = static_cast<const typename T::Storage*>(logits.data) + offset;
  const int64_t stride = logits.vocab_stride;
  if (logits.guided) {
    const auto* second = first + logits.pair_stride;
    if (stride == 1) return combine_guided<T>(first, second, 1, n, scale, inverse_temperature, keys);
    return combine_guided<T>(first, second, stride, n, scale, inverse_temperature, keys);
  }
  if (stride == 1) return combine_plain<T>(first, 1, n, inverse_temperature, keys);
  return combine_plain<T>(first, stride, n, inverse_temperature, keys);
}

SJD_CLONES int32_t combine_float32(const Logits& logits, int64_t offset, int n, float scale, float inverse_temperature,
                                   int32_t* keys) {
  return combine_as<Float32>(logits, offset, n, scale, inverse_temperature, keys);
}

SJD_CLONES int32_t combine_float16(const Logits& logits, int64_t offset, int n, float scale, float inverse_temperature,
                                   int32_t* keys) {
  return combine_as<Float16>(logits, offset, n, scale, inverse_temperature, keys);
}

SJD_CLONES int32_t combine_bfloat16(const Logits& logits, int64_t offset, int n, float scale, float inverse_temperature,
                                    int32_t* keys) {
  return combine_as<BFloat16>(logits, offset, n, scale, inverse_temperature, keys);
}

}  // namespace

int32_t combine(const Logits& logits, int64_t offset, int n, float scale, float inverse_temperature, int32_t* keys) {
  switch (logits.dtype) {
    case DType::kFloat16:
      return combine_float16(logits, offset, n, scale, inverse_temperature, keys);
    case DType::kBFloat16:
      return combine_bfloat16(logits, offset, n, scale, inverse_temperature, keys);
    default:
      return combine_float32(logits, offset, n, scale, inverse_temperature, keys);
  }
}

// ----------------------------------------------------------------------------------------------------- selection

SJD_CLONES Split split_count(const int32_t* keys, int n, int32_t threshold) {
  int32_t count = 0, above = INT32_MAX, below = INT32_MIN;
  for (int j = 0; j < n; ++j) {
    const int32_t kept = -static_cast<int32_t>(keys[j] >= threshold);
    count -= kept;
    above = std::min(above, choose(kept, keys[j], INT32_MAX));
    below = std::max(below, choose(kept, INT32_MIN, keys[j]));
  }
  return {static_cast<uint64_t>(count), above, below};
}

SJD_CLONES Split split_mass(const int32_t* keys, const float* weights, int n, int32_t threshold) {
  Split split = {0, INT32_MAX, INT32_MIN};
  for (int first = 0; first < n; first += kBlock) {
    const int end = std::min(n, first + kBlock);
    uint32_t high = 0, low = 0;
    int32_t above = INT32_MAX, below = INT32_MIN;
    for (int j = first; j < end; ++j) {
      const int32_t kept = -static_cast<int32_t>(keys[j] >= threshold);
      high += fixed_high(weights[j]) & static_cast<uint32_t>(kept);
      low += fixed_low(weights[j]) & static_cast<uint32_t>(kept);
      above = std::min(above, choose(kept, keys[j], INT32_MAX));
      below = std::max(below, choose(kept, INT32_MIN, keys[j]));
    }
    split.measure += join_halves(high, low);
    split.above = std::min(split.above, above);
    split.below = std::max(split.below, below);
  }
  return split;
}

SJD_CLONES int nth_equal(const int32_t* keys, int n, int32_t key, int64_t which) {
  for (int first = 0; first < n; first += kBlock) {
    const int end = std::min(n, first + kBlock);
    int32_t count = 0;
    for (int j = first; j < end; ++j) count += keys[j] == key;
    if (count >= which) {
      for (int j = first; j < end; ++j) {
        if (keys[j] == key && --which == 0) return j;
      }
    }
    which -= count;
  }
  return n - 1;
}

// ------------------------------------------------------------------------------------------------ weights, sums

namespace {

SJD_CLONES void weigh_finite(const int32_t* keys, int first_id, int n, float peak, int32_t cut, int32_t cut_id,
                             float* weights) {
  for (int j = 0; j < n; ++j) weights[j] = weight(keys[j], first_id + j, peak, cut, cut_id);
}

}  // namespace

void weigh(const int32_t* keys, int first_id, int n, const RowLaw& law, float* weights) {
  if (law.nonfinite()) {
    std::fill_n(weights, n, 1.0f);
  } else {
    weigh_finite(keys, first_id, n, law.peak, order_key(law.cut), static_cast<int32_t>(law.cut_id), weights);
  }
}

SJD_CLONES uint64_t sum_blocks(const float* weights, int n, uint64_t* sums) {
  uint64_t total = 0;
  for (int first = 0; first < n; first += kBlock) {
    const int end = std::min(n, first + kBlock);
    uint32_t high = 0, low = 0;
    for (int j = first; j < end; ++j) {
      high += fixed_high(weights[j]);
      low += fixed_low(weights[j]);
    }
    *sums = join_halves(high, low);
    total += *sums++;
  }
  return total;
}

SJD_CLONES void subtract_draft(float* target, float target_scale, const float* draft, float draft_scale, int n) {
  for (int j = 0; j < n; ++j) {
    const float rest = target[j] * target_scale - draft[j] * draft_scale;
    target[j] = rest > 0.0f ? rest : 0.0f;
  }
}

SJD_CLONES void subtract_counted(float* target, float target_scale, const float* draft, float draft_scale, int n) {
  for (int j = 0; j < n; ++j) {
    const float rest = counted(target[j]) * target_scale - counted(draft[j]) * draft_scale;
    target[j] = rest > 0.0f ? rest : 0.0f;
  }
}

// -------------------------------------------------------------------------------------------------------- Gumbel

namespace {

// noise[j] of tokens first_id + j for one block; first_id is a multiple of 4.
SJD_CLONES void gumbel_block(int64_t seed, int64_t position, int first_id, float* noise) {
  uint32_t words[4][kBlock / 4];
  for (int j = 0; j < kBlock / 4; ++j) {
    const Words four = philox(seed, position, 0, kGumbel | static_cast<uint32_t>(first_id / 4 + j) << 8);
    for (int i = 0; i < 4; ++i) words[i][j] = four.word[i];
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < kBlock / 4; ++j) noise[4 * j + i] = gumbel(words[i][j]);
  }
}

// scores[j] = key of z + noise, INT32_MIN where the weight is zero; returns the largest.
SJD_CLONES int32_t score_block(const int32_t* keys, const float* weights, const float* noise, int n, int32_t* scores) {
  int32_t best = INT32_MIN;
  for (int j = 0; j < n; ++j) {
    const int32_t kept = -static_cast<int32_t>(weights[j] > 0.0f);
    scores[j] = choose(kept, order_key(key_value(keys[j]) + noise[j]), INT32_MIN);
    best = std::max(best, scores[j]);
  }
  return best;
}

}  // namespace

int gumbel_argmax(const int32_t* keys, const float* weights, int n, int64_t seed, int64_t position) {
  float noise[kBlock];
  int32_t scores[kBlock], best = INT32_MIN;
  int winner = 0;
  for (int first = 0; first < n; first += kBlock) {
    const int count = std::min(kBlock, n - first);
    gumbel_block(seed, position, first, noise);
    const int32_t best_here = score_block(keys + first, weights + first, noise, count, scores);
    if (best_here > best) {
      best = best_here;
      winner = first + static_cast<int>(std::find(scores, scores + count, best) - scores);
    }
  }
  return winner;
}

}  // namespace sjd

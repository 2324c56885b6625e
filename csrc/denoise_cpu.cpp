#include "denoise_cpu.h"

#include <algorithm>

#include "clones.h"
#include "thread_pool.h"

namespace sjd {

namespace {

constexpr int64_t kNumbersForThreads = 1 << 16;  // fewer are done before threads have begun

struct Step {
  float keep, pull;
  bool down;
};

template <class T>
SJD_INLINE void denoise_slot(const DenoiseParams& p, const Step& step, float* noisy, int64_t token,
                             const float* encoding, int64_t out) {
  const auto* embedding = static_cast<const typename T::Storage*>(p.embeddings) + token * p.hidden;
  auto* inputs = static_cast<typename T::Storage*>(p.inputs) + out * p.hidden;
  if (step.down) {
    for (int64_t j = 0; j < p.hidden; ++j) {
      const float clean = (T::widen(embedding[j]) - p.mean[j]) * p.inverse[j];
      noisy[j] = step.keep * noisy[j] + step.pull * clean;
    }
  }
  for (int64_t j = 0; j < p.hidden; ++j) inputs[j] = T::narrow((noisy[j] * p.std[j] + p.mean[j]) + encoding[j]);
}

SJD_CLONES void denoise_float32(const DenoiseParams& p, const Step& step, float* noisy, int64_t token,
                                const float* encoding, int64_t out) {
  denoise_slot<Float32>(p, step, noisy, token, encoding, out);
}

SJD_CLONES void denoise_float16(const DenoiseParams& p, const Step& step, float* noisy, int64_t token,
                                const float* encoding, int64_t out) {
  denoise_slot<Float16>(p, step, noisy, token, encoding, out);
}

SJD_CLONES void denoise_bfloat16(const DenoiseParams& p, const Step& step, float* noisy, int64_t token,
                                 const float* encoding, int64_t out) {
  denoise_slot<BFloat16>(p, step, noisy, token, encoding, out);
}

void denoise_window_slot(const DenoiseParams& p, int64_t b, int64_t slot) {
  const int64_t position = p.num_committed[b] + slot, out = b * p.num_slots + slot;
  p.out_levels[out] = 0;
  if (position >= p.num_tokens) return;
  int32_t& level = p.levels[b * p.num_tokens + position];
  if (level == 0) return;
  const Step step = {p.keep[level], p.pull[level], slot < p.lowered[b]};
  level -= step.down;
  p.out_levels[out] = level;
  float* noisy = p.noisy + (b * p.num_tokens + position) * p.hidden;
  const int64_t token = std::clamp<int64_t>(p.tokens[b * p.tokens_width + position + 1], 0, p.vocab_size - 1);
  const float* encoding = p.encodings + level * p.hidden;
  if (p.dtype == DType::kFloat16) {
    denoise_float16(p, step, noisy, token, encoding, out);
  } else if (p.dtype == DType::kBFloat16) {
    denoise_bfloat16(p, step, noisy, token, encoding, out);
  } else {
    denoise_float32(p, step, noisy, token, encoding, out);
  }
}

}  // namespace

void denoise_cpu(const DenoiseParams& p) {
  const int64_t num_slots = p.batch_size * p.num_slots;
  const int num_threads = num_slots * p.hidden < kNumbersForThreads ? 1 : p.num_threads;
  ThreadPool::run(num_slots, num_threads, [&](int64_t i) { denoise_window_slot(p, i / p.num_slots, i % p.num_slots); });
}

}  // namespace sjd

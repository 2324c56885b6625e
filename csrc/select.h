// Top-k and top-p: the cut of a row without a sort.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>

#include "rows.h"

namespace sjd {

// An element of the row with measure(>= key) >= need > measure(> key), and that measure(> key).
struct Cut {
  int32_t key;
  uint64_t above;
};

// The key that about `share` of the row lies above, from a sample of it.
inline int32_t guess_cut(const int32_t* keys, int n, double share) {
  constexpr int kSamples = 64;
  int32_t sample[kSamples];
  for (int i = 0; i < kSamples; ++i) sample[i] = keys[static_cast<int64_t>(i) * n / kSamples];
  int32_t* const nth = sample + std::min(static_cast<int>(share * kSamples), kSamples - 1);
  std::nth_element(sample, nth, sample + kSamples, std::greater<>());
  return *nth;
}

// A threshold between two points of a row's tail, where the measure is about `need` if it falls exponentially with the
// logit. A `stretch` above 1 goes further, to come out on the other side of the answer.
inline int32_t interpolate(int32_t from, double from_measure, int32_t to, double to_measure, double need,
                           double stretch) {
  const double share = stretch * std::log(from_measure / need) / std::log(from_measure / to_measure);
  const float start = key_value(from), end = key_value(to);
  return order_key(static_cast<float>(start + share * (end - start)));
}

// The cut of a row: exact, whatever the guess is.
//
// `split` measures one threshold in one pass over the row, and moves an end of [low, high] to an element of the row.
// Thresholds are interpolated; from the fifth pass on every second one halves the interval of keys, which bounds their
// number whatever the logits are.
//
//   need    least measure of what is kept, from 1 to `all`, the measure of the row
//   one     measure of a token at the peak
//   guess   where to look first: the cut of a similar row
template <class SplitAt>
Cut find_cut(uint64_t need, uint64_t all, uint64_t one, int32_t peak, int32_t guess, SplitAt split) {
  int32_t low = kNegativeInfinityKey, high = peak, threshold = guess;
  uint64_t low_measure = all, above = 0;  // measure(>= low) and measure(> high)
  for (int pass = 1; low < high; ++pass) {
    const Split at = split(std::clamp(threshold, low + 1, high));
    if (at.measure >= need) {
      low = at.above;
      low_measure = at.measure;
    } else {
      high = at.below;
      above = at.measure;
    }
    const bool open_below = low == kNegativeInfinityKey, open_above = high == peak;
    const double at_low = static_cast<double>(low_measure), at_high = static_cast<double>(std::max(above, one));
    if (low_measure == need) {
      threshold = low + 1;  // the very set to keep: one more pass moves `high` down to its least element
    } else if ((pass > 4 && pass % 2 == 0) || (open_below && above <= one)) {
      threshold = static_cast<int32_t>((static_cast<int64_t>(low) + high + 1) >> 1);
    } else if (open_below) {
      threshold = interpolate(high, at_high, peak, static_cast<double>(one), static_cast<double>(need), 1.5);
    } else {
      threshold = interpolate(low, at_low, high, at_high, static_cast<double>(need), open_above ? 1.5 : 1.0);
    }
  }
  return {low, above};
}

}  // namespace sjd

// The arithmetic of a decision: the C++ twin of kernels/arithmetic.py, bit for bit. The build forbids fused
// multiply-adds (-ffp-contract=off), so every float32 operation here rounds exactly once, as its twin's does.
#pragma once

#include <cmath>
#include <cstdint>

#include "bits.h"

namespace sjd {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to the nearest integer
constexpr float kMinExponent = -64.0f;
constexpr float kExp2[] = {0.6931471824645996f,  0.24022647738456726f,   0.055503323674201965f,
                           0.00961843691766262f, 0.0013398873852565885f, 0.00015353361959569156f};
constexpr float kLog1p[] = {1.0f,
                            -0.49999284744262695f,
                            0.33370062708854675f,
                            -0.2428050935268402f,
                            0.2696126401424408f,
                            0.2035384625196457f,
                            1.2576686143875122f,
                            1.6958105564117432f,
                            1.441107153892517f};
constexpr int kWeightBits = 44;

// ------------------------------------------------------------------------------------------------ order of logits

// float32 without NaN and without -0 to int32 and back, keeping the order: maxima and comparisons of integers are what
// a compiler vectorises without being allowed to reorder floats.
SJD_INLINE int32_t order_key(float x) { return bits(x) ^ ((bits(x) >> 31) & 0x7fffffff); }
SJD_INLINE float key_value(int32_t key) { return from_bits(key ^ ((key >> 31) & 0x7fffffff)); }

constexpr int32_t kNegativeInfinityKey = static_cast<int32_t>(0x807fffffu);

// z of `reference.combine` as a key: what is not finite becomes -inf, and -0 becomes +0.
SJD_INLINE int32_t logit_key(float z) {
  const int32_t not_finite = -((bits(z) & 0x7f800000) == 0x7f800000);
  return choose(not_finite, kNegativeInfinityKey, order_key(z + 0.0f));
}

// ------------------------------------------------------------------------------------------------------- exp, log

template <int N>
SJD_INLINE float horner(const float (&coefficients)[N], float x) {
  float value = coefficients[N - 1];
#pragma GCC unroll 8
  for (int i = N - 2; i >= 0; --i) value = value * x + coefficients[i];
  return value;
}

// exp(x) of x <= 0, at least 2^-64; exp(0) is 1.
SJD_INLINE float exp_of(float x) {
  float t = x * kLog2E;
  t = t > kMinExponent ? t : kMinExponent;
  const float whole = (t + kMagic) - kMagic;
  const float f = t - whole;
  const float power = from_bits((static_cast<int32_t>(whole) + 127) << 23);
  return (horner(kExp2, f) * f + 1.0f) * power;
}

// -ln of normal x > 0 as mantissa in [1/2, 1) times 2^exponent; with `direct`, -ln(1 - x) of x in [0, 1/2].
SJD_INLINE float minus_log(float x, int32_t direct) {
  const int32_t mantissa = (bits(x) & 0x007fffff) | 0x3f000000;
  const float r = from_bits(choose(direct, bits(-x), bits(from_bits(mantissa) - 1.0f)));
  const float exponent = static_cast<float>(((bits(x) >> 23) - 126) & ~direct);
  return -(horner(kLog1p, r) * r + exponent * kLn2);
}

// Standard Gumbel noise -log(-log(1 - x)) of x = (word + 1/2) / 2^32.
SJD_INLINE float gumbel(uint32_t word) {
  const int32_t lower_half = ~(static_cast<int32_t>(word) >> 31);  // all ones where word < 2^31
  const int32_t folded = static_cast<int32_t>(word) ^ ~lower_half;
  const float x = (static_cast<float>(folded) + 0.5f) * 0x1p-32f;
  return minus_log(minus_log(x, lower_half), 0);
}

// ------------------------------------------------------------------------------------------- weights and draws

// A float32 w in [0, 1] counts as the integer floor(w * 2^44) = (high << 21) + low: two int32 conversions, which
// vectorise. 256 of either half fit a uint32.
SJD_INLINE uint32_t fixed_high(float w) { return static_cast<uint32_t>(static_cast<int32_t>(w * 0x1p23f)); }
SJD_INLINE uint32_t fixed_low(float w) {
  const float scaled = w * 0x1p23f;
  const float rest = scaled - static_cast<float>(static_cast<int32_t>(scaled));
  return static_cast<uint32_t>(static_cast<int32_t>(rest * 0x1p21f));
}
SJD_INLINE uint64_t join_halves(uint32_t high, uint32_t low) { return (static_cast<uint64_t>(high) << 21) + low; }
SJD_INLINE uint64_t fixed_point(float w) { return join_halves(fixed_high(w), fixed_low(w)); }
// The same as a float32 again, which a float32 that is rounded down still is.
SJD_INLINE float counted(float w) {
  const float high = static_cast<float>(static_cast<int32_t>(fixed_high(w)));
  const float low = static_cast<float>(static_cast<int32_t>(fixed_low(w)));
  return high * 0x1p-23f + low * 0x1p-44f;
}
// What scales weights of this total to sum to 1; 0 where there are none.
inline float scale_of(uint64_t total) { return total ? static_cast<float>(0x1p44 / static_cast<double>(total)) : 0.0f; }

// floor(word * total / 2^32): the cumulative weight that a draw must exceed.
inline uint64_t share(uint32_t word, uint64_t total) {
  return word * (total >> 32) + (word * (total & 0xffffffffu) >> 32);
}

// The numbers of a row's law, in the order of `WindowState.laws`; see `reference.RowLaw`.
struct RowLaw {
  float peak, scale, cut, cut_id;
  bool nonfinite() const { return peak == -INFINITY; }
};

// exp(z - peak) where the law keeps the token, 0 elsewhere. Not for a row without one finite logit.
SJD_INLINE float weight(int32_t key, int32_t id, float peak, int32_t cut, int32_t cut_id) {
  const int32_t kept = -static_cast<int32_t>((key > cut) | ((key == cut) & (id <= cut_id)));
  return from_bits(bits(exp_of(key_value(key) - peak)) & kept);
}

}  // namespace sjd

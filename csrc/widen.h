// float32 and the 16-bit types: their bits, written out so that a loop over them vectorises.
#pragma once

#include <cstdint>

#include "bits.h"

namespace sjd {

enum class DType { kFloat32, kFloat16, kBFloat16 };

struct Float32 {
  using Storage = float;
  static SJD_INLINE float widen(float x) { return x; }
  static SJD_INLINE float narrow(float x) { return x; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static SJD_INLINE float widen(uint16_t x) { return from_bits(static_cast<int32_t>(static_cast<uint32_t>(x) << 16)); }
  // To the nearest, ties to even; NaN stays NaN.
  static SJD_INLINE uint16_t narrow(float x) {
    const uint32_t u = static_cast<uint32_t>(bits(x)), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const int32_t is_nan = -static_cast<int32_t>((u & 0x7fffffffu) > 0x7f800000u);
    return static_cast<uint16_t>(choose(is_nan, 0x7fff, static_cast<int32_t>(rounded)));
  }
};

struct Float16 {
  using Storage = uint16_t;
  static SJD_INLINE float widen(uint16_t x) {
    const int32_t magnitude = x & 0x7fff, shifted = magnitude << 13;
    const int32_t subnormal = -static_cast<int32_t>(magnitude < 0x0400), infinite = -(magnitude >= 0x7c00);
    const float tiny = from_bits(shifted + (113 << 23)) - from_bits(113 << 23);
    const int32_t normal = shifted + (112 << 23) + ((112 << 23) & infinite);
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
    return from_bits(choose(subnormal, bits(tiny), normal) | static_cast<int32_t>(sign));
  }
  // To the nearest, ties to even; what is too large is infinite, NaN stays NaN.
  static SJD_INLINE uint16_t narrow(float x) {
    const int32_t u = bits(x), magnitude = u & 0x7fffffff;
    // Adding a power of two rounds a subnormal result in the float unit; else the mantissa is rounded as an integer.
    const int32_t tiny = bits(from_bits(magnitude) + 0.5f) - bits(0.5f);
    const int32_t normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const int32_t subnormal = -static_cast<int32_t>(magnitude < (113 << 23));
    const int32_t infinite = -static_cast<int32_t>(magnitude >= 0x477ff000), nan = -(magnitude > 0x7f800000);
    const int32_t finite = choose(subnormal, tiny, normal);
    const int32_t half = choose(nan, 0x7fff, choose(infinite, 0x7c00, finite));
    return static_cast<uint16_t>(half | static_cast<int32_t>((static_cast<uint32_t>(u) >> 16) & 0x8000u));
  }
};

}  // namespace sjd

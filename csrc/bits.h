// The bits of a float32, and what marks a function that every variant of a loop takes in: those for x86 instruction
// sets in C++, and those for the host and the device under nvcc.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SJD_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// A call would leave the variant.
#define SJD_INLINE inline __attribute__((always_inline))
#else
#define SJD_INLINE inline
#endif

namespace sjd {

SJD_INLINE int32_t bits(float x) {
  int32_t y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

SJD_INLINE float from_bits(int32_t x) {
  float y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// mask ? a : b for a mask of all ones or none. Written out, because GCC turns a conditional minimum into a branch.
SJD_INLINE int32_t choose(int32_t mask, int32_t a, int32_t b) { return (a & mask) | (b & ~mask); }

}  // namespace sjd

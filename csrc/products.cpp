#include "products.h"

#include "clones.h"

#if defined(SJD_HAS_CLONES)
#include <immintrin.h>
#endif

namespace sjd {
namespace {

#define SJD_MULTIPLY_ARGUMENTS                                                                               \
  const uint32_t *a, int64_t lda, const uint32_t *b, int64_t ldb, float *c, int64_t ldc, int rows, int cols, \
      int steps, bool add

using Vector = float __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")  // no decision depends on these sums, and fused they take half the time

struct Float32Products {
  template <int R, int C>
  static SJD_INLINE void tile(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                              int steps, bool add) {
    const float *left = reinterpret_cast<const float*>(a), *right = reinterpret_cast<const float*>(b);
    Vector sums[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) {
        sums[r][j] = add ? *reinterpret_cast<const Vector*>(c + r * ldc + j * kLanes) : Vector{};
      }
    }
    for (int k = 0; k < steps; ++k) {
      Vector column[C];
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) column[j] = *reinterpret_cast<const Vector*>(right + k * ldb + j * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j) sums[r][j] += left[r * lda + k] * column[j];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) *reinterpret_cast<Vector*>(c + r * ldc + j * kLanes) = sums[r][j];
    }
  }
};

// C vectors of columns: R rows at a time, then what is left.
template <class Products, int R, int C>
SJD_INLINE void multiply_columns(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                                 int rows, int steps, bool add) {
  for (; rows >= R; rows -= R, a += R * lda, c += R * ldc)
    Products::template tile<R, C>(a, lda, b, ldb, c, ldc, steps, add);
  if constexpr (R > 1) multiply_columns<Products, R - 1, C>(a, lda, b, ldb, c, ldc, rows, steps, add);
}

// C vectors of columns at a time, what is left by halves.
template <class Products, int R, int C>
SJD_INLINE void multiply_tiles(SJD_MULTIPLY_ARGUMENTS) {
  for (; cols >= C * kLanes; cols -= C * kLanes, b += C * kLanes, c += C * kLanes)
    multiply_columns<Products, R, C>(a, lda, b, ldb, c, ldc, rows, steps, add);
  if constexpr (C > 1) multiply_tiles<Products, R, C / 2>(a, lda, b, ldb, c, ldc, rows, cols, steps, add);
}

void multiply_any(SJD_MULTIPLY_ARGUMENTS) {
  multiply_tiles<Float32Products, 2, 1>(a, lda, b, ldb, c, ldc, rows, cols, steps, add);
}

#if defined(SJD_HAS_CLONES)
__attribute__((target("arch=x86-64-v3"))) void multiply_v3(SJD_MULTIPLY_ARGUMENTS) {
  multiply_tiles<Float32Products, 4, 1>(a, lda, b, ldb, c, ldc, rows, cols, steps, add);
}

// Of the 32 registers of 64 bytes, 24 sum.
__attribute__((target("arch=x86-64-v4"))) void multiply_v4(SJD_MULTIPLY_ARGUMENTS) {
  multiply_tiles<Float32Products, 6, 4>(a, lda, b, ldb, c, ldc, rows, cols, steps, add);
}

struct BFloat16Products {
  template <int R, int C>
  __attribute__((target("arch=x86-64-v4,avx512bf16"))) static void tile(const uint32_t* a, int64_t lda,
                                                                        const uint32_t* b, int64_t ldb, float* c,
                                                                        int64_t ldc, int steps, bool add) {
    __m512 sums[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) sums[r][j] = add ? _mm512_loadu_ps(c + r * ldc + j * kLanes) : _mm512_setzero_ps();
    }
    for (int k = 0; k < steps; ++k) {
      __m512bh column[C];
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) column[j] = (__m512bh)_mm512_loadu_si512(b + k * ldb + j * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const auto pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r * lda + k]));
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], pair, column[j]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) _mm512_storeu_ps(c + r * ldc + j * kLanes, sums[r][j]);
    }
  }
};

void multiply_pairs(SJD_MULTIPLY_ARGUMENTS) {
  multiply_tiles<BFloat16Products, 6, 4>(a, lda, b, ldb, c, ldc, rows, cols, steps, add);
}
#endif

#pragma GCC pop_options

}  // namespace

Multiply multiply_float32() {
#if defined(SJD_HAS_CLONES)
  if (__builtin_cpu_supports("x86-64-v4")) return multiply_v4;
  if (__builtin_cpu_supports("x86-64-v3")) return multiply_v3;
#endif
  return multiply_any;
}

Multiply multiply_bfloat16() {
#if defined(SJD_HAS_CLONES)
  if (__builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16")) return multiply_pairs;
#endif
  return nullptr;
}

bool has_bfloat16_tiles() {
#if defined(SJD_HAS_CLONES)
  return __builtin_cpu_supports("amx-bf16");
#else
  return false;
#endif
}

}  // namespace sjd

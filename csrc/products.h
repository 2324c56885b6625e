// Sums of products of small matrices on a CPU, as attention and the matrices of a transformer need them: float32, or
// bfloat16 where the CPU multiplies it.
#pragma once

#include <cstdint>

#include "bits.h"

namespace sjd {

constexpr int kLanes = 16;  // 32-bit units that are moved as one vector

// c[rows, cols] (+)= a[rows, steps] b[steps, cols]. Units of a and b are float32, or pairs of bfloat16 whose products
// are summed. `cols` is a multiple of kLanes, c has `ldc` floats a row. Every sum runs through the steps one by one: it
// does not depend on what is summed beside it, nor on whether a call stops and another goes on.
using Multiply = void (*)(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                          int rows, int cols, int steps, bool add);

// The fastest on this CPU.
Multiply multiply_float32();

// Null where the CPU does not multiply bfloat16 in its vectors.
Multiply multiply_bfloat16();

// The CPU multiplies bfloat16 in tiles, which is several times as fast.
bool has_bfloat16_tiles();

}  // namespace sjd

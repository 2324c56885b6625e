// Counter-based random numbers: the C++ twin of kernels/philox.py, where purposes and words are explained.
#pragma once

#include <cstdint>

#include "arithmetic.h"

namespace sjd {

constexpr uint32_t kWindow = 0, kGumbel = 1, kTrySiblings = 2, kDrawSiblings = 3;  // purposes
enum Word { kAccept, kFresh, kResidual, kInit };

struct Words {
  uint32_t word[4];
};

// Philox4x32-10 at counter (position, iteration, purpose | block << 8, 0) under the image's seed.
SJD_INLINE Words philox(int64_t seed, int64_t position, int64_t iteration, uint32_t purpose_and_block) {
  uint32_t a = static_cast<uint32_t>(position), b = static_cast<uint32_t>(iteration), c = purpose_and_block, d = 0;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = static_cast<uint64_t>(a) * 0xD2511F53u, right = static_cast<uint64_t>(c) * 0xCD9E8D57u;
    a = static_cast<uint32_t>(right >> 32) ^ b ^ key0;
    b = static_cast<uint32_t>(right);
    c = static_cast<uint32_t>(left >> 32) ^ d ^ key1;
    d = static_cast<uint32_t>(left);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{a, b, c, d}};
}

// (word + 1/2) / 2^32, in (0, 1).
inline double uniform(uint32_t word) { return (word + 0.5) * 0x1p-32; }

}  // namespace sjd

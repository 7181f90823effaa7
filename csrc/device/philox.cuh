// Philox4x32-10: random bits that are a function of a counter and a key, and of nothing else. "Parallel random numbers:
// as easy as 1, 2, 3", Salmon, Moraes, Dror, Shaw 2011, figure 2 and table 2.
#pragma once

#include <cstdint>

#include "device/cuda.h"

namespace fastgpt {

struct PhiloxWords {
  uint32_t at[4];
};

__device__ __forceinline__ PhiloxWords philox(PhiloxWords counter, uint64_t key) {
  constexpr uint32_t kMultipliers[2] = {0xD2511F53, 0xCD9E8D57}, kKeySteps[2] = {0x9E3779B9, 0xBB67AE85};
  constexpr int kRounds = 10;
  auto& [c0, c1, c2, c3] = counter.at;
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t a = uint64_t(c0) * kMultipliers[0], b = uint64_t(c2) * kMultipliers[1];
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c1 = uint32_t(b);
    c3 = uint32_t(a);
    k0 += kKeySteps[0];
    k1 += kKeySteps[1];
  }
  return counter;
}

}  // namespace fastgpt

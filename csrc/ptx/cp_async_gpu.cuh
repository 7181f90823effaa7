// cp.async (sm_80): copies from global to shared memory that run while the thread goes on. Older chips copy at once.
#pragma once

#include <type_traits>

#include "ptx/address.cuh"
#include "ptx/common.cuh"

namespace fastgpt {

// Copies kBytes (4, 8 or 16), or writes zeros where !inside. 16 bytes go past the L1 cache.
template <int kBytes = 16>
FASTGPT_PTX void cp_async(void* shared_to, const void* from, bool inside = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
#if __CUDA_ARCH__ >= 800
  const int bytes_read = inside ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared_to)), "l"(from),
                 "n"(kBytes), "r"(bytes_read)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared_to)), "l"(from),
                 "n"(kBytes), "r"(bytes_read)
                 : "memory");
#else
  using Words = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t>>;
  *static_cast<Words*>(shared_to) = inside ? *static_cast<const Words*>(from) : Words{};
#endif
}

FASTGPT_PTX void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most kGroupsLeft of this thread's groups are still on their way.
template <int kGroupsLeft>
FASTGPT_PTX void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
#endif
}

}  // namespace fastgpt

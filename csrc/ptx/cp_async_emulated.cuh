// cp.async (sm_80): copies from global to shared memory that run while the thread goes on.
#pragma once

#include "emulator/instructions.h"
#include "ptx/address.cuh"
#include "ptx/common.cuh"

namespace fastgpt {

template <int kBytes = 16>
FASTGPT_PTX void cp_async(void* shared_to, const void* from, bool inside = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  emulator::cp_async(shared_to, from, kBytes, inside ? kBytes : 0);
}

FASTGPT_PTX void cp_async_commit() { emulator::cp_async_commit(); }

template <int kGroupsLeft>
FASTGPT_PTX void cp_async_wait() {
  emulator::cp_async_wait(kGroupsLeft);
}

}  // namespace fastgpt

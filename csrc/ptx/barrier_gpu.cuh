// Barriers for some warps of a block (bar), and of a cluster; how many registers a warpgroup has (sm_90).
#pragma once

#include "ptx/common.cuh"

namespace fastgpt {

// Barriers 1 to 15 for kThreads threads (whole warps); 0 is __syncthreads's.
FASTGPT_PTX void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FASTGPT_PTX void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

FASTGPT_PTX void cluster_arrive() {
  FASTGPT_SM90(asm volatile("barrier.cluster.arrive.release.aligned;" :: : "memory"));
}
FASTGPT_PTX void cluster_wait() { FASTGPT_SM90(asm volatile("barrier.cluster.wait.acquire.aligned;" :: : "memory")); }

template <int kRegisters>
FASTGPT_PTX void give_back_registers_down_to() {
  FASTGPT_SM90(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters)));
}

template <int kRegisters>
FASTGPT_PTX void take_registers_up_to() {
  FASTGPT_SM90(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters)));
}

}  // namespace fastgpt

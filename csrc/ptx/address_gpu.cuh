// Addresses of shared memory, a block's own and those of its cluster.
#pragma once

#include "ptx/common.cuh"

namespace fastgpt {

// As instructions take it.
FASTGPT_PTX uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same variable in the shared memory of another block of the cluster; ordinary loads and stores take it.
template <class T>
FASTGPT_PTX T* map_to_rank(T* pointer, unsigned rank) {
  T* mapped = nullptr;
  FASTGPT_SM90(asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(pointer), "r"(rank)));
  return mapped;
}

FASTGPT_PTX unsigned cluster_rank() {
  unsigned rank = 0;
  FASTGPT_SM90(asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)));
  return rank;
}

}  // namespace fastgpt

// Addresses of shared memory, a block's own and those of its cluster.
#pragma once

#include "emulator/instructions.h"
#include "ptx/common.cuh"

namespace fastgpt {

FASTGPT_PTX uint32_t shared_address(const void* pointer) { return emulator::shared_address(pointer); }

template <class T>
FASTGPT_PTX T* map_to_rank(T* pointer, unsigned rank) {
  return static_cast<T*>(emulator::map_to_rank(pointer, rank));
}

FASTGPT_PTX unsigned cluster_rank() { return emulator::cluster_rank(); }

}  // namespace fastgpt

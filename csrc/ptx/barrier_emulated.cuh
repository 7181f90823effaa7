// Barriers for some warps of a block (bar), and of a cluster; how many registers a warpgroup has (sm_90).
#pragma once

#include "emulator/instructions.h"
#include "ptx/common.cuh"

namespace fastgpt {

FASTGPT_PTX void barrier_sync(int id, int threads) { emulator::named_barrier(id, threads, true); }
FASTGPT_PTX void barrier_arrive(int id, int threads) { emulator::named_barrier(id, threads, false); }

FASTGPT_PTX void cluster_arrive() { emulator::cluster_arrive(); }
FASTGPT_PTX void cluster_wait() { emulator::cluster_wait(); }

template <int kRegisters>
FASTGPT_PTX void give_back_registers_down_to() {
  emulator::set_max_registers(kRegisters);
}

template <int kRegisters>
FASTGPT_PTX void take_registers_up_to() {
  emulator::set_max_registers(kRegisters);
}

}  // namespace fastgpt

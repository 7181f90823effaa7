// mbarrier (sm_90): barriers in shared memory that count arrivals, and bytes that the TMA unit brings.
#pragma once

#include "emulator/instructions.h"
#include "ptx/address.cuh"
#include "ptx/common.cuh"

namespace fastgpt {

FASTGPT_PTX void mbarrier_init(uint64_t& barrier, int arrivals) { emulator::mbarrier_init(&barrier, arrivals); }
FASTGPT_PTX void mbarrier_invalidate(uint64_t& barrier) { emulator::mbarrier_invalidate(&barrier); }
FASTGPT_PTX void fence_mbarrier_init() { emulator::fence_mbarrier_init(); }
FASTGPT_PTX void mbarrier_arrive(uint64_t& barrier) { emulator::mbarrier_arrive(&barrier, 0); }
FASTGPT_PTX void mbarrier_arrive_expect_bytes(uint64_t& barrier, uint32_t bytes) {
  emulator::mbarrier_arrive(&barrier, bytes);
}
FASTGPT_PTX void mbarrier_expect_bytes(uint64_t& barrier, uint32_t bytes) {
  emulator::mbarrier_expect(&barrier, bytes);
}
FASTGPT_PTX void mbarrier_arrive_at_rank(uint64_t& barrier, unsigned rank) {
  emulator::mbarrier_arrive_at_rank(&barrier, rank);
}
FASTGPT_PTX void mbarrier_wait(uint64_t& barrier, unsigned parity) { emulator::mbarrier_wait(&barrier, parity); }
FASTGPT_PTX void fence_proxy_async() { emulator::fence_proxy_async(); }

}  // namespace fastgpt

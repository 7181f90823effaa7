// mbarrier (sm_90): barriers in shared memory that count arrivals, and bytes that the TMA unit brings.
#pragma once

#include "ptx/address.cuh"
#include "ptx/common.cuh"

namespace fastgpt {

FASTGPT_PTX void mbarrier_init(uint64_t& barrier, int arrivals) {
  FASTGPT_SM90(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
                            "r"(arrivals) : "memory"));
}

// After the last use, before the memory serves anything else.
FASTGPT_PTX void mbarrier_invalidate(uint64_t& barrier) {
  FASTGPT_SM90(asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory"));
}

// Initialisations become visible to the cluster and to the TMA unit; a barrier of the block or cluster must follow.
FASTGPT_PTX void fence_mbarrier_init() {
  FASTGPT_SM90(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"));
}

FASTGPT_PTX void mbarrier_arrive(uint64_t& barrier) {
  FASTGPT_SM90(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory"));
}

FASTGPT_PTX void mbarrier_arrive_expect_bytes(uint64_t& barrier, uint32_t bytes) {
  FASTGPT_SM90(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
                            "r"(bytes) : "memory"));
}

FASTGPT_PTX void mbarrier_expect_bytes(uint64_t& barrier, uint32_t bytes) {
  FASTGPT_SM90(asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
                            "r"(bytes) : "memory"));
}

// At the same barrier of another block of the cluster.
FASTGPT_PTX void mbarrier_arrive_at_rank(uint64_t& barrier, unsigned rank) {
  FASTGPT_SM90(asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(&barrier)),
      "r"(rank) : "memory"));
}

// Until the phase of this parity is over; the first phase has parity 0.
FASTGPT_PTX void mbarrier_wait(uint64_t& barrier, unsigned parity) {
  FASTGPT_SM90(
      asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                   "@!done bra again;\n}" ::"r"(shared_address(&barrier)),
                   "r"(parity) : "memory"));
}

// What this thread has seen written to shared memory may be read by the TMA unit and by wgmma.
FASTGPT_PTX void fence_proxy_async() { FASTGPT_SM90(asm volatile("fence.proxy.async.shared::cta;" :: : "memory")); }

}  // namespace fastgpt

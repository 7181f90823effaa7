// The tensor memory accelerator (sm_90): boxes of tensors of up to five dimensions, copied by one thread.
#pragma once

#include "emulator/instructions.h"
#include "ptx/address.cuh"
#include "ptx/common.cuh"

namespace fastgpt {

using TensorMap = emulator::TensorMap;
using TensorType = emulator::TensorType;

inline TensorMap make_tensor_map(const void* base, TensorType type, unsigned rank, const uint64_t* sizes,
                                 const uint64_t* strides, const uint32_t* box, unsigned swizzle) {
  return emulator::make_tensor_map(const_cast<void*>(base), type, rank, sizes, strides, box, swizzle);
}

constexpr TensorType kTensorF32 = TensorType::f32, kTensorF16 = TensorType::f16, kTensorBf16 = TensorType::bf16;

template <int kRank>
FASTGPT_PTX void tma_load(void* shared_to, const TensorMap& map, uint64_t& barrier, const int (&at)[kRank]) {
  emulator::tma_load(shared_to, map, &barrier, at, kRank, 0);
}

template <int kRank>
FASTGPT_PTX void tma_load_multicast(void* shared_to, const TensorMap& map, uint64_t& barrier, const int (&at)[kRank],
                                    uint16_t blocks) {
  emulator::tma_load(shared_to, map, &barrier, at, kRank, blocks);
}

template <int kRank>
FASTGPT_PTX void tma_store(const TensorMap& map, const void* shared_from, const int (&at)[kRank]) {
  emulator::tma_store(map, shared_from, at, kRank);
}

template <int kRank>
FASTGPT_PTX void tma_reduce_add(const TensorMap& map, const void* shared_from, const int (&at)[kRank]) {
  emulator::tma_reduce_add(map, shared_from, at, kRank);
}

FASTGPT_PTX void bulk_load(void* shared_to, const void* from, uint32_t bytes, uint64_t& barrier) {
  emulator::bulk_load(shared_to, from, bytes, &barrier);
}
FASTGPT_PTX void bulk_store(void* to, const void* shared_from, uint32_t bytes) {
  emulator::bulk_store(to, shared_from, bytes);
}
FASTGPT_PTX void bulk_reduce_add(float* to, const float* shared_from, uint32_t bytes) {
  emulator::bulk_reduce_add(TensorType::f32, to, shared_from, bytes);
}

FASTGPT_PTX void bulk_commit() { emulator::bulk_commit(); }

template <int kGroupsLeft>
FASTGPT_PTX void bulk_wait() {
  emulator::bulk_wait(kGroupsLeft, false);
}

template <int kGroupsLeft>
FASTGPT_PTX void bulk_wait_read() {
  emulator::bulk_wait(kGroupsLeft, true);
}

}  // namespace fastgpt

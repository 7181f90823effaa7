// The tensor memory accelerator (sm_90): boxes of tensors of up to five dimensions, copied by one thread.
#pragma once

#include <cuda.h>

#include <stdexcept>

#include "ptx/address.cuh"
#include "ptx/common.cuh"

namespace fastgpt {

using TensorMap = CUtensorMap;
using TensorType = CUtensorMapDataType;

// Describes a tensor for the TMA unit. Dimension 0 is the contiguous one; strides, in bytes, are those of the others.
// swizzle: 0, 32, 64 or 128 bytes. To be passed to a kernel as const __grid_constant__ TensorMap.
inline TensorMap make_tensor_map(const void* base, TensorType type, unsigned rank, const uint64_t* sizes,
                                 const uint64_t* strides, const uint32_t* box, unsigned swizzle) {
  // The driver's function is found through the runtime, so that nothing links against libcuda.
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    constexpr unsigned kSinceVersion = 12000;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, kSinceVersion, cudaEnableDefault, &found);
    if (error != cudaSuccess || !entry)
      throw std::runtime_error("the CUDA driver has no tensor maps: it must be 12.0 or newer");
    return reinterpret_cast<Encode>(entry);
  }();
  static const uint32_t kDense[5] = {1, 1, 1, 1, 1};
  const CUtensorMapSwizzle kind = swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                  : swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                  : swizzle == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                  : CU_TENSOR_MAP_SWIZZLE_NONE;
  TensorMap map;
  const CUresult result =
      encode(&map, type, rank, const_cast<void*>(base), sizes, strides, box, kDense, CU_TENSOR_MAP_INTERLEAVE_NONE,
             kind, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::invalid_argument("tensor map: refused by the driver");
  return map;
}

constexpr TensorType kTensorF32 = CU_TENSOR_MAP_DATA_TYPE_FLOAT32, kTensorF16 = CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                     kTensorBf16 = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

// Starts the copy of the box at these coordinates, the contiguous one first. Its bytes, also of what lies outside the
// tensor and becomes zero, count towards the barrier. By one thread.
FASTGPT_PTX void tma_load(void* shared_to, const TensorMap& map, uint64_t& barrier, const int (&at)[1]) {
  FASTGPT_SM90(asm volatile(
      "cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3}], [%2];" ::"r"(
          shared_address(shared_to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(at[0]) : "memory"));
}
FASTGPT_PTX void tma_load(void* shared_to, const TensorMap& map, uint64_t& barrier, const int (&at)[2]) {
  FASTGPT_SM90(asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(shared_address(shared_to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(at[0]), "r"(at[1]) : "memory"));
}
FASTGPT_PTX void tma_load(void* shared_to, const TensorMap& map, uint64_t& barrier, const int (&at)[3]) {
  FASTGPT_SM90(
      asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
                   "%4, %5}], [%2];" ::"r"(shared_address(shared_to)),
                   "l"(&map), "r"(shared_address(&barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]) : "memory"));
}
FASTGPT_PTX void tma_load(void* shared_to, const TensorMap& map, uint64_t& barrier, const int (&at)[4]) {
  FASTGPT_SM90(asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(shared_to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]) : "memory"));
}
FASTGPT_PTX void tma_load(void* shared_to, const TensorMap& map, uint64_t& barrier, const int (&at)[5]) {
  FASTGPT_SM90(asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, "
      "%7}], [%2];" ::"r"(shared_address(shared_to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]) : "memory"));
}

// The same into every block of the cluster whose bit is set, at the same place, counting towards its own barrier there.
FASTGPT_PTX void tma_load_multicast(void* shared_to, const TensorMap& map, uint64_t& barrier, const int (&at)[1],
                                    uint16_t blocks) {
  FASTGPT_SM90(asm volatile(
      "cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%4}], [%2], %3;" ::"r"(shared_address(shared_to)),
      "l"(&map), "r"(shared_address(&barrier)), "h"(blocks), "r"(at[0]) : "memory"));
}
FASTGPT_PTX void tma_load_multicast(void* shared_to, const TensorMap& map, uint64_t& barrier, const int (&at)[2],
                                    uint16_t blocks) {
  FASTGPT_SM90(asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%4, %5}], [%2], %3;" ::"r"(shared_address(shared_to)),
      "l"(&map), "r"(shared_address(&barrier)), "h"(blocks), "r"(at[0]), "r"(at[1]) : "memory"));
}
FASTGPT_PTX void tma_load_multicast(void* shared_to, const TensorMap& map, uint64_t& barrier, const int (&at)[3],
                                    uint16_t blocks) {
  FASTGPT_SM90(asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(shared_address(shared_to)),
      "l"(&map), "r"(shared_address(&barrier)), "h"(blocks), "r"(at[0]), "r"(at[1]), "r"(at[2]) : "memory"));
}
FASTGPT_PTX void tma_load_multicast(void* shared_to, const TensorMap& map, uint64_t& barrier, const int (&at)[4],
                                    uint16_t blocks) {
  FASTGPT_SM90(asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(shared_address(shared_to)),
      "l"(&map), "r"(shared_address(&barrier)), "h"(blocks), "r"(at[0]), "r"(at[1]), "r"(at[2]),
      "r"(at[3]) : "memory"));
}
FASTGPT_PTX void tma_load_multicast(void* shared_to, const TensorMap& map, uint64_t& barrier, const int (&at)[5],
                                    uint16_t blocks) {
  FASTGPT_SM90(asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%4, %5, %6, %7, %8}], [%2], %3;" ::"r"(shared_address(shared_to)),
      "l"(&map), "r"(shared_address(&barrier)), "h"(blocks), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
      "r"(at[4]) : "memory"));
}

// From shared memory to the box; what lies outside the tensor is dropped. Needs bulk_commit() and bulk_wait().
FASTGPT_PTX void tma_store(const TensorMap& map, const void* shared_from, const int (&at)[1]) {
  FASTGPT_SM90(asm volatile("cp.async.bulk.tensor.1d.global.shared::cta.tile.bulk_group [%0, {%2}], [%1];" ::"l"(&map),
                            "r"(shared_address(shared_from)), "r"(at[0]) : "memory"));
}
FASTGPT_PTX void tma_store(const TensorMap& map, const void* shared_from, const int (&at)[2]) {
  FASTGPT_SM90(
      asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
                   "r"(shared_address(shared_from)), "r"(at[0]), "r"(at[1]) : "memory"));
}
FASTGPT_PTX void tma_store(const TensorMap& map, const void* shared_from, const int (&at)[3]) {
  FASTGPT_SM90(
      asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
                   "r"(shared_address(shared_from)), "r"(at[0]), "r"(at[1]), "r"(at[2]) : "memory"));
}
FASTGPT_PTX void tma_store(const TensorMap& map, const void* shared_from, const int (&at)[4]) {
  FASTGPT_SM90(asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
      "r"(shared_address(shared_from)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]) : "memory"));
}
FASTGPT_PTX void tma_store(const TensorMap& map, const void* shared_from, const int (&at)[5]) {
  FASTGPT_SM90(asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map),
      "r"(shared_address(shared_from)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]) : "memory"));
}

// Adds to the box, element by element, atomically but in no set order.
FASTGPT_PTX void tma_reduce_add(const TensorMap& map, const void* shared_from, const int (&at)[1]) {
  FASTGPT_SM90(asm volatile(
      "cp.reduce.async.bulk.tensor.1d.global.shared::cta.add.tile.bulk_group [%0, {%2}], [%1];" ::"l"(&map),
      "r"(shared_address(shared_from)), "r"(at[0]) : "memory"));
}
FASTGPT_PTX void tma_reduce_add(const TensorMap& map, const void* shared_from, const int (&at)[2]) {
  FASTGPT_SM90(asm volatile(
      "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
      "r"(shared_address(shared_from)), "r"(at[0]), "r"(at[1]) : "memory"));
}
FASTGPT_PTX void tma_reduce_add(const TensorMap& map, const void* shared_from, const int (&at)[3]) {
  FASTGPT_SM90(asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
      "r"(shared_address(shared_from)), "r"(at[0]), "r"(at[1]), "r"(at[2]) : "memory"));
}
FASTGPT_PTX void tma_reduce_add(const TensorMap& map, const void* shared_from, const int (&at)[4]) {
  FASTGPT_SM90(asm volatile(
      "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
      "r"(shared_address(shared_from)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]) : "memory"));
}
FASTGPT_PTX void tma_reduce_add(const TensorMap& map, const void* shared_from, const int (&at)[5]) {
  FASTGPT_SM90(asm volatile(
      "cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(
          &map),
      "r"(shared_address(shared_from)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]) : "memory"));
}

// The same for contiguous bytes, multiples of 16, without a tensor map.
FASTGPT_PTX void bulk_load(void* shared_to, const void* from, uint32_t bytes, uint64_t& barrier) {
  FASTGPT_SM90(
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       shared_address(shared_to)),
                   "l"(from), "r"(bytes), "r"(shared_address(&barrier)) : "memory"));
}
FASTGPT_PTX void bulk_store(void* to, const void* shared_from, uint32_t bytes) {
  FASTGPT_SM90(asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
                            "r"(shared_address(shared_from)), "r"(bytes) : "memory"));
}
FASTGPT_PTX void bulk_reduce_add(float* to, const float* shared_from, uint32_t bytes) {
  FASTGPT_SM90(asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
                            "r"(shared_address(shared_from)), "r"(bytes) : "memory"));
}

FASTGPT_PTX void bulk_commit() { FASTGPT_SM90(asm volatile("cp.async.bulk.commit_group;" :: : "memory")); }

// Until at most kGroupsLeft of this thread's groups of stores are unfinished.
template <int kGroupsLeft>
FASTGPT_PTX void bulk_wait() {
  FASTGPT_SM90(asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kGroupsLeft) : "memory"));
}

// The same, but only until their sources in shared memory may be reused: nobody may rely on the results yet.
template <int kGroupsLeft>
FASTGPT_PTX void bulk_wait_read() {
  FASTGPT_SM90(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroupsLeft) : "memory"));
}

}  // namespace fastgpt

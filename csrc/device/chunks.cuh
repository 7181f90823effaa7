// Many tensors in one launch: each is cut into chunks of one size, and a block takes one chunk.
//
// The table of tensors is the kernel's parameter. It needs no memory on the device and no copy, and a CUDA graph that
// captures the launch keeps it: a replay works on the same tensors, whatever has become of the table on the host.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/cuda.h"

namespace fastgpt {

// Tensor has a member int32_t first_chunk, which is the table's. To be passed as const __grid_constant__.
template <class Tensor, class Common>
struct ChunkTable {
  static constexpr size_t kMostBytes = 4096;  // of parameters, on every chip
  static constexpr size_t kMostTensors = (kMostBytes - sizeof(Common) - 2 * sizeof(int64_t)) / sizeof(Tensor);

  Common common;
  int32_t count = 0, chunks = 0;
  Tensor tensors[kMostTensors];

  explicit ChunkTable(const Common& common) : common(common) {}

  bool full() const { return count == int32_t(kMostTensors); }
  // 2^31 chunks are more than any memory holds.
  void add(const Tensor& tensor, int64_t chunks_of_tensor) {
    tensors[count] = tensor;
    tensors[count++].first_chunk = chunks;
    chunks += int32_t(chunks_of_tensor);
  }

  // The tensor of this block: the last one whose first chunk is not past it.
  __device__ __forceinline__ const Tensor& tensor_of_block() const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (tensors[middle].first_chunk <= int(blockIdx.x)) low = middle;
      else high = middle - 1;
    }
    return tensors[low];
  }
};

}  // namespace fastgpt

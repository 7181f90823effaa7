// Sums over the threads of a warp or a block, in an order that never changes. Every thread gets the sums.
#pragma once

#include "device/cuda.h"

namespace fastgpt {

constexpr int kWarp = 32;

template <class A>
__device__ __forceinline__ A warp_sum(A x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// Replaces each value by its sum over kThreads threads: a warp, or a block of that size. All of them must be here.
template <int kThreads, int kCount, class A>
__device__ __forceinline__ void sum_over(A (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = warp_sum(values[i]);
  if constexpr (kThreads > kWarp) {
    constexpr int kWarps = kThreads / kWarp;
    __shared__ A of_warp[kWarps][kCount];
    __syncthreads();  // the sums of the call before this one have been read
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp][i] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = A(0);
      for (int warp = 0; warp < kWarps; ++warp) values[i] += of_warp[warp][i];
    }
  }
}

// The sum of `count` elements, each `stride` after the one before, of a lane's own: a block of kWarps warps has 32 such
// columns, and each warp adds up every kWarps-th row, 128 bytes at a time. In double. The first warp gets the sums; all of
// the block must be here, also lanes without a column (!exists).
template <int kWarps, class A>
__device__ __forceinline__ double sum_of_column(const A* first, int64_t count, int64_t stride, bool exists) {
  __shared__ double of_warp[kWarps][kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  double sum = 0;
  if (exists) {
    for (int64_t i = warp; i < count; i += kWarps) sum += first[i * stride];
  }
  of_warp[warp][lane] = sum;
  __syncthreads();
  if (warp == 0) {
    for (int other = 1; other < kWarps; ++other) sum += of_warp[other][lane];
  }
  return sum;
}

}  // namespace fastgpt

// Kernels that see each element alone: a thread has kSize neighbours of a row, and each row belongs to many threads.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/bounds.cuh"
#include "device/numeric.cuh"
#include "device/vector.cuh"

namespace fastgpt {

struct Place {
  bool exists;  // false: there is nothing left for this thread
  int64_t row, column;

  template <class T>
  __device__ __forceinline__ const T* in(const ConstRows& rows) const {
    return static_cast<const T*>(rows.data) + row * rows.stride + column;
  }
  template <class T>
  __device__ __forceinline__ T* in(void* rows, int64_t stride) const {
    return static_cast<T*>(rows) + row * stride + column;
  }
};

// Where this thread's elements begin; columns is a multiple of kSize.
template <int kSize>
__device__ __forceinline__ Place place_of_thread(int64_t rows, int64_t columns) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, of_row = columns / kSize;
  const int64_t row = rows == 1 ? 0 : i / of_row;  // a division is as much work as several elements
  return {in_bounds(i, rows * of_row), row, i * kSize - row * columns};
}

// Blocks of `threads` for all elements of a tensor; rows * columns > 0.
inline unsigned elementwise_blocks(int64_t rows, int64_t columns, int size, int threads) {
  return unsigned((rows * (columns / size) + threads - 1) / threads);
}

// f(T(), size) for the type behind a dtype, and the size of its vectors as a constant: 16 bytes, or one element.
template <class F>
void with_vectors(DType dtype, bool whole_vectors, F f) {
  const auto with = [&](auto zero) {
    if (whole_vectors) f(zero, std::integral_constant<int, 16 / sizeof(zero)>());
    else f(zero, std::integral_constant<int, 1>());
  };
  switch (dtype) {
    case DType::float64: return with(double());
    case DType::float32: return with(float());
    case DType::bfloat16: return with(__nv_bfloat16());
    case DType::float16: return with(__half());
  }
}

}  // namespace fastgpt

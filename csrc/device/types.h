// What a launcher's parameters are made of. No torch, no CUDA headers, so that both sides of an <op>.h may include it.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace fastgpt {

enum class DType { float64, float32, bfloat16, float16 };

using Stream = CUstream_st*;  // a cudaStream_t

constexpr int bytes_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// Rows of a tensor to read: a row's elements are neighbours, and the next row begins `stride` elements on.
struct ConstRows {
  const void* data = nullptr;
  int64_t stride = 0;
};

// Heads of D neighbours each, to read: (B, T, heads, D) with a stride for each of the first three dimensions.
struct ConstHeads {
  const void* data = nullptr;
  int64_t batch = 0, token = 0, head = 0;
};

}  // namespace fastgpt

// What a launcher's parameters are made of. No torch, no CUDA headers, so that both sides of an <op>.h may include it.
#pragma once

struct CUstream_st;

namespace fastgpt {

enum class DType { float64, float32, bfloat16, float16 };

using Stream = CUstream_st*;  // a cudaStream_t

constexpr int bytes_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

}  // namespace fastgpt

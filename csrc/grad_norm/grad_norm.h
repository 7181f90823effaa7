// The sum of the squares of many tensors: what the kernels in grad_norm.cu are given. No torch, no CUDA headers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/types.h"

namespace fastgpt {

struct GradNormTensor {
  const void* data = nullptr;
  int64_t count = 0;        // contiguous elements
  int32_t first_chunk = 0;  // of a launch, filled in by the launcher: the first block for this tensor
  DType dtype = DType::float32;
};

// A thread squares and adds up in float, or in double where `wide`.
struct GradNorm {
  const GradNormTensor* tensors = nullptr;
  size_t count = 0;
  bool wide = false;
  double* partials = nullptr;  // (grad_norm_chunks of all tensors): workspace
  void* out = nullptr;         // one number: float, or double where `wide`
};

// How many partial sums a tensor has.
int64_t grad_norm_chunks(int64_t count);

void launch_grad_norm(const GradNorm& p, Stream stream);

}  // namespace fastgpt

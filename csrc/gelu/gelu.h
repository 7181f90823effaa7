// GELU and its gradient: what the kernels in gelu.cu are given. No torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "device/types.h"

namespace fastgpt {

// y = gelu(x), or d_x = d_y * gelu'(x): N rows of C elements each, all of one dtype.
struct Gelu {
  int64_t rows = 0, columns = 0;
  DType dtype = DType::float32;
  bool tanh = false;    // the approximation by tanh
  ConstRows x, d_y;     // d_y: of the backward
  void* out = nullptr;  // y or d_x, (N, C) contiguous
};

// vector: 16 bytes at a time; rows begin at multiples of 16 bytes, and their width is one. generic: serves everything.
enum class GeluPath { vector, generic };

void launch_gelu_forward(const Gelu& p, GeluPath path, Stream stream);
void launch_gelu_backward(const Gelu& p, GeluPath path, Stream stream);

}  // namespace fastgpt

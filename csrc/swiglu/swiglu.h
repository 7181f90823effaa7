// y = silu(gate) * up and its gradients: what the kernels in swiglu.cu are given. No torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "device/types.h"

namespace fastgpt {

// N rows of F elements each, all of one dtype. Packed or not is a matter of where rows begin: in [gate | up] those of up
// begin F elements after those of gate, and both are 2F elements apart.
struct SwigluForward {
  int64_t rows = 0, columns = 0;
  DType dtype = DType::float32;
  ConstRows gate, up;
  void* y = nullptr;  // (N, F) contiguous
};

struct SwigluBackward {
  int64_t rows = 0, columns = 0;
  DType dtype = DType::float32;
  ConstRows d_y, gate, up;
  void* d_gate = nullptr;  // null: not wanted
  void* d_up = nullptr;    // null: not wanted
  int64_t d_stride = 0;    // from a row of d_gate or d_up to the next
};

// vector: 16 bytes at a time; rows begin at multiples of 16 bytes, and their width is one. generic: serves everything.
enum class SwigluPath { vector, generic };

void launch_swiglu_forward(const SwigluForward& p, SwigluPath path, Stream stream);
void launch_swiglu_backward(const SwigluBackward& p, SwigluPath path, Stream stream);

}  // namespace fastgpt

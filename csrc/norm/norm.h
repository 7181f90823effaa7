// LayerNorm and RMSNorm: what the kernels in norm.cu are given. No torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "device/types.h"

namespace fastgpt {

// C elements, one for each column.
struct ConstChannels {
  const void* data = nullptr;  // null: not given
  DType dtype = DType::float32;
};
struct Channels {
  void* data = nullptr;  // null: not wanted
  DType dtype = DType::float32;
};

// N rows of C elements: r = x + residual;  y = (r - mean) * rstd * weight + bias
struct NormForward {
  int64_t rows = 0, columns = 0;
  DType dtype = DType::float32;  // of x, residual, new_residual and y
  bool subtract_mean = true;     // LayerNorm; RMSNorm is LayerNorm whose mean is taken to be 0
  double eps = 0;
  ConstRows x, residual;         // residual.data null: r = x
  ConstChannels weight, bias;    // null: ones, zeros
  void* new_residual = nullptr;  // (N, C) contiguous: r, rounded; written where there is a residual
  void* y = nullptr;             // (N, C) contiguous
  void* mean = nullptr;          // (N), float, or double for float64; null without subtract_mean
  void* rstd = nullptr;          // (N), likewise: 1 / sqrt(variance + eps)
};

// The gradients of y's definition above, by x and residual (the same), weight and bias.
struct NormBackward {
  int64_t rows = 0, columns = 0;
  DType dtype = DType::float32;  // of d_y, d_residual, r and d_x
  bool subtract_mean = true;
  ConstRows d_y, d_residual, r;  // d_residual.data null: new_residual was not used
  ConstChannels weight;
  const void* mean = nullptr;
  const void* rstd = nullptr;
  void* d_x = nullptr;  // (N, C) contiguous; null: not wanted
  Channels d_weight, d_bias;
  int64_t sums = 0, rows_of_sum = 0;  // what norm_split_rows said
  void* partials = nullptr;           // (2, sums, C), float, or double for float64: workspace
};

// vector: 16-byte accesses, a row in registers. generic: one element at a time; serves everything.
enum class NormPath { vector, generic };

// The widest row that the vector path holds in registers.
int64_t norm_widest_vector_row(DType dtype);

// Decides how many sums over how many rows each the backward first writes for every column: p.sums, p.rows_of_sum.
void norm_split_rows(NormBackward& p, NormPath path);

void launch_norm_forward(const NormForward& p, NormPath path, Stream stream);
void launch_norm_backward(const NormBackward& p, NormPath path, Stream stream);

}  // namespace fastgpt

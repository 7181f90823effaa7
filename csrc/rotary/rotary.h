// Rotary position embedding of query and key heads, and the norm before it: what the kernels in rotary.cu are given.
// No torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "device/types.h"

namespace fastgpt {

// What every kernel here is told. Tables are float, and double for float64.
struct RotaryPlan {
  int64_t batches = 0, tokens = 0;               // B, T
  int64_t q_heads = 0, k_heads = 0, v_heads = 0;
  int64_t width = 0, half = 0;                   // D, and half of the dimensions that are rotated
  DType dtype = DType::float32;
  const void *cos = nullptr, *sin = nullptr;     // (table_rows, half)
  int64_t table_rows = 0;
  const void* positions = nullptr;               // null: 0, 1, ... T - 1
  bool long_positions = false;                   // int64, and not int32
  int64_t positions_batch = 0;                   // from one row of positions to the next; 0: one for all
};

// y is x with its query and key heads rotated: (B, T, q + k + v, D), contiguous.
struct Rotary {
  RotaryPlan plan;
  ConstHeads x;
  void* y = nullptr;
  bool in_place = false;  // y is x: what does not change is not written
  bool backwards = false;
};

// The same of x / sqrt(mean(x^2) + eps) * weight.
struct RotaryNormForward {
  RotaryPlan plan;
  ConstHeads x;
  const void *q_weight = nullptr, *k_weight = nullptr;  // (D)
  DType q_weight_dtype = DType::float32, k_weight_dtype = DType::float32;
  double eps = 0;
  void* y = nullptr;
};

struct RotaryNormBackward {
  RotaryPlan plan;
  ConstHeads x, d_y;
  const void *q_weight = nullptr, *k_weight = nullptr;
  DType q_weight_dtype = DType::float32, k_weight_dtype = DType::float32;
  double eps = 0;
  void* d_x = nullptr;                                // (B, T, q + k + v, D) contiguous; null: not wanted
  void *d_q_weight = nullptr, *d_k_weight = nullptr;  // both or none
  int64_t sums = 0, tokens_of_sum = 0;                // what rotary_split_tokens said
  void* partials = nullptr;                           // (sums, 2, D), float, or double for float64: workspace
  void* rstd = nullptr;                               // (B, T, q + k), likewise: workspace of the generic path
};

// vector: 16 bytes at a time. generic: one element at a time; serves everything.
enum class RotaryPath { vector, generic };

// Whether a head with its norm is narrow enough for the vector path.
bool rotary_norm_fits_vectors(const RotaryPlan& plan);

// Decides how many sums over how many tokens each the norm's backward first writes.
void rotary_split_tokens(RotaryNormBackward& p);

void launch_rotary(const Rotary& p, RotaryPath path, Stream stream);
void launch_rotary_norm_forward(const RotaryNormForward& p, RotaryPath path, Stream stream);
void launch_rotary_norm_backward(const RotaryNormBackward& p, RotaryPath path, Stream stream);

}  // namespace fastgpt

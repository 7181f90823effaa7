// AdamW over many tensors: what the kernels in adamw.cu are given. No torch, no CUDA headers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/types.h"

namespace fastgpt {

// A number, or where it lies on the device.
struct AdamWNumber {
  enum class Type : int { float64, float32, int64, boolean };
  double value = 0;
  const void* data = nullptr;  // null: it is `value`
  Type type = Type::float64;   // of what lies there
};

// The same for all tensors of a call.
struct AdamWOptions {
  AdamWNumber lr, step, clip, skip;
  double beta1 = 0, beta2 = 0, eps = 0, weight_decay = 0;
  double log_beta1 = 0, log_beta2 = 0;  // on the host once, not in every block
  uint64_t seed = 0;
};

// One tensor, or a run of its elements. Moments and masters are float, or double for float64.
struct AdamWTensor {
  void* param = nullptr;
  const void* grad = nullptr;
  void *exp_avg = nullptr, *exp_avg_sq = nullptr;
  void* master = nullptr;  // null: param takes the update itself, in bfloat16 rounded stochastically
  int64_t count = 0;
  uint64_t first_element = 0;  // what the first of them is called where random bits are drawn
  uint32_t id = 0;             // what the tensor is called there
  int32_t first_chunk = 0;     // of a launch, filled in by the launcher: the first block for this tensor
  DType dtype = DType::float32;
  bool wide_grad = false;  // grad is float where param has 16 bits
};

// vector: 16 bytes of moments at a time, and the same elements of the others; count is a multiple of
// adamw_vector(dtype). generic: one element at a time; serves everything.
enum class AdamWPath { vector, generic };

constexpr int adamw_vector(DType dtype) { return dtype == DType::float64 ? 2 : 4; }  // elements

// The tensors may be of several kinds. A launch takes as many of one kind as fit its parameters.
void launch_adamw(const AdamWOptions& options, const AdamWTensor* tensors, size_t count, AdamWPath path,
                  Stream stream);

}  // namespace fastgpt

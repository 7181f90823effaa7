// Cross-entropy of rows of logits and its gradient: what the kernels in cross_entropy.cu are given. No torch, no CUDA
// headers.
#pragma once

#include <cstdint>

#include "device/types.h"

namespace fastgpt {

// N rows of V logits x, and for each a target t; A is float, or double for float64 logits. Of a row
//   peak = max_j x_j,  sum = sum_j e^(x_j - peak),  LSE = peak + ln sum
//   loss = (1 - s) (LSE - x_t) + s (LSE - mean_j x_j) + z LSE^2
//   d_x_j = d_loss (e^(x_j - LSE) (1 + 2 z LSE) - (1 - s) [j = t] - s / V)
struct CrossEntropy {
  int64_t rows = 0;
  int columns = 0;     // of a row in memory
  int vocab_size = 0;  // V: columns from here on are padding
  DType dtype = DType::float32;
  ConstRows logits;
  const void* targets = nullptr;  // (N)
  bool targets_are_int64 = true;  // or int32
  int64_t ignore_index = -100;
  double label_smoothing = 0, z_loss = 0, softcap = 0;  // s, z; softcap 0: none, else x <- softcap * tanh(x / softcap)

  void* losses = nullptr;          // (N) A
  void* peak_and_rest = nullptr;   // (N, 2) A; null: not wanted
  const void* d_losses = nullptr;  // (N) A
  const void* known = nullptr;     // (N, 2) A: the peak_and_rest that the backward begins with
  void* d_logits = nullptr;        // rows of `columns`, d_stride apart; may be the logits; null: not wanted
  int64_t d_stride = 0;
  int kept_vectors = 0;            // of a row in shared memory between its two passes; set by the launcher
};

// vector: 16 bytes at a time; rows begin at multiples of 16 bytes, and their width is one. generic: serves everything.
enum class CrossEntropyPath { vector, generic };

// How many 16-byte vectors of a row stay in shared memory between the two passes of the vector path, and how many more in
// registers; the rest of a row that is too wide is read twice.
int cross_entropy_kept_vectors(const CrossEntropy& p);
int cross_entropy_vectors_in_registers(const CrossEntropy& p);

// Losses, and with d_logits their gradients.
void launch_cross_entropy(const CrossEntropy& p, CrossEntropyPath path, Stream stream);

// d_logits, from d_losses and known.
void launch_cross_entropy_backward(const CrossEntropy& p, CrossEntropyPath path, Stream stream);

}  // namespace fastgpt

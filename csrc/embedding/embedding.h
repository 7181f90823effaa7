// Rows of a table by id, and the table's gradient: what the kernels in embedding.cu are given. No torch, no CUDA
// headers.
#pragma once

#include <cstdint>

#include "device/types.h"

namespace fastgpt {

// y[n] = weight[ids[n]]; NaN where there is no such row.
struct EmbeddingForward {
  int64_t count = 0, rows = 0, columns = 0;  // N ids; V, C
  DType dtype = DType::float32;
  ConstRows weight;
  const void* ids = nullptr;  // (N)
  bool long_ids = false;      // int64, and not int32
  void* y = nullptr;          // (N, C) contiguous
};

// d_weight[v] = sum of d_y[order[i]] over begins[v] <= i < begins[v + 1]
struct EmbeddingBackward {
  int64_t count = 0, rows = 0, columns = 0;
  DType dtype = DType::float32;  // of d_y
  bool wide = false;             // d_weight is of the type that sums are kept in: float, or double for float64
  ConstRows d_y;
  const int64_t* order = nullptr;   // (N) places, by id, and each id's in their own order
  const int64_t* begins = nullptr;  // (V + 1)
  const void* sorted = nullptr;     // (N): the ids in that order
  bool long_ids = false;
  void* partials = nullptr;  // (embedding_runs, C), of the type that sums are kept in: workspace
  void* d_weight = nullptr;  // (V, C) contiguous
};

// vector: 16 bytes at a time. generic: one element at a time; serves everything.
enum class EmbeddingPath { vector, generic };

// How many runs of places the backward may add up beforehand.
int64_t embedding_runs(int64_t count);

void launch_embedding_forward(const EmbeddingForward& p, EmbeddingPath path, Stream stream);
void launch_embedding_backward(const EmbeddingBackward& p, EmbeddingPath path, Stream stream);

}  // namespace fastgpt

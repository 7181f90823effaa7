// The sum of the squares of many tensors, in an order that never changes.
//
// Every tensor is cut into chunks of kChunk elements. A block squares and adds up one chunk, whichever multiprocessor it
// runs on and whenever, and writes a partial sum to the chunk's own place. A second launch of one block adds up these.
// Nothing is atomic, and no sum depends on the size of the GPU. A thread adds up in float, kChunk / kThreads elements;
// from there on it is double, which costs nothing that counts, so the error does not grow with the number of parameters.
//
// A launch takes the chunks of as many tensors as fit its parameters (csrc/device/chunks.cuh).
//
// A thread has 16 bytes of neighbours at a time; where a tensor does not begin at a multiple of 16 bytes, or ends, it
// takes the same elements one by one, so the sum is the same.

#include "grad_norm/grad_norm.h"

#include "device/bounds.cuh"
#include "device/chunks.cuh"
#include "device/numeric.cuh"
#include "device/reduce.cuh"
#include "device/vector.cuh"
#include "host/launch.h"

namespace fastgpt {
namespace {

constexpr int kThreads = 256;
constexpr int kFinalThreads = 512;
constexpr int64_t kChunk = 16384;

using Table = ChunkTable<GradNormTensor, double*>;  // with the partial sums' place
static_assert(sizeof(Table) <= Table::kMostBytes);

// Of this thread's elements of a chunk that begins at `begin`.
template <class T, class A>
__device__ __forceinline__ A squares(const GradNormTensor& t, int64_t begin) {
  constexpr int kSize = Vec16<T>::kSize;
  const T* data = static_cast<const T*>(t.data);
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  A sums[kSize] = {};
#pragma unroll 4
  for (int n = 0; n < kChunk / (kThreads * kSize); ++n) {
    const int64_t i = begin + (n * kThreads + threadIdx.x) * kSize;
    Vec16<T> x;
    if (aligned && in_bounds(i + kSize - 1, t.count)) {
      x = load16(data + i);
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) x.at[j] = in_bounds(i + j, t.count) ? data[i + j] : T(0.0f);
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) sums[j] = fma(A(widen(x.at[j])), A(widen(x.at[j])), sums[j]);
  }
  A sum = 0;
#pragma unroll
  for (int j = 0; j < kSize; ++j) sum += sums[j];
  return sum;
}

template <class A>
__global__ __launch_bounds__(kThreads) void grad_norm_partials_kernel(const __grid_constant__ Table table) {
  const GradNormTensor& t = table.tensor_of_block();
  const int64_t begin = (int64_t(blockIdx.x) - t.first_chunk) * kChunk;
  double sums[1] = {};
  switch (t.dtype) {
    case DType::bfloat16: sums[0] = squares<__nv_bfloat16, A>(t, begin); break;
    case DType::float16: sums[0] = squares<__half, A>(t, begin); break;
    case DType::float32: sums[0] = squares<float, A>(t, begin); break;
    case DType::float64:
      if constexpr (sizeof(A) == 8) sums[0] = squares<double, A>(t, begin);
      break;
  }
  sum_over<kThreads>(sums);
  if (threadIdx.x == 0) table.common[blockIdx.x] = sums[0];
}

template <class A>
__global__ __launch_bounds__(kFinalThreads) void grad_norm_kernel(const double* partials, int64_t count, A* out) {
  double sums[1] = {};
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kFinalThreads) sums[0] += partials[i];
  sum_over<kFinalThreads>(sums);
  if (threadIdx.x == 0) *out = A(sums[0]);
}

template <class A>
void launch_with(const GradNorm& p, Stream stream) {
  Table table(p.partials);
  int64_t done = 0;
  const auto flush = [&] {
    launch(grad_norm_partials_kernel<A>, LaunchShape{dim3(unsigned(table.chunks)), dim3(kThreads), 0, stream}, table);
    done += table.chunks;
    table = Table(p.partials + done);
  };
  for (const GradNormTensor* t = p.tensors; t != p.tensors + p.count; ++t) {
    if (t->count == 0) continue;
    if (table.full()) flush();
    table.add(*t, grad_norm_chunks(t->count));
  }
  if (table.count) flush();
  launch(grad_norm_kernel<A>, LaunchShape{dim3(1), dim3(kFinalThreads), 0, stream}, p.partials, done,
         static_cast<A*>(p.out));
}

}  // namespace

int64_t grad_norm_chunks(int64_t count) { return (count + kChunk - 1) / kChunk; }

void launch_grad_norm(const GradNorm& p, Stream stream) {
  p.wide ? launch_with<double>(p, stream) : launch_with<float>(p, stream);
}

}  // namespace fastgpt

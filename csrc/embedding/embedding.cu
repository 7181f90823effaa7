// Rows of a table by id, and the gradient of the table.
//
// Forward: a warp copies a row, 16 bytes a lane at a time: an id is read once for 512 bytes. There is nothing to
// compute.
//
// Backward: many places may have the same id, and their gradients must be added up in an order that never changes. The
// page sorts the ids, so that the places of an id are neighbours in `order`, and finds where each id's begin. A warp
// then writes one row of d_weight: the sum over the row's places in float, rounded once, or zeros where it has none. A
// lane reads one entry of `order` for 32 of them, which a shuffle hands round, so that the loads of d_y do not wait for
// those of `order`.
//
// Text has ids that take a twentieth of all places, and a batch of padding has one that takes all: a single warp would
// be busy with it long after the others are done. So what fills a whole run of kRun sorted places is added up
// beforehand, every run by a warp of its own (embedding_runs_kernel), and the warp of the row adds up those sums. It is
// the same order of additions every time, so the result is, too; nothing is atomic. This is chosen by arithmetic; no
// time on a GPU has been taken so far.

#include "embedding/embedding.h"

#include "device/bounds.cuh"
#include "device/elementwise.cuh"
#include "device/numeric.cuh"
#include "device/reduce.cuh"
#include "device/vector.cuh"
#include "host/launch.h"

namespace fastgpt {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int64_t kRun = 64;

template <class T>
using Wide = decltype(widen(T()));

__device__ __forceinline__ int64_t index_of_warp() { return int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; }

__device__ __forceinline__ int64_t id_at(const void* ids, bool long_ids, int64_t i) {
  return long_ids ? static_cast<const int64_t*>(ids)[i] : static_cast<const int32_t*>(ids)[i];
}

template <class T, int kSize>
__global__ __launch_bounds__(kThreads) void embedding_forward_kernel(EmbeddingForward p) {
  const int64_t n = index_of_warp();
  if (!in_bounds(n, p.count)) return;
  const int64_t id = id_at(p.ids, p.long_ids, n);
  const bool exists = in_bounds(uint64_t(id), uint64_t(p.rows));
  const T* from = static_cast<const T*>(p.weight.data) + id * p.weight.stride;
  T* to = static_cast<T*>(p.y) + n * p.columns;
#pragma unroll 4
  for (int64_t column = threadIdx.x % kWarp * kSize; column < p.columns; column += kWarp * kSize) {
    Vec<T, kSize> values;
    if (exists) {
      values = load<kSize>(from + column);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) values.at[i] = narrow<T>(Wide<T>(NAN));
    }
    store(to + column, values);
  }
}

// sums += d_y[order[i]] from this lane's column on, for begin <= i < end. All of a warp are here; those beyond the
// last column read what the first lane reads, which costs nothing and saves a branch in the loop.
template <class T, int kSize, class A>
__device__ __forceinline__ void add_places(const EmbeddingBackward& p, int64_t begin, int64_t end, int64_t column,
                                           A (&sums)[kSize]) {
  const T* d_y = static_cast<const T*>(p.d_y.data) + (in_bounds(column, p.columns) ? column : 0);
  for (int64_t first = begin; first < end; first += kWarp) {
    const int lane = threadIdx.x % kWarp, count = int(min(end - first, int64_t(kWarp)));
    int64_t place_of_lane = 0;
    if (in_bounds(lane, count)) place_of_lane = p.order[first + lane];
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const Vec<T, kSize> of_place = load<kSize>(d_y + __shfl_sync(0xffffffffu, place_of_lane, i) * p.d_y.stride);
#pragma unroll
      for (int j = 0; j < kSize; ++j) sums[j] += widen(of_place.at[j]);
    }
  }
}

// sums += partials[run] for begin <= run < end.
template <int kSize, class A>
__device__ __forceinline__ void add_runs(const EmbeddingBackward& p, int64_t begin, int64_t end, int64_t column,
                                         A (&sums)[kSize]) {
  constexpr int kStep = kSize * sizeof(A) >= 16 ? 16 / sizeof(A) : 1;
  for (int64_t run = begin; run < end; ++run) {
    const A* of_run = static_cast<const A*>(p.partials) + run * p.columns + column;
#pragma unroll
    for (int i = 0; i < kSize; i += kStep) {
      const Vec<A, kStep> part = load<kStep>(of_run + i);
#pragma unroll
      for (int j = 0; j < kStep; ++j) sums[i + j] += part.at[j];
    }
  }
}

template <int kSize, class A>
__device__ __forceinline__ void store_all(A* to, const A (&from)[kSize]) {
  constexpr int kStep = kSize * sizeof(A) >= 16 ? 16 / sizeof(A) : 1;
#pragma unroll
  for (int i = 0; i < kSize; i += kStep) {
    Vec<A, kStep> part;
#pragma unroll
    for (int j = 0; j < kStep; ++j) part.at[j] = from[i + j];
    store(to + i, part);
  }
}

// partials[run]: the sum over a run of sorted places, if they all have the same id.
template <class T, int kSize>
__global__ __launch_bounds__(kThreads) void embedding_runs_kernel(EmbeddingBackward p) {
  using A = Wide<T>;
  const int64_t run = index_of_warp();
  if (!in_bounds(run, p.count / kRun)) return;
  const int64_t begin = run * kRun, end = begin + kRun;
  if (id_at(p.sorted, p.long_ids, begin) != id_at(p.sorted, p.long_ids, end - 1)) return;
  for (int64_t first = 0; first < p.columns; first += kWarp * kSize) {
    const int64_t column = first + threadIdx.x % kWarp * kSize;
    A sums[kSize] = {};
    add_places<T>(p, begin, end, column, sums);
    if (in_bounds(column, p.columns)) store_all(static_cast<A*>(p.partials) + run * p.columns + column, sums);
  }
}

template <class T, int kSize>
__global__ __launch_bounds__(kThreads) void embedding_backward_kernel(EmbeddingBackward p) {
  using A = Wide<T>;
  const int64_t row = index_of_warp();
  if (!in_bounds(row, p.rows)) return;
  const int64_t begin = p.begins[row], end = p.begins[row + 1];
  // Whole runs are in the middle, from first_run on; before and behind them are places of runs that the id shares.
  const int64_t first_run = (begin + kRun - 1) / kRun, runs = max(end / kRun - first_run, int64_t(0));
  const int64_t whole = runs > 0 ? first_run * kRun : end;

  for (int64_t first = 0; first < p.columns; first += kWarp * kSize) {
    const int64_t column = first + threadIdx.x % kWarp * kSize;
    A sums[kSize] = {};
    const bool has_columns = in_bounds(column, p.columns);
#pragma unroll 1  // two copies of the code are more than the registers that hold branches together
    for (int side = 0; side < 2; ++side) {
      add_places<T>(p, side ? whole + runs * kRun : begin, side ? end : whole, column, sums);
      if (side == 0 && has_columns) add_runs(p, first_run, first_run + runs, column, sums);
    }
    if (!has_columns) continue;
    if (p.wide) {
      store_all(static_cast<A*>(p.d_weight) + row * p.columns + column, sums);
    } else {
      Vec<T, kSize> rounded;
#pragma unroll
      for (int i = 0; i < kSize; ++i) rounded.at[i] = narrow<T>(sums[i]);
      store(static_cast<T*>(p.d_weight) + row * p.columns + column, rounded);
    }
  }
}

LaunchShape shape_of(int64_t warps, Stream stream) {
  return {dim3(unsigned((warps + kWarps - 1) / kWarps)), dim3(kThreads), 0, stream};
}

}  // namespace

int64_t embedding_runs(int64_t count) { return count / kRun; }

void launch_embedding_forward(const EmbeddingForward& p, EmbeddingPath path, Stream stream) {
  if (p.count == 0) return;
  with_vectors(p.dtype, path == EmbeddingPath::vector, [&](auto zero, auto size) {
    launch(embedding_forward_kernel<decltype(zero), size()>, shape_of(p.count, stream), p);
  });
}

void launch_embedding_backward(const EmbeddingBackward& p, EmbeddingPath path, Stream stream) {
  with_vectors(p.dtype, path == EmbeddingPath::vector, [&](auto zero, auto size) {
    using T = decltype(zero);
    if (p.count >= kRun) launch(embedding_runs_kernel<T, size()>, shape_of(p.count / kRun, stream), p);
    launch(embedding_backward_kernel<T, size()>, shape_of(p.rows, stream), p);
  });
}

}  // namespace fastgpt

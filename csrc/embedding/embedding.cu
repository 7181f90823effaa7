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
constexpr int kBackwardBlocks = 4;  // of a multiprocessor: 64 registers; left to itself ptxas spills for more on some chips

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

// A lane's sums in accesses of up to 16 bytes; those of 16-bit elements take two.
template <int kSize, class A>
struct Parts {
  static constexpr int kStep = kSize * sizeof(A) >= 16 ? 16 / sizeof(A) : 1, kCount = kSize / kStep;
  using Part = Vec<A, kStep>;

  static __device__ __forceinline__ Part of(const A (&sums)[kSize], int number) {
    Part part;
#pragma unroll
    for (int j = 0; j < kStep; ++j) part.at[j] = sums[number * kStep + j];
    return part;
  }
  // In a row of partials, which nobody else reads, come first the first parts of all lanes, then the second ones: a warp's
  // access has whole sectors.
  static __device__ __forceinline__ A* in_partials(const EmbeddingBackward& p, int64_t run, int64_t column, int number) {
    return static_cast<A*>(p.partials) + run * p.columns + (number * p.columns + column) / kCount;
  }
};

// sums += partials[run] for begin <= run < end.
template <int kSize, class A>
__device__ __forceinline__ void add_runs(const EmbeddingBackward& p, int begin, int end, int64_t column,
                                         A (&sums)[kSize]) {
  using P = Parts<kSize, A>;
  [[maybe_unused]] constexpr int kRuns = 2 / P::kCount;  // at a time
#pragma unroll kRuns
  for (int run = begin; run < end; ++run) {
#pragma unroll
    for (int number = 0; number < P::kCount; ++number) {
      const typename P::Part part = load<P::kStep>(P::in_partials(p, run, column, number));
#pragma unroll
      for (int j = 0; j < P::kStep; ++j) sums[number * P::kStep + j] += part.at[j];
    }
  }
}

// Where a lane has two parts, lanes 2k and 2k + 1 exchange one, so that a warp's stores have whole sectors: the first has
// the first 32 bytes of each pair, the second the others. A lane whose neighbour has no columns keeps both its own. All of
// a warp are here.
template <int kSize, class A>
struct Exchanged {
  using P = Parts<kSize, A>;
  typename P::Part part[P::kCount];
  int64_t place[P::kCount];

  __device__ __forceinline__ Exchanged(const A (&sums)[kSize], int64_t column, int64_t columns) {
    part[0] = P::of(sums, 0);
    place[0] = column;
    if constexpr (P::kCount == 2) {
      part[1] = P::of(sums, 1);
      place[1] = column + P::kStep;
      const bool odd = threadIdx.x % 2, paired = odd || in_bounds(column + kSize, columns);
      typename P::Part other;
#pragma unroll
      for (int j = 0; j < P::kStep; ++j) {
        other.at[j] = __shfl_xor_sync(0xffffffffu, odd ? part[0].at[j] : part[1].at[j], 1);
      }
      const typename P::Part first = part[0], second = part[1];
#pragma unroll
      for (int j = 0; j < P::kStep; ++j) {
        part[0].at[j] = odd ? other.at[j] : first.at[j];
        part[1].at[j] = !odd && paired ? other.at[j] : second.at[j];
      }
      place[0] -= odd ? P::kStep : 0;
      place[1] += !odd && paired ? P::kStep : 0;
    }
  }
};

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
    if (!in_bounds(column, p.columns)) continue;
#pragma unroll
    for (int number = 0; number < Parts<kSize, A>::kCount; ++number) {
      store(Parts<kSize, A>::in_partials(p, run, column, number), Parts<kSize, A>::of(sums, number));
    }
  }
}

template <class T, int kSize>
__global__ __launch_bounds__(kThreads, kBackwardBlocks) void embedding_backward_kernel(EmbeddingBackward p) {
  using A = Wide<T>;
  const int64_t row = index_of_warp();
  if (!in_bounds(row, p.rows)) return;
  const int64_t begin = p.begins[row], end = p.begins[row + 1];
  // Whole runs are in the middle, from first_run on; before and behind them are places of runs that the id shares.
  const int first_run = int((begin + kRun - 1) / kRun), runs = max(int(end / kRun) - first_run, 0);
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
    if (p.wide) {
      const Exchanged<kSize, A> exchanged(sums, column, p.columns);
#pragma unroll
      for (int number = 0; number < Parts<kSize, A>::kCount; ++number) {
        A* const to = static_cast<A*>(p.d_weight) + row * p.columns + exchanged.place[number];
        if (has_columns) store_whole(to, exchanged.part[number]);
      }
    } else if (has_columns) {
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

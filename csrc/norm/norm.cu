// LayerNorm and RMSNorm, forward and backward. Read norm_forward_kernel first.
//
// There is nothing to compute here, only memory to read and write, so each element is read once and written once, 16
// bytes at a time. A row stays in registers between the passes over it: its sum, then its variance around the mean
// just found (one pass over squares would cancel), then the result. RMSNorm is the same with a mean of 0.
//
// A thread has the same columns in every row it sees. So it reads their weight and bias once, before its first row,
// and in the backward it adds up their gradients in registers over many rows. This wants few blocks that stay: a grid
// of as many as run at a time (blocks_that_stay), each taking every n-th row.
//
// The gradients of weight and bias are sums over all rows. A block takes a run of rows, adds up in float, and writes
// one row of `partials`; a second, small kernel adds those up, in double. There are no atomics, so the result is the
// same every time; and a run has kMostRowsOfSum rows at most, so it is as exact for a million rows as for a thousand.
//
// Three tiles, by the width of a row:
//   NarrowTile  a warp for each row, so that its sums need shuffles and no barrier. Three vectors a lane are 768
//               columns of 16 bits, GPT-2's; with four, the backward's two sums for each column spilled on sm_90. Four
//               warps a block: they share one row of partials, which they add up through shared memory.
//   MiddleTile  128 threads for each row, two vectors a thread: 769 to 2048 columns of 16 bits. 1024 of them are one
//               vector for every thread.
//   WideTile    512 threads for each row, to 8192 columns. Wider ones are rare enough for the generic path.
// How many blocks stay on a multiprocessor is what their registers allow (ptxas -v: a thread of the backward holds the
// sums of all its columns, so 12 to 16 warps; the forward 16 to 24). __launch_bounds__ asks the compiler for just that,
// and blocks_that_stay counts on it. All this is chosen by registers, spills and counted bytes; no time on a GPU has
// been taken so far.
//
// The generic kernels serve everything else: float64, a width that is no multiple of a vector, memory that does not
// begin at one, rows too wide for registers. One element at a time, three passes over memory, most of it found in
// caches. norm.cpp: choose_path says which path serves a call.

#include "norm/norm.h"

#include <algorithm>
#include <stdexcept>

#include "device/bounds.cuh"
#include "device/numeric.cuh"
#include "device/reduce.cuh"
#include "device/vector.cuh"
#include "host/launch.h"
#include "host/multiprocessors.h"

namespace fastgpt {
namespace {

template <int row_threads, int threads>
struct Rows {
  static constexpr int kRowThreads = row_threads;       // a row's own: a warp, or all of a block's
  static constexpr int kThreads = threads;
  static constexpr int kRows = kThreads / kRowThreads;  // that a block works on at a time
};
// kVectors: 16-byte vectors of a row that a thread has, at most. Blocks: on a multiprocessor at a time.
struct NarrowTile : Rows<kWarp, 128> {
  static constexpr int kVectors = 3, kForwardBlocks = 4, kBackwardBlocks = 3;
};
struct MiddleTile : Rows<128, 128> {
  static constexpr int kVectors = 2, kForwardBlocks = 6, kBackwardBlocks = 4;
};
struct WideTile : Rows<512, 512> {
  static constexpr int kVectors = 2, kForwardBlocks = 1, kBackwardBlocks = 1;
};
struct GenericNarrowTile : Rows<kWarp, 128> {
  static constexpr int kForwardBlocks = 8, kBackwardBlocks = 8;
};
struct GenericWideTile : Rows<256, 256> {
  static constexpr int kForwardBlocks = 4, kBackwardBlocks = 4;
};
constexpr int64_t kWidestGenericNarrowRow = 1024;
constexpr int64_t kMostRowsOfSum = 64;  // that one thread adds up before it writes a partial sum

// The rows of a thread are first_row(), first_row() + row_step(), ...
template <class Tile>
__device__ __forceinline__ int64_t first_row() {
  return int64_t(blockIdx.x) * Tile::kRows + threadIdx.x / Tile::kRowThreads;
}
template <class Tile>
__device__ __forceinline__ int64_t row_step() {
  return int64_t(gridDim.x) * Tile::kRows;
}

// ---- the vector path ---------------------------------------------------------------------------------------------
// T: what rows are stored in.

template <class T>
__device__ __forceinline__ const T* row_of(const ConstRows& rows, int64_t row) {
  return static_cast<const T*>(rows.data) + row * rows.stride;
}

// kSize values of type W, from element `first` on, by 16-byte loads.
template <class W, int kSize>
__device__ __forceinline__ void load_widened(float (&to)[kSize], const void* from, int first) {
#pragma unroll
  for (int i = 0; i < kSize; i += Vec16<W>::kSize) {
    const Vec16<W> loaded = load16(static_cast<const W*>(from) + first + i);
#pragma unroll
    for (int j = 0; j < Vec16<W>::kSize && i + j < kSize; ++j) to[i + j] = widen(loaded.at[j]);
  }
}

// The weights of this thread's columns, widened once and kept; `otherwise` where there are none in memory.
template <class Tile, int kSize>
__device__ __forceinline__ void load_channels(float (&channels)[Tile::kVectors][kSize], const ConstChannels& from,
                                              float otherwise, int vectors) {
#pragma unroll
  for (int v = 0; v < Tile::kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) channels[v][i] = otherwise;
    const int vector = threadIdx.x % Tile::kRowThreads + v * Tile::kRowThreads;
    if (from.data && in_bounds(vector, vectors)) {
      switch (from.dtype) {
        case DType::bfloat16: load_widened<__nv_bfloat16>(channels[v], from.data, vector * kSize); break;
        case DType::float16: load_widened<__half>(channels[v], from.data, vector * kSize); break;
        default: load_widened<float>(channels[v], from.data, vector * kSize);
      }
    }
  }
}

// This thread's part of a row; zeros past its end.
template <class Tile, class T>
__device__ __forceinline__ void load_row(Vec16<T> (&values)[Tile::kVectors], const T* row, int vectors) {
#pragma unroll
  for (int v = 0; v < Tile::kVectors; ++v) {
    const int vector = threadIdx.x % Tile::kRowThreads + v * Tile::kRowThreads;
    values[v] = Vec16<T>{};
    if (in_bounds(vector, vectors)) values[v] = load16(row + vector * Vec16<T>::kSize);
  }
}

template <class T, class Tile>
__global__ __launch_bounds__(Tile::kThreads, Tile::kForwardBlocks) void norm_forward_kernel(NormForward p) {
  constexpr int kSize = Vec16<T>::kSize;
  const int vectors = int(p.columns / kSize), lane = threadIdx.x % Tile::kRowThreads;
  const float columns = float(p.columns), eps = float(p.eps);

  float weight[Tile::kVectors][kSize], bias[Tile::kVectors][kSize];
  load_channels<Tile>(weight, p.weight, 1.0f, vectors);
  load_channels<Tile>(bias, p.bias, 0.0f, vectors);

  for (int64_t row = first_row<Tile>(); row < p.rows; row += row_step<Tile>()) {
    Vec16<T> r[Tile::kVectors];
    load_row<Tile>(r, row_of<T>(p.x, row), vectors);
    if (p.residual.data) {
      Vec16<T> residual[Tile::kVectors];
      load_row<Tile>(residual, row_of<T>(p.residual, row), vectors);
#pragma unroll
      for (int v = 0; v < Tile::kVectors; ++v) {
        const int vector = lane + v * Tile::kRowThreads;
        // Rounded here and now: the backward will read it back, and must differentiate what this normalises.
#pragma unroll
        for (int i = 0; i < kSize; ++i) r[v].at[i] = narrow<T>(widen(r[v].at[i]) + widen(residual[v].at[i]));
        T* to = static_cast<T*>(p.new_residual) + row * p.columns + vector * kSize;
        if (in_bounds(vector, vectors)) store16(to, r[v]);
      }
    }

    float mean = 0;
    if (p.subtract_mean) {
      float sum[1] = {0};
#pragma unroll
      for (int v = 0; v < Tile::kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) sum[0] += widen(r[v].at[i]);
      }
      sum_over<Tile::kRowThreads>(sum);
      mean = sum[0] / columns;
    }

    float squares[1] = {0};
#pragma unroll
    for (int v = 0; v < Tile::kVectors; ++v) {
      // The zeros past the end are not zero once the mean is subtracted.
      if (!in_bounds(lane + v * Tile::kRowThreads, vectors)) continue;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float centred = widen(r[v].at[i]) - mean;
        squares[0] = fmaf(centred, centred, squares[0]);
      }
    }
    sum_over<Tile::kRowThreads>(squares);
    const float rstd = inverse_sqrt(squares[0] / columns + eps);

    if (lane == 0) {
      if (p.subtract_mean) static_cast<float*>(p.mean)[row] = mean;
      static_cast<float*>(p.rstd)[row] = rstd;
    }
#pragma unroll
    for (int v = 0; v < Tile::kVectors; ++v) {
      const int vector = lane + v * Tile::kRowThreads;
      Vec16<T> y;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        y.at[i] = narrow<T>((widen(r[v].at[i]) - mean) * rstd * weight[v][i] + bias[v][i]);
      }
      if (in_bounds(vector, vectors)) store16(static_cast<T*>(p.y) + row * p.columns + vector * kSize, y);
    }
  }
}

// Where a column's sum is kept in shared memory: eight lanes store 16 bytes each at every other vector, and this
// spreads them over all banks.
__device__ __forceinline__ int64_t place_of(int64_t column) { return column ^ (column >> 5 & 1) << 2; }

// Writes one row of partial sums: this block's threads put theirs into shared memory, and take out the sums over the
// rows that the block works on at a time, in the order in which a warp stores whole sectors.
template <class Tile, int kSize>
__device__ __forceinline__ void write_partials(const float (&sums)[Tile::kVectors][kSize], float* to, int64_t columns) {
  constexpr int kColumns = Tile::kVectors * Tile::kRowThreads * kSize;
  const int lane = threadIdx.x % Tile::kRowThreads;
  __shared__ float of_row[Tile::kRows][kColumns];
  __syncthreads();  // the sums that were here before have been read
#pragma unroll
  for (int v = 0; v < Tile::kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      store16(&of_row[threadIdx.x / Tile::kRowThreads][place_of((lane + v * Tile::kRowThreads) * kSize + i)],
              {sums[v][i], sums[v][i + 1], sums[v][i + 2], sums[v][i + 3]});
    }
  }
  __syncthreads();
  for (int64_t column = threadIdx.x; column < columns; column += Tile::kThreads) {
    float sum = 0;
#pragma unroll
    for (int row = 0; row < Tile::kRows; ++row) sum += of_row[row][place_of(column)];
    to[column] = sum;
  }
}

// With xhat = (r - mean) * rstd and g = d_y * weight:
//   d_x = rstd * (g - mean(g) - xhat * mean(g * xhat)) + d_residual;  d_weight = sum(d_y * xhat);  d_bias = sum(d_y)
// where mean(g) is the gradient through the mean: 0 in RMSNorm.
template <class T, class Tile>
__global__ __launch_bounds__(Tile::kThreads, Tile::kBackwardBlocks) void norm_backward_kernel(NormBackward p) {
  constexpr int kSize = Vec16<T>::kSize;
  const int vectors = int(p.columns / kSize), lane = threadIdx.x % Tile::kRowThreads;
  const float columns = float(p.columns);

  float weight[Tile::kVectors][kSize];
  load_channels<Tile>(weight, p.weight, 1.0f, vectors);

  for (int64_t sum = blockIdx.x; sum < p.sums; sum += gridDim.x) {
    float d_weight[Tile::kVectors][kSize] = {}, d_bias[Tile::kVectors][kSize] = {};
    const int64_t begin = sum * p.rows_of_sum, end = min(begin + p.rows_of_sum, p.rows);

    for (int64_t row = begin + threadIdx.x / Tile::kRowThreads; row < end; row += Tile::kRows) {
      Vec16<T> r[Tile::kVectors], d_y[Tile::kVectors];
      load_row<Tile>(r, row_of<T>(p.r, row), vectors);
      load_row<Tile>(d_y, row_of<T>(p.d_y, row), vectors);
      const float mean = p.subtract_mean ? static_cast<const float*>(p.mean)[row] : 0;
      const float rstd = static_cast<const float*>(p.rstd)[row];

      float of_row[2] = {0, 0};  // of g, and of g * xhat
#pragma unroll
      for (int v = 0; v < Tile::kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const float d = widen(d_y[v].at[i]), xhat = (widen(r[v].at[i]) - mean) * rstd;
          const float g = d * weight[v][i];
          of_row[0] += g;
          of_row[1] += g * xhat;
          d_weight[v][i] += d * xhat;
          d_bias[v][i] += d;
        }
      }
      if (!p.d_x) continue;
      sum_over<Tile::kRowThreads>(of_row);
      const float mean_g = p.subtract_mean ? of_row[0] / columns : 0, mean_g_xhat = of_row[1] / columns;

#pragma unroll
      for (int v = 0; v < Tile::kVectors; ++v) {
        const int vector = lane + v * Tile::kRowThreads;
        if (!in_bounds(vector, vectors)) continue;
        Vec16<T> d_residual{}, d_x;
        if (p.d_residual.data) d_residual = load16(row_of<T>(p.d_residual, row) + vector * kSize);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const float xhat = (widen(r[v].at[i]) - mean) * rstd, g = widen(d_y[v].at[i]) * weight[v][i];
          d_x.at[i] = narrow<T>(rstd * (g - mean_g - xhat * mean_g_xhat) + widen(d_residual.at[i]));
        }
        store16(static_cast<T*>(p.d_x) + row * p.columns + vector * kSize, d_x);
      }
    }
    float* partials = static_cast<float*>(p.partials);
    if (p.d_weight.data) write_partials<Tile>(d_weight, partials + sum * p.columns, p.columns);
    if (p.d_bias.data) write_partials<Tile>(d_bias, partials + (p.sums + sum) * p.columns, p.columns);
  }
}

// ---- the generic path --------------------------------------------------------------------------------------------
// A: what is computed in, float or double. Dtypes are looked at for each element.

template <class A>
__device__ __forceinline__ A channel(const ConstChannels& channels, int64_t column, A otherwise) {
  return channels.data ? load_as<A>(channels.data, channels.dtype, column) : otherwise;
}

template <class A, class Tile>
__global__ __launch_bounds__(Tile::kThreads, Tile::kForwardBlocks) void norm_forward_generic_kernel(NormForward p) {
  const int lane = threadIdx.x % Tile::kRowThreads;
  const A columns = A(p.columns);

  for (int64_t row = first_row<Tile>(); row < p.rows; row += row_step<Tile>()) {
    const int64_t x = row * p.x.stride, residual = row * p.residual.stride, out = row * p.columns;
    A sum[1] = {0};
    for (int64_t c = lane; c < p.columns; c += Tile::kRowThreads) {
      A value = load_as<A>(p.x.data, p.dtype, x + c);
      if (p.residual.data) {
        value += load_as<A>(p.residual.data, p.dtype, residual + c);
        value = store_as<A>(p.new_residual, p.dtype, out + c, value);
      }
      sum[0] += value;
    }
    // From here on r is read back from memory, each element by the thread that wrote it.
    const void* r = p.residual.data ? p.new_residual : p.x.data;
    const int64_t r_row = p.residual.data ? out : x;

    A mean = 0;
    if (p.subtract_mean) {
      sum_over<Tile::kRowThreads>(sum);
      mean = sum[0] / columns;
    }
    A squares[1] = {0};
    for (int64_t c = lane; c < p.columns; c += Tile::kRowThreads) {
      const A centred = load_as<A>(r, p.dtype, r_row + c) - mean;
      squares[0] += centred * centred;
    }
    sum_over<Tile::kRowThreads>(squares);
    const A rstd = inverse_sqrt(squares[0] / columns + A(p.eps));

    if (lane == 0) {
      if (p.subtract_mean) static_cast<A*>(p.mean)[row] = mean;
      static_cast<A*>(p.rstd)[row] = rstd;
    }
    for (int64_t c = lane; c < p.columns; c += Tile::kRowThreads) {
      const A xhat = (load_as<A>(r, p.dtype, r_row + c) - mean) * rstd;
      store_as<A>(p.y, p.dtype, out + c, xhat * channel<A>(p.weight, c, 1) + channel<A>(p.bias, c, 0));
    }
  }
}

// d_x alone; see norm_backward_kernel.
template <class A, class Tile>
__global__ __launch_bounds__(Tile::kThreads, Tile::kBackwardBlocks) void norm_backward_generic_kernel(NormBackward p) {
  const int lane = threadIdx.x % Tile::kRowThreads;
  const A columns = A(p.columns);

  for (int64_t row = first_row<Tile>(); row < p.rows; row += row_step<Tile>()) {
    const int64_t r = row * p.r.stride, d_y = row * p.d_y.stride, d_residual = row * p.d_residual.stride;
    const A mean = p.subtract_mean ? static_cast<const A*>(p.mean)[row] : A(0);
    const A rstd = static_cast<const A*>(p.rstd)[row];

    A sums[2] = {0, 0};
    for (int64_t c = lane; c < p.columns; c += Tile::kRowThreads) {
      const A xhat = (load_as<A>(p.r.data, p.dtype, r + c) - mean) * rstd;
      const A g = load_as<A>(p.d_y.data, p.dtype, d_y + c) * channel<A>(p.weight, c, 1);
      sums[0] += g;
      sums[1] += g * xhat;
    }
    sum_over<Tile::kRowThreads>(sums);
    const A mean_g = p.subtract_mean ? sums[0] / columns : A(0), mean_g_xhat = sums[1] / columns;

    for (int64_t c = lane; c < p.columns; c += Tile::kRowThreads) {
      const A xhat = (load_as<A>(p.r.data, p.dtype, r + c) - mean) * rstd;
      const A g = load_as<A>(p.d_y.data, p.dtype, d_y + c) * channel<A>(p.weight, c, 1);
      A d_x = rstd * (g - mean_g - xhat * mean_g_xhat);
      if (p.d_residual.data) d_x += load_as<A>(p.d_residual.data, p.dtype, d_residual + c);
      store_as<A>(p.d_x, p.dtype, row * p.columns + c, d_x);
    }
  }
}

constexpr int kPartialsThreads = 128;

// A thread for each column; blocks (., y) write sums y, y + gridDim.y, ...
template <class A>
__global__ __launch_bounds__(kPartialsThreads) void norm_partials_generic_kernel(NormBackward p) {
  const int64_t column = int64_t(blockIdx.x) * kPartialsThreads + threadIdx.x;
  if (!in_bounds(column, p.columns)) return;
  for (int64_t sum = blockIdx.y; sum < p.sums; sum += gridDim.y) {
    const int64_t begin = sum * p.rows_of_sum, end = min(begin + p.rows_of_sum, p.rows);
    A d_weight = 0, d_bias = 0;
    for (int64_t row = begin; row < end; ++row) {
      const A mean = p.subtract_mean ? static_cast<const A*>(p.mean)[row] : A(0);
      const A rstd = static_cast<const A*>(p.rstd)[row];
      const A d = load_as<A>(p.d_y.data, p.dtype, row * p.d_y.stride + column);
      d_weight += d * (load_as<A>(p.r.data, p.dtype, row * p.r.stride + column) - mean) * rstd;
      d_bias += d;
    }
    A* partials = static_cast<A*>(p.partials);
    if (p.d_weight.data) partials[sum * p.columns + column] = d_weight;
    if (p.d_bias.data) partials[(p.sums + sum) * p.columns + column] = d_bias;
  }
}

// ---- the sum over partials, of both paths ------------------------------------------------------------------------

constexpr int kSumWarps = 8;

// A block for 32 columns of d_weight (y = 0) or d_bias (y = 1). No rows of partials: zeros.
template <class A>
__global__ __launch_bounds__(kWarp * kSumWarps) void norm_sum_partials_kernel(NormBackward p) {
  const Channels& out = blockIdx.y == 0 ? p.d_weight : p.d_bias;
  if (!out.data) return;
  const int64_t column = int64_t(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  const bool exists = in_bounds(column, p.columns);
  const A* partials = static_cast<const A*>(p.partials) + blockIdx.y * p.sums * p.columns;
  const double sum = sum_of_column<kSumWarps>(partials + column, p.sums, p.columns, exists);
  if (exists && threadIdx.x < kWarp) store_as(out.data, out.dtype, column, sum);
}

// ---- launchers ---------------------------------------------------------------------------------------------------

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many blocks run at a time, if the rows keep that many busy.
template <class Tile>
int64_t blocks_that_stay(int64_t rows, int blocks_on_one) {
  return std::min(divided_up(rows, Tile::kRows), int64_t(multiprocessors()) * blocks_on_one);
}

// f(tile), an object of the smallest tile that a row fits.
template <class F>
auto with_tile(DType dtype, int64_t columns, F f) {
  const int64_t vectors = columns * bytes_of(dtype) / 16;
  if (vectors <= NarrowTile::kVectors * NarrowTile::kRowThreads) return f(NarrowTile{});
  if (vectors <= MiddleTile::kVectors * MiddleTile::kRowThreads) return f(MiddleTile{});
  return f(WideTile{});
}

template <class T>
struct Type {
  using type = T;
};

// f(Type<T>) for the type behind a dtype.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::float32: return f(Type<float>{});
    case DType::bfloat16: return f(Type<__nv_bfloat16>{});
    case DType::float16: return f(Type<__half>{});
    default: throw std::runtime_error("norm: float64 has no vector path");
  }
}

template <class Tile>
void forward_on_vectors(const NormForward& p, Stream stream) {
  const dim3 grid(unsigned(blocks_that_stay<Tile>(p.rows, Tile::kForwardBlocks)));
  with_type(p.dtype, [&](auto type) {
    launch(norm_forward_kernel<typename decltype(type)::type, Tile>, {grid, dim3(Tile::kThreads), 0, stream}, p);
  });
}

template <class A, class Tile>
void forward_generic(const NormForward& p, Stream stream) {
  const dim3 grid(unsigned(blocks_that_stay<Tile>(p.rows, Tile::kForwardBlocks)));
  launch(norm_forward_generic_kernel<A, Tile>, {grid, dim3(Tile::kThreads), 0, stream}, p);
}

template <class Tile>
void backward_on_vectors(const NormBackward& p, Stream stream) {
  const dim3 grid(unsigned(std::min(p.sums, blocks_that_stay<Tile>(p.rows, Tile::kBackwardBlocks))));
  with_type(p.dtype, [&](auto type) {
    launch(norm_backward_kernel<typename decltype(type)::type, Tile>, {grid, dim3(Tile::kThreads), 0, stream}, p);
  });
}

template <class A, class Tile>
void backward_generic(const NormBackward& p, Stream stream) {
  if (p.d_x) {
    const dim3 grid(unsigned(blocks_that_stay<Tile>(p.rows, Tile::kBackwardBlocks)));
    launch(norm_backward_generic_kernel<A, Tile>, {grid, dim3(Tile::kThreads), 0, stream}, p);
  }
  if (p.d_weight.data || p.d_bias.data) {
    const dim3 grid(unsigned(divided_up(p.columns, kPartialsThreads)), unsigned(std::min<int64_t>(p.sums, 1024)));
    launch(norm_partials_generic_kernel<A>, {grid, dim3(kPartialsThreads), 0, stream}, p);
  }
}

template <class A>
void forward_generic(const NormForward& p, Stream stream) {
  if (p.columns <= kWidestGenericNarrowRow) return forward_generic<A, GenericNarrowTile>(p, stream);
  return forward_generic<A, GenericWideTile>(p, stream);
}

template <class A>
void backward_generic(const NormBackward& p, Stream stream) {
  if (p.columns <= kWidestGenericNarrowRow) return backward_generic<A, GenericNarrowTile>(p, stream);
  return backward_generic<A, GenericWideTile>(p, stream);
}

template <class A>
void sum_partials(const NormBackward& p, Stream stream) {
  const dim3 grid(unsigned(divided_up(p.columns, kWarp)), p.d_bias.data ? 2 : 1);
  launch(norm_sum_partials_kernel<A>, {grid, dim3(kWarp * kSumWarps), 0, stream}, p);
}

}  // namespace

int64_t norm_widest_vector_row(DType dtype) {
  return dtype == DType::float64 ? 0 : 16 * WideTile::kVectors * WideTile::kRowThreads / bytes_of(dtype);
}

void norm_split_rows(NormBackward& p, NormPath path) {
  p.rows_of_sum = kMostRowsOfSum;
  if (path == NormPath::vector && p.rows > 0) {
    with_tile(p.dtype, p.columns, [&](auto tile) {
      // Every block gets the same number of runs, and those are as long as that allows.
      const int64_t rows_of_block = divided_up(p.rows, blocks_that_stay<decltype(tile)>(p.rows, tile.kBackwardBlocks));
      const int64_t runs = divided_up(rows_of_block, kMostRowsOfSum * tile.kRows);
      p.rows_of_sum = divided_up(rows_of_block, runs);
    });
  }
  p.sums = divided_up(p.rows, p.rows_of_sum);
}

void launch_norm_forward(const NormForward& p, NormPath path, Stream stream) {
  if (p.rows == 0) return;
  if (path == NormPath::generic) {
    return p.dtype == DType::float64 ? forward_generic<double>(p, stream) : forward_generic<float>(p, stream);
  }
  with_tile(p.dtype, p.columns, [&](auto tile) { forward_on_vectors<decltype(tile)>(p, stream); });
}

void launch_norm_backward(const NormBackward& p, NormPath path, Stream stream) {
  if (p.rows > 0) {
    if (path == NormPath::vector) {
      with_tile(p.dtype, p.columns, [&](auto tile) { backward_on_vectors<decltype(tile)>(p, stream); });
    } else if (p.dtype == DType::float64) {
      backward_generic<double>(p, stream);
    } else {
      backward_generic<float>(p, stream);
    }
  }
  if (p.d_weight.data || p.d_bias.data) {
    p.dtype == DType::float64 ? sum_partials<double>(p, stream) : sum_partials<float>(p, stream);
  }
}

}  // namespace fastgpt

// What the generic forward and backward have in common: a tile in shared memory, and the two products of a tile. In
// tensor cores' place are single multiplications, so that any dtype and width will do.
//
// A block of 128 threads has kRows rows, 16 threads for four of them. Rows are queries, or keys in the backward; the
// columns of a tile are what they meet, keys or queries.
//
//   tile_products     S (rows x columns) = a (rows x D) . b (columns x D)^T, over D in steps of kDepth
//   add_weighted      (rows x kWidth) += weights (rows x columns) . b (columns x kWidth), likewise
//
// Of S a thread has four rows and every sixteenth column, so a warp reads two rows of `a` (one address for 16 lanes)
// and 16 neighbouring rows of `b`. Rows are padded by 16 bytes: eight rows then begin in eight different groups of four
// banks, and no access here has a bank conflict. In registers a value is used four times for each time it is loaded.
#pragma once

#include <stdexcept>

#include "attention/scores.cuh"
#include "device/bounds.cuh"
#include "device/numeric.cuh"
#include "device/vector.cuh"
#include "host/launch.h"

namespace fastgpt {

// A: what is computed in. kWidth: how many columns of a head's result a block computes; wider heads are shared out, and
// each block computes the scores again. Doubles have half the columns, so that all fits 48 KB.
template <class A_, int width>
struct GenericTile {
  using A = A_;
  static constexpr int kWidth = width, kDepth = 64;
  static constexpr int kRun = 8;  // products that are summed before they join a score: roundings add up less
  static constexpr int kThreads = 128, kLanes = 16;  // lanes: that share four rows
  static constexpr int kBlocks = 2;                  // of a multiprocessor, at least: results take many registers
  static constexpr int kOwn = 4, kRows = kThreads / kLanes * kOwn;
  static constexpr int kColumns = sizeof(A) == 8 ? 32 : 64, kOwnColumns = kColumns / kLanes;
  static constexpr int kVector = Vec16<A>::kSize, kVectors = kDepth / kVector / kLanes;  // of a thread's columns
  static constexpr int kChunks = kWidth / kDepth;

  using Scores = A[kOwn][kOwnColumns];
  using Result = A[kChunks][kOwn][kVectors][kVector];  // columns (lane + 16 v) * kVector + i of each kDepth

  struct SharedMemory {
    A rows[kRows][kDepth + kVector];
    A columns[kColumns][kDepth + kVector];
    A weights[kRows][kColumns + kVector];
    A lse[kColumns], delta[kColumns], off[kColumns], inverse[kColumns];  // of queries that are columns
    KeyRange ranges[kColumns], all;                                      // of each query, be it a row or a column
  };

  __device__ __forceinline__ static int lane() { return threadIdx.x % kLanes; }
  __device__ __forceinline__ static int first_row() { return threadIdx.x / kLanes * kOwn; }
};

// Over the lanes that share a row.
template <class Tile, class A>
__device__ __forceinline__ A sum_of_row(A x) {
  for (int distance = Tile::kLanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// `count` rows from `first` on, of one head of a batch.
struct HeadRows {
  const ConstHeads& heads;
  int64_t begin;  // of the head
  int first, count;

  __device__ __forceinline__ HeadRows(const ConstHeads& heads, int64_t batch, int64_t head, int first, int count)
      : heads(heads), begin(batch * heads.batch + head * heads.head), first(first), count(count) {}
};

// Columns depth .. depth + kDepth - 1 of rows; zeros where there are none.
template <class Tile, int kCount>
__device__ __forceinline__ void load_rows(typename Tile::A (&to)[kCount][Tile::kDepth + Tile::kVector],
                                          const HeadRows& from, const AttentionPlan& plan, int depth) {
  using A = typename Tile::A;
  const int column = threadIdx.x % Tile::kDepth;
  const bool exists = in_bounds(depth + column, plan.width);
  for (int row = threadIdx.x / Tile::kDepth; row < kCount; row += Tile::kThreads / Tile::kDepth) {
    A x = 0;
    if (exists && in_bounds(row, from.count)) {
      const int64_t at = from.begin + int64_t(from.first + row) * from.heads.token + depth + column;
      x = load_as<A>(from.heads.data, plan.dtype, at);
    }
    to[row][column] = x;
  }
}

// Needs all threads of the block.
template <class Tile>
__device__ __forceinline__ void tile_products(typename Tile::Scores& products, typename Tile::SharedMemory& shared,
                                              const HeadRows& a, const HeadRows& b, const AttentionPlan& plan) {
  using A = typename Tile::A;
#pragma unroll
  for (int r = 0; r < Tile::kOwn; ++r) {
#pragma unroll
    for (int c = 0; c < Tile::kOwnColumns; ++c) products[r][c] = 0;
  }
  for (int depth = 0; depth < plan.width; depth += Tile::kDepth) {
    __syncthreads();  // what was there has been read
    load_rows<Tile>(shared.rows, a, plan, depth);
    load_rows<Tile>(shared.columns, b, plan, depth);
    __syncthreads();
    const int left = min(Tile::kDepth, plan.width - depth);  // past it are zeros
#pragma unroll 1
    for (int run = 0; run < left; run += Tile::kRun) {
      typename Tile::Scores sums = {};
#pragma unroll 1  // or the loads of several steps take all registers
      for (int d = run; d < min(run + Tile::kRun, left); d += Tile::kVector) {
        Vec16<A> x[Tile::kOwn], y[Tile::kOwnColumns];
#pragma unroll
        for (int r = 0; r < Tile::kOwn; ++r) x[r] = load16(&shared.rows[Tile::first_row() + r][d]);
#pragma unroll
        for (int c = 0; c < Tile::kOwnColumns; ++c) y[c] = load16(&shared.columns[Tile::lane() + c * Tile::kLanes][d]);
#pragma unroll
        for (int i = 0; i < Tile::kVector; ++i) {
#pragma unroll
          for (int r = 0; r < Tile::kOwn; ++r) {
#pragma unroll
            for (int c = 0; c < Tile::kOwnColumns; ++c) sums[r][c] = fma(x[r].at[i], y[c].at[i], sums[r][c]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < Tile::kOwn; ++r) {
#pragma unroll
        for (int c = 0; c < Tile::kOwnColumns; ++c) products[r][c] += sums[r][c];
      }
    }
  }
}

// result = scale of the row * result + weights . columns depth .. of b, where weights are what tile_products gave. The
// sum over a tile is made first and then added to what there is: as exact over many tiles as over few. Needs all
// threads of the block.
template <class Tile>
__device__ __forceinline__ void add_weighted(typename Tile::Result& result,
                                             const typename Tile::A (&scale)[Tile::kOwn],
                                             typename Tile::SharedMemory& shared, const typename Tile::Scores& weights,
                                             const HeadRows& b, const AttentionPlan& plan, int depth) {
  using A = typename Tile::A;
#pragma unroll
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
    if (depth + chunk * Tile::kDepth >= plan.width) break;
    __syncthreads();  // what was there has been read
    if (chunk == 0) {
#pragma unroll
      for (int r = 0; r < Tile::kOwn; ++r) {
#pragma unroll
        for (int c = 0; c < Tile::kOwnColumns; ++c) {
          shared.weights[Tile::first_row() + r][Tile::lane() + c * Tile::kLanes] = weights[r][c];
        }
      }
    }
    load_rows<Tile>(shared.columns, b, plan, depth + chunk * Tile::kDepth);
    __syncthreads();
    A sums[Tile::kOwn][Tile::kVectors][Tile::kVector] = {};
#pragma unroll 1
    for (int k = 0; k < b.count; k += Tile::kVector) {
      Vec16<A> w[Tile::kOwn];
#pragma unroll
      for (int r = 0; r < Tile::kOwn; ++r) w[r] = load16(&shared.weights[Tile::first_row() + r][k]);
#pragma unroll
      for (int j = 0; j < Tile::kVector; ++j) {
#pragma unroll
        for (int v = 0; v < Tile::kVectors; ++v) {
          const Vec16<A> x = load16(&shared.columns[k + j][(Tile::lane() + v * Tile::kLanes) * Tile::kVector]);
#pragma unroll
          for (int r = 0; r < Tile::kOwn; ++r) {
#pragma unroll
            for (int i = 0; i < Tile::kVector; ++i) sums[r][v][i] = fma(w[r].at[j], x.at[i], sums[r][v][i]);
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < Tile::kOwn; ++r) {
#pragma unroll
      for (int v = 0; v < Tile::kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < Tile::kVector; ++i) {
          result[chunk][r][v][i] = fma(result[chunk][r][v][i], scale[r], sums[r][v][i]);
        }
      }
    }
  }
}

// result * scale of the row, to columns depth .. of `count` rows: the first at element `begin`, each `stride` on.
template <class Tile>
__device__ __forceinline__ void store_result(void* to, int64_t begin, int64_t stride, int count,
                                             const AttentionPlan& plan, int depth, const typename Tile::Result& result,
                                             const typename Tile::A (&scale)[Tile::kOwn]) {
#pragma unroll
  for (int r = 0; r < Tile::kOwn; ++r) {
    const int row = Tile::first_row() + r;
    if (!in_bounds(row, count)) continue;
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
#pragma unroll
      for (int v = 0; v < Tile::kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < Tile::kVector; ++i) {
          const int column =
              depth + chunk * Tile::kDepth + (Tile::lane() + v * Tile::kLanes) * Tile::kVector + i;
          if (in_bounds(column, plan.width)) {
            store_as(to, plan.dtype, begin + row * stride + column, result[chunk][r][v][i] * scale[r]);
          }
        }
      }
    }
  }
}

// What queries first .. first + count - 1 see, in shared.ranges and, of all together, shared.all. By the first warp.
template <class Tile>
__device__ __forceinline__ void find_ranges(typename Tile::SharedMemory& shared, const AttentionPlan& plan, int batch,
                                            int first, int count, int keys) {
  constexpr int kWarp = 32;
  if (threadIdx.x >= kWarp) return;
  KeyRange all;
  for (int i = threadIdx.x; i < Tile::kColumns; i += kWarp) {
    KeyRange range;
    if (in_bounds(i, count)) range = keys_seen(plan, batch, first + i, keys);
    shared.ranges[i] = range;
    all.join(range.begin, range.end);
  }
  all = over_warp(all);
  if (threadIdx.x == 0) shared.all = all;
}

// f(tile), an object of the tile that fits a call's dtype and width.
template <class F>
void with_generic_tile(const AttentionPlan& plan, F f) {
  if (plan.dtype == DType::float64) return f(GenericTile<double, 64>());
  if (plan.width <= 64) return f(GenericTile<float, 64>());
  return f(GenericTile<float, 128>());
}

// Blocks along a line: for every batch and head, every part of kWidth columns, and every kRows of `rows`.
template <class Tile>
struct GenericPlace {
  int batch, head, depth, first;

  __device__ __forceinline__ GenericPlace(const AttentionPlan& plan, int heads, int rows) {
    const int tiles = tiles_of(rows), parts = parts_of(plan);
    const unsigned part = blockIdx.x / tiles, of_head = part / parts;
    // Last rows first: under a causal mask they see the most keys.
    first = int(tiles - 1 - blockIdx.x % tiles) * Tile::kRows;
    depth = int(part % parts) * Tile::kWidth;
    head = int(of_head % heads);
    batch = int(of_head / heads);
  }

  __host__ __device__ static int tiles_of(int rows) { return (rows + Tile::kRows - 1) / Tile::kRows; }
  // One where heads have no elements: there is an LSE all the same.
  __host__ __device__ static int parts_of(const AttentionPlan& plan) {
    return plan.width <= Tile::kWidth ? 1 : (plan.width + Tile::kWidth - 1) / Tile::kWidth;
  }
};

// A block for every place. None: there is nothing to do.
template <class Tile>
LaunchShape generic_shape(const AttentionPlan& plan, int heads, int rows, Stream stream) {
  using Place = GenericPlace<Tile>;
  const int64_t blocks = int64_t(plan.batches) * heads * Place::parts_of(plan) * Place::tiles_of(rows);
  if (blocks > INT_MAX) throw std::runtime_error("attention: too many blocks for one launch");
  return {dim3(unsigned(blocks)), dim3(Tile::kThreads), sizeof(typename Tile::SharedMemory), stream};
}

}  // namespace fastgpt

// What attention's kernels on tensor cores are made of: tiles in shared memory, the pieces of a tile that a warp's
// matrix instructions take, and what a group of queries sees. docs/attention.md has drawings.
//
// mma_m16n8k16 has its operands spread over the lanes of a warp; lane = 4 group + member. Of a result (16 x 8) a lane
// has rows group and group + 8, columns 2 member and the next. Two results side by side, rounded to 16 bits, are just
// what the instruction takes as its left operand (16 x 16): so the result of one product becomes the operand of the
// next without leaving the registers.
#pragma once

#include <type_traits>

#include "attention/scores.cuh"
#include "device/bounds.cuh"
#include "device/numeric.cuh"
#include "device/vector.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/matrix.cuh"

namespace fastgpt {

constexpr int kPiece = 16;  // rows and columns of what one ldmatrix brings, and one instruction multiplies

__device__ __forceinline__ int lane_of_warp() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_of_block() { return threadIdx.x / 32; }
__device__ __forceinline__ int group_of_lane() { return threadIdx.x % 32 / 4; }
__device__ __forceinline__ int member_of_group() { return threadIdx.x % 4; }

// rows x width elements of 2 bytes. Columns come in panels as wide as all 32 banks, or half of them; within a panel the
// place of a row's vectors of 16 bytes is turned by the row's number (xor), so that the same column of 8 neighbouring
// rows, which is what ldmatrix reads at a time, lies in 8 different groups of banks; and so do the vectors of a panel's
// line.
template <class T_, int rows, int width>
struct alignas(128) MatrixTile {
  using T = T_;
  static constexpr int kRows = rows, kWidth = width, kPanel = width % 64 == 0 ? 64 : 32;
  static constexpr int kVector = Vec16<T>::kSize, kVectors = kPanel / kVector, kRowsInLine = 64 / kPanel;
  static_assert(sizeof(T) == 2 && width % kPanel == 0 && rows % kPiece == 0);

  T elements[rows * width];

  __device__ __forceinline__ static int place(int row, int column) {
    const int vector = (column % kPanel / kVector) ^ (row / kRowsInLine % kVectors);
    return column / kPanel * (kRows * kPanel) + row * kPanel + vector * kVector + column % kVector;
  }
  __device__ __forceinline__ T* at(int row, int column) { return elements + place(row, column); }
};

// f(row, column) for all vectors of `count` rows, those of `threads` threads at a time, of which this is number
// `thread`. Neighbours have those of a panel's line. (Not unrolled: the addresses would take registers from
// accumulators.)
template <class Tile, int count, int threads, class F>
__device__ __forceinline__ void for_each_vector(int thread, F f) {
#pragma unroll 1
  for (int i = thread; i < count * (Tile::kWidth / Tile::kVector); i += threads) {
    f(i / Tile::kVectors % count, i / (Tile::kVectors * count) * Tile::kPanel + i % Tile::kVectors * Tile::kVector);
  }
}

// The order of a piece's four 8x8 matrices in the registers that ldmatrix fills.
enum class Order { down_first, across_first };

// Where this lane's row of the piece at row 0, column 0 begins; pieces at other places are one xor and a constant away.
template <class Tile, Order order>
__device__ __forceinline__ int place_of_lane() {
  const int lane = lane_of_warp(), first = lane / 8 % 2, second = lane / 16;
  return order == Order::down_first ? Tile::place(first * 8 + lane % 8, second * 8)
                                    : Tile::place(second * 8 + lane % 8, first * 8);
}

// The piece whose corner is (row, column), both multiples of kPiece; `lane`: place_of_lane of this tile.
template <bool transposed = false, class Tile>
__device__ __forceinline__ void load_piece(uint32_t (&piece)[4], const Tile& tile, int lane, int row, int column) {
  constexpr int kPanel = Tile::kPanel;
  ldmatrix<transposed>(piece, tile.elements + (lane ^ column % kPanel) + row * kPanel +
                                  column / kPanel * (Tile::kRows * kPanel));
}

// What is to be given for place_of_lane and load_piece:
//                                             order           transposed
//   left operand from a tile [row][depth]     down_first      false
//   left operand from a tile [depth][row]     across_first    true
//   right operand from a tile [column][depth] across_first    false
//   right operand from a tile [depth][column] down_first      true

// left and right, the 16 columns of the result in two, += a . b
template <class T>
__device__ __forceinline__ void multiply_piece(float (&left)[4], float (&right)[4], const uint32_t (&a)[4],
                                               const uint32_t (&b)[4]) {
  using Type = std::conditional_t<std::is_same_v<T, __half>, F16, Bf16>;
  const uint32_t b_left[2] = {b[0], b[1]}, b_right[2] = {b[2], b[3]};
  mma_m16n8k16(left, a, b_left, left, Type());
  mma_m16n8k16(right, a, b_right, right, Type());
}

// Two neighbours, rounded.
template <class T>
__device__ __forceinline__ uint32_t pack(float x, float y) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 both = __floats2half2_rn(x, y);
    return reinterpret_cast<const uint32_t&>(both);
  } else {
    const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
    return reinterpret_cast<const uint32_t&>(both);
  }
}

// Two results side by side as a left operand.
template <class T>
__device__ __forceinline__ void pack_piece(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

template <int n>
__device__ __forceinline__ void clear(float (&results)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) results[i][e] = 0;
  }
}

template <class T>
__device__ __forceinline__ const T* rows_of_head(const ConstHeads& heads, int batch, int head, int first_row) {
  return static_cast<const T*>(heads.data) + int64_t(batch) * heads.batch + int64_t(head) * heads.head +
         int64_t(first_row) * heads.token;
}

// Starts copies of `count` rows of `width` elements, zeros elsewhere. By all threads of a block.
template <int threads, class Tile>
__device__ __forceinline__ void load_tile(Tile& tile, const typename Tile::T* from, int64_t stride, int count,
                                          int width) {
  for_each_vector<Tile, Tile::kRows, threads>(threadIdx.x, [&](int row, int column) {
    const bool row_exists = in_bounds(row, count);
    const bool inside = row_exists && in_bounds(column, width);
    cp_async(tile.at(row, column), inside ? from + row * stride + column : from, inside);
  });
}

// Rounds a warp's results of 16 rows and stores `count` of these rows, `width` columns, to `to`: by way of rows
// first_row .. of a tile, of which this warp has no more need, for whole vectors. result[row / 8] is multiplied by
// scale[].
template <class Tile, int n>
__device__ __forceinline__ void store_results(Tile& tile, int first_row, const float (&results)[n][4],
                                              const float (&scale)[2], typename Tile::T* to, int64_t stride, int count,
                                              int width) {
  using T = typename Tile::T;
  static_assert(n * 8 == Tile::kWidth);
  __syncwarp();  // the other lanes have read what was there
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T* at = tile.at(first_row + half * 8 + group_of_lane(), i * 8 + member_of_group() * 2);
      *reinterpret_cast<uint32_t*>(at) =
          pack<T>(results[i][half * 2] * scale[half], results[i][half * 2 + 1] * scale[half]);
    }
  }
  __syncwarp();
  for_each_vector<Tile, kPiece, 32>(lane_of_warp(), [&](int row, int column) {
    const bool exists = in_bounds(row, count);
    if (exists && in_bounds(column, width)) {
      store16(to + row * stride + column, load16(tile.at(first_row + row, column)));
    }
  });
}

// ---- masks ---------------------------------------------------------------------------------------------

// Of a group of queries: the keys that some of them see (those between included), and those that all see.
struct Visible {
  KeyRange some, all{0, INT_MAX};

  __device__ __forceinline__ bool hidden(int first, int count) const { return !some.meets(first, first + count); }
  __device__ __forceinline__ bool whole(int first, int count) const {
    return all.begin <= first && first + count <= all.end;
  }
};

// Of `count` queries from `first` on, where there are no documents: the first sees the least at the end, and the last
// at the beginning.
__device__ __forceinline__ Visible visible_by_position(const AttentionPlan& plan, int first, int count, int keys) {
  const int first_position = first + keys - plan.queries, last_position = first_position + count - 1;
  KeyRange some{0, keys};
  Visible seen{{}, some};
  if (plan.causal) some.end = min(keys, last_position + 1), seen.all.end = min(keys, first_position + 1);
  if (plan.window >= 0) {
    some.begin = max(0, first_position - plan.window);
    seen.all.begin = max(0, last_position - plan.window);
  }
  if (!some.empty()) seen.some = some;
  return seen;
}

// Likewise of at most `most` queries, with documents or without. Needs all lanes of the warp.
template <int most>
__device__ __forceinline__ Visible visible_to(const AttentionPlan& plan, int batch, int first, int count, int keys) {
  if (count <= 0) return {{}, {}};
  if (!plan.doc_start) return visible_by_position(plan, first, count, keys);
  Visible seen;
  for (int i = lane_of_warp(); i < most; i += 32) {
    if (!in_bounds(i, count)) break;
    const KeyRange range = keys_seen(plan, batch, first + i, keys);
    seen.some.join(range.begin, range.end);
    seen.all.begin = max(seen.all.begin, range.begin);
    seen.all.end = min(seen.all.end, range.end);
  }
  seen.some = over_warp(seen.some);
  for (int distance = 16; distance > 0; distance /= 2) {
    seen.all.begin = max(seen.all.begin, __shfl_xor_sync(0xffffffffu, seen.all.begin, distance));
    seen.all.end = min(seen.all.end, __shfl_xor_sync(0xffffffffu, seen.all.end, distance));
  }
  return seen;
}

// ---- scores --------------------------------------------------------------------------------------------

// Scores on their way from a product q . k to a power of two, with approximations that 16 bits do not show. A kernel's
// parameter, so that none of it needs a register.
struct PowersOfTwo {
  bool capped;
  float unit;      // of a score, in the softmax's exponent: `scale`, or the cap
  float exponent;  // likewise of the power of two
  float inner;     // of the product, in the exponent of tanh's power of two

  static constexpr float kLog2e = 1.4426950408889634f;

  explicit PowersOfTwo(const AttentionPlan& plan)
      : capped(plan.softcap != 0),
        unit(float(capped ? plan.softcap : plan.scale)),
        exponent(unit * kLog2e),
        inner(capped ? 2 * kLog2e * float(plan.scale) / float(plan.softcap) : 0.0f) {}

  // Where they are capped; else the product itself is the score.
  __device__ __forceinline__ float tanh_of(float product) const {
    return 1 - 2 * reciprocal_approx(1 + exp2_approx(product * inner));
  }
};

}  // namespace fastgpt

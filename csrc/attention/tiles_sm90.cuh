// What attention's kernels on Hopper are made of besides tiles.cuh: tiles in shared memory as the TMA unit fills them
// and as wgmma reads them, the ring they come in, and whose turn it is on the tensor cores. docs/attention.md has
// drawings.
//
// A wgmma's result (64 x n) is spread over the 128 threads of a warpgroup as four of mma_m16n8k16's, 16 rows for each
// warp: a lane has rows group and group + 8 of its warp's, and of every 8 columns 2 member and the next. Its left
// operand may come from registers, in the layout of mma_m16n8k16's.
#pragma once

#include "attention/attention.h"
#include "attention/tiles.cuh"
#include "ptx/barrier.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace fastgpt {

constexpr int kWarpgroup = 128;       // threads
constexpr int kWarpgroupRows = 64;    // that a wgmma multiplies
constexpr unsigned kSwizzleBytes = 128;

// rows x width elements of 2 bytes, the width filled up to panels of 128 bytes. Each panel is what one TMA copy brings:
// its vectors of 16 bytes lie turned by the row's number (xor), as the 128-byte swizzle has them.
template <class T_, int rows, int width>
struct alignas(1024) SwizzledTile {
  using T = T_;
  static constexpr int kRows = rows, kWidth = width, kPanel = kSwizzleBytes / sizeof(T);
  static constexpr int kPanels = (width + kPanel - 1) / kPanel;
  static constexpr uint32_t kPanelBytes = rows * kSwizzleBytes;
  static constexpr uint32_t kGroupBytes = 8 * kSwizzleBytes;  // of 8 rows, after which the swizzle repeats
  static_assert(sizeof(T) == 2 && rows % 8 == 0 && width % kPiece == 0);

  T elements[kPanels * rows * kPanel];

  __device__ __forceinline__ T* at(int row, int column) {
    const int vector = (column % kPanel / 8) ^ (row % 8);
    return elements + (column / kPanel * rows + row) * kPanel + vector * 8 + column % 8;
  }

  // Starts the copies of rows row .. of a head; whole panels, for what lies outside of the tensor comes as zeros. By
  // one thread.
  __device__ __forceinline__ void copy(const TensorMap& map, uint64_t& arrived, int row, int head, int batch) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const int from[4] = {panel * kPanel, row, head, batch};
      tma_load(elements + panel * rows * kPanel, map, arrived, from);
    }
  }
  // And tells the barrier how many bytes will come.
  __device__ __forceinline__ void fetch(const TensorMap& map, uint64_t& arrived, int row, int head, int batch) {
    mbarrier_arrive_expect_bytes(arrived, sizeof(elements));
    copy(map, arrived, row, head, batch);
  }

  // As an operand of wgmma. with_depth_along_rows: Q and K of Q K^T; a step goes 16 columns on. with_depth_down: V of P
  // V, from a panel's first column on; a step goes 16 rows down.
  __device__ __forceinline__ uint64_t with_depth_along_rows(int first_row) const {
    return matrix_descriptor(elements + first_row * kPanel, 0, kGroupBytes, kSwizzleBytes);
  }
  __device__ __forceinline__ uint64_t with_depth_down(int first_column = 0) const {
    return matrix_descriptor(elements + first_column * rows, kPanelBytes, kGroupBytes, kSwizzleBytes);
  }
  __device__ __forceinline__ static uint64_t step_along_rows(int column) {
    return (column / kPanel * kPanelBytes + column % kPanel * sizeof(T)) >> 4;  // a descriptor counts in 16 bytes
  }
  __device__ __forceinline__ static uint64_t step_down(int row) { return row * kSwizzleBytes >> 4; }
};

// Which stage of a ring comes next, and the parity of its barriers' phase, which flips each time round.
template <int kStages>
struct RingPosition {
  int stage = 0;
  unsigned parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// Warpgroups have the tensor cores in turns, round after round, and compute exponentials meanwhile. The results do not
// depend on it. Each of the `members` takes and gives every one of `rounds` turns, used or not.
template <int members>
struct Turns {
  static constexpr int kFirstBarrier = 1;  // 0 is __syncthreads's
  int member, rounds;

  __device__ __forceinline__ void take(int round) const {
    if (member == 0 && round == 0) return;  // nobody gives the first
    barrier_sync(kFirstBarrier + member, 2 * kWarpgroup);
  }
  __device__ __forceinline__ void give(int round) const {
    const bool last = member == members - 1;
    if (last && round == rounds - 1) return;  // nobody waits
    barrier_arrive(kFirstBarrier + (last ? 0 : member + 1), 2 * kWarpgroup);
  }
};

// ptxas puts the wait for a wgmma as early as it can, in front of arithmetic that should go on meanwhile. A branch that
// needs the result keeps it behind. A sum of powers, which no row makes negative.
__device__ __forceinline__ void compute_before_here(float never_negative) {
  if (never_negative < 0) __trap();
}

// Heads of a plan for the TMA unit: (width, tokens, heads, batches), and boxes of a panel of some rows of a head.
template <class Tile>
TensorMap map_of_heads(const ConstHeads& of, const AttentionPlan& plan, int tokens, int heads, int box_rows) {
  using T = typename Tile::T;
  const auto bytes = [&](int64_t stride) {  // 0: there is one only, and any will do
    return uint64_t(stride ? stride : plan.width) * sizeof(T);
  };
  const uint64_t sizes[4] = {uint64_t(plan.width), uint64_t(tokens), uint64_t(heads), uint64_t(plan.batches)};
  const uint64_t strides[3] = {bytes(of.token), bytes(of.head), bytes(of.batch)};
  const uint32_t box[4] = {uint32_t(Tile::kPanel), uint32_t(box_rows), 1, 1};
  constexpr TensorType kType = std::is_same_v<T, __half> ? kTensorF16 : kTensorBf16;
  return make_tensor_map(of.data, kType, 4, sizes, strides, box, kSwizzleBytes);
}

}  // namespace fastgpt

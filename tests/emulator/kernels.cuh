// A small kernel for every function of csrc/ptx. One source for two uses: on the emulator models.cu compares their
// results with plain loops, and vectors.cu runs them on recorded inputs, on the emulator and on a GPU.
#pragma once

#include "host/launch.h"
#include "ptx/address.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/matrix.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/store.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

using namespace fastgpt;
using bf16 = __nv_bfloat16;
using f16 = __half;

// ---- st.global.v4 ----

// The warp's 32 pieces of 16 bytes in reverse order.
__global__ void store_in_reverse(const unsigned char* x, unsigned char* y) {
  struct alignas(16) Piece {
    unsigned char at[16];
  } piece;
  for (int i = 0; i < 16; ++i) piece.at[i] = x[16 * threadIdx.x + i];
  store_16_bytes(y + 16 * (31 - threadIdx.x), piece);
}

// ---- cp.async ----

constexpr int kCopies = 64;  // by two groups of 32 lanes' copies

template <int kBytes>
struct CopiesShared {
  alignas(16) unsigned char at[kCopies * kBytes];
};

// Each lane copies kBytes of either group, every third one zeros instead; the first group is read while the second may
// be on its way.
template <int kBytes>
__global__ void copy_asynchronously(const unsigned char* x, unsigned char* y) {
  CopiesShared<kBytes>& shared = dynamic_shared<CopiesShared<kBytes>>();
  const int lane = threadIdx.x, first = lane * kBytes, second = first + 32 * kBytes;
  cp_async<kBytes>(&shared.at[first], x + first, lane % 3 != 0);
  cp_async_commit();
  cp_async<kBytes>(&shared.at[second], x + second, lane % 3 != 1);
  cp_async_commit();
  cp_async_wait<1>();
  for (int i = 0; i < kBytes; ++i) y[first + i] = shared.at[first + i];
  cp_async_wait<0>();
  for (int i = 0; i < kBytes; ++i) y[second + i] = shared.at[second + i];
}

// ---- barriers of some warps ----

struct ExchangeShared {
  float values[64];
};

// The first warp writes and goes on, the second waits for it; then both meet.
__global__ void exchange_through_named_barriers(const float* x, float* y) {
  ExchangeShared& shared = dynamic_shared<ExchangeShared>();
  const int i = threadIdx.x;
  if (i < 32) {
    shared.values[i] = x[i];
    barrier_arrive(1, 64);
  } else {
    barrier_sync(1, 64);
    shared.values[i] = shared.values[63 - i] + x[i];
  }
  barrier_sync(2, 64);
  y[i] = shared.values[63 - i];
}

// ---- warp-level matrix instructions ----

template <int kCount>
struct MatricesShared {
  alignas(16) uint16_t at[kCount * 64];
};

// The rows are given in reverse, so that it matters which lane's row is which.
template <bool kTransposed, int kCount>
__global__ void load_matrices(const uint16_t* x, uint32_t* y) {
  MatricesShared<kCount>& shared = dynamic_shared<MatricesShared<kCount>>();
  const int lane = threadIdx.x;
  for (int i = lane; i < kCount * 64; i += 32) shared.at[i] = x[i];
  __syncwarp();
  uint32_t fragment[kCount];
  ldmatrix<kTransposed>(fragment, &shared.at[(kCount * 8 - 1 - lane % (kCount * 8)) * 8]);
  for (int i = 0; i < kCount; ++i) y[lane * kCount + i] = fragment[i];
}

template <bool kTransposed, int kCount>
__global__ void store_matrices(const uint32_t* x, uint16_t* y) {
  MatricesShared<kCount>& shared = dynamic_shared<MatricesShared<kCount>>();
  const int lane = threadIdx.x;
  uint32_t fragment[kCount];
  for (int i = 0; i < kCount; ++i) fragment[i] = x[lane * kCount + i];
  stmatrix<kTransposed>(&shared.at[(kCount * 8 - 1 - lane % (kCount * 8)) * 8], fragment);
  __syncwarp();
  for (int i = lane; i < kCount * 64; i += 32) y[i] = shared.at[i];
}

// Through registers and back, transposed once: a transposition of each 8x8 matrix.
struct TransposeShared {
  alignas(16) bf16 in[4 * 64], out[4 * 64];
};
__global__ void transpose_with_stmatrix(const bf16* x, bf16* y) {
  TransposeShared& shared = dynamic_shared<TransposeShared>();
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) shared.in[i] = x[i];
  __syncwarp();
  uint32_t fragment[4];
  ldmatrix(fragment, &shared.in[lane * 8]);
  stmatrix<true>(&shared.out[lane * 8], fragment);
  __syncwarp();
  for (int i = lane; i < 256; i += 32) y[i] = shared.out[i];
}

// D[16,8] = A[16,16] B[8,16]^T + C[16,8], through shared memory.
template <class T>
struct MultiplyShared {
  alignas(16) T a[16 * 16], b[8 * 16];
};
template <class T, class Type>
__global__ void multiply_16x8(const T* a, const T* b, const float* c, float* d) {
  MultiplyShared<T>& shared = dynamic_shared<MultiplyShared<T>>();
  const int lane = threadIdx.x;
  cp_async(&shared.a[lane * 8], a + lane * 8);
  if (lane < 16) cp_async(&shared.b[lane * 8], b + lane * 8);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  uint32_t a_fragment[4], b_fragment[2];
  ldmatrix(a_fragment, &shared.a[lane % 16 * 16 + lane / 16 * 8]);
  ldmatrix(b_fragment, &shared.b[lane % 8 * 16 + lane / 8 % 2 * 8]);
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2];
  mma_m16n8k16(sums, a_fragment, b_fragment, sums, Type());
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// D[16,8] = A[16,8] B[8,8] + C[16,8]; low_bits are set in both, and must not be looked at.
__global__ void multiply_tf32(const float* a, const float* b, const float* c, float* d, uint32_t low_bits) {
  const int group = threadIdx.x / 4, member = threadIdx.x % 4;
  uint32_t a_fragment[4], b_fragment[2];
  for (int i = 0; i < 4; ++i)
    a_fragment[i] = __float_as_uint(a[(group + i % 2 * 8) * 8 + member + i / 2 * 4]) | low_bits;
  for (int i = 0; i < 2; ++i) b_fragment[i] = __float_as_uint(b[(member + i * 4) * 8 + group]) | low_bits;
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = c[(group + i / 2 * 8) * 8 + member * 2 + i % 2];
  mma_m16n8k8_tf32(sums, a_fragment, b_fragment, sums);
  for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + member * 2 + i % 2] = sums[i];
}

// ---- mbarrier ----

struct PhasesShared {
  alignas(16) uint32_t values[64], loaded[64];
  alignas(8) uint64_t barrier;
};

// Of one barrier: a phase that every thread arrives at, one that waits for bytes too, and, after it was made anew for
// fewer arrivals, one more.
__global__ void pass_phases(const uint32_t* x, uint32_t* y) {
  PhasesShared& shared = dynamic_shared<PhasesShared>();
  const int i = threadIdx.x;
  if (i == 0) {
    mbarrier_init(shared.barrier, 64);
    fence_mbarrier_init();
  }
  __syncthreads();
  shared.values[i] = x[i];
  mbarrier_arrive(shared.barrier);
  mbarrier_wait(shared.barrier, 0);
  y[i] = shared.values[63 - i];

  if (i == 0) {
    mbarrier_expect_bytes(shared.barrier, sizeof(shared.loaded) / 2);
    bulk_load(shared.loaded, x + 64, sizeof(shared.loaded) / 2, shared.barrier);
    mbarrier_arrive_expect_bytes(shared.barrier, sizeof(shared.loaded) / 2);
    bulk_load(shared.loaded + 32, x + 96, sizeof(shared.loaded) / 2, shared.barrier);
  } else {
    mbarrier_arrive(shared.barrier);
  }
  mbarrier_wait(shared.barrier, 1);
  y[64 + i] = shared.loaded[63 - i];

  __syncthreads();
  if (i == 0) {
    mbarrier_invalidate(shared.barrier);
    mbarrier_init(shared.barrier, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (i == 0) {
    for (int j = 0; j < 64; ++j) shared.values[j] = x[128 + j];
    mbarrier_arrive(shared.barrier);
  }
  mbarrier_wait(shared.barrier, 0);
  y[128 + i] = shared.values[63 - i];
}

// ---- bulk copies of contiguous bytes ----

struct BulkShared {
  alignas(128) float at[64];
  alignas(8) uint64_t full;
};

// There and back by one thread; then what has been read is changed, and stored once more.
__global__ void copy_in_bulk(const float* x, float* first, float* second) {
  BulkShared& shared = dynamic_shared<BulkShared>();
  mbarrier_init(shared.full, 1);
  fence_mbarrier_init();
  mbarrier_arrive_expect_bytes(shared.full, sizeof(shared.at));
  bulk_load(shared.at, x, sizeof(shared.at), shared.full);
  mbarrier_wait(shared.full, 0);
  bulk_store(first, shared.at, sizeof(shared.at));
  bulk_commit();
  bulk_wait_read<0>();
  for (int i = 0; i < 64; i += 2) shared.at[i] += 1;
  fence_proxy_async();
  bulk_store(second, shared.at, sizeof(shared.at));
  bulk_commit();
  bulk_wait<0>();
}

__global__ void copy_words(const uint32_t* from, uint32_t* to, int count) {
  for (int i = threadIdx.x; i < count; i += 32) to[i] = from[i];
}

__global__ void add_in_bulk(const float* x, float* y) {
  BulkShared& shared = dynamic_shared<BulkShared>();
  for (int i = threadIdx.x; i < 64; i += 32) shared.at[i] = x[i];
  fence_proxy_async();
  __syncwarp();
  if (threadIdx.x != 0) return;
  bulk_reduce_add(y, shared.at, sizeof(shared.at));
  bulk_commit();
  bulk_wait<0>();
}

// ---- TMA ----

constexpr int kBoxFloats = 4 * 2 * 2 * 2 * 2;
struct BoxShared {
  alignas(128) float tile[kBoxFloats];
  alignas(8) uint64_t full;
};

template <int kRank>
__global__ void copy_box(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to, float* seen,
                         int shift, bool add) {
  BoxShared& shared = dynamic_shared<BoxShared>();
  int at[kRank];
  for (int i = 0; i < kRank; ++i) at[i] = shift;
  mbarrier_init(shared.full, 1);
  fence_mbarrier_init();
  const unsigned bytes = 16u << (kRank - 1);
  mbarrier_arrive_expect_bytes(shared.full, bytes);
  tma_load(shared.tile, from, shared.full, at);
  mbarrier_wait(shared.full, 0);
  for (unsigned i = 0; i < bytes / 4; ++i) seen[i] = shared.tile[i];
  if (add)
    tma_reduce_add(to, shared.tile, at);
  else
    tma_store(to, shared.tile, at);
  bulk_commit();
  bulk_wait<0>();
}

// A tensor of 4 x 3 x 3 x ... floats, and boxes of 4 x 2 x 2 x ... in it.
struct BoxShape {
  uint64_t sizes[5] = {4, 3, 3, 3, 3}, strides[4] = {16, 48, 144, 432};
  uint32_t box[5] = {4, 2, 2, 2, 2};
  int count = 4, box_count = 4;
  explicit BoxShape(int rank) {
    for (int i = 1; i < rank; ++i) {
      count *= 3;
      box_count *= 2;
    }
  }
};

constexpr int kTileBytes = 2048;  // 16 rows of a 128-byte swizzle
struct TileShared {
  alignas(1024) uint16_t tile[kTileBytes / 2];
  alignas(8) uint64_t full;
};

// A tile as it lies in shared memory, swizzled, and back.
__global__ void copy_tile(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to, uint16_t* seen,
                          bool add) {
  TileShared& shared = dynamic_shared<TileShared>();
  const int at[2] = {0, 0};
  if (threadIdx.x == 0) {
    mbarrier_init(shared.full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_bytes(shared.full, kTileBytes);
    tma_load(shared.tile, from, shared.full, at);
  }
  __syncwarp();
  mbarrier_wait(shared.full, 0);
  for (int i = threadIdx.x; i < kTileBytes / 2; i += 32) seen[i] = shared.tile[i];
  __syncwarp();
  if (threadIdx.x != 0) return;
  if (add)
    tma_reduce_add(to, shared.tile, at);
  else
    tma_store(to, shared.tile, at);
  bulk_commit();
  bulk_wait<0>();
}

// Each block of the cluster loads half of the tile into both.
struct MulticastShared {
  alignas(128) float tile[2][32];
  alignas(8) uint64_t full;
};
template <int kRank>
__global__ void multicast(const __grid_constant__ TensorMap map, float* y) {
  MulticastShared& shared = dynamic_shared<MulticastShared>();
  if (threadIdx.x == 0) {
    mbarrier_init(shared.full, 1);
    fence_mbarrier_init();
  }
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_bytes(shared.full, sizeof(shared.tile));
    int at[kRank] = {};
    at[kRank - 1] = int(cluster_rank()) * (kRank == 1 ? 32 : 1);
    tma_load_multicast(shared.tile[cluster_rank()], map, shared.full, at, 3);
  }
  mbarrier_wait(shared.full, 0);
  for (int i = threadIdx.x; i < 64; i += 32) y[blockIdx.x * 64 + i] = shared.tile[i / 32][i % 32];
}

// 64 floats as a tensor in which either half is a box.
struct HalvesShape {
  uint64_t sizes[5] = {32, 1, 1, 1, 1}, strides[4] = {128, 128, 128, 128};
  uint32_t box[5] = {32, 1, 1, 1, 1};
  explicit HalvesShape(int rank) { sizes[rank - 1] = rank == 1 ? 64 : 2; }
};

// ---- wgmma ----

constexpr int kDepth = 64;  // of the tiles: four steps of 16

// How a tile of kRows rows of A, or columns of B, lies in shared memory: PTX ISA 9.7.14.5.1. Without a swizzle in 8x8
// matrices of 128 bytes; with one in lines of kSwizzle bytes, along k or along mn.
template <Major kMajor, int kRows, int kSwizzle>
struct TileLayout {
  static constexpr bool kAlongK = kMajor == Major::k;
  static constexpr int kLine = kSwizzle ? kSwizzle : 16;
  static constexpr int kPerLine = kLine / 2;
  static constexpr int kLines = kAlongK ? kRows : kDepth;                             // below each other
  static constexpr int kColumnBytes = kLines * kLine;                                 // of lines below each other
  static constexpr int kBytes = ((kAlongK ? kDepth : kRows) + kPerLine - 1) / kPerLine * kColumnBytes;

  __device__ static int element(int row, int k) {
    const int along = kAlongK ? k : row, across = kAlongK ? row : k;
    const int byte = along / kPerLine * kColumnBytes + across * kLine + along % kPerLine * 2;
    const int mask = kSwizzle == 128 ? 7 : kSwizzle == 64 ? 3 : kSwizzle == 32 ? 1 : 0;
    return (byte ^ (byte >> 7 & mask) << 4) / 2;
  }
  __device__ static uint64_t descriptor(const void* tile, int step) {
    const char* start = static_cast<const char*>(tile);
    const int k = step * 16, groups = 8 * kLine;  // bytes from one group of 8 lines to the next
    start += kAlongK ? k / kPerLine * kColumnBytes + k % kPerLine * 2 : k * kLine;
    if (kSwizzle || kAlongK) return matrix_descriptor(start, kColumnBytes, groups, kSwizzle);
    return matrix_descriptor(start, groups, kColumnBytes, kSwizzle);  // along mn and unswizzled they change places
  }
};

template <class LayoutA, class LayoutB>
struct Operands {
  alignas(1024) uint16_t a[LayoutA::kBytes / 2];
  alignas(1024) uint16_t b[LayoutB::kBytes / 2];
};

template <class T>
struct TypeOf;
template <>
struct TypeOf<bf16> {
  using type = Bf16;
};
template <>
struct TypeOf<f16> {
  using type = F16;
};

// D[64,N] = A[64,64] B[N,64]^T by one warpgroup; A and B are contiguous along k in global memory.
template <class T, int kColumns, Major kA, Major kB, int kSwizzle, bool kFromRegisters>
struct Multiply {
  using LayoutA = TileLayout<kA, 64, kSwizzle>;
  using LayoutB = TileLayout<kB, kColumns, kSwizzle>;
  using SharedMemory = Operands<LayoutA, LayoutB>;
};

template <class T, int kColumns, Major kA, Major kB, int kSwizzle, bool kFromRegisters>
__global__ __launch_bounds__(128, 1) void multiply_64xn(const T* a_global, const T* b_global, float* d_global) {
  using This = Multiply<T, kColumns, kA, kB, kSwizzle, kFromRegisters>;
  typename This::SharedMemory& shared = dynamic_shared<typename This::SharedMemory>();
  const uint16_t* a_bits = reinterpret_cast<const uint16_t*>(a_global);
  const uint16_t* b_bits = reinterpret_cast<const uint16_t*>(b_global);
  for (int i = threadIdx.x; i < 64 * kDepth; i += 128)
    shared.a[This::LayoutA::element(i / kDepth, i % kDepth)] = a_bits[i];
  for (int i = threadIdx.x; i < kColumns * kDepth; i += 128)
    shared.b[This::LayoutB::element(i / kDepth, i % kDepth)] = b_bits[i];
  fence_proxy_async();
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * 16 + lane / 4, column = lane % 4 * 2;
  uint32_t fragments[kDepth / 16][4];
  if (kFromRegisters)
    for (int step = 0; step < kDepth / 16; ++step)
      for (int i = 0; i < 4; ++i)
        fragments[step][i] = *reinterpret_cast<const uint32_t*>(
            &a_bits[(row + i % 2 * 8) * kDepth + step * 16 + column + i / 2 * 8]);
  using Type = typename TypeOf<T>::type;
  float d[kColumns / 2];
  for (int i = 0; i < kColumns / 2; ++i) d[i] = 0;
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    const uint64_t b_tile = This::LayoutB::descriptor(shared.b, step);
    if constexpr (kFromRegisters)
      wgmma<kB>(d, fragments[step], b_tile, step > 0, Type());
    else
      wgmma<kA, kB>(d, This::LayoutA::descriptor(shared.a, step), b_tile, step > 0, Type());
  }
  wgmma_commit();
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i)
    d_global[(row + i / 2 % 2 * 8) * kColumns + i / 4 * 8 + column + i % 2] = d[i];
}

// C = A B^T the way a Hopper kernel does it: a producer warp fills a ring of stages by TMA, two consumer warpgroups
// multiply, the result leaves by TMA.
namespace matmul {

constexpr int kTileM = 128, kTileN = 64, kTileK = 64, kStages = 2, kConsumers = 2, kThreads = 128 * (kConsumers + 1);

struct SharedMemory {
  alignas(1024) bf16 a[kStages][kTileM * kTileK], b[kStages][kTileN * kTileK], c[kTileM * kTileN];
  alignas(8) uint64_t full[kStages], empty[kStages];
};

struct RingPosition {
  int stage = 0, parity = 0;  // the parity flips each time it comes back to stage 0
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

__global__ __launch_bounds__(kThreads, 1) void kernel(const __grid_constant__ TensorMap a,
                                                      const __grid_constant__ TensorMap b,
                                                      const __grid_constant__ TensorMap c, int k) {
  SharedMemory& shared = dynamic_shared<SharedMemory>();
  const int group = threadIdx.x / 128, steps = k / kTileK;
  const int row = blockIdx.y * kTileM, column = blockIdx.x * kTileN;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(shared.full[stage], 1);
      mbarrier_init(shared.empty[stage], kConsumers);
    }
    fence_mbarrier_init();
  }
  __syncthreads();

  RingPosition at;
  if (group == kConsumers) {
    give_back_registers_down_to<40>();
    if (threadIdx.x == kConsumers * 128) {
      for (int step = 0; step < steps; ++step, at.advance()) {
        mbarrier_wait(shared.empty[at.stage], at.parity ^ 1);
        mbarrier_arrive_expect_bytes(shared.full[at.stage], sizeof(shared.a[0]) + sizeof(shared.b[0]));
        const int a_at[2] = {step * kTileK, row}, b_at[2] = {step * kTileK, column};
        tma_load(shared.a[at.stage], a, shared.full[at.stage], a_at);
        tma_load(shared.b[at.stage], b, shared.full[at.stage], b_at);
      }
    }
  } else {
    take_registers_up_to<232>();
    float d[32];
    for (int step = 0; step < steps; ++step, at.advance()) {
      mbarrier_wait(shared.full[at.stage], at.parity);
      wgmma_fence();
      for (int i = 0; i < kTileK; i += 16)
        wgmma(d, matrix_descriptor(shared.a[at.stage] + group * 64 * kTileK + i, 0, 1024, 128),
              matrix_descriptor(shared.b[at.stage] + i, 0, 1024, 128), step + i > 0, Bf16());
      wgmma_commit();
      wgmma_wait<0>();
      if (threadIdx.x % 128 == 0) mbarrier_arrive(shared.empty[at.stage]);
    }
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    for (int i = 0; i < 32; i += 2) {  // where the store's swizzle expects it
      const int r = group * 64 + warp * 16 + lane / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + lane % 4 * 2;
      *reinterpret_cast<__nv_bfloat162*>(&shared.c[r * kTileN + (n / 8 ^ r % 8) * 8 + n % 8]) =
          __floats2bfloat162_rn(d[i], d[i + 1]);
    }
    fence_proxy_async();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const int c_at[2] = {column, row};
    tma_store(c, shared.c, c_at);
    bulk_commit();
    bulk_wait<0>();
  }
}

constexpr int kM = 136, kN = 72, kK = 192;  // tiles hang over the edges

}  // namespace matmul

// ---- clusters ----

struct ClusterShared {
  float values[32];
  alignas(8) uint64_t ready;
};
__global__ void reverse_through_cluster(const float* x, float* y) {
  __shared__ float sum;  // each block has its own
  ClusterShared& shared = dynamic_shared<ClusterShared>();
  if (threadIdx.x == 0) {
    mbarrier_init(shared.ready, 1);
    fence_mbarrier_init();
    sum = cluster_rank();
  }
  cluster_arrive();
  cluster_wait();
  const unsigned other = 3 - cluster_rank();
  map_to_rank(shared.values, other)[threadIdx.x] = x[blockIdx.x * 32 + threadIdx.x];
  __syncwarp();
  if (threadIdx.x == 0) mbarrier_arrive_at_rank(shared.ready, other);
  mbarrier_wait(shared.ready, 0);
  y[blockIdx.x * 32 + threadIdx.x] = shared.values[threadIdx.x] + sum;
}

// The models of instructions against plain loops. Inputs are small whole numbers, so every sum is exact and every
// comparison is for equality.
#include "case.h"

#include <cstring>

#include "emulator/elements.h"

namespace {

template <class A, class B>
std::string differs(const std::vector<A>& got, const std::vector<B>& want, const char* what) {
  for (size_t i = 0; i < want.size(); ++i) {
    const double a = float(got[i]), b = float(want[i]);
    if (!(a == b))
      return std::string(what) + " " + std::to_string(i) + ": " + std::to_string(a) + ", expected " + std::to_string(b);
  }
  return "";
}

// C[m,n] = A[m,k] B[k,n], where the strides say how A and B lie.
template <class T>
std::vector<float> product(const std::vector<T>& a, const std::vector<T>& b, int m, int n, int k, int a_row, int a_k,
                           int b_k, int b_column) {
  std::vector<float> c(m * n, 0.0f);
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j)
      for (int p = 0; p < k; ++p) c[i * n + j] += float(a[i * a_row + p * a_k]) * float(b[p * b_k + j * b_column]);
  return c;
}

}  // namespace

// ---- warp-level matrix instructions ----

// C[16,8] = A[16,16] B[8,16]^T, through shared memory.
template <class T, class Type>
__global__ void multiply_16x8(const T* a, const T* b, float* c) {
  struct Shared {
    alignas(16) T a[16 * 16], b[8 * 16];
  };
  Shared& shared = dynamic_shared<Shared>();
  const int lane = threadIdx.x;
  cp_async(&shared.a[lane * 8], a + lane * 8);
  if (lane < 16) cp_async(&shared.b[lane * 8], b + lane * 8);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  uint32_t a_fragment[4], b_fragment[2];
  ldmatrix(a_fragment, &shared.a[lane % 16 * 16 + lane / 16 * 8]);
  ldmatrix(b_fragment, &shared.b[lane % 8 * 16 + lane / 8 % 2 * 8]);
  float d[4] = {};
  mma_m16n8k16(d, a_fragment, b_fragment, d, Type());
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

template <class T, class Type>
std::string check_mma() {
  std::vector<T> a = random_values<T>(256, 1), b = random_values<T>(128, 2);
  std::vector<float> c(128);
  Tensors tensors;
  launch(multiply_16x8<T, Type>, {dim3(1), dim3(32), 768}, tensors.in(a, "a"), tensors.in(b, "b"), tensors.out(c, "c"));
  return differs(c, product(a, b, 16, 8, 16, 16, 1, 1, 16), "element");
}
MODEL(mma_bf16) { return check_mma<bf16, Bf16>(); }
MODEL(mma_f16) { return check_mma<__half, F16>(); }

__global__ void multiply_tf32(const float* a, const float* b, float* c) {
  const int group = threadIdx.x / 4, member = threadIdx.x % 4;
  uint32_t a_fragment[4], b_fragment[2];
  for (int i = 0; i < 4; ++i)
    a_fragment[i] = __float_as_uint(a[(group + i % 2 * 8) * 8 + member + i / 2 * 4]) | 1;  // ignored
  for (int i = 0; i < 2; ++i) b_fragment[i] = __float_as_uint(b[(member + i * 4) * 8 + group]);
  float d[4] = {};
  mma_m16n8k8_tf32(d, a_fragment, b_fragment, d);
  for (int i = 0; i < 4; ++i) c[(group + i / 2 * 8) * 8 + member * 2 + i % 2] = d[i];
}
MODEL(mma_tf32) {
  std::vector<float> a = random_values<float>(128, 1), b = random_values<float>(64, 2), c(128);
  Tensors tensors;
  launch(multiply_tf32, {dim3(1), dim3(32)}, tensors.in(a, "a"), tensors.in(b, "b"), tensors.out(c, "c"));
  return differs(c, product(a, b, 16, 8, 8, 8, 1, 8, 1), "element");
}

// Through registers and back, transposed once: a transposition of each 8x8 matrix.
__global__ void transpose_with_stmatrix(const bf16* x, bf16* y) {
  struct Shared {
    alignas(16) bf16 in[4 * 64], out[4 * 64];
  };
  Shared& shared = dynamic_shared<Shared>();
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) shared.in[i] = x[i];
  __syncwarp();
  uint32_t fragment[4];
  ldmatrix(fragment, &shared.in[lane * 8]);
  stmatrix<true>(&shared.out[lane * 8], fragment);
  __syncwarp();
  for (int i = lane; i < 256; i += 32) y[i] = shared.out[i];
}
MODEL(stmatrix) {
  std::vector<bf16> x = random_values<bf16>(256, 1), y(256), want(256);
  Tensors tensors;
  launch(transpose_with_stmatrix, {dim3(1), dim3(32), 1024}, tensors.in(x, "x"), tensors.out(y, "y"));
  for (int m = 0; m < 4; ++m)
    for (int i = 0; i < 64; ++i) want[m * 64 + i] = x[m * 64 + i % 8 * 8 + i / 8];
  return differs(y, want, "element");
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

// A tensor of 4 x 3 x 3 x ... floats; the box of 4 x 2 x 2 x ... at `shift` lies partly outside.
template <int kRank>
std::string check_box(int shift, bool add) {
  int count = 4, box_count = 4;
  uint64_t sizes[5] = {4, 3, 3, 3, 3}, strides[4] = {16, 48, 144, 432};
  uint32_t box[5] = {4, 2, 2, 2, 2};
  for (int i = 1; i < kRank; ++i) {
    count *= 3;
    box_count *= 2;
  }
  std::vector<float> from = random_values<float>(count, kRank), to = random_values<float>(count, 9), seen(box_count),
                     want_seen, want = to;
  for (int i = 0; i < box_count; ++i) {
    bool inside = true;
    int offset = 0, rest = i;
    for (int d = 0, scale = 1; d < kRank; ++d) {
      const int c = rest % int(box[d]) + shift;
      inside = inside && c >= 0 && c < int(sizes[d]);
      offset += c * scale;
      rest /= int(box[d]);
      scale *= int(sizes[d]);
    }
    want_seen.push_back(inside ? from[offset] : 0.0f);
    if (inside) want[offset] = from[offset] + (add ? want[offset] : 0.0f);
  }
  Tensors tensors;
  const TensorMap from_map = make_tensor_map(tensors.in(from, "from"), kTensorF32, kRank, sizes, strides, box, 0);
  const TensorMap to_map = make_tensor_map(tensors.add(to, "to", emulator::TensorAccess::in_place), kTensorF32, kRank,
                                           sizes, strides, box, 0);
  launch(copy_box<kRank>, {dim3(1), dim3(1), sizeof(BoxShared)}, from_map, to_map, tensors.out(seen, "seen"), shift,
         add);
  const std::string wrong = differs(seen, want_seen, "loaded element");
  return wrong.empty() ? differs(to, want, "stored element") : wrong;
}
template <int kRank>
std::string check_boxes() {
  for (const int shift : {0, 1, 2, -1})
    for (const bool add : {false, true})
      if (std::string wrong = check_box<kRank>(shift, add); !wrong.empty())
        return wrong + " at shift " + std::to_string(shift);
  return "";
}
MODEL(tma_1d) { return check_boxes<1>(); }
MODEL(tma_2d) { return check_boxes<2>(); }
MODEL(tma_3d) { return check_boxes<3>(); }
MODEL(tma_4d) { return check_boxes<4>(); }
MODEL(tma_5d) { return check_boxes<5>(); }

MODEL(tensor_map_limits) {
  std::vector<float> x(64);
  const uint64_t sizes[2] = {8, 8}, strides[1] = {32}, odd[1] = {36};
  const uint32_t box[2] = {8, 8}, narrow[2] = {2, 8};
  const auto refused = [&](const void* base, const uint64_t* stride, const uint32_t* of, unsigned swizzle) {
    try {
      make_tensor_map(base, kTensorF32, 2, sizes, stride, of, swizzle);
      return false;
    } catch (const std::invalid_argument&) {
      return true;
    }
  };
  void* base = reinterpret_cast<void*>((uintptr_t(x.data()) + 15) / 16 * 16);
  if (refused(base, strides, box, 32)) return "a good map was refused";
  if (!refused(static_cast<char*>(base) + 4, strides, box, 32)) return "a misaligned tensor was accepted";
  if (!refused(base, odd, box, 32)) return "an odd stride was accepted";
  if (!refused(base, strides, narrow, 32)) return "a row of 8 bytes was accepted";
  if (!refused(base, strides, box, 16)) return "a swizzle of 16 bytes was accepted";
  return "";
}

// Each block of the cluster loads half of the tile into both.
__global__ void multicast(const __grid_constant__ TensorMap map, float* y) {
  struct Shared {
    alignas(128) float tile[2][32];
    alignas(8) uint64_t full;
  };
  Shared& shared = dynamic_shared<Shared>();
  if (threadIdx.x == 0) {
    mbarrier_init(shared.full, 1);
    fence_mbarrier_init();
  }
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_bytes(shared.full, sizeof(shared.tile));
    const int at[2] = {0, int(cluster_rank())};
    tma_load_multicast(shared.tile[cluster_rank()], map, shared.full, at, 3);
  }
  mbarrier_wait(shared.full, 0);
  for (int i = threadIdx.x; i < 64; i += 32) y[blockIdx.x * 64 + i] = shared.tile[i / 32][i % 32];
}
MODEL(tma_multicast) {
  std::vector<float> x = random_values<float>(64, 1), y(128), want = x;
  want.insert(want.end(), x.begin(), x.end());
  Tensors tensors;
  const uint64_t sizes[2] = {32, 2}, strides[1] = {128};
  const uint32_t box[2] = {32, 1};
  const TensorMap map = make_tensor_map(tensors.in(x, "x"), kTensorF32, 2, sizes, strides, box, 0);
  launch(multicast, {dim3(2), dim3(32), 1024, nullptr, dim3(2)}, map, tensors.out(y, "y"));
  return differs(y, want, "element");
}

// ---- wgmma ----

struct Operands {
  alignas(1024) bf16 a[64 * 64], b[64 * 64];
  alignas(8) uint64_t full;
};

__device__ __forceinline__ void load_operands(Operands& shared, const TensorMap& a, const TensorMap& b) {
  if (threadIdx.x == 0) {
    mbarrier_init(shared.full, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const int at[2] = {0, 0};
    mbarrier_arrive_expect_bytes(shared.full, sizeof(shared.a) + sizeof(shared.b));
    tma_load(shared.a, a, shared.full, at);
    tma_load(shared.b, b, shared.full, at);
  }
  mbarrier_wait(shared.full, 0);
}

// D[64,64] = op(A) op(B): 64x64 tiles of 128-byte rows, 128-byte swizzle, read along k or along mn.
template <Major kA, Major kB, bool kFromRegisters>
__global__ void multiply_64x64(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                               const bf16* a_global, float* d_global) {
  Operands& shared = dynamic_shared<Operands>();
  load_operands(shared, a, b);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * 16 + lane / 4, column = lane % 4 * 2;
  const auto operand = [](const bf16* tile, Major major, int step) {
    return major == Major::k ? matrix_descriptor(tile + step * 16, 0, 1024, 128)
                             : matrix_descriptor(tile + step * 16 * 64, 1024, 1024, 128);
  };
  uint32_t fragments[4][4];
  if (kFromRegisters)
    for (int step = 0; step < 4; ++step)
      for (int i = 0; i < 4; ++i)
        fragments[step][i] =
            *reinterpret_cast<const uint32_t*>(&a_global[(row + i % 2 * 8) * 64 + step * 16 + column + i / 2 * 8]);
  float d[32];
  wgmma_fence();
  for (int step = 0; step < 4; ++step) {
    const uint64_t b_tile = operand(shared.b, kB, step);
    if constexpr (kFromRegisters)
      wgmma<kB>(d, fragments[step], b_tile, step > 0, Bf16());
    else
      wgmma<kA, kB>(d, operand(shared.a, kA, step), b_tile, step > 0, Bf16());
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < 32; ++i) d_global[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + column + i % 2] = d[i];
}

template <Major kA, Major kB, bool kFromRegisters>
std::string check_wgmma() {
  std::vector<bf16> a = random_values<bf16>(4096, 1), b = random_values<bf16>(4096, 2);
  std::vector<float> d(4096);
  Tensors tensors;
  const uint64_t sizes[2] = {64, 64}, strides[1] = {128};
  const uint32_t box[2] = {64, 64};
  const bf16* a_in = tensors.in(a, "a");
  const TensorMap a_map = make_tensor_map(a_in, kTensorBf16, 2, sizes, strides, box, 128);
  const TensorMap b_map = make_tensor_map(tensors.in(b, "b"), kTensorBf16, 2, sizes, strides, box, 128);
  launch(multiply_64x64<kA, kB, kFromRegisters>, {dim3(1), dim3(128), sizeof(Operands)}, a_map, b_map, a_in,
         tensors.out(d, "d"));
  const bool a_k = kA == Major::k, b_k = kB == Major::k;
  return differs(d, product(a, b, 64, 64, 64, a_k ? 64 : 1, a_k ? 1 : 64, b_k ? 1 : 64, b_k ? 64 : 1), "element");
}
MODEL(wgmma_k_k) { return check_wgmma<Major::k, Major::k, false>(); }
MODEL(wgmma_k_mn) { return check_wgmma<Major::k, Major::mn, false>(); }
MODEL(wgmma_mn_k) { return check_wgmma<Major::mn, Major::k, false>(); }
MODEL(wgmma_mn_mn) { return check_wgmma<Major::mn, Major::mn, false>(); }
MODEL(wgmma_registers_k) { return check_wgmma<Major::k, Major::k, true>(); }
MODEL(wgmma_registers_mn) { return check_wgmma<Major::k, Major::mn, true>(); }

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

}  // namespace matmul

MODEL(hopper_matmul) {
  const int m = 136, n = 72, k = 192;  // tiles hang over the edges
  std::vector<bf16> a(m * k), b(n * k), c(m * n), want;
  for (int i = 0; i < m * k; ++i) a[i] = bf16(float(i * 7 % 3 - 1));  // sums stay below 256, so bf16 holds them
  for (int i = 0; i < n * k; ++i) b[i] = bf16(float(i * 5 % 3 - 1));
  for (const float x : product(a, b, m, n, k, k, 1, 1, k)) want.push_back(bf16(x));
  Tensors tensors;
  const auto map = [&](const bf16* base, int rows, int columns, uint32_t box_rows) {
    const uint64_t sizes[2] = {uint64_t(columns), uint64_t(rows)}, strides[1] = {uint64_t(columns) * 2};
    const uint32_t box[2] = {64, box_rows};
    return make_tensor_map(base, kTensorBf16, 2, sizes, strides, box, 128);
  };
  launch(matmul::kernel, {dim3(2, 2), dim3(matmul::kThreads), sizeof(matmul::SharedMemory)},
         map(tensors.in(a, "a"), m, k, 128), map(tensors.in(b, "b"), n, k, 64), map(tensors.out(c, "c"), m, n, 128), k);
  return differs(c, want, "element");
}

// ---- number formats ----

MODEL(half_precision) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint16_t half = uint16_t(bits);
    __half h;
    bf16 b;
    std::memcpy(&h, &half, 2);
    std::memcpy(&b, &half, 2);
    const auto same = [](float x, float y) { return x == y || (x != x && y != y); };
    if (!same(emulator::f16_to_float(half), __half2float(h))) return "f16 " + std::to_string(bits) + " to float";
    if (!same(emulator::bf16_to_float(half), __bfloat162float(b))) return "bf16 " + std::to_string(bits) + " to float";
    // The value itself, and points between it and its neighbours, ties among them.
    for (const float scale : {1.0f, 1.0f + 0x1p-11f, 1.0f + 0x1p-9f, 1.0f + 0x1.8p-9f, 1.0f - 0x1p-12f}) {
      const float x = __half2float(h) * scale, y = __bfloat162float(b) * scale;
      const __half to_half = __float2half_rn(x);
      const bf16 to_bf16 = __float2bfloat16_rn(y);
      uint16_t want_half, want_bf16;
      std::memcpy(&want_half, &to_half, 2);
      std::memcpy(&want_bf16, &to_bf16, 2);
      if (x == x && emulator::float_to_f16(x) != want_half) return std::to_string(x) + " to f16";
      if (y == y && emulator::float_to_bf16(y) != want_bf16) return std::to_string(y) + " to bf16";
    }
  }
  return "";
}

// ---- clusters ----

__global__ void reverse_through_cluster(const float* x, float* y) {
  struct Shared {
    float values[32];
    alignas(8) uint64_t ready;
  };
  __shared__ float sum;  // each block has its own
  Shared& shared = dynamic_shared<Shared>();
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
MODEL(cluster) {
  std::vector<float> x = random_values<float>(256, 1), y(256), want(256);
  Tensors tensors;
  launch(reverse_through_cluster, {dim3(8), dim3(32), 256, nullptr, dim3(4)}, tensors.in(x, "x"), tensors.out(y, "y"));
  for (int i = 0; i < 256; ++i) want[i] = x[(i / 128 * 4 + 3 - i / 32 % 4) * 32 + i % 32] + float(i / 32 % 4);
  return differs(y, want, "element");
}

// ---- approximations ----

// Never exact, so that nothing can lean on it, and never further off than the manual says.
__global__ void approximate(const float* x, float* powers, float* reciprocals) {
  powers[threadIdx.x] = exp2_approx(x[threadIdx.x]);
  reciprocals[threadIdx.x] = reciprocal_approx(x[threadIdx.x]);
}
MODEL(approximations) {
  std::vector<float> x(64), powers(64), reciprocals(64);
  for (int i = 0; i < 60; ++i) x[i] = std::ldexp(1.0f + i / 60.0f, i % 7 - 4) * (i % 2 ? 1 : -1);
  const float infinite = HUGE_VALF, subnormal = 1e-40f;
  x[60] = infinite, x[61] = -infinite, x[62] = subnormal, x[63] = -200;  // 2^-200 is no float
  Tensors tensors;
  launch(approximate, {dim3(1), dim3(64)}, tensors.in(x, "x"), tensors.out(powers, "powers"),
         tensors.out(reciprocals, "reciprocals"));
  const auto off = [](float got, double exact) { return std::fabs(got / exact - 1); };
  for (int i = 0; i < 60; ++i) {
    const double power = off(powers[i], std::exp2(double(x[i]))), reciprocal = off(reciprocals[i], 1 / double(x[i]));
    if (!(power > 0x1p-23 && power < 0x1.4p-22)) return "2^x of " + std::to_string(x[i]);
    if (!(reciprocal > 0x1p-25 && reciprocal < 0x1.8p-23)) return "1 / x of " + std::to_string(x[i]);
  }
  if (powers[60] != infinite || powers[61] != 0 || powers[63] != 0) return "2^x at the ends";
  if (reciprocals[60] != 0 || reciprocals[61] != 0 || reciprocals[62] != infinite) return "1 / x at the ends";
  return "";
}

// ---- what is counted ----

// A column of a row-major matrix: 32 sectors where 4 would do. A column of shared memory: 32 conflicts where none need
// be.
__global__ void columns(const float* x, float* y) {
  struct Shared {
    float tile[32][32];
  };
  Shared& shared = dynamic_shared<Shared>();
  shared.tile[threadIdx.x][0] = x[threadIdx.x * 32];  // COUNT column
  y[threadIdx.x] = x[threadIdx.x];                    // COUNT row
  y[threadIdx.x] = shared.tile[threadIdx.x][0];
}
MODEL(counted_columns) {
  std::vector<float> x = random_values<float>(1024 + 8, 1), y(64);
  Tensors tensors;
  const auto aligned = [](float* p) { return reinterpret_cast<float*>((uintptr_t(p) + 31) / 32 * 32); };
  const float* from = aligned(tensors.in(x, "x"));
  launch(columns, {dim3(1), dim3(32), sizeof(float) * 1024}, from, aligned(tensors.out(y, "y")));
  return "";
}

// ---- the interface for Python ----

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* emulator_tests() {
  static std::string names;
  names.clear();
  for (const auto& [name, twins] : twins()) names += "twins " + name + " " + twins.kind + "\n";
  for (const auto& [name, model] : models()) names += "model " + name + "\n";
  return names.c_str();
}

// What the launch threw, or nothing.
EXPORT const char* emulator_run_twin(const char* name, int faulty) {
  static std::string message;
  message.clear();
  try {
    twins().at(name).run(faulty);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

EXPORT const char* emulator_run_model(const char* name) {
  static std::string message;
  try {
    message = models().at(name)();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

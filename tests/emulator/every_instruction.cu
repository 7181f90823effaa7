// Every function of csrc/ptx once: both twins must compile. Nothing here is run.
#include "host/launch.h"
#include "ptx/address.cuh"
#include "ptx/approximate.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/matrix.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/store.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

using namespace fastgpt;

struct SharedMemory {
  alignas(1024) unsigned char tile[4096];
  uint64_t barrier;
};

__global__ void sm80(const float* x, float* y) {
  SharedMemory& shared = dynamic_shared<SharedMemory>();
  store_16_bytes(y, *reinterpret_cast<const uint4*>(x));
  cp_async(shared.tile, x);
  cp_async<8>(shared.tile, x);
  cp_async<4>(shared.tile, x, threadIdx.x == 0);
  cp_async_commit();
  cp_async_wait<0>();
  uint32_t a[4], b[2], c[1];
  float d[4] = {};
  ldmatrix(a, shared.tile);
  ldmatrix(b, shared.tile);
  ldmatrix(c, shared.tile);
  ldmatrix<true>(a, shared.tile);
  ldmatrix<true>(b, shared.tile);
  ldmatrix<true>(c, shared.tile);
  mma_m16n8k16(d, a, b, d, Bf16());
  mma_m16n8k16(d, a, b, d, F16());
  mma_m16n8k8_tf32(d, a, b, d);
  barrier_sync(1, 32);
  barrier_arrive(2, 64);
  y[threadIdx.x] = d[0] + c[0] + exp2_approx(x[0]) + reciprocal_approx(x[0]);
}

template <int kRank>
__device__ void copy_box(SharedMemory& shared, const TensorMap& map) {
  int at[kRank] = {};
  tma_load(shared.tile, map, shared.barrier, at);
  tma_load_multicast(shared.tile, map, shared.barrier, at, 3);
  tma_store(map, shared.tile, at);
  tma_reduce_add(map, shared.tile, at);
}

template <int kCount>
__global__ __launch_bounds__(128, 1) void multiply(float* y) {
  SharedMemory& shared = dynamic_shared<SharedMemory>();
  float d[kCount] = {};
  uint32_t a[4] = {};
  const uint64_t tile = matrix_descriptor(shared.tile, 0, 1024, 128);
  wgmma_fence();
  wgmma(d, tile, tile, false, Bf16());
  wgmma<Major::mn, Major::mn>(d, tile, tile, true, F16());
  wgmma(d, a, tile, true, Bf16());
  wgmma<Major::mn>(d, a, tile, true, F16());
  wgmma_commit();
  wgmma_wait<0>();
  pin_registers(d);
  for (int i = 0; i < kCount; ++i) y[i] = d[i];
}

__global__ __launch_bounds__(128, 1) void sm90(const __grid_constant__ TensorMap map, float* y) {
  SharedMemory& shared = dynamic_shared<SharedMemory>();
  mbarrier_init(shared.barrier, 1);
  fence_mbarrier_init();
  mbarrier_arrive(shared.barrier);
  mbarrier_arrive_expect_bytes(shared.barrier, 16);
  mbarrier_expect_bytes(shared.barrier, 16);
  mbarrier_arrive_at_rank(shared.barrier, 1);
  mbarrier_wait(shared.barrier, 0);
  mbarrier_wait(shared.barrier, 1);
  mbarrier_invalidate(shared.barrier);
  fence_proxy_async();
  copy_box<1>(shared, map);
  copy_box<2>(shared, map);
  copy_box<3>(shared, map);
  copy_box<4>(shared, map);
  copy_box<5>(shared, map);
  bulk_load(shared.tile, y, 16, shared.barrier);
  bulk_store(y, shared.tile, 16);
  bulk_reduce_add(y, reinterpret_cast<float*>(shared.tile), 16);
  bulk_commit();
  bulk_wait<0>();
  bulk_wait_read<1>();
  uint32_t a[4] = {}, b[2] = {}, c[1] = {};
  stmatrix(shared.tile, a);
  stmatrix(shared.tile, b);
  stmatrix(shared.tile, c);
  stmatrix<true>(shared.tile, a);
  stmatrix<true>(shared.tile, b);
  stmatrix<true>(shared.tile, c);
  cluster_arrive();
  cluster_wait();
  y[cluster_rank()] = *map_to_rank(y, 1);
}

__global__ __launch_bounds__(128, 1) void registers() {
  take_registers_up_to<232>();
  give_back_registers_down_to<40>();
}

TensorMap describe(const void* base) {
  const uint64_t sizes[2] = {64, 64}, strides[1] = {256};
  const uint32_t box[2] = {16, 16};
  return make_tensor_map(base, kTensorF32, 2, sizes, strides, box, 64);
}

void run(float* y) {
  launch(sm80, {dim3(1), dim3(32), sizeof(SharedMemory)}, y, y);
  launch(multiply<4>, {dim3(1), dim3(128), sizeof(SharedMemory)}, y);
  launch(multiply<32>, {dim3(1), dim3(128), sizeof(SharedMemory)}, y);
  launch(multiply<128>, {dim3(1), dim3(128), sizeof(SharedMemory)}, y);
  launch(registers, {dim3(1), dim3(128)});
  launch(sm90, {dim3(2), dim3(128), sizeof(SharedMemory), nullptr, dim3(2)}, describe(y), y);
}

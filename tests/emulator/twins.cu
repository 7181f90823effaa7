// One faulty kernel and its correct twin for every kind of finding.
#include "case.h"

struct Floats {
  float first[64];
  float second[64];
};

static const LaunchShape kWarp{dim3(1), dim3(32), sizeof(Floats)};
static const LaunchShape kTwoWarps{dim3(1), dim3(64), sizeof(Floats)};
static const LaunchShape kTwoBlocks{dim3(2), dim3(32), sizeof(Floats)};

// ---- races ----

template <bool kFaulty>
__global__ void shared_race(float* y) {
  Floats& shared = dynamic_shared<Floats>();
  const int i = threadIdx.x;
  shared.first[i] = i;
  if (!kFaulty) __syncthreads();
  y[i] = shared.first[63 - i];  // HERE shared_race
}
TWINS(shared_race, "data race") {
  Data data;
  LAUNCH(shared_race, kTwoWarps, data.y);
}

template <bool kFaulty>
__global__ void overwritten_too_early(float* y) {
  Floats& shared = dynamic_shared<Floats>();
  const int i = threadIdx.x;
  shared.first[i] = i;
  __syncthreads();
  y[i] = shared.first[63 - i];
  if (!kFaulty) __syncthreads();
  shared.first[i] = 0;  // HERE overwritten_too_early
}
TWINS(overwritten_too_early, "data race") {
  Data data;
  LAUNCH(overwritten_too_early, kTwoWarps, data.y);
}

// Many readers of one value, of whom one was not waited for.
template <bool kFaulty>
__global__ void one_reader_of_many(float* y) {
  Floats& shared = dynamic_shared<Floats>();
  const int i = threadIdx.x;
  if (i == 0) shared.first[0] = 1;
  __syncthreads();
  y[i] = shared.first[0];
  if (!kFaulty || i < 32) barrier_sync(1, kFaulty ? 32 : 64);
  if (i == 0) shared.first[0] = 2;  // HERE one_reader_of_many
}
TWINS(one_reader_of_many, "data race") {
  Data data;
  LAUNCH(one_reader_of_many, kTwoWarps, data.y);
}

template <bool kFaulty>
__global__ void static_race(float* y) {
  __shared__ float values[64];
  const int i = threadIdx.x;
  values[i] = i;
  if (!kFaulty) __syncthreads();
  y[i] = values[63 - i];  // HERE static_race
}
TWINS(static_race, "data race") {
  Data data;
  LAUNCH(static_race, kTwoWarps, data.y);
}

template <bool kFaulty>
__global__ void global_race(float* y) {
  const int i = threadIdx.x;
  y[i] = i;
  if (!kFaulty) __syncthreads();
  y[64 + i] = y[63 - i];  // HERE global_race
}
TWINS(global_race, "data race") {
  Data data;
  LAUNCH(global_race, kTwoWarps, data.y);
}

// A shuffle moves values but orders no memory.
template <bool kFaulty>
__global__ void warp_race(float* y) {
  Floats& shared = dynamic_shared<Floats>();
  const int i = threadIdx.x;
  shared.first[i] = __shfl_xor_sync(0xffffffffu, float(i), 1);
  if (!kFaulty) __syncwarp();
  y[i] = shared.first[i ^ 1];  // HERE warp_race
}
TWINS(warp_race, "data race") {
  Data data;
  LAUNCH(warp_race, kWarp, data.y);
}

template <bool kFaulty>
__global__ void same_element_of_two_blocks(float* y) {
  y[(kFaulty ? 0 : blockIdx.x * 32) + threadIdx.x] = 1;  // HERE same_element_of_two_blocks
}
TWINS(same_element_of_two_blocks, "data race") {
  Data data;
  LAUNCH(same_element_of_two_blocks, kTwoBlocks, data.y);
}

template <bool kFaulty>
__global__ void atomic_and_plain(float* y) {
  if (blockIdx.x == 0) {
    if (kFaulty)
      y[0] = 1;
    else
      atomicExch(&y[0], 1.0f);
  } else {
    atomicExch(&y[0], 2.0f);  // HERE atomic_and_plain
  }
}
TWINS(atomic_and_plain, "data race") {
  std::vector<float> sum(1);
  Tensors tensors;
  LAUNCH(atomic_and_plain, (LaunchShape{dim3(2), dim3(1)}), tensors.add(sum, "sum", emulator::TensorAccess::in_place));
}

__device__ __forceinline__ float inner(const float* values, int i) {
  return values[63 - i];  // HERE inlined_helper
}
__device__ __forceinline__ float outer(const float* values, int i) { return inner(values, i); }
template <bool kFaulty>
__global__ void inlined_helper(float* y) {
  Floats& shared = dynamic_shared<Floats>();
  shared.first[threadIdx.x] = 1;
  if (!kFaulty) __syncthreads();
  y[threadIdx.x] = outer(shared.first, threadIdx.x);
}
TWINS(inlined_helper, "data race") {
  Data data;
  LAUNCH(inlined_helper, kTwoWarps, data.y);
}

// ---- bounds and alignment ----

template <bool kFaulty>
__global__ void past_the_end(const float* x, float* y) {
  const int i = threadIdx.x + (kFaulty ? 1 : 0);
  y[threadIdx.x] = x[4096 - 32 + i];  // HERE past_the_end
}
TWINS(past_the_end, "out of bounds") {
  Data data;
  LAUNCH(past_the_end, kWarp, data.x, data.y);
}

template <bool kFaulty>
__global__ void before_the_begin(const float* x, float* y) {
  y[threadIdx.x] = x[int(threadIdx.x) - (kFaulty ? 1 : 0)];  // HERE before_the_begin
}
TWINS(before_the_begin, "out of bounds") {
  Data data;
  LAUNCH(before_the_begin, kWarp, data.x, data.y);
}

template <bool kFaulty>
__global__ void shared_pointer(float* y) {
  float* values = dynamic_shared<Floats>().second;
  values[threadIdx.x + (kFaulty ? 33 : 0)] = 1;  // HERE shared_pointer
}
TWINS(shared_pointer, "out of bounds") {
  Data data;
  LAUNCH(shared_pointer, kWarp, data.y);
}

template <bool kFaulty>
__global__ void array_index(float* y) {
  Floats& shared = dynamic_shared<Floats>();
  shared.first[threadIdx.x + (kFaulty ? 33 : 0)] = 1;  // HERE array_index
}
TWINS(array_index, "out of bounds") {
  Data data;
  LAUNCH(array_index, kWarp, data.y);
}

__global__ void uses_shared(float* y) {
  dynamic_shared<Floats>().first[0] = 1;  // HERE too_little_shared_memory
}
TWINS(too_little_shared_memory, "out of bounds") {
  Data data;
  launch(uses_shared, {dim3(1), dim3(1), sizeof(Floats) - (faulty ? 1 : 0)}, data.y);
}

struct Twelve {
  float values[12];
};
template <bool kFaulty>
__global__ void long_copy(const float* x, float* y) {
  Twelve copy;
  memcpy(&copy, x + 4096 - 12 + (kFaulty ? 1 : 0), sizeof(copy));  // HERE long_copy
  y[threadIdx.x] = copy.values[threadIdx.x % 12];
}
TWINS(long_copy, "out of bounds") {
  Data data;
  LAUNCH(long_copy, kWarp, data.x, data.y);
}

template <bool kFaulty>
__global__ void misaligned_vector(const float* x, float* y) {
  const float4 v = *reinterpret_cast<const float4*>(x + (kFaulty ? 2 : 4));  // HERE misaligned_vector
  y[threadIdx.x] = v.x;
}
TWINS(misaligned_vector, "misaligned address") {
  Data data;
  LAUNCH(misaligned_vector, kWarp, data.x, data.y);
}

template <bool kFaulty>
__global__ void misaligned_copy(const float* x, float* y) {
  Floats& shared = dynamic_shared<Floats>();
  cp_async(shared.first, x + (kFaulty ? 1 : 0));  // HERE misaligned_copy
  cp_async_commit();
  cp_async_wait<0>();
}
TWINS(misaligned_copy, "misaligned address") {
  Data data;
  LAUNCH(misaligned_copy, (LaunchShape{dim3(1), dim3(1), sizeof(Floats)}), data.x, data.y);
}

template <bool kFaulty>
__global__ void input_written(const float* x, float* y) {
  float* to = kFaulty ? const_cast<float*>(x) : y;
  to[threadIdx.x] = 1;  // HERE input_written
}
TWINS(input_written, "write to an input") {
  Data data;
  LAUNCH(input_written, kWarp, data.x, data.y);
}

// ---- memory that nobody wrote ----

template <bool kFaulty>
__global__ void shared_uninitialised(float* y) {
  Floats& shared = dynamic_shared<Floats>();
  if (threadIdx.x < (kFaulty ? 31 : 32)) shared.first[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = shared.first[threadIdx.x];  // HERE shared_uninitialised
}
TWINS(shared_uninitialised, "uninitialised read") {
  Data data;
  LAUNCH(shared_uninitialised, kWarp, data.y);
}

// Static shared memory keeps what the block before left, which must not look like this block's.
template <bool kFaulty>
__global__ void static_uninitialised(float* y) {
  __shared__ float value;
  if (threadIdx.x == 0 && (blockIdx.x == 0 || !kFaulty)) value = 1;
  __syncthreads();
  y[blockIdx.x * 32 + threadIdx.x] = value;  // HERE static_uninitialised
}
TWINS(static_uninitialised, "uninitialised read") {
  Data data;
  LAUNCH(static_uninitialised, kTwoBlocks, data.y);
}

template <bool kFaulty>
__global__ void output_uninitialised(float* y) {
  if (!kFaulty) y[threadIdx.x] = 1;
  y[threadIdx.x] += 1;  // HERE output_uninitialised
}
TWINS(output_uninitialised, "uninitialised read") {
  Data data;
  LAUNCH(output_uninitialised, kWarp, data.y);
}

// ---- barriers and warps ----

template <bool kFaulty>
__global__ void nobody_arrives(float* y) {
  if (threadIdx.x < 32)
    barrier_sync(1, 64);  // HERE nobody_arrives
  else if (!kFaulty)
    barrier_arrive(1, 64);
}
TWINS(nobody_arrives, "deadlock") {
  Data data;
  LAUNCH(nobody_arrives, kTwoWarps, data.y);
}

template <bool kFaulty>
__global__ void barrier_in_a_branch(float* y) {
  if (kFaulty && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();  // HERE barrier_in_a_branch
  }
}
TWINS(barrier_in_a_branch, "divergent barrier") {
  Data data;
  LAUNCH(barrier_in_a_branch, kTwoWarps, data.y);
}

template <bool kFaulty>
__global__ void barrier_counts_differ(float* y) {
  if (threadIdx.x < 32)
    barrier_arrive(1, 64);
  else
    barrier_sync(1, kFaulty ? 32 : 64);  // HERE barrier_counts_differ
}
TWINS(barrier_counts_differ, "wrong barrier count") {
  Data data;
  LAUNCH(barrier_counts_differ, kTwoWarps, data.y);
}

template <bool kFaulty>
__global__ void lanes_missing(float* y) {
  if (threadIdx.x < 16)
    y[threadIdx.x] = __shfl_xor_sync(kFaulty ? 0xffffffffu : 0xffffu, 1.0f, 1);  // HERE lanes_missing
}
TWINS(lanes_missing, "deadlock") {
  Data data;
  LAUNCH(lanes_missing, kWarp, data.y);
}

template <bool kFaulty>
__global__ void caller_not_in_mask(float* y) {
  y[threadIdx.x] = __shfl_xor_sync(kFaulty ? 0xffffu : 0xffffffffu, 1.0f, 1);  // HERE caller_not_in_mask
}
TWINS(caller_not_in_mask, "wrong mask") {
  Data data;
  LAUNCH(caller_not_in_mask, kWarp, data.y);
}

template <bool kFaulty>
__global__ void source_not_in_mask(float* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, kFaulty ? 16 : 8);  // HERE source_not_in_mask
}
TWINS(source_not_in_mask, "wrong mask") {
  Data data;
  LAUNCH(source_not_in_mask, kWarp, data.y);
}

template <bool kFaulty>
__global__ void divergent_warp(float* y) {
  if (kFaulty && threadIdx.x < 16) {
    __syncwarp();
  } else {
    y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);  // HERE divergent_warp
  }
}
TWINS(divergent_warp, "divergent warp") {
  Data data;
  LAUNCH(divergent_warp, kWarp, data.y);
}

// Blocks run one after another here, as they may on a GPU that is busy: who spins for another block may spin for ever.
template <bool kFaulty>
__global__ void waits_for_a_later_block(int* flag) {
  if (kFaulty && blockIdx.x == 0) {
    while (atomicAdd(flag, 0) == 0) __nanosleep(100);  // HERE waits_for_a_later_block
  } else {
    atomicExch(flag, 1);
  }
}
TWINS(waits_for_a_later_block, "deadlock") {
  std::vector<int> flag(1);
  Tensors tensors;
  int* p = tensors.add(flag, "flag", emulator::TensorAccess::in_place);
  LAUNCH(waits_for_a_later_block, (LaunchShape{dim3(2), dim3(1)}), p);
}

// ---- cp.async ----

template <bool kFaulty>
__global__ void copy_not_waited_for(const float* x, float* y) {
  Floats& shared = dynamic_shared<Floats>();
  cp_async(&shared.first[threadIdx.x * 4], x + threadIdx.x * 4);
  cp_async_commit();
  if (!kFaulty) cp_async_wait<0>();
  y[threadIdx.x] = shared.first[threadIdx.x * 4];  // HERE copy_not_waited_for
}
TWINS(copy_not_waited_for, "data race") {
  Data data;
  LAUNCH(copy_not_waited_for, (LaunchShape{dim3(1), dim3(16), sizeof(Floats)}), data.x, data.y);
}

template <bool kFaulty>
__global__ void wrong_group_waited_for(const float* x, float* y) {
  Floats& shared = dynamic_shared<Floats>();
  cp_async(&shared.first[0], x);
  cp_async_commit();
  cp_async(&shared.second[0], x);
  cp_async_commit();
  cp_async_wait<kFaulty ? 1 : 0>();
  y[0] = shared.second[0];  // HERE wrong_group_waited_for
}
TWINS(wrong_group_waited_for, "data race") {
  Data data;
  LAUNCH(wrong_group_waited_for, (LaunchShape{dim3(1), dim3(1), sizeof(Floats)}), data.x, data.y);
}

template <bool kFaulty>
__global__ void copy_of_another_thread(const float* x, float* y) {
  Floats& shared = dynamic_shared<Floats>();
  cp_async(&shared.first[threadIdx.x * 4], x + threadIdx.x * 4);
  cp_async_commit();
  cp_async_wait<0>();
  if (!kFaulty) __syncthreads();
  y[threadIdx.x] = shared.first[60 - threadIdx.x * 4];  // HERE copy_of_another_thread
}
TWINS(copy_of_another_thread, "data race") {
  Data data;
  LAUNCH(copy_of_another_thread, (LaunchShape{dim3(1), dim3(16), sizeof(Floats)}), data.x, data.y);
}

// ---- mbarrier and TMA ----

struct Boxed {
  alignas(1024) float tile[256];
  alignas(8) uint64_t full, empty;
};
static const LaunchShape kBoxed{dim3(1), dim3(64), sizeof(Boxed)};

__device__ __forceinline__ void initialise(Boxed& shared, int arrivals = 1) {
  if (threadIdx.x == 0) {
    mbarrier_init(shared.full, arrivals);
    fence_mbarrier_init();
  }
  __syncthreads();
}

template <bool kFaulty>
__global__ void load_not_waited_for(const float* x, float* y) {
  Boxed& shared = dynamic_shared<Boxed>();
  initialise(shared);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_bytes(shared.full, sizeof(shared.tile));
    bulk_load(shared.tile, x, sizeof(shared.tile), shared.full);
  }
  if (!kFaulty) mbarrier_wait(shared.full, 0);
  y[threadIdx.x] = shared.tile[threadIdx.x];  // HERE load_not_waited_for
}
TWINS(load_not_waited_for, "data race") {
  Data data;
  LAUNCH(load_not_waited_for, kBoxed, data.x, data.y);
}

template <bool kFaulty>
__global__ void wrong_parity(const float* x, float* y) {
  Boxed& shared = dynamic_shared<Boxed>();
  initialise(shared);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_bytes(shared.full, sizeof(shared.tile));
    bulk_load(shared.tile, x, sizeof(shared.tile), shared.full);
  }
  mbarrier_wait(shared.full, kFaulty ? 1 : 0);
  y[threadIdx.x] = shared.tile[threadIdx.x];  // HERE wrong_parity
}
TWINS(wrong_parity, "data race") {
  Data data;
  LAUNCH(wrong_parity, kBoxed, data.x, data.y);
}

template <bool kFaulty>
__global__ void wrong_bytes(const float* x, float* y) {
  Boxed& shared = dynamic_shared<Boxed>();
  initialise(shared);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_bytes(shared.full, sizeof(shared.tile) + (kFaulty ? 16 : 0));
    bulk_load(shared.tile, x, sizeof(shared.tile), shared.full);
  }
  mbarrier_wait(shared.full, 0);  // HERE wrong_bytes
}
TWINS(wrong_bytes, "deadlock") {
  Data data;
  LAUNCH(wrong_bytes, kBoxed, data.x, data.y);
}

template <bool kFaulty>
__global__ void too_few_arrivals(float* y) {
  Boxed& shared = dynamic_shared<Boxed>();
  initialise(shared, kFaulty ? 3 : 2);
  if (threadIdx.x % 32 == 0) mbarrier_arrive(shared.full);
  mbarrier_wait(shared.full, 0);  // HERE too_few_arrivals
}
TWINS(too_few_arrivals, "deadlock") {
  Data data;
  LAUNCH(too_few_arrivals, kBoxed, data.y);
}

template <bool kFaulty>
__global__ void bytes_of_no_copy(float* y) {
  Boxed& shared = dynamic_shared<Boxed>();
  initialise(shared, 1);
  if (threadIdx.x == 0) mbarrier_expect_bytes(shared.full, kFaulty ? (1 << 20) : 0);  // HERE bytes_of_no_copy
}
TWINS(bytes_of_no_copy, "wrong mbarrier bytes") {
  Data data;
  LAUNCH(bytes_of_no_copy, kBoxed, data.y);
}

template <bool kFaulty>
__global__ void too_many_arrivals(const float* x, float* y) {
  Boxed& shared = dynamic_shared<Boxed>();
  initialise(shared);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_bytes(shared.full, sizeof(shared.tile));
    if (kFaulty) mbarrier_arrive(shared.full);  // HERE too_many_arrivals
    bulk_load(shared.tile, x, sizeof(shared.tile), shared.full);
  }
  mbarrier_wait(shared.full, 0);
}
TWINS(too_many_arrivals, "wrong mbarrier count") {
  Data data;
  LAUNCH(too_many_arrivals, kBoxed, data.x, data.y);
}

template <bool kFaulty>
__global__ void mbarrier_uninitialised(float* y) {
  Boxed& shared = dynamic_shared<Boxed>();
  initialise(shared, 64);
  mbarrier_arrive(kFaulty ? shared.empty : shared.full);  // HERE mbarrier_uninitialised
}
TWINS(mbarrier_uninitialised, "uninitialised mbarrier") {
  Data data;
  LAUNCH(mbarrier_uninitialised, kBoxed, data.y);
}

template <bool kFaulty>
__global__ void mbarrier_not_published(float* y) {
  Boxed& shared = dynamic_shared<Boxed>();
  if (threadIdx.x == 0) mbarrier_init(shared.full, 64);
  if (!kFaulty) __syncthreads();
  mbarrier_arrive(shared.full);  // HERE mbarrier_not_published
}
TWINS(mbarrier_not_published, "data race") {
  Data data;
  LAUNCH(mbarrier_not_published, kBoxed, data.y);
}

template <bool kFaulty>
__global__ void mbarrier_not_fenced(const float* x, float* y) {
  Boxed& shared = dynamic_shared<Boxed>();
  if (threadIdx.x == 0) {
    mbarrier_init(shared.full, 1);
    if (!kFaulty) fence_proxy_async();  // serves as well as fence_mbarrier_init()
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_bytes(shared.full, sizeof(shared.tile));
    bulk_load(shared.tile, x, sizeof(shared.tile), shared.full);  // HERE mbarrier_not_fenced
  }
  mbarrier_wait(shared.full, 0);
  y[threadIdx.x] = shared.tile[threadIdx.x];
}
TWINS(mbarrier_not_fenced, "missing proxy fence") {
  Data data;
  LAUNCH(mbarrier_not_fenced, kBoxed, data.x, data.y);
}

// The producer overwrites the tile without waiting until it was read.
template <bool kFaulty>
__global__ void tile_not_empty(const float* x, float* y) {
  Boxed& shared = dynamic_shared<Boxed>();
  if (threadIdx.x == 0) mbarrier_init(shared.empty, 32);
  initialise(shared);
  for (int step = 0; step < 2; ++step) {
    if (threadIdx.x == 0) {
      if (!kFaulty) mbarrier_wait(shared.empty, step ^ 1);
      mbarrier_arrive_expect_bytes(shared.full, sizeof(shared.tile));
      bulk_load(shared.tile, x, sizeof(shared.tile), shared.full);  // HERE tile_not_empty
      mbarrier_wait(shared.full, step);
    } else if (threadIdx.x >= 32) {
      mbarrier_wait(shared.full, step);
      y[step * 64 + threadIdx.x] = shared.tile[threadIdx.x];
      mbarrier_arrive(shared.empty);
    }
  }
}
TWINS(tile_not_empty, "data race") {
  Data data;
  LAUNCH(tile_not_empty, kBoxed, data.x, data.y);
}

template <bool kFaulty>
__global__ void store_without_proxy_fence(float* y) {
  Boxed& shared = dynamic_shared<Boxed>();
  for (int i = threadIdx.x; i < 256; i += 64) shared.tile[i] = i;
  if (!kFaulty) fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(y, shared.tile, sizeof(shared.tile));  // HERE store_without_proxy_fence
    bulk_commit();
    bulk_wait<0>();
  }
}
TWINS(store_without_proxy_fence, "missing proxy fence") {
  Data data;
  LAUNCH(store_without_proxy_fence, kBoxed, data.y);
}

template <bool kFaulty>
__global__ void store_not_waited_for(float* y) {
  Boxed& shared = dynamic_shared<Boxed>();
  for (int i = threadIdx.x; i < 256; i += 64) shared.tile[i] = i;
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(y, shared.tile, sizeof(shared.tile));  // HERE store_not_waited_for
    bulk_commit();
    if (!kFaulty) bulk_wait_read<0>();
  }
}
TWINS(store_not_waited_for, "missing bulk wait") {
  Data data;
  LAUNCH(store_not_waited_for, kBoxed, data.y);
}

template <bool kFaulty>
__global__ void source_reused_too_early(float* y) {
  Boxed& shared = dynamic_shared<Boxed>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 256; ++i) shared.tile[i] = i;
    fence_proxy_async();
    bulk_store(y, shared.tile, sizeof(shared.tile));
    bulk_commit();
    if (!kFaulty) bulk_wait_read<0>();
    shared.tile[0] = -1;  // HERE source_reused_too_early
    bulk_wait<0>();
  }
}
TWINS(source_reused_too_early, "data race") {
  Data data;
  LAUNCH(source_reused_too_early, kBoxed, data.y);
}

// wait_group.read proves only that the source was read, not that the result is there.
template <bool kFaulty>
__global__ void result_not_there(float* y) {
  Boxed& shared = dynamic_shared<Boxed>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 256; ++i) shared.tile[i] = i;
    fence_proxy_async();
    bulk_store(y, shared.tile, sizeof(shared.tile));
    bulk_commit();
    if (kFaulty)
      bulk_wait_read<0>();
    else
      bulk_wait<0>();
    y[256] = y[0];  // HERE result_not_there
  }
}
TWINS(result_not_there, "data race") {
  Data data;
  LAUNCH(result_not_there, kBoxed, data.y);
}

// ---- wgmma ----

struct Matrices {
  alignas(1024) bf16 a[64 * 64], b[64 * 64];
};
static const LaunchShape kWarpgroup{dim3(1), dim3(128), sizeof(Matrices)};

__device__ __forceinline__ uint64_t k_major(const bf16* tile) { return matrix_descriptor(tile, 0, 1024, 128); }

__device__ __forceinline__ void fill(Matrices& shared, bool fence) {
  for (int i = threadIdx.x; i < 64 * 64; i += 128) shared.a[i] = shared.b[i] = __float2bfloat16(1.0f);
  if (fence) fence_proxy_async();
  __syncthreads();
}

template <bool kFaulty>
__global__ void wgmma_without_fence(float* y) {
  Matrices& shared = dynamic_shared<Matrices>();
  fill(shared, true);
  float d[32] = {};
  if (!kFaulty) wgmma_fence();
  wgmma(d, k_major(shared.a), k_major(shared.b), true, Bf16());  // HERE wgmma_without_fence
  wgmma_commit();
  wgmma_wait<0>();
  y[threadIdx.x] = d[0];
}
TWINS(wgmma_without_fence, "missing wgmma fence") {
  Data data;
  LAUNCH(wgmma_without_fence, kWarpgroup, data.y);
}

template <bool kFaulty>
__global__ void result_read_in_flight(float* y) {
  Matrices& shared = dynamic_shared<Matrices>();
  fill(shared, true);
  float d[32] = {};
  wgmma_fence();
  wgmma(d, k_major(shared.a), k_major(shared.b), true, Bf16());
  wgmma_commit();
  if (!kFaulty) wgmma_wait<0>();
  y[threadIdx.x] = d[0];  // HERE result_read_in_flight
  wgmma_wait<0>();
}
TWINS(result_read_in_flight, "missing wgmma wait") {
  Data data;
  LAUNCH(result_read_in_flight, kWarpgroup, data.y);
}

template <bool kFaulty>
__global__ void wgmma_not_committed(float* y) {
  Matrices& shared = dynamic_shared<Matrices>();
  fill(shared, true);
  float d[32] = {};
  wgmma_fence();
  wgmma(d, k_major(shared.a), k_major(shared.b), true, Bf16());
  if (!kFaulty) wgmma_commit();
  wgmma_wait<0>();
  y[threadIdx.x] = d[0];  // HERE wgmma_not_committed
}
TWINS(wgmma_not_committed, "missing wgmma wait") {
  Data data;
  LAUNCH(wgmma_not_committed, kWarpgroup, data.y);
}

template <bool kFaulty>
__global__ void operand_overwritten(float* y) {
  Matrices& shared = dynamic_shared<Matrices>();
  fill(shared, true);
  float d[32] = {};
  wgmma_fence();
  wgmma(d, k_major(shared.a), k_major(shared.b), true, Bf16());
  wgmma_commit();
  if (!kFaulty) wgmma_wait<0>();
  __syncthreads();
  shared.b[threadIdx.x] = __float2bfloat16(2.0f);  // HERE operand_overwritten
  wgmma_wait<0>();
}
TWINS(operand_overwritten, "data race") {
  Data data;
  LAUNCH(operand_overwritten, kWarpgroup, data.y);
}

template <bool kFaulty>
__global__ void operand_register_changed(float* y) {
  Matrices& shared = dynamic_shared<Matrices>();
  fill(shared, true);
  float d[32] = {};
  uint32_t a[4] = {};
  wgmma_fence();
  wgmma(d, a, k_major(shared.b), true, Bf16());
  wgmma_commit();
  if (!kFaulty) wgmma_wait<0>();
  a[0] = 1;  // HERE operand_register_changed
  wgmma_wait<0>();
  y[threadIdx.x] = d[0] + a[0];
}
TWINS(operand_register_changed, "missing wgmma wait") {
  Data data;
  LAUNCH(operand_register_changed, kWarpgroup, data.y);
}

template <bool kFaulty>
__global__ void wgmma_without_proxy_fence(float* y) {
  Matrices& shared = dynamic_shared<Matrices>();
  fill(shared, !kFaulty);
  float d[32] = {};
  wgmma_fence();
  wgmma(d, k_major(shared.a), k_major(shared.b), true, Bf16());  // HERE wgmma_without_proxy_fence
  wgmma_commit();
  wgmma_wait<0>();
  y[threadIdx.x] = d[0];
}
TWINS(wgmma_without_proxy_fence, "missing proxy fence") {
  Data data;
  LAUNCH(wgmma_without_proxy_fence, kWarpgroup, data.y);
}

template <bool kFaulty>
__global__ void too_many_registers(float* y) {
  if (threadIdx.x < 128)
    give_back_registers_down_to<24>();
  else
    take_registers_up_to<kFaulty ? 256 : 240>();
  y[threadIdx.x] = 1;
}
TWINS(too_many_registers, "wrong register count") {
  Data data;
  LAUNCH(too_many_registers, (LaunchShape{dim3(1), dim3(384)}), data.y);
}

// ---- clusters ----

static const LaunchShape kCluster{dim3(2), dim3(32), sizeof(Floats), nullptr, dim3(2)};

template <bool kFaulty>
__global__ void neighbour_not_started(float* y) {
  Floats& shared = dynamic_shared<Floats>();
  if (!kFaulty) {
    cluster_arrive();
    cluster_wait();
  }
  map_to_rank(shared.first, cluster_rank() ^ 1)[threadIdx.x] = 1;  // HERE neighbour_not_started
  cluster_arrive();
  cluster_wait();
}
TWINS(neighbour_not_started, "missing cluster barrier") {
  Data data;
  LAUNCH(neighbour_not_started, kCluster, data.y);
}

template <bool kFaulty>
__global__ void neighbour_race(float* y) {
  Floats& shared = dynamic_shared<Floats>();
  cluster_arrive();
  cluster_wait();
  shared.first[threadIdx.x] = cluster_rank();
  if (!kFaulty) {
    cluster_arrive();
    cluster_wait();
  }
  y[blockIdx.x * 32 + threadIdx.x] =
      map_to_rank(shared.first, cluster_rank() ^ 1)[threadIdx.x] + 1;  // HERE neighbour_race
  cluster_arrive();
  cluster_wait();
}
TWINS(neighbour_race, "data race") {
  Data data;
  LAUNCH(neighbour_race, kCluster, data.y);
}

template <bool kFaulty>
__global__ void neighbour_gone(float* y) {
  Floats& shared = dynamic_shared<Floats>();
  shared.first[threadIdx.x] = 1;
  cluster_arrive();
  cluster_wait();
  if (blockIdx.x == 0)
    for (int i = 0; i < 4; ++i) __nanosleep(1);
  y[blockIdx.x * 32 + threadIdx.x] = blockIdx.x ? 0 : map_to_rank(shared.first, 1)[threadIdx.x];  // HERE neighbour_gone
  if (!kFaulty) {
    cluster_arrive();
    cluster_wait();
  }
}
TWINS(neighbour_gone, "shared memory of a block that has exited") {
  Data data;
  LAUNCH(neighbour_gone, kCluster, data.y);
}

// ---- what a launch is refused for ----

__global__ void needs_hopper(float* y) {
  Boxed& shared = dynamic_shared<Boxed>();
  mbarrier_init(shared.full, 1);  // HERE wrong_chip
}
TWINS(wrong_chip, "unsupported instruction") {
  Data data;
  emulator::Settings settings = emulator::settings();
  const emulator::Settings before = settings;
  if (faulty) settings.chip = "sm_80";
  emulator::configure(settings);
  try {
    launch(needs_hopper, {dim3(1), dim3(1), sizeof(Boxed)}, data.y);
  } catch (...) {
    emulator::configure(before);
    throw;
  }
  emulator::configure(before);
}

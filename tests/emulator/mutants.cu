// Kernels for test_mutants.py: with sites that nothing needs, that nothing reaches, and that end in all sorts of ways
// once they are switched off. A model returns what it computed.
#include "case.h"
#include "device/bounds.cuh"

namespace {

struct Values {
  float of_thread[64];
};

// The sum over the two warps of a block.
__device__ __forceinline__ float sum_of_block(Values& shared, float value) {
  __syncthreads();  // what was here before has been read
  shared.of_thread[threadIdx.x] = value;
  __syncthreads();
  float sum = 0;
  for (float of_thread : shared.of_thread) sum += of_thread;
  return sum;
}

std::string text(const std::vector<float>& values) {
  std::string out;
  for (float value : values) out += std::to_string(int(value)) + " ";
  return out;
}

template <class Kernel>
std::string run(Kernel kernel, size_t shared_bytes = sizeof(Values)) {
  std::vector<float> values(64);
  Tensors tensors;
  float* y = tensors.out(values, "y");
  launch(kernel, {dim3(1), dim3(64), shared_bytes}, y);
  return text(values);
}

}  // namespace

__global__ void sums_twice(float* y) {
  Values& shared = dynamic_shared<Values>();
  const float first = sum_of_block(shared, 1);
  y[threadIdx.x] = first + sum_of_block(shared, 2);
}
MODEL(sums_twice) { return run(sums_twice); }

__global__ void waits_twice(float* y) {
  Values& shared = dynamic_shared<Values>();
  shared.of_thread[threadIdx.x] = threadIdx.x;
  __threadfence_block();
  __syncthreads();
  __syncthreads();
  y[threadIdx.x] = shared.of_thread[63 - threadIdx.x];
}
MODEL(waits_twice) { return run(waits_twice); }

__global__ void never_asks(float* y) {
  y[threadIdx.x] = 0;
  if (blockDim.x > 64 && in_bounds(int(threadIdx.x), 64)) y[threadIdx.x] = 1;
}
MODEL(never_asks) { return run(never_asks); }

__global__ void other_numbers(float* y) {
  y[threadIdx.x] = in_bounds(int(threadIdx.x), 32) ? 1 : 0;
}
MODEL(other_numbers) { return run(other_numbers); }

__global__ void runs_on(float* y) {
  unsigned i = threadIdx.x;
  while (in_bounds(i, 100u)) i += 64;
  y[threadIdx.x] = i;
}
MODEL(runs_on) { return run(runs_on); }

// Past the checks: what a kernel does to the process.
__global__ void crashes(float* y) {
  y[threadIdx.x] = 0;
  if (in_bounds(int(threadIdx.x) + 64, 64)) emulator::copy_unseen(reinterpret_cast<void*>(16), y, sizeof(float));
}
MODEL(crashes) { return run(crashes); }

struct Counted {
  float of_thread[64];
  uint64_t arrived;
};

// Nothing was copied; all else is needed, and so is each number.
__global__ void waits_for_all(float* y) {
  Counted& shared = dynamic_shared<Counted>();
  cp_async_wait<0>();
  if (threadIdx.x == 0) mbarrier_init(shared.arrived, 64);
  __syncthreads();  // it is initialised
  shared.of_thread[threadIdx.x] = threadIdx.x;
  mbarrier_arrive(shared.arrived);
  mbarrier_wait(shared.arrived, 0);
  y[threadIdx.x] = shared.of_thread[63 - threadIdx.x];
}
MODEL(waits_for_all) { return run(waits_for_all, sizeof(Counted)); }

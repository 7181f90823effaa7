// The one way to launch a kernel, in both builds: launch(kernel, {grid, block, shared_bytes, stream}, args...).
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>

#include "device/cuda.h"
#include "host/asking.h"

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;       // dynamic shared memory: sizeof the kernel's SharedMemory
  cudaStream_t stream = nullptr;
  dim3 cluster = dim3(1, 1, 1);  // blocks that run together and see each other's shared memory (sm_90)
};

#if defined(__CUDACC__)

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const LaunchShape& shape, Args&&... args) {
  if (fastgpt::only_asking) return;
  constexpr size_t kSharedWithoutAsking = 48 * 1024;
  if (shape.shared_bytes > kSharedWithoutAsking) {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    int(shape.shared_bytes)),
               "asking for more shared memory");
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {shape.cluster.x, shape.cluster.y, shape.cluster.z};
  const bool clustered = shape.cluster.x * shape.cluster.y * shape.cluster.z > 1;

  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = shape.stream;
  config.attrs = &attribute;
  config.numAttrs = clustered ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, Params(std::forward<Args>(args))...), "launching a kernel");
}

// The block's dynamic shared memory, seen as a T.
template <class T>
__device__ __forceinline__ T& dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_bytes[];
  return *reinterpret_cast<T*>(dynamic_shared_bytes);
}

#else

template <class... Params, class... Args>
__attribute__((no_sanitize("thread"))) void launch(void (*kernel)(Params...), const LaunchShape& shape,
                                                   Args&&... args) {
  if (fastgpt::only_asking) return;
  // Copying the arguments is not the kernel's doing, so the memory hooks must not see it.
  const auto thread = [&]() __attribute__((no_sanitize("thread"))) { kernel(static_cast<Params>(args)...); };
  const auto dim = [](const dim3& d) { return emulator::Dim{d.x, d.y, d.z}; };
  emulator::run_grid(
      reinterpret_cast<const void*>(kernel), dim(shape.grid), dim(shape.block), dim(shape.cluster), shape.shared_bytes,
      [](const void* f) __attribute__((no_sanitize("thread"))) { (*static_cast<decltype(&thread)>(f))(); }, &thread);
}

template <class T>
__attribute__((always_inline)) inline T& dynamic_shared() {
  return *static_cast<T*>(emulator::dynamic_shared_memory(sizeof(T)));
}

#endif

// What the current device is and has: its chip, multiprocessors, by which a grid that stays until all rows are done is
// sized, shared memory for a block, and the L2 cache.
#pragma once

#include <cstdint>

#include "host/launch.h"

#if defined(__CUDACC__)

inline int multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "asking for the current device");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "asking for its multiprocessors");
  return count;
}

// 80 for sm_80.
inline int chip() {
  int device = 0, major = 0, minor = 0;
  check_cuda(cudaGetDevice(&device), "asking for the current device");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking for its chip");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "asking for its chip");
  return major * 10 + minor;
}

// Whether the library has code of its own for a chip, and not for older ones alone, which the driver compiles for it.
constexpr bool compiled_for(int chip) {
  for (const int number : {__CUDA_ARCH_LIST__}) {
    if (number == 10 * chip) return true;
  }
  return false;
}

// The most that a block can ask for.
inline int64_t most_shared_bytes() {
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), "asking for the current device");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "asking for its shared memory");
  return bytes;
}

inline int64_t cache_bytes() {
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), "asking for the current device");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device), "asking for its L2 cache");
  return bytes;
}

#else

// Few, so that the small tensors of tests give every block several rows.
inline int multiprocessors() { return 2; }

// As little as a short test's keys and values.
inline int64_t cache_bytes() { return 128 << 10; }

inline int chip() { return emulator::chip_number(); }

constexpr bool compiled_for(int) { return true; }

inline int64_t most_shared_bytes() { return int64_t(emulator::most_shared_bytes()); }

#endif

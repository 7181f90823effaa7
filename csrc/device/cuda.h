// CUDA's names for kernels: the real headers under nvcc, the emulator's stand-ins otherwise.
// Every kernel source includes this, directly or through another header, and never cuda_runtime.h.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// The one test of an index against its bound (see device/bounds.cuh) returns through this function, so that the
// emulated build can switch it off at run time and see whether the tests notice.
__host__ __device__ __forceinline__ bool bounds_condition(bool inside) { return inside; }
#else
#include "emulator/cuda.h"
#endif

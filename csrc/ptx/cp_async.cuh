// cp.async (sm_80): copies from global to shared memory that run while the thread goes on.
#pragma once

#if defined(__CUDACC__)
#include "ptx/cp_async_gpu.cuh"
#else
#include "ptx/cp_async_emulated.cuh"
#endif

// mbarrier (sm_90): barriers in shared memory that count arrivals, and bytes that the TMA unit brings.
#pragma once

#if defined(__CUDACC__)
#include "ptx/mbarrier_gpu.cuh"
#else
#include "ptx/mbarrier_emulated.cuh"
#endif

// Barriers for some warps of a block (bar), and of a cluster; how many registers a warpgroup has (sm_90).
#pragma once

#if defined(__CUDACC__)
#include "ptx/barrier_gpu.cuh"
#else
#include "ptx/barrier_emulated.cuh"
#endif

// ldmatrix and mma.sync (sm_80), stmatrix (sm_90): what the tensor cores of a warp work on.
#pragma once

#if defined(__CUDACC__)
#include "ptx/matrix_gpu.cuh"
#else
#include "ptx/matrix_emulated.cuh"
#endif

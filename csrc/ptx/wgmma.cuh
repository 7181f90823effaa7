// wgmma (sm_90a): a warpgroup multiplies 64 rows at a time, with operands read from shared memory.
#pragma once

#if defined(__CUDACC__)
#include "ptx/wgmma_gpu.cuh"
#else
#include "ptx/wgmma_emulated.cuh"
#endif

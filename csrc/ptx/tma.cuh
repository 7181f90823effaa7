// The tensor memory accelerator (sm_90): boxes of tensors of up to five dimensions, copied by one thread.
#pragma once

#if defined(__CUDACC__)
#include "ptx/tma_gpu.cuh"
#else
#include "ptx/tma_emulated.cuh"
#endif

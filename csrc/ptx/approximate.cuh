// Approximations of functions, one instruction each; results and inputs too small to be normal count as zero.
#pragma once

#if defined(__CUDACC__)
#include "ptx/approximate_gpu.cuh"
#else
#include "ptx/approximate_emulated.cuh"
#endif

// Addresses of shared memory, a block's own and those of its cluster.
#pragma once

#if defined(__CUDACC__)
#include "ptx/address_gpu.cuh"
#else
#include "ptx/address_emulated.cuh"
#endif

// st.global.v4: sixteen bytes of registers to global memory in one instruction.
#pragma once

#if defined(__CUDACC__)
#include "ptx/store_gpu.cuh"
#else
#include "ptx/store_emulated.cuh"
#endif

// What the files of this folder share. Each instruction is one function, in twins of one signature: NAME_gpu.cuh holds
// the asm, NAME_emulated.cuh calls the emulator's model of it, NAME.cuh includes the one that the build needs.
#pragma once

#include <cstdint>

#include "device/cuda.h"

#define FASTGPT_PTX __device__ __forceinline__

#if defined(__CUDACC__)
// Hopper's instructions in sources that are also compiled for older chips, where nothing may call them.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTGPT_SM90(...) __VA_ARGS__
#else
#define FASTGPT_SM90(...) __trap()
#endif
#endif

namespace fastgpt {

// Whether what is being compiled is for a chip with sm_80's instructions, and with Hopper's. A kernel that needs them
// ends where it is false, so that no time is spent on the rest.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kForSm80 = false;
#else
constexpr bool kForSm80 = true;
#endif
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kForSm90 = false;
#else
constexpr bool kForSm90 = true;
#endif

}  // namespace fastgpt

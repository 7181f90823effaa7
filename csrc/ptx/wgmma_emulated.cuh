// wgmma (sm_90a): a warpgroup multiplies 64 rows at a time, with operands read from shared memory.
#pragma once

#include "emulator/instructions.h"
#include "ptx/matrix.cuh"
#include "ptx/common.cuh"

namespace fastgpt {

// Which dimension of an operand is contiguous in shared memory: the depth k, or the rows of A or columns of B (mn).
enum class Major { k, mn };

// Describes an operand in shared memory. Distances in bytes; what they mean depends on major and swizzle (PTX ISA
// 9.7.14.5.1): with a swizzle and k-major, stride is from one group of 8 rows to the next, and leading is not used.
FASTGPT_PTX uint64_t matrix_descriptor(const void* start, uint32_t leading, uint32_t stride, unsigned swizzle) {
  const uint64_t kind = swizzle == 128 ? 1 : swizzle == 64 ? 2 : swizzle == 32 ? 3 : 0;
  return uint64_t((shared_address(start) & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         kind << 62;
}

FASTGPT_PTX void wgmma_fence() { emulator::wgmma_fence(); }
FASTGPT_PTX void wgmma_commit() { emulator::wgmma_commit(); }

template <int kGroupsLeft>
FASTGPT_PTX void wgmma_wait() {
  emulator::wgmma_wait(kGroupsLeft);
}

// The compiler's business alone.
template <int kCount>
FASTGPT_PTX void pin_registers(float (&)[kCount]) {}
template <int kCount>
FASTGPT_PTX void pin_registers(uint32_t (&)[kCount][4]) {}

template <Major kA = Major::k, Major kB = Major::k, int kCount>
FASTGPT_PTX void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate, Bf16) {
  emulator::wgmma(emulator::MatrixType::bf16, 2 * kCount, d, nullptr, a, b, accumulate, kA == Major::mn,
                  kB == Major::mn);
}

template <Major kB = Major::k, int kCount>
FASTGPT_PTX void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool accumulate, Bf16) {
  emulator::wgmma(emulator::MatrixType::bf16, 2 * kCount, d, a, 0, b, accumulate, false, kB == Major::mn);
}

template <Major kA = Major::k, Major kB = Major::k, int kCount>
FASTGPT_PTX void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate, F16) {
  emulator::wgmma(emulator::MatrixType::f16, 2 * kCount, d, nullptr, a, b, accumulate, kA == Major::mn,
                  kB == Major::mn);
}

template <Major kB = Major::k, int kCount>
FASTGPT_PTX void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool accumulate, F16) {
  emulator::wgmma(emulator::MatrixType::f16, 2 * kCount, d, a, 0, b, accumulate, false, kB == Major::mn);
}

}  // namespace fastgpt

// ldmatrix and mma.sync (sm_80), stmatrix (sm_90): what the tensor cores of a warp work on.
#pragma once

#include "emulator/instructions.h"
#include "ptx/address.cuh"
#include "ptx/common.cuh"

namespace fastgpt {

template <bool kTransposed = false, int kCount>
FASTGPT_PTX void ldmatrix(uint32_t (&out)[kCount], const void* row) {
  emulator::ldmatrix(out, row, kCount, kTransposed);
}

template <bool kTransposed = false, int kCount>
FASTGPT_PTX void stmatrix(void* row, const uint32_t (&in)[kCount]) {
  emulator::stmatrix(row, in, kCount, kTransposed);
}

struct Bf16 {};
struct F16 {};

FASTGPT_PTX void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                              Bf16) {
  emulator::mma(emulator::MatrixType::bf16, d, a, b, c);
}

FASTGPT_PTX void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], F16) {
  emulator::mma(emulator::MatrixType::f16, d, a, b, c);
}

FASTGPT_PTX void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  emulator::mma(emulator::MatrixType::tf32, d, a, b, c);
}

}  // namespace fastgpt

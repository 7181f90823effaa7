// ldmatrix and mma.sync (sm_80), stmatrix (sm_90): what the tensor cores of a warp work on.
#pragma once

#include "ptx/address.cuh"
#include "ptx/common.cuh"

namespace fastgpt {

// Lane 8 i + j gives row j (16 bytes in shared memory) of the i-th 8x8 matrix of 2-byte elements.
template <bool kTransposed = false>
FASTGPT_PTX void ldmatrix(uint32_t (&out)[1], const void* row) {
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(out[0])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(out[0])
                 : "r"(shared_address(row))
                 : "memory");
}

template <bool kTransposed = false>
FASTGPT_PTX void ldmatrix(uint32_t (&out)[2], const void* row) {
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(shared_address(row))
                 : "memory");
}

template <bool kTransposed = false>
FASTGPT_PTX void ldmatrix(uint32_t (&out)[4], const void* row) {
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}

template <bool kTransposed = false>
FASTGPT_PTX void stmatrix(void* row, const uint32_t (&in)[1]) {
  if constexpr (kTransposed)
    FASTGPT_SM90(asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(shared_address(row)),
                              "r"(in[0]) : "memory"));
  else
    FASTGPT_SM90(asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(shared_address(row)),
                              "r"(in[0]) : "memory"));
}

template <bool kTransposed = false>
FASTGPT_PTX void stmatrix(void* row, const uint32_t (&in)[2]) {
  if constexpr (kTransposed)
    FASTGPT_SM90(
        asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)),
                     "r"(in[0]), "r"(in[1]) : "memory"));
  else
    FASTGPT_SM90(asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)),
                              "r"(in[0]), "r"(in[1]) : "memory"));
}

template <bool kTransposed = false>
FASTGPT_PTX void stmatrix(void* row, const uint32_t (&in)[4]) {
  if constexpr (kTransposed)
    FASTGPT_SM90(asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(in[0]),
        "r"(in[1]), "r"(in[2]), "r"(in[3]) : "memory"));
  else
    FASTGPT_SM90(
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                     "r"(in[0]), "r"(in[1]), "r"(in[2]), "r"(in[3]) : "memory"));
}

// The element type of the instructions below.
struct Bf16 {};
struct F16 {};

// d[16,8] = a[16,16] b[16,8] + c, sums in fp32; d and c may be the same registers.
FASTGPT_PTX void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                              Bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

FASTGPT_PTX void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], F16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// d[16,8] = a[16,8] b[8,8] + c; of each fp32 input the lowest 13 bits are ignored.
FASTGPT_PTX void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

}  // namespace fastgpt

// Approximations of functions, one instruction each; results and inputs too small to be normal count as zero.
#pragma once

#include "ptx/common.cuh"

namespace fastgpt {

// 2^x
FASTGPT_PTX float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x
FASTGPT_PTX float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fastgpt

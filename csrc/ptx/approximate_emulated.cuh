// Approximations of functions, one instruction each; results and inputs too small to be normal count as zero.
#pragma once

#include "emulator/instructions.h"
#include "ptx/common.cuh"

namespace fastgpt {

FASTGPT_PTX float exp2_approx(float x) { return emulator::exp2_approx(x); }

FASTGPT_PTX float reciprocal_approx(float x) { return emulator::reciprocal_approx(x); }

}  // namespace fastgpt

// ex2.approx.ftz and rcp.approx.ftz: PTX ISA 9.7.3.21 and 9.7.3.13.
#include <cmath>

#include "instructions.h"

namespace emulator {

namespace {

float without_subnormals(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// The result for x, wrong by the largest relative error: in one direction or the other, as a hash of x decides, so that
// neither of two neighbours knows and sums do not drift.
float wrong(double exact, double relative_error, float x) {
  const unsigned hash = __builtin_bit_cast(unsigned, x) * 2654435769u;
  return without_subnormals(float(exact * (hash >> 31 ? 1 + relative_error : 1 - relative_error)));
}

}  // namespace

float exp2_approx(float x) { return wrong(std::exp2(double(without_subnormals(x))), 0x1p-22, x); }

float reciprocal_approx(float x) { return wrong(1 / double(without_subnormals(x)), 0x1p-23, x); }

}  // namespace emulator

// The one way to test an index before a memory access: the emulator can switch each such test off, to see whether the
// tests notice. (A loop's own condition is not an index test.)
#pragma once

#include "device/cuda.h"

// Whether i, which is never negative, is one of 0 .. size - 1.
template <class Index>
__device__ __forceinline__ bool in_bounds(Index i, Index size) {
  return bounds_condition(i < size);
}

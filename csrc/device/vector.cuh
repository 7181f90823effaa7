// Sixteen bytes at a time, the widest access that a thread has: one instruction, and a warp's 512 bytes in a row.
#pragma once

#include "device/cuda.h"

namespace fastgpt {

template <class T>
struct alignas(16) Vec16 {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

// p is a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ Vec16<T> load16(const T* p) {
  return *reinterpret_cast<const Vec16<T>*>(p);
}

template <class T>
__device__ __forceinline__ void store16(T* p, const Vec16<T>& v) {
  *reinterpret_cast<Vec16<T>*>(p) = v;
}

}  // namespace fastgpt

// Neighbours in one access. Sixteen bytes are the widest that a thread has: one instruction, and a warp's 512 bytes in a
// row.
#pragma once

#include "device/cuda.h"
#include "ptx/store.cuh"

namespace fastgpt {

template <class T, int size>
struct alignas(size * sizeof(T)) Vec {
  static constexpr int kSize = size;
  T at[size];
};

template <class T>
using Vec16 = Vec<T, 16 / sizeof(T)>;

// p is a multiple of the bytes that are loaded.
template <int kSize, class T>
__device__ __forceinline__ Vec<T, kSize> load(const T* p) {
  return *reinterpret_cast<const Vec<T, kSize>*>(p);
}
template <class T>
__device__ __forceinline__ Vec16<T> load16(const T* p) {
  return load<Vec16<T>::kSize>(p);
}

template <class T, int kSize>
__device__ __forceinline__ void store(T* p, const Vec<T, kSize>& v) {
  *reinterpret_cast<Vec<T, kSize>*>(p) = v;
}
// The same, to global memory, for loops in which the compiler takes a vector apart; elsewhere it needs more registers.
template <class T, int kSize>
__device__ __forceinline__ void store_whole(T* p, const Vec<T, kSize>& v) {
  if constexpr (sizeof(v) == 16) store_16_bytes(p, v);
  else store(p, v);
}
template <class T>
__device__ __forceinline__ void store16(T* p, const Vec16<T>& v) {
  store(p, v);
}

}  // namespace fastgpt

// Numbers as they are stored, and as they are computed with: float for 16 and 32 bits, double for 64.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/cuda.h"
#include "device/types.h"
#include "ptx/approximate.cuh"

namespace fastgpt {

__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

// x as it is stored in a T, rounded to nearest even.
template <class T>
__device__ __forceinline__ T narrow(double x) {
  static_assert(std::is_same_v<T, double>);
  return x;
}
template <class T>
__device__ __forceinline__ T narrow(float x) {
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
  if constexpr (std::is_same_v<T, float>) return x;
}

// Element i of an array whose dtype is known at run time: for paths where the branch does not matter.
template <class A>
__device__ __forceinline__ A load_as(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::float64: return A(static_cast<const double*>(data)[i]);
    case DType::float32: return A(static_cast<const float*>(data)[i]);
    case DType::bfloat16: return A(widen(static_cast<const __nv_bfloat16*>(data)[i]));
    default: return A(widen(static_cast<const __half*>(data)[i]));
  }
}

// Stores x, and returns what it became there.
template <class A>
__device__ __forceinline__ A store_as(void* data, DType dtype, int64_t i, A x) {
  switch (dtype) {
    case DType::float64: return A(static_cast<double*>(data)[i] = double(x));
    case DType::float32: return A(static_cast<float*>(data)[i] = float(x));
    case DType::bfloat16: {
      const __nv_bfloat16 stored = narrow<__nv_bfloat16>(float(x));
      static_cast<__nv_bfloat16*>(data)[i] = stored;
      return A(widen(stored));
    }
    default: {
      const __half stored = narrow<__half>(float(x));
      static_cast<__half*>(data)[i] = stored;
      return A(widen(stored));
    }
  }
}

// a * b, rounded, whatever it is added to: nvcc would make one instruction of the two, which rounds once.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// 1 / sqrt(x), rounded well where rsqrtf is off by two units in the last place: one step of Newton's method, with an
// exact residual. A row's scale multiplies every element, so it is worth it.
__device__ __forceinline__ float inverse_sqrt(float x) {
  const float y = rsqrtf(x), xy = x * y;
  const float residual = fmaf(-xy, y, 1.0f) - fmaf(x, y, -xy) * y;
  return residual == residual ? fmaf(0.5f * y, residual, y) : y;  // NaN where x is 0 or inf, and y right as it is
}
__device__ __forceinline__ double inverse_sqrt(double x) { return 1.0 / sqrt(x); }

// 1 / (1 + e^-x), and 1 less that: each keeps its digits where it is next to 0.
template <class A>
struct Sigmoid {
  A value, rest;
};

// For a result that will be stored as a T: in 16 bits nobody sees how wrong the approximations are, which is two or three
// units in the last place of a float.
template <class T, class A>
__device__ __forceinline__ Sigmoid<A> sigmoid(A x) {
  A smaller, larger;  // smaller = e^-|x| * larger
  if constexpr (sizeof(T) == 2) {
    const float power = exp2_approx(-1.4426950f * fabsf(x));  // 1 / ln 2
    larger = reciprocal_approx(1 + power);
    smaller = power * larger;
  } else {
    const A power = exp(x < 0 ? x : -x);
    larger = 1 / (1 + power);
    smaller = power * larger;
  }
  return x < 0 ? Sigmoid<A>{smaller, larger} : Sigmoid<A>{larger, smaller};
}

}  // namespace fastgpt

// Lets CUDA kernel sources compile as plain C++: CUDA's own headers, and what they lack outside nvcc.
#pragma once
#define __shared__ static          // blocks run one after another on one OS thread
#define __launch_bounds__(...)
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <algorithm>
#include <cmath>
#include <cstring>
#include "emulator.h"

#define threadIdx (::emulator::thread_idx())
#define blockIdx (::emulator::block_idx())
#define blockDim (::emulator::block_dim())
#define gridDim (::emulator::grid_dim())
constexpr int warpSize = 32;

// ---- barriers and votes ----
inline void __syncthreads(emulator::Loc loc = EMULATOR_HERE) { emulator::block_barrier(0, 0, false, loc); }
inline void __syncwarp(unsigned mask = 0xffffffffu, emulator::Loc loc = EMULATOR_HERE) {
  emulator::warp_collective("__syncwarp", [](void* const*, unsigned) {}, nullptr, mask, true, loc);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { emulator::yield(); }
inline unsigned __activemask() { return emulator::active_lanes(); }
inline void __trap(emulator::Loc loc = EMULATOR_HERE) { emulator::fail("__trap()", loc); }

namespace emulator {
template <class T> struct Exchange { T in, out; int source; };   // source < 0 or >= 32: keep own value
template <class T> T exchange(const char* name, unsigned mask, T value, int source, Loc loc) {
  Exchange<T> x{value, value, source};
  warp_collective(name, [](void* const args[32], unsigned mask) {
    for (int lane = 0; lane < 32; ++lane) if (mask >> lane & 1) {
      auto& me = *static_cast<Exchange<T>*>(args[lane]);
      if (!(mask >> me.source & 1)) fail("shuffle reads from a lane outside its mask", Loc{"", 0});
      me.out = static_cast<Exchange<T>*>(args[me.source])->in;
    }
  }, &x, mask, false, loc);
  return x.out;
}
template <class T, class F> T reduce(const char* name, unsigned mask, T value, F, Loc loc) {
  Exchange<T> x{value, value, 0};
  warp_collective(name, [](void* const args[32], unsigned mask) {
    bool first = true; T total{};
    for (int lane = 0; lane < 32; ++lane) if (mask >> lane & 1) {
      T v = static_cast<Exchange<T>*>(args[lane])->in;
      total = first ? v : F()(total, v); first = false;
    }
    for (int lane = 0; lane < 32; ++lane) if (mask >> lane & 1) static_cast<Exchange<T>*>(args[lane])->out = total;
  }, &x, mask, false, loc);
  return x.out;
}
inline int lane_or_self(int src, int lo, int hi) { return src < lo || src > hi ? int(lane()) : src; }
struct Add { template <class T> T operator()(T a, T b) const { return a + b; } };
struct Min { template <class T> T operator()(T a, T b) const { return a < b ? a : b; } };
struct Max { template <class T> T operator()(T a, T b) const { return a < b ? b : a; } };
struct Or  { template <class T> T operator()(T a, T b) const { return a | b; } };
struct And { template <class T> T operator()(T a, T b) const { return a & b; } };
}  // namespace emulator

template <class T> T __shfl_sync(unsigned m, T v, int src, int w = 32, emulator::Loc loc = EMULATOR_HERE) {
  int base = emulator::lane() & ~(w - 1);
  return emulator::exchange("__shfl_sync", m, v, base + (src & (w - 1)), loc);
}
template <class T> T __shfl_xor_sync(unsigned m, T v, int x, int w = 32, emulator::Loc loc = EMULATOR_HERE) {
  int lane = emulator::lane(), base = lane & ~(w - 1);
  return emulator::exchange("__shfl_xor_sync", m, v, emulator::lane_or_self(lane ^ x, 0, base + w - 1), loc);
}
template <class T> T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32, emulator::Loc loc = EMULATOR_HERE) {
  int lane = emulator::lane(), base = lane & ~(w - 1);
  return emulator::exchange("__shfl_down_sync", m, v, emulator::lane_or_self(lane + d, base, base + w - 1), loc);
}
template <class T> T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32, emulator::Loc loc = EMULATOR_HERE) {
  int lane = emulator::lane(), base = lane & ~(w - 1);
  return emulator::exchange("__shfl_up_sync", m, v, emulator::lane_or_self(lane - int(d), base, base + w - 1), loc);
}
inline unsigned __ballot_sync(unsigned m, int p, emulator::Loc loc = EMULATOR_HERE) {
  return emulator::reduce("__ballot_sync", m, p ? 1u << emulator::lane() : 0u, emulator::Or{}, loc);
}
inline int __any_sync(unsigned m, int p, emulator::Loc loc = EMULATOR_HERE) { return emulator::reduce("__any_sync", m, int(p != 0), emulator::Or{}, loc); }
inline int __all_sync(unsigned m, int p, emulator::Loc loc = EMULATOR_HERE) { return emulator::reduce("__all_sync", m, int(p != 0), emulator::And{}, loc); }
inline unsigned __reduce_add_sync(unsigned m, unsigned v, emulator::Loc loc = EMULATOR_HERE) { return emulator::reduce("__reduce_add_sync", m, v, emulator::Add{}, loc); }
inline unsigned __reduce_max_sync(unsigned m, unsigned v, emulator::Loc loc = EMULATOR_HERE) { return emulator::reduce("__reduce_max_sync", m, v, emulator::Max{}, loc); }

// ---- atomics ----
namespace emulator {
template <class T, class F> __attribute__((noinline, no_sanitize("thread"), no_sanitize("undefined")))
T atomic(T* p, F f, Loc loc) { check_access(p, sizeof(T), kAtomic, loc); T old = *p; *p = f(old); return old; }
}
template <class T> T atomicAdd(T* p, T v, emulator::Loc loc = EMULATOR_HERE) { return emulator::atomic(p, [=](T o) { return T(o + v); }, loc); }
template <class T> T atomicMax(T* p, T v, emulator::Loc loc = EMULATOR_HERE) { return emulator::atomic(p, [=](T o) { return o < v ? v : o; }, loc); }
template <class T> T atomicMin(T* p, T v, emulator::Loc loc = EMULATOR_HERE) { return emulator::atomic(p, [=](T o) { return v < o ? v : o; }, loc); }
template <class T> T atomicExch(T* p, T v, emulator::Loc loc = EMULATOR_HERE) { return emulator::atomic(p, [=](T) { return v; }, loc); }
template <class T> T atomicCAS(T* p, T c, T v, emulator::Loc loc = EMULATOR_HERE) { return emulator::atomic(p, [=](T o) { return o == c ? v : o; }, loc); }

// ---- device functions that the host headers lack ----
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline unsigned __float_as_uint(float f) { unsigned u; std::memcpy(&u, &f, 4); return u; }
inline float __uint_as_float(unsigned u) { float f; std::memcpy(&f, &u, 4); return f; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
using std::max; using std::min;

// What in_bounds() returns through: a place that the mutation tests can switch off.
inline bool bounds_condition(bool inside) { return inside; }

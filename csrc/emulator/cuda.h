// Lets CUDA kernel sources compile as plain C++: CUDA's own headers, and what they lack outside nvcc.
#pragma once

// Calls of memcpy and memset that the compiler does not expand would escape the memory hooks: they go to checked twins.
extern "C" void* memcpy(void* __restrict, const void* __restrict, __SIZE_TYPE__) noexcept
    __asm__("fastgpt_emulator_memcpy");
extern "C" void* memset(void*, int, __SIZE_TYPE__) noexcept __asm__("fastgpt_emulator_memset");

#define __shared__ static  // co-resident blocks swap its contents, see memory.cpp
#define __launch_bounds__(...)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "emulator.h"

#define EMULATED inline __attribute__((always_inline))

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_size())
#define gridDim (::emulator::grid_size())
constexpr int warpSize = 32;

// ---- barriers and fences ----

EMULATED void __syncthreads() { emulator::block_barrier(); }
EMULATED void __syncwarp(unsigned mask = 0xffffffffu) { emulator::warp_barrier(mask); }
EMULATED void __threadfence() { emulator::memory_fence("__threadfence"); }
EMULATED void __threadfence_block() { emulator::memory_fence("__threadfence_block"); }
EMULATED void __threadfence_system() { emulator::memory_fence("__threadfence_system"); }
EMULATED void __nanosleep(unsigned) { emulator::yield(); }
EMULATED unsigned __activemask() { return emulator::active_lanes(); }
EMULATED void __trap() { emulator::trap(); }
EMULATED bool bounds_condition(bool inside) { return emulator::bounds_condition(inside); }

// ---- shuffles, votes, reductions ----

namespace emulator {

template <class T>
struct Exchange {
  T in, out;
  int source;  // the lane to read from
};

template <class T>
void run_exchange(void* const arguments[32], unsigned mask, const Caller& caller) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    auto& mine = *static_cast<Exchange<T>*>(arguments[lane]);
    if (!(mask >> mine.source & 1)) bad_shuffle(mine.source, mask, caller);
    mine.out = static_cast<Exchange<T>*>(arguments[mine.source])->in;
  }
}

template <class T>
EMULATED T exchange(const char* name, unsigned mask, T value, int source) {
  Exchange<T> argument{value, value, source};
  warp_collective(name, run_exchange<T>, &argument, mask);
  return argument.out;
}

template <class T, class Operation>
void run_reduction(void* const arguments[32], unsigned mask, const Caller&) {
  bool first = true;
  T total{};
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const T value = static_cast<Exchange<T>*>(arguments[lane])->in;
    total = first ? value : Operation()(total, value);
    first = false;
  }
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) static_cast<Exchange<T>*>(arguments[lane])->out = total;
}

template <class Operation, class T>
EMULATED T reduce(const char* name, unsigned mask, T value) {
  Exchange<T> argument{value, value, 0};
  warp_collective(name, run_reduction<T, Operation>, &argument, mask);
  return argument.out;
}

EMULATED int lane_or_self(int source, int lowest, int highest) {
  return source < lowest || source > highest ? int(lane()) : source;
}

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Min {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};
struct Max {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
struct Or {
  template <class T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct And {
  template <class T>
  T operator()(T a, T b) const {
    return a & b;
  }
};

}  // namespace emulator

template <class T>
EMULATED T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int base = emulator::lane() & ~(width - 1);
  return emulator::exchange("__shfl_sync", mask, value, base + (source & (width - 1)));
}
template <class T>
EMULATED T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = emulator::lane(), base = lane & ~(width - 1);
  return emulator::exchange("__shfl_xor_sync", mask, value, emulator::lane_or_self(lane ^ bits, 0, base + width - 1));
}
template <class T>
EMULATED T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulator::lane(), base = lane & ~(width - 1);
  return emulator::exchange("__shfl_down_sync", mask, value,
                            emulator::lane_or_self(lane + int(delta), base, base + width - 1));
}
template <class T>
EMULATED T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulator::lane(), base = lane & ~(width - 1);
  return emulator::exchange("__shfl_up_sync", mask, value,
                            emulator::lane_or_self(lane - int(delta), base, base + width - 1));
}
EMULATED unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulator::reduce<emulator::Or>("__ballot_sync", mask, predicate ? 1u << emulator::lane() : 0u);
}
EMULATED int __any_sync(unsigned mask, int predicate) {
  return emulator::reduce<emulator::Or>("__any_sync", mask, int(predicate != 0));
}
EMULATED int __all_sync(unsigned mask, int predicate) {
  return emulator::reduce<emulator::And>("__all_sync", mask, int(predicate != 0));
}
template <class T>
EMULATED T __reduce_add_sync(unsigned mask, T value) {
  return emulator::reduce<emulator::Add>("__reduce_add_sync", mask, value);
}
template <class T>
EMULATED T __reduce_min_sync(unsigned mask, T value) {
  return emulator::reduce<emulator::Min>("__reduce_min_sync", mask, value);
}
template <class T>
EMULATED T __reduce_max_sync(unsigned mask, T value) {
  return emulator::reduce<emulator::Max>("__reduce_max_sync", mask, value);
}

// ---- atomics: a fiber gives way only where it waits, so plain code is atomic ----

namespace emulator {
template <class T, class Change>
EMULATED T atomic(T* address, Change change) {
  access_memory(address, sizeof(T), Access::atomic);
  T old;
  copy_unseen(&old, address, sizeof(T));
  const T changed = change(old);
  copy_unseen(address, &changed, sizeof(T));
  return old;
}
}  // namespace emulator

template <class T>
EMULATED T atomicAdd(T* p, T value) {
  return emulator::atomic(p, [=](T old) { return T(old + value); });
}
template <class T>
EMULATED T atomicMax(T* p, T value) {
  return emulator::atomic(p, [=](T old) { return old < value ? value : old; });
}
template <class T>
EMULATED T atomicMin(T* p, T value) {
  return emulator::atomic(p, [=](T old) { return value < old ? value : old; });
}
template <class T>
EMULATED T atomicExch(T* p, T value) {
  return emulator::atomic(p, [=](T) { return value; });
}
template <class T>
EMULATED T atomicCAS(T* p, T expected, T value) {
  return emulator::atomic(p, [=](T old) { return old == expected ? value : old; });
}

// ---- device functions that the host headers lack ----

template <class T>
EMULATED T __ldg(const T* p) {
  return *p;
}
template <class T>
EMULATED T __ldcs(const T* p) {
  return *p;
}
template <class T>
EMULATED T __ldcg(const T* p) {
  return *p;
}
template <class T>
EMULATED void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
EMULATED void __stcg(T* p, T value) {
  *p = value;
}
EMULATED float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
EMULATED double rsqrt(double x) { return 1.0 / std::sqrt(x); }
EMULATED float __expf(float x) { return std::exp(x); }
EMULATED float __logf(float x) { return std::log(x); }
EMULATED float __fdividef(float a, float b) { return a / b; }
EMULATED float __fmul_rn(float a, float b) { return a * b; }
EMULATED double __dmul_rn(double a, double b) { return a * b; }
EMULATED float __frcp_rn(float x) { return 1.0f / x; }
EMULATED float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
EMULATED unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
EMULATED float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
EMULATED int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
EMULATED float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
EMULATED int __popc(unsigned x) { return __builtin_popcount(x); }
EMULATED int __ffs(int x) { return __builtin_ffs(x); }
EMULATED int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
using std::erf;  // of floats too, where C's are of doubles alone
using std::exp;
using std::expm1;
using std::fma;
using std::log;
using std::max;
using std::min;
using std::sqrt;
using std::tanh;

// AdamW over many tensors, each element read once and written once.
//
// A model has hundreds of tensors, from a few elements to hundreds of millions, and a launch for each would cost more
// than the work. So a launch takes the chunks of as many tensors as fit its parameters (csrc/device/chunks.cuh). No
// table is copied to the device: a CUDA graph that captures the launch keeps it.
//
// What changes from step to step (learning rate, step, clipping, whether to skip) may lie on the device, where the host
// never reads it. The first thread of a block turns it into the factors of the update, while the block's loads are on
// their way; everybody else waits for it at a barrier. Clipping is a factor of the gradient, and costs nothing.
//
// A thread has the same elements of every tensor, as many as 16 bytes of moments hold: so it takes 8 bytes of 16-bit
// tensors at a time. A lane with 16 bytes of those would have 32 of the moments, in two accesses each of which uses half
// of every sector. On the way are, with kVectors = 2, 2 * 64 bytes for each of 1024 threads of a multiprocessor, where an
// H200 needs some 32 KB (csrc/swiglu). This is arithmetic; no time on a GPU has been taken so far.
//
// Each operation is written as it is rounded (fma where two are one), so that nothing is left for the compiler to
// contract: both paths give the same bits, and a shard gives those of the whole tensor.

#include "adamw/adamw.h"

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "device/bounds.cuh"
#include "device/chunks.cuh"
#include "device/numeric.cuh"
#include "device/philox.cuh"
#include "device/vector.cuh"
#include "host/launch.h"

namespace fastgpt {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 2;     // of a thread
constexpr int kElements = 8;    // of a thread, one at a time
constexpr int kPhiloxSize = 8;  // elements that share four words: 16 bits each

template <class T>
using Wide = decltype(widen(T()));

using Table = ChunkTable<AdamWTensor, AdamWOptions>;
static_assert(sizeof(Table) <= Table::kMostBytes);

__device__ __forceinline__ double value_of(const AdamWNumber& x) {
  if (!x.data) return x.value;
  switch (x.type) {
    case AdamWNumber::Type::float64: return *static_cast<const double*>(x.data);
    case AdamWNumber::Type::float32: return *static_cast<const float*>(x.data);
    case AdamWNumber::Type::int64: return double(*static_cast<const int64_t*>(x.data));
    default: return *static_cast<const bool*>(x.data);
  }
}

// What the update is made of.
template <class A>
struct Factors {
  A clip, beta1, rest1, beta2, rest2;  // rest = 1 - beta
  A decay;                             // 1 - lr * weight_decay
  A rate;                              // lr / (1 - beta1^step)
  A scale;                             // 1 / sqrt(1 - beta2^step)
  A eps;
  uint32_t step;  // its low 32 bits
  bool skip;

  __device__ __forceinline__ static Factors of(const AdamWOptions& options) {
    const double lr = value_of(options.lr), step = value_of(options.step);
    // 1 - beta^step would lose the digits of a beta next to 1.
    const A correction1 = -expm1(A(step * options.log_beta1)), correction2 = -expm1(A(step * options.log_beta2));
    Factors f;
    f.clip = A(value_of(options.clip));
    f.beta1 = A(options.beta1);
    f.rest1 = A(1 - options.beta1);
    f.beta2 = A(options.beta2);
    f.rest2 = A(1 - options.beta2);
    f.decay = A(1 - lr * options.weight_decay);
    f.rate = A(lr) / correction1;
    f.scale = 1 / sqrt(correction2);
    f.eps = A(options.eps);
    f.step = uint32_t(int64_t(step));
    f.skip = value_of(options.skip) != 0;  // NaN too
    return f;
  }

  // For all threads of a block, which come here together.
  __device__ __forceinline__ static Factors of_block(const AdamWOptions& options) {
    __shared__ Factors shared;
    if (threadIdx.x == 0) shared = of(options);
    __syncthreads();
    return shared;
  }

  __device__ __forceinline__ void update(A& param, A grad, A& exp_avg, A& exp_avg_sq) const {
    const A g = clip * grad;
    exp_avg = fma(beta1, exp_avg, rest1 * g);
    exp_avg_sq = fma(beta2, exp_avg_sq, rest2 * g * g);
    const A direction = exp_avg / fma(sqrt(exp_avg_sq), scale, eps);
    param = fma(-rate, direction, decay * param);
  }
};

// bits[i]: the random 16 of element first + i.
template <int kSize>
__device__ __forceinline__ void random_bits(uint32_t (&bits)[kSize], uint64_t first, uint32_t id, uint32_t step,
                                            uint64_t seed) {
  const auto words_of = [&](uint64_t run) { return philox({uint32_t(run), uint32_t(run >> 32), id, step}, seed); };
  const uint64_t run = first / kPhiloxSize;
  const int before = int(first % kPhiloxSize);
  const PhiloxWords words = words_of(run);
  PhiloxWords next = words;
  if (before + kSize > kPhiloxSize) next = words_of(run + 1);  // a shard may begin anywhere
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const int place = before + i, half = place % kPhiloxSize;
    const PhiloxWords& from = place < kPhiloxSize ? words : next;
    // Selected, not indexed: an array in registers has no index.
    const uint32_t low = half & 2 ? from.at[1] : from.at[0], high = half & 2 ? from.at[3] : from.at[2];
    const uint32_t word = half & 4 ? high : low;
    bits[i] = half & 1 ? word >> 16 : word & 0xffff;
  }
}

// x, rounded away from zero where the 16 bits that it loses and `bits` add up to a carry.
__device__ __forceinline__ __nv_bfloat16 round_stochastically(float x, uint32_t bits) {
  const float rounded = __uint_as_float((__float_as_uint(x) + bits) & 0xffff0000u);
  return narrow<__nv_bfloat16>(x != x ? x : rounded);
}

// A block's chunk, by vectors. T is param's type; kMaster: masters take the update.
template <class T, bool kMaster>
__global__ __launch_bounds__(kThreads) void adamw_kernel(const __grid_constant__ Table table) {
  using A = Wide<T>;
  constexpr int kSize = 16 / sizeof(A);
  using Values = Vec<A, kSize>;
  const AdamWTensor& t = table.tensor_of_block();
  const int64_t chunk = int64_t(blockIdx.x) - t.first_chunk;
  T* const params = static_cast<T*>(t.param);
  A *const exp_avgs = static_cast<A*>(t.exp_avg), *const exp_avg_sqs = static_cast<A*>(t.exp_avg_sq);
  A* const masters = static_cast<A*>(t.master);

  Values p[kVectors], g[kVectors], m[kVectors], v[kVectors];
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    const int64_t vector = (chunk * kVectors + n) * kThreads + threadIdx.x;
    if (!in_bounds(vector, t.count / kSize)) continue;
    const int64_t i = vector * kSize;
    m[n] = load<kSize>(exp_avgs + i);
    v[n] = load<kSize>(exp_avg_sqs + i);
    if constexpr (std::is_same_v<T, A>) {
      p[n] = load<kSize>(params + i);
      g[n] = load<kSize>(static_cast<const A*>(t.grad) + i);
    } else {
      if constexpr (kMaster) {
        p[n] = load<kSize>(masters + i);
      } else {
        const Vec<T, kSize> stored = load<kSize>(params + i);
#pragma unroll
        for (int j = 0; j < kSize; ++j) p[n].at[j] = widen(stored.at[j]);
      }
      if (t.wide_grad) {
        g[n] = load<kSize>(static_cast<const A*>(t.grad) + i);
      } else {
        const Vec<T, kSize> stored = load<kSize>(static_cast<const T*>(t.grad) + i);
#pragma unroll
        for (int j = 0; j < kSize; ++j) g[n].at[j] = widen(stored.at[j]);
      }
    }
  }

  const Factors<A> factors = Factors<A>::of_block(table.common);
  if (factors.skip) return;

#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    const int64_t vector = (chunk * kVectors + n) * kThreads + threadIdx.x;
    if (!in_bounds(vector, t.count / kSize)) continue;
    const int64_t i = vector * kSize;
#pragma unroll
    for (int j = 0; j < kSize; ++j) factors.update(p[n].at[j], g[n].at[j], m[n].at[j], v[n].at[j]);
    store(exp_avgs + i, m[n]);
    store(exp_avg_sqs + i, v[n]);
    if constexpr (std::is_same_v<T, A>) {
      store(params + i, p[n]);
    } else {
      Vec<T, kSize> rounded;
      if constexpr (kMaster) {
        store(masters + i, p[n]);
#pragma unroll
        for (int j = 0; j < kSize; ++j) rounded.at[j] = narrow<T>(p[n].at[j]);
      } else {
        uint32_t bits[kSize];
        random_bits(bits, t.first_element + i, t.id, factors.step, table.common.seed);
#pragma unroll
        for (int j = 0; j < kSize; ++j) rounded.at[j] = round_stochastically(p[n].at[j], bits[j]);
      }
      store(params + i, rounded);
    }
  }
}

// A block's chunk, one element after the other, of any type.
template <class A>
__global__ __launch_bounds__(kThreads) void adamw_generic_kernel(const __grid_constant__ Table table) {
  constexpr DType kWide = sizeof(A) == 8 ? DType::float64 : DType::float32;
  const AdamWTensor& t = table.tensor_of_block();
  const int64_t chunk = int64_t(blockIdx.x) - t.first_chunk;
  const DType grad_dtype = t.wide_grad ? kWide : t.dtype;
  A *const exp_avgs = static_cast<A*>(t.exp_avg), *const exp_avg_sqs = static_cast<A*>(t.exp_avg_sq);
  A* const masters = static_cast<A*>(t.master);
  const Factors<A> factors = Factors<A>::of_block(table.common);
  if (factors.skip) return;

#pragma unroll 1
  for (int n = 0; n < kElements; ++n) {
    const int64_t i = (chunk * kElements + n) * kThreads + threadIdx.x;
    if (!in_bounds(i, t.count)) return;
    A p = masters ? masters[i] : load_as<A>(t.param, t.dtype, i), m = exp_avgs[i], v = exp_avg_sqs[i];
    factors.update(p, load_as<A>(t.grad, grad_dtype, i), m, v);
    exp_avgs[i] = m;
    exp_avg_sqs[i] = v;
    if (masters) masters[i] = p;
    if (!masters && t.dtype == DType::bfloat16) {
      uint32_t bits[1];
      random_bits(bits, t.first_element + i, t.id, factors.step, table.common.seed);
      static_cast<__nv_bfloat16*>(t.param)[i] = round_stochastically(float(p), bits[0]);
    } else {
      store_as<A>(t.param, t.dtype, i, p);
    }
  }
}

using Kernel = void (*)(Table);

Kernel kernel_for(const AdamWTensor& t, AdamWPath path) {
  if (path == AdamWPath::generic) {
    return t.dtype == DType::float64 ? adamw_generic_kernel<double> : adamw_generic_kernel<float>;
  }
  switch (t.dtype) {
    case DType::float64: return adamw_kernel<double, false>;
    case DType::float32: return adamw_kernel<float, false>;
    case DType::float16: return adamw_kernel<__half, true>;
    default: return t.master ? adamw_kernel<__nv_bfloat16, true> : adamw_kernel<__nv_bfloat16, false>;
  }
}

int64_t elements_of_chunk(const AdamWTensor& t, AdamWPath path) {
  return path == AdamWPath::generic ? kThreads * kElements : kThreads * kVectors * adamw_vector(t.dtype);
}

}  // namespace

void launch_adamw(const AdamWOptions& options, const AdamWTensor* tensors, size_t count, AdamWPath path,
                  Stream stream) {
  // One table for each kernel that is needed; it is launched when it is full, and at the end.
  std::vector<std::pair<Kernel, Table>> pending;
  const auto flush = [&](std::pair<Kernel, Table>& of) {
    auto& [kernel, table] = of;
    launch(kernel, LaunchShape{dim3(unsigned(table.chunks)), dim3(kThreads), 0, stream}, table);
    table = Table(options);
  };
  for (const AdamWTensor* t = tensors; t != tensors + count; ++t) {
    if (t->count == 0) continue;
    const Kernel kernel = kernel_for(*t, path);
    auto found = std::find_if(pending.begin(), pending.end(), [&](const auto& of) { return of.first == kernel; });
    if (found == pending.end()) found = pending.insert(found, {kernel, Table(options)});
    if (found->second.full()) flush(*found);
    const int64_t chunk = elements_of_chunk(*t, path);
    found->second.add(*t, (t->count + chunk - 1) / chunk);
  }
  for (auto& of : pending) {
    if (of.second.count) flush(of);
  }
}

}  // namespace fastgpt

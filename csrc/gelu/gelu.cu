// GELU, forward and backward: the plan of swiglu.cu, a thread for every 16 bytes, and more to compute for each element.
//
// Of 16-bit values a vector brings eight, which have to be done in the time that memory takes for its 32 bytes, in and
// out. An H200 moves 4.3 TB/s, which are 19 bytes in a cycle of a multiprocessor; its four schedulers can issue 7
// instructions, each for 32 lanes, while 32 bytes are moved: 27 for an element, with all that belongs to its vector.
// erff alone has 28. So for 16-bit values Phi(x) is made from a bell that the gradient needs too:
//     Phi(-|x|) = e^(-x^2 / 2) * t * P(t),   t = 1 / (1 + 0.39 |x|)
// with P of degree 5, fitted for the smallest largest error: 1e-8. This is less than what 1 + erf(x) in float costs
// where it is next to 0. An element takes 19 instructions so, and 14 in tanh's form.
//
// A thread of the forward has one load on its way, 32 KB for a multiprocessor that is full of threads. This is half of
// what swiglu's has, but so is the share of reads in what is moved: 2/3 there, 1/2 here.

#include "gelu/gelu.h"

#include "device/elementwise.cuh"
#include "host/launch.h"

namespace fastgpt {
namespace {

constexpr int kThreads = 256;

// Of a standard normal distribution at x.
template <class A>
struct Normal {
  A density, below;  // below: the share of it that is below x, Phi(x)
};

// For a result that will be stored as a T.
template <class T, class A>
__device__ __forceinline__ Normal<A> normal(A x) {
  constexpr A kDensityAt0 = 0.3989422804014327;  // 1 / sqrt(2 pi)
  if constexpr (sizeof(T) > 2) {
    return {kDensityAt0 * exp(A(-0.5) * x * x), A(0.5) * (1 + erf(A(0.7071067811865476) * x))};
  } else {
    const float bell = exp2_approx(-0.72134752f * x * x);  // e^(-x^2 / 2)
    const float t = reciprocal_approx(fmaf(0.39f, fabsf(x), 1.0f));
    float beyond = 0.053846918f;  // the share beyond |x|
    beyond = fmaf(beyond, t, -0.25824335f);
    beyond = fmaf(beyond, t, 0.37516782f);
    beyond = fmaf(beyond, t, -0.016635064f);
    beyond = fmaf(beyond, t, 0.19443662f);
    beyond = fmaf(beyond, t, 0.15142706f);
    beyond *= t * bell;
    return {kDensityAt0 * bell, x < 0 ? beyond : 1 - beyond};
  }
}

// Of gelu's approximation: (1 + tanh(u)) / 2 with u = sqrt(2 / pi) * (x + kCubic * x^3). It is sigmoid(2u), too.
constexpr double kScale = 0.7978845608028654, kCubic = 0.044715;

template <class T, class A>
__device__ __forceinline__ Sigmoid<A> tanh_share(A x) {
  const A u = A(kScale) * x * (1 + A(kCubic) * x * x);
  if constexpr (sizeof(T) == 2) return sigmoid<T>(2 * u);
  const A t = tanh(u);
  return {A(0.5) * (1 + t), A(0.5) * (1 - t)};
}

template <class T, class A>
__device__ __forceinline__ A gelu(A x, bool by_tanh) {
  return x * (by_tanh ? tanh_share<T>(x).value : normal<T>(x).below);
}

// The derivative of gelu(x).
template <class T, class A>
__device__ __forceinline__ A gelu_slope(A x, bool by_tanh) {
  if (by_tanh) {
    const Sigmoid<A> share = tanh_share<T>(x);
    return share.value + x * share.value * share.rest * A(2 * kScale) * (1 + A(3 * kCubic) * x * x);
  }
  const Normal<A> at = normal<T>(x);
  return at.below + x * at.density;
}

template <class T, int kSize>
__global__ __launch_bounds__(kThreads) void gelu_forward_kernel(Gelu p) {
  const Place here = place_of_thread<kSize>(p.rows, p.columns);
  if (!here.exists) return;
  const Vec<T, kSize> x = load<kSize>(here.in<T>(p.x));
  Vec<T, kSize> y;
#pragma unroll
  for (int i = 0; i < kSize; ++i) y.at[i] = narrow<T>(gelu<T>(widen(x.at[i]), p.tanh));
  store(here.in<T>(p.out, p.columns), y);
}

template <class T, int kSize>
__global__ __launch_bounds__(kThreads) void gelu_backward_kernel(Gelu p) {
  const Place here = place_of_thread<kSize>(p.rows, p.columns);
  if (!here.exists) return;
  const Vec<T, kSize> d_y = load<kSize>(here.in<T>(p.d_y)), x = load<kSize>(here.in<T>(p.x));
  Vec<T, kSize> d_x;
#pragma unroll
  for (int i = 0; i < kSize; ++i) d_x.at[i] = narrow<T>(widen(d_y.at[i]) * gelu_slope<T>(widen(x.at[i]), p.tanh));
  store(here.in<T>(p.out, p.columns), d_x);
}

LaunchShape shape_of(const Gelu& p, int size, Stream stream) {
  return {dim3(elementwise_blocks(p.rows, p.columns, size, kThreads)), dim3(kThreads), 0, stream};
}

}  // namespace

void launch_gelu_forward(const Gelu& p, GeluPath path, Stream stream) {
  if (p.rows == 0) return;
  with_vectors(p.dtype, path == GeluPath::vector, [&](auto zero, auto size) {
    launch(gelu_forward_kernel<decltype(zero), size()>, shape_of(p, size, stream), p);
  });
}

void launch_gelu_backward(const Gelu& p, GeluPath path, Stream stream) {
  if (p.rows == 0) return;
  with_vectors(p.dtype, path == GeluPath::vector, [&](auto zero, auto size) {
    launch(gelu_backward_kernel<decltype(zero), size()>, shape_of(p, size, stream), p);
  });
}

}  // namespace fastgpt

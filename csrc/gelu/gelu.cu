// GELU, forward and backward: the plan of swiglu.cu, a thread for every 16 bytes, and more to compute for each element.
//
// Of 16-bit values a vector brings eight, which have to be done in the time that memory takes for its 32 bytes, in and
// out. On an H200 that is about 1.7 cycles of a multiprocessor; its four schedulers issue seven instructions in them,
// each for 32 lanes: 27 for an element, with all that belongs to the vector. erff alone has 28. So Phi(x) is made from a
// bell that the gradient needs too:
//     Phi(-|x|) = e^(-x^2 / 2) * t * P(t),   t = 1 / (1 + 0.39 |x|)
// with P of degree 5 such that the largest error of Phi is 1e-8, a sixth of what rounding 1/2 to float may cost. Without
// a difference 1 - erf, the negative side keeps its digits. An element takes 19 instructions, tanh's form 14.
//
// A thread of the forward has one load on its way, 32 KB for a multiprocessor that is full of threads. This is half of
// what swiglu's has, and so is the share of reads in what is moved.

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

__device__ __forceinline__ Normal<float> normal(float x) {
  const float bell = exp2_approx(-0.72134752f * x * x);  // e^(-x^2 / 2)
  const float t = reciprocal_approx(fmaf(0.39f, fabsf(x), 1.0f));
  float beyond = 0.053846918f;  // the share beyond |x|
  beyond = fmaf(beyond, t, -0.25824335f);
  beyond = fmaf(beyond, t, 0.37516782f);
  beyond = fmaf(beyond, t, -0.016635064f);
  beyond = fmaf(beyond, t, 0.19443662f);
  beyond = fmaf(beyond, t, 0.15142706f);
  beyond *= t * bell;
  return {0.39894228f * bell, x < 0 ? beyond : 1 - beyond};
}
__device__ __forceinline__ Normal<double> normal(double x) {
  return {0.3989422804014327 * exp(-0.5 * x * x), 0.5 * erfc(-0.7071067811865476 * x)};
}

// tanh(u) = 2 sigmoid(2u) - 1, so the approximation is x * sigmoid(2u), and 2u = kScale * (x + kCubic * x^3).
constexpr double kScale = 1.5957691216057308, kCubic = 0.044715;  // kScale: 2 sqrt(2 / pi)

template <class A>
__device__ __forceinline__ A gelu(A x, bool tanh) {
  if (!tanh) return x * normal(x).below;
  return x * sigmoid(A(kScale) * x * (1 + A(kCubic) * x * x));
}

// The derivative of gelu(x).
template <class A>
__device__ __forceinline__ A gelu_slope(A x, bool tanh) {
  if (!tanh) {
    const Normal<A> at = normal(x);
    return at.below + x * at.density;
  }
  const A share = sigmoid(A(kScale) * x * (1 + A(kCubic) * x * x));
  return share + x * share * (1 - share) * A(kScale) * (1 + A(3 * kCubic) * x * x);
}

template <class T, int kSize>
__global__ __launch_bounds__(kThreads) void gelu_forward_kernel(Gelu p) {
  const Place here = place_of_thread<kSize>(p.rows, p.columns);
  if (!here.exists) return;
  const Vec<T, kSize> x = load<kSize>(here.in<T>(p.x));
  Vec<T, kSize> y;
#pragma unroll
  for (int i = 0; i < kSize; ++i) y.at[i] = narrow<T>(gelu(widen(x.at[i]), p.tanh));
  store(here.in<T>(p.out, p.columns), y);
}

template <class T, int kSize>
__global__ __launch_bounds__(kThreads) void gelu_backward_kernel(Gelu p) {
  const Place here = place_of_thread<kSize>(p.rows, p.columns);
  if (!here.exists) return;
  const Vec<T, kSize> d_y = load<kSize>(here.in<T>(p.d_y)), x = load<kSize>(here.in<T>(p.x));
  Vec<T, kSize> d_x;
#pragma unroll
  for (int i = 0; i < kSize; ++i) d_x.at[i] = narrow<T>(widen(d_y.at[i]) * gelu_slope(widen(x.at[i]), p.tanh));
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

// SwiGLU, forward and backward. The simplest kernels of all: read these first, then csrc/norm.
//
// There is little to compute and much to move, so all that matters is memory: each element is read once and written
// once, in accesses of 16 bytes, the widest there are. A thread has kSize neighbouring elements, as many as 16 bytes
// hold; a warp's 32 threads have 512 bytes in a row. Where a tensor does not allow that (a row that begins elsewhere
// than at a multiple of 16 bytes), the same kernel runs with kSize = 1. swiglu.cpp: choose_path says which it is.
//
// A GPU reaches the speed of its memory by having enough on the way: what it reads in the time that one read takes. On
// an H200 that is 4.3 TB/s / 132 multiprocessors * 1 us, some 32 KB each, and twice that for a margin. One vector of
// each tensor is enough if all threads that a multiprocessor can have are there: 2048 * 2 * 16 bytes are 64 KB in the
// forward, 96 KB in the backward. For that a thread must do with 32 registers, and does. A block ends when its
// elements are done, and the next one starts in its place: there is nothing to keep from one element to another. All
// this is arithmetic; no time on a GPU has been taken so far.

#include "swiglu/swiglu.h"

#include "device/elementwise.cuh"
#include "host/launch.h"

namespace fastgpt {
namespace {

constexpr int kThreads = 256;

// y = silu(gate) * up
template <class T, int kSize>
__global__ __launch_bounds__(kThreads) void swiglu_forward_kernel(SwigluForward p) {
  const Place here = place_of_thread<kSize>(p.rows, p.columns);
  if (!here.exists) return;
  const Vec<T, kSize> gates = load<kSize>(here.in<T>(p.gate)), ups = load<kSize>(here.in<T>(p.up));
  Vec<T, kSize> y;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const auto gate = widen(gates.at[i]), up = widen(ups.at[i]);
    y.at[i] = narrow<T>(gate * sigmoid<T>(gate).value * up);
  }
  store(here.in<T>(p.y, p.columns), y);
}

// d_up = d_y * silu(gate);  d_gate = d_y * up * silu'(gate), where silu'(z) = sigmoid(z) * (1 + z * (1 - sigmoid(z)))
template <class T, int kSize>
__global__ __launch_bounds__(kThreads) void swiglu_backward_kernel(SwigluBackward p) {
  const Place here = place_of_thread<kSize>(p.rows, p.columns);
  if (!here.exists) return;
  const Vec<T, kSize> d_ys = load<kSize>(here.in<T>(p.d_y)), gates = load<kSize>(here.in<T>(p.gate));
  Vec<T, kSize> ups{};
  if (p.d_gate) ups = load<kSize>(here.in<T>(p.up));
  Vec<T, kSize> d_gates, d_ups;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const auto d_y = widen(d_ys.at[i]), gate = widen(gates.at[i]), up = widen(ups.at[i]);
    const auto share = sigmoid<T>(gate);
    d_gates.at[i] = narrow<T>(d_y * up * share.value * (1 + gate * share.rest));
    d_ups.at[i] = narrow<T>(d_y * gate * share.value);
  }
  if (p.d_gate) store(here.in<T>(p.d_gate, p.d_stride), d_gates);
  if (p.d_up) store(here.in<T>(p.d_up, p.d_stride), d_ups);
}

template <class P>
LaunchShape shape_of(const P& p, int size, Stream stream) {
  return {dim3(elementwise_blocks(p.rows, p.columns, size, kThreads)), dim3(kThreads), 0, stream};
}

}  // namespace

void launch_swiglu_forward(const SwigluForward& p, SwigluPath path, Stream stream) {
  if (p.rows == 0) return;
  with_vectors(p.dtype, path == SwigluPath::vector, [&](auto zero, auto size) {
    launch(swiglu_forward_kernel<decltype(zero), size()>, shape_of(p, size, stream), p);
  });
}

void launch_swiglu_backward(const SwigluBackward& p, SwigluPath path, Stream stream) {
  if (p.rows == 0) return;
  with_vectors(p.dtype, path == SwigluPath::vector, [&](auto zero, auto size) {
    launch(swiglu_backward_kernel<decltype(zero), size()>, shape_of(p, size, stream), p);
  });
}

}  // namespace fastgpt

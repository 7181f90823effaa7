"""Exercise 7: a gated unit with the squared ReLU, forward and backward, in CUDA."""


def relu_squared_glu() -> str:
    """The source of two CUDA kernels, as a str:

        __global__ void forward(const __nv_bfloat16* gate_up, __nv_bfloat16* y, int N, int F)
        __global__ void backward(const __nv_bfloat16* d_y, const __nv_bfloat16* gate_up, __nv_bfloat16* d_gate_up,
                                 int N, int F)

    gate_up is (N, 2 F): in each row first the F gates, then the F ups. y and d_y are (N, F).

        y = max(gate, 0)^2 * up

    d_gate_up, packed as gate_up, is its gradient: derive it. Computed in float and rounded once. F is a multiple of 8,
    so each row of every tensor begins at a multiple of 16 bytes.

    Both are launched with one thread for every 8 columns of y, in blocks of 128, rounded up. A thread reads and writes
    16 bytes at a time, each of them once. The place of a row may not fit 32 bits.

    #include <cuda_bf16.h> belongs into the source.
    """
    return r"""
#include <cuda_bf16.h>

struct alignas(16) Vector {
  __nv_bfloat16 at[8];
};

struct Place {
  bool exists;
  int64_t y, gate, up;  // the numbers of vectors
};

__device__ Place place_of_thread(int N, int F) {
  const int64_t v = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, of_row = F / 8, row = v / of_row;
  const int64_t gate = v + row * of_row;  // a row of gate_up is twice as long
  return {row < N, v, gate, gate + of_row};
}

__global__ void forward(const __nv_bfloat16* gate_up, __nv_bfloat16* y, int N, int F) {
  const Place here = place_of_thread(N, F);
  if (!here.exists) return;
  const Vector* from = reinterpret_cast<const Vector*>(gate_up);
  const Vector gates = from[here.gate], ups = from[here.up];
  Vector out;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float gate = float(gates.at[i]);
    out.at[i] = __float2bfloat16(gate < 0 ? 0 : gate * gate * float(ups.at[i]));
  }
  reinterpret_cast<Vector*>(y)[here.y] = out;
}

__global__ void backward(const __nv_bfloat16* d_y, const __nv_bfloat16* gate_up, __nv_bfloat16* d_gate_up, int N,
                         int F) {
  const Place here = place_of_thread(N, F);
  if (!here.exists) return;
  const Vector* from = reinterpret_cast<const Vector*>(gate_up);
  const Vector d_ys = reinterpret_cast<const Vector*>(d_y)[here.y], gates = from[here.gate], ups = from[here.up];
  Vector d_gates, d_ups;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float gate = float(gates.at[i]), d = gate < 0 ? 0 : float(d_ys.at[i]);
    d_gates.at[i] = __float2bfloat16(d * 2 * gate * float(ups.at[i]));
    d_ups.at[i] = __float2bfloat16(d * gate * gate);
  }
  Vector* to = reinterpret_cast<Vector*>(d_gate_up);
  to[here.gate] = d_gates;
  to[here.up] = d_ups;
}
"""

"""Exercise 6: RMSNorm of wide rows, a block for each row, in CUDA."""


def wide_rms_norm() -> str:
    """The source of a CUDA kernel, as a str:

        __global__ void rms_norm(const __nv_bfloat16* x, const __nv_bfloat16* weight, __nv_bfloat16* y, int N, int C,
                                 float eps)

    For each of N rows of C numbers, y = x * rstd * weight, where rstd = 1 / sqrt(mean(x^2) + eps). Computed in float
    and rounded once. C is a multiple of 8, from 8 to 4096; every tensor begins at a multiple of 16 bytes.

    It is launched with blocks of 128 threads, and with fewer blocks than rows: block b takes rows b, b + gridDim.x, and
    so on, all of its threads together. Of each row, thread t has the vectors of 16 bytes number t, t + 128, t + 256 and
    t + 384, as far as the row goes; it reads them once and keeps them. The weights of these columns it reads before its
    first row. The sum of squares goes over the warp by shuffles, and over the four warps through shared memory. No
    barrier too few: a row's sums must not overwrite those of the row before while somebody reads them. And none for
    nothing.

    warp_sum of the chapter and its Vector belong into the source too; #include <cuda_bf16.h> may stand there.
    """
    return r"""
#include <cuda_bf16.h>

constexpr int kThreads = 128, kWarps = kThreads / 32, kVectors = 4;  // of a row, for each thread

struct alignas(16) Vector {
  __nv_bfloat16 at[8];
};

__device__ float block_sum(float x) {
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(0xffffffffu, x, bits);
  __shared__ float of_warp[kWarps];
  __syncthreads();  // the sums of the row before have been read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();  // these are written
  x = 0;
  for (int warp = 0; warp < kWarps; ++warp) x += of_warp[warp];
  return x;
}

__global__ __launch_bounds__(kThreads) void rms_norm(const __nv_bfloat16* x, const __nv_bfloat16* weight,
                                                     __nv_bfloat16* y, int N, int C, float eps) {
  const Vector* weights = reinterpret_cast<const Vector*>(weight);
  Vector w[kVectors];
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    const int v = threadIdx.x + kThreads * n;
    if (v < C / 8) w[n] = weights[v];
  }

  for (int64_t row = blockIdx.x; row < N; row += gridDim.x) {
    const Vector* from = reinterpret_cast<const Vector*>(x + row * C);
    Vector* to = reinterpret_cast<Vector*>(y + row * C);
    Vector r[kVectors];
    float squares = 0;
#pragma unroll
    for (int n = 0; n < kVectors; ++n) {
      const int v = threadIdx.x + kThreads * n;
      if (v >= C / 8) continue;
      r[n] = from[v];
      for (int i = 0; i < 8; ++i) squares += float(r[n].at[i]) * float(r[n].at[i]);
    }
    const float rstd = rsqrtf(block_sum(squares) / C + eps);

#pragma unroll
    for (int n = 0; n < kVectors; ++n) {
      const int v = threadIdx.x + kThreads * n;
      if (v >= C / 8) continue;
      Vector out;
      for (int i = 0; i < 8; ++i) out.at[i] = __float2bfloat16(float(r[n].at[i]) * rstd * float(w[n].at[i]));
      to[v] = out;
    }
  }
}
"""

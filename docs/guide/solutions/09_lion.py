"""Exercise 9: Lion in one pass, in CUDA."""


def lion() -> str:
    """The source of a CUDA kernel, as a str:

        __global__ void lion(float* w, const float* g, float* m, const float* clip, const float* skip, int64_t n,
                             float lr, float beta1, float beta2, float decay)

    For each of n weights, with h = clip * g:

        w = w * (1 - lr * decay) - lr * sign(beta1 * m + (1 - beta1) * h)      m as it was before
        m = beta2 * m + (1 - beta2) * h

    sign is 1, -1, or 0 of 0. clip and skip are one number each, in memory. Where skip is not 0 (NaN is not) nothing is
    written. n is a multiple of 4, and every list begins at a multiple of 16 bytes.

    It is launched with any number of blocks of 128 threads. Thread t of the whole grid takes the vectors of 16 bytes
    number t, t + (threads of the grid), and so on. Each number of w, g and m is read once; w and m are written once.
    """
    return r"""
struct alignas(16) Vector {
  float at[4];
};

__global__ void lion(float* w, const float* g, float* m, const float* clip, const float* skip, int64_t n, float lr,
                     float beta1, float beta2, float decay) {
  if (*skip != 0) return;
  const float factor = *clip;
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n / 4; i += threads) {
    Vector weights = reinterpret_cast<Vector*>(w)[i], means = reinterpret_cast<Vector*>(m)[i];
    const Vector gradients = reinterpret_cast<const Vector*>(g)[i];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float h = factor * gradients.at[k], mixed = beta1 * means.at[k] + (1 - beta1) * h;
      const float sign = float(mixed > 0) - float(mixed < 0);
      weights.at[k] = weights.at[k] * (1 - lr * decay) - lr * sign;
      means.at[k] = beta2 * means.at[k] + (1 - beta2) * h;
    }
    reinterpret_cast<Vector*>(w)[i] = weights;
    reinterpret_cast<Vector*>(m)[i] = means;
  }
}
"""

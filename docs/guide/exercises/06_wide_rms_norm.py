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
    # Your code goes here.

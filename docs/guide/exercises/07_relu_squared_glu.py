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
    # Your code goes here.

"""swiglu and rms_norm in Triton, forward and backward: peers for the benchmarks of our kernels.

What one writes in Triton without going to lengths: a program for each row or block of elements, float32 inside, results
rounded once. `swiglu(gate_up)` and `rms_norm(x, weight, eps)` are differentiable and take contiguous tensors on a GPU;
with TRITON_INTERPRET=1 in the environment, on a CPU. Needs triton, which torch for CUDA brings along.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # of swiglu's elements for a program
PROGRAMS = 512  # of rms_norm's backward: each adds up the weight's gradient over its rows


@triton.jit
def swiglu_forward_kernel(gate_up, y, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < F
    gate = tl.load(gate_up + row * 2 * F + column, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + column, mask, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(y + row * F + column, result.to(y.dtype.element_ty), mask)


@triton.jit
def swiglu_backward_kernel(d_y, gate_up, d_gate_up, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < F
    gate = tl.load(gate_up + row * 2 * F + column, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + column, mask, other=0.0).to(tl.float32)
    d = tl.load(d_y + row * F + column, mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    d_gate = d * up * share * (1 + gate * (1 - share))
    d_up = d * gate * share
    tl.store(d_gate_up + row * 2 * F + column, d_gate.to(d_gate_up.dtype.element_ty), mask)
    tl.store(d_gate_up + row * 2 * F + F + column, d_up.to(d_gate_up.dtype.element_ty), mask)


@triton.jit
def rms_norm_forward_kernel(x, weight, y, rstd, C, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < C
    values = tl.load(x + row * C + column, mask, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(values * values, 0) / C + eps)
    tl.store(rstd + row, scale)
    gamma = tl.load(weight + column, mask, other=0.0).to(tl.float32)
    tl.store(y + row * C + column, (values * scale * gamma).to(y.dtype.element_ty), mask)


@triton.jit
def rms_norm_backward_kernel(d_y, x, weight, rstd, d_x, partials, N, C, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < C
    gamma = tl.load(weight + column, mask, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, N, tl.num_programs(0)):
        at = tl.full((BLOCK,), row, tl.int64) * C + column
        scale = tl.load(rstd + row)
        xhat = tl.load(x + at, mask, other=0.0).to(tl.float32) * scale
        d = tl.load(d_y + at, mask, other=0.0).to(tl.float32)
        g = d * gamma
        d_weight += d * xhat
        gradient = scale * (g - xhat * (tl.sum(g * xhat, 0) / C))
        tl.store(d_x + at, gradient.to(d_x.dtype.element_ty), mask)
    tl.store(partials + program.to(tl.int64) * C + column, d_weight, mask)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        *shape, width = gate_up.shape
        y = gate_up.new_empty(*shape, width // 2)
        ctx.save_for_backward(gate_up)
        swiglu_forward_kernel[_grid(y)](gate_up, y, width // 2, BLOCK=BLOCK)
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        d_gate_up = torch.empty_like(gate_up)
        swiglu_backward_kernel[_grid(d_y)](d_y.contiguous(), gate_up, d_gate_up, d_y.shape[-1], BLOCK=BLOCK)
        return d_gate_up


def _grid(y: Tensor) -> tuple[int, int]:
    return y.numel() // y.shape[-1], triton.cdiv(y.shape[-1], BLOCK)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        C = x.shape[-1]
        y, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(x, weight, rstd)
        rms_norm_forward_kernel[(rstd.numel(),)](x, weight, y, rstd, C, eps, BLOCK=triton.next_power_of_2(C))
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        N, C = rstd.numel(), x.shape[-1]
        programs = min(N, PROGRAMS)
        d_x, partials = torch.empty_like(x), x.new_empty(programs, C, dtype=torch.float32)
        rms_norm_backward_kernel[(programs,)](
            d_y.contiguous(), x, weight, rstd, d_x, partials, N, C, BLOCK=triton.next_power_of_2(C)
        )
        return d_x, partials.sum(0).to(weight.dtype), None


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of a contiguous [gate | up] (..., 2F), as `fastgpt.ops.swiglu`."""
    return _Swiglu.apply(gate_up)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm of a contiguous x (..., C), as `fastgpt.ops.rms_norm`."""
    return _RmsNorm.apply(x, weight, eps)

"""RMSNorm over the last dimension, with the residual addition before it fused in.

    r = x + residual                                  (rounded to the dtype of x; r = x without a residual)
    y = r / sqrt(mean(r^2) + eps) * weight

"Root Mean Square Layer Normalization", Zhang, Sennrich 2019 (arXiv:1910.07467), equation 4, with eps inside the root
as in Llama. Statistics and arithmetic are in float32 (float64 for float64), and y is rounded once. Forward and backward
see the same, rounded r. With g = dL/dy * weight and s = 1 / sqrt(mean(r^2) + eps), the gradient is
s * (g - r * s^2 * mean(g * r)).

| tensor      | shape    | dtype                                |
|-------------|----------|--------------------------------------|
| x, residual | (..., C) | float64, float32, bfloat16, float16  |
| weight      | (C,)     | that of x, or float32; None for ones |
| y, r        | (..., C) | that of x; contiguous                |

C >= 1; other dimensions may be empty. Any strides. Raises ValueError for anything else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt import native
from fastgpt.ops.contract import (
    accumulator,
    check_channel_weight,
    check_eps,
    check_like,
    check_rows,
    hand_written_backward_serves,
)


def rms_norm(
    x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm of x (..., C), or of x + residual; the module's docstring has the contract.

    Returns y, or (y, x + residual) where a residual is given. Raises ValueError.
    """
    check_rows("rms_norm", "x", x)
    if weight is not None:
        check_channel_weight("rms_norm", "weight", weight, x)
    check_eps("rms_norm", eps)
    if residual is not None:
        check_like("rms_norm", "residual", residual, "x", x)
    native.select(x)
    if not hand_written_backward_serves(x):
        return reference(x, weight, eps=eps, residual=residual)
    if residual is None:
        return _OnCpu.apply(x, weight, eps)
    new_residual = (x + residual).contiguous()
    return _OnCpu.apply(new_residual, weight, eps), new_residual


def reference(
    x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    if residual is None:
        return _normalise(x, weight, eps)
    new_residual = (x + residual).contiguous()
    return _normalise(new_residual, weight, eps), new_residual


def _normalise(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = x.contiguous().to(accumulator(x.dtype))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


class _OnCpu(torch.autograd.Function):
    """The same, in half the passes over memory that autograd derives from `_normalise`.

    LayerNorm's backward kernel, told that the mean was 0, gives all of dx but that it also takes out the row's mean of
    g * s, which is added back; and it gives the weight's gradient on the way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        wide = x.contiguous().to(accumulator(x.dtype))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        y = wide * scale
        return (y if weight is None else y.mul_(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a second derivative was asked for: leave the graph to autograd
            inputs = [t for t, needed in ((x, need_x), (weight, need_weight)) if needed]
            found = iter(torch.autograd.grad(_normalise(x, weight, ctx.eps), inputs, d_y, create_graph=True))
            return next(found) if need_x else None, next(found) if need_weight else None, None
        wide = x.contiguous().to(scale.dtype)
        d_y = d_y.contiguous().to(scale.dtype)
        gamma = None if weight is None else weight.to(scale.dtype)
        d_x, d_weight, _ = torch.ops.aten.native_layer_norm_backward(
            d_y, wide, x.shape[-1:], torch.zeros_like(scale), scale, gamma, None, [need_x, need_weight, False]
        )
        if need_x:
            row_mean = d_y.mean(-1, keepdim=True) if gamma is None else (d_y @ gamma).unsqueeze(-1).div_(x.shape[-1])
            d_x = d_x.add_(row_mean.mul_(scale)).to(x.dtype)
        return d_x, d_weight.to(weight.dtype) if need_weight else None, None

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


# Up to here float32 norms by torch.linalg.vector_norm, which adds up in a few lanes, are as good as a mean of squares.
_NARROW = 4096


class _OnCpu(torch.autograd.Function):
    """The same, in half the passes over memory that autograd derives from `_normalise`.

    LayerNorm's backward kernel, told that the mean was 0, gives all of dx but that it also takes out the row's mean of
    d_y * weight, which is added back. Its gradient of the weight is left: it is one long sum, less exact than ours.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        wide = x.contiguous().to(accumulator(x.dtype))
        if x.shape[-1] <= _NARROW:
            mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        else:
            mean_square = wide.square().mean(-1, keepdim=True)
        scale = mean_square.add_(eps).rsqrt_()  # (..., 1)
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
        C = x.shape[-1]
        wide = x.contiguous().to(scale.dtype)
        d_y = d_y.contiguous().to(scale.dtype)
        d_x = d_weight = None
        if need_x:
            gamma = None if weight is None else weight.contiguous().to(scale.dtype)
            d_x, _, _ = torch.ops.aten.native_layer_norm_backward(
                d_y, wide, (C,), torch.zeros_like(scale), scale, gamma, None, (True, False, False)
            )
            taken_out = d_y.mean(-1, keepdim=True) if gamma is None else (d_y @ gamma).unsqueeze(-1).div_(C)
            d_x = d_x.add_(taken_out.mul_(scale)).to(x.dtype)
        if need_weight:
            d_weight = (d_y * wide).mul_(scale).view(-1, C).sum(0).to(weight.dtype)
        return d_x, d_weight, None

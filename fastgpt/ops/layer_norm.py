"""LayerNorm over the last dimension, with the residual addition before it fused in.

    r = x + residual                                  (rounded to the dtype of x; r = x without a residual)
    y = (r - mean(r)) / sqrt(var(r) + eps) * weight + bias

mean and var (biased) are over C. "Layer Normalization", Ba, Kiros, Hinton 2016 (arXiv:1607.06450), equation 4.
Statistics and arithmetic are in float32 (float64 for float64), and y is rounded once. Forward and backward see the
same, rounded r. With xhat = (r - mean) * rstd and g = dL/dy * weight, the gradients are
rstd * (g - mean(g) - xhat * mean(g * xhat)) by r, and the sums over rows of dL/dy * xhat and dL/dy by weight and bias.
The kernels (csrc/norm) are deterministic, and have no second derivative.

| tensor       | shape    | dtype                                |
|--------------|----------|--------------------------------------|
| x, residual  | (..., C) | float64, float32, bfloat16, float16  |
| weight, bias | (C,)     | that of x, or float32                |
| y, r         | (..., C) | that of x; contiguous                |

C >= 1; other dimensions may be empty. Any strides. Raises ValueError for anything else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import native
from fastgpt.ops.contract import (
    accumulator,
    autocast_rows,
    check_channel_weight,
    check_eps,
    check_like,
    check_rows,
    needs_gradient,
    refuse_double_backward,
)
from fastgpt.ops.registry import contiguous_like, nothing_like, register


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm of x (..., C), or of x + residual; the module's docstring has the contract.

    Returns y, or (y, x + residual) where a residual is given. Raises ValueError.
    """
    check_rows("layer_norm", "x", x)
    check_channel_weight("layer_norm", "weight", weight, x)
    if bias is not None:
        check_channel_weight("layer_norm", "bias", bias, x)
    check_eps("layer_norm", eps)
    if residual is not None:
        check_like("layer_norm", "residual", residual, "x", x)
    ops = native.select(x, "layer_norm")
    if ops is None:
        return reference(x, weight, bias, eps=eps, residual=residual)
    x, residual, weight, bias = autocast_rows(x, residual, weight, bias)
    if needs_gradient(x, residual, weight, bias):
        return _Kernels.apply(ops, x, residual, weight, bias, eps)
    y, new_residual, _mean, _rstd = ops.layer_norm_forward.default(x, residual, weight, bias, eps)
    return y if residual is None else (y, new_residual)


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    if residual is None:
        return _normalise(x, weight, bias, eps)
    new_residual = (x + residual).contiguous()
    return _normalise(new_residual, weight, bias, eps), new_residual


def _normalise(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    # Not in 16 bits, which torch's CPU kernel takes too: it then adds up the gradients of weight and bias in 16 bits,
    # and in bfloat16 a sum of ones stops at 256.
    wide = accumulator(x.dtype)
    bias = None if bias is None else bias.to(wide)
    return F.layer_norm(x.contiguous().to(wide), weight.shape, weight.to(wide), bias, eps).to(x.dtype)


# ---- kernels -------------------------------------------------------------------------------------------


SCHEMAS = {
    # new_residual is empty without a residual; mean and rstd (...) are for the backward.
    "layer_norm_forward": (
        "(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps) "
        "-> (Tensor y, Tensor new_residual, Tensor mean, Tensor rstd)"
    ),
    # d_x is the gradient of x and of residual alike. What is not needed is empty.
    "layer_norm_backward": (
        "(Tensor d_y, Tensor? d_new_residual, Tensor r, Tensor weight, Tensor? bias, Tensor mean, Tensor rstd, "
        "bool need_x, bool need_weight, bool need_bias) -> (Tensor d_x, Tensor d_weight, Tensor d_bias)"
    ),
}


def _fake_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    mean = x.new_empty(x.shape[:-1], dtype=accumulator(x.dtype))
    new_residual = nothing_like(x) if residual is None else contiguous_like(x)
    return contiguous_like(x), new_residual, mean, torch.empty_like(mean)


def _fake_backward(
    d_y: Tensor,
    d_new_residual: Tensor | None,
    r: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    return (
        contiguous_like(r) if need_x else nothing_like(r),
        contiguous_like(weight) if need_weight else nothing_like(r),
        contiguous_like(bias) if need_bias and bias is not None else nothing_like(r),
    )


register(SCHEMAS, {"layer_norm_forward": _fake_forward, "layer_norm_backward": _fake_backward})


class _Kernels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ops: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor | tuple[Tensor, Tensor]:
        y, new_residual, mean, rstd = ops.layer_norm_forward.default(x, residual, weight, bias, eps)
        ctx.ops = ops
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual is None else new_residual, weight, bias, mean, rstd)
        return y if residual is None else (y, new_residual)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor | None, d_new_residual: Tensor | None = None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("layer_norm")
        if d_y is None:  # only x + residual was used
            return None, d_new_residual, d_new_residual, None, None, None
        _, need_x, need_residual, need_weight, need_bias, _ = ctx.needs_input_grad
        d_x, d_weight, d_bias = ctx.ops.layer_norm_backward.default(
            d_y, d_new_residual, *ctx.saved_tensors, need_x or need_residual, need_weight, need_bias
        )
        return (
            None,
            d_x if need_x else None,
            d_x if need_residual else None,
            d_weight if need_weight else None,
            d_bias if need_bias else None,
            None,
        )

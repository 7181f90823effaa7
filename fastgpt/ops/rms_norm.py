"""RMSNorm over the last dimension, with the residual addition before it fused in.

    r = x + residual                                  (rounded to the dtype of x; r = x without a residual)
    y = r / sqrt(mean(r^2) + eps) * weight

"Root Mean Square Layer Normalization", Zhang, Sennrich 2019 (arXiv:1910.07467), equation 4, with eps inside the root
as in Llama. Statistics and arithmetic are in float32 (float64 for float64), and y is rounded once. Forward and backward
see the same, rounded r. With g = dL/dy * weight and s = 1 / sqrt(mean(r^2) + eps), the gradient is
s * (g - r * s^2 * mean(g * r)), and the weight's the sum over rows of dL/dy * r * s. The kernels (csrc/norm) are
deterministic, and have no second derivative.

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
    autocast_rows,
    check_channel_weight,
    check_eps,
    check_like,
    check_rows,
    hand_written_backward_serves,
    needs_gradient,
    refuse_double_backward,
)
from fastgpt.ops.registry import contiguous_like, nothing_like, register


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
    ops = native.select(x, "rms_norm")
    if ops is not None:
        return _on_kernels(ops, *autocast_rows(x, residual, weight), eps)
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


# ---- kernels -------------------------------------------------------------------------------------------


SCHEMAS = {
    # new_residual is empty without a residual; rstd (...) is for the backward.
    "rms_norm_forward": (
        "(Tensor x, Tensor? residual, Tensor? weight, float eps) -> (Tensor y, Tensor new_residual, Tensor rstd)"
    ),
    # d_x is the gradient of x and of residual alike. What is not needed is empty.
    "rms_norm_backward": (
        "(Tensor d_y, Tensor? d_new_residual, Tensor r, Tensor? weight, Tensor rstd, bool need_x, bool need_weight) "
        "-> (Tensor d_x, Tensor d_weight)"
    ),
}


def _fake_forward(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    new_residual = nothing_like(x) if residual is None else contiguous_like(x)
    return contiguous_like(x), new_residual, x.new_empty(x.shape[:-1], dtype=accumulator(x.dtype))


def _fake_backward(
    d_y: Tensor,
    d_new_residual: Tensor | None,
    r: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, ...]:
    return (
        contiguous_like(r) if need_x else nothing_like(r),
        contiguous_like(weight) if need_weight and weight is not None else nothing_like(r),
    )


register(SCHEMAS, {"rms_norm_forward": _fake_forward, "rms_norm_backward": _fake_backward})


def _on_kernels(
    ops: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float
) -> Tensor | tuple[Tensor, Tensor]:
    if needs_gradient(x, residual, weight):
        return _Kernels.apply(ops, x, residual, weight, eps)
    y, new_residual, _rstd = ops.rms_norm_forward.default(x, residual, weight, eps)
    return y if residual is None else (y, new_residual)


class _Kernels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ops: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        y, new_residual, rstd = ops.rms_norm_forward.default(x, residual, weight, eps)
        ctx.ops = ops
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual is None else new_residual, weight, rstd)
        return y if residual is None else (y, new_residual)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor | None, d_new_residual: Tensor | None = None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("rms_norm")
        if d_y is None:  # only x + residual was used
            return None, d_new_residual, d_new_residual, None, None
        _, need_x, need_residual, need_weight, _ = ctx.needs_input_grad
        d_x, d_weight = ctx.ops.rms_norm_backward.default(
            d_y, d_new_residual, *ctx.saved_tensors, need_x or need_residual, need_weight
        )
        return (
            None,
            d_x if need_x else None,
            d_x if need_residual else None,
            d_weight if need_weight else None,
            None,
        )

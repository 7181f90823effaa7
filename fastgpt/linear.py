"""A linear layer that computes the gradient of its weight in a formulation of choice.

    y = x W^T + b        dX = dY W,   dW = dY^T X,   db = the sum of dY's rows

dW (N, K) sums over all M tokens. It is a few tiles for a GPU and each is a long sum, so which way to ask a library for
it is fastest depends on shape, GPU and library: FORMULATIONS lists ways, `precision.measure_weight_gradients` finds the
fastest where a model is trained. Each gives the same bits every time, but not the same as another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import contract

PLAIN = "plain"  # as torch's own layer does it
SPLITS = (2, 4, 8)

Formulation = Callable[[Tensor, Tensor], Tensor]


def _wide(x: Tensor) -> dict[str, torch.dtype]:
    """For a product whose result is kept as it was summed, in float32, where there is such a product."""
    return {"out_dtype": torch.float32} if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) else {}


def _split(parts: int) -> Formulation:
    """The sum over M in equal parts beside each other; their sum is in float32."""

    def formulation(d_y: Tensor, x: Tensor) -> Tensor:
        M = len(x)
        if M % parts:
            return d_y.t() @ x
        d_y, x = (t.view(parts, M // parts, t.shape[1]) for t in (d_y, x))
        return torch.bmm(d_y.mT, x, **_wide(x)).sum(0)

    return formulation


# name -> (d_y (M, N), x (M, K)), contiguous, to dW (N, K), in their dtype or in float32.
FORMULATIONS: dict[str, Formulation] = {
    PLAIN: lambda d_y, x: d_y.t() @ x,
    "transposed": lambda d_y, x: (x.t() @ d_y).t(),
    "wide": lambda d_y, x: torch.mm(d_y.t(), x, **_wide(x)),
    **{f"split in {parts}": _split(parts) for parts in SPLITS},
}


class Linear(nn.Linear):
    """nn.Linear; `weight_gradient` names one of FORMULATIONS. Under autocast, torch.compile and torch.func, and for a
    second derivative, it is torch's own layer."""

    weight_gradient: str = PLAIN

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.weight_gradient == PLAIN or _someone_looks_inside(x):
            return F.linear(x, self.weight, self.bias)
        return _Linear.apply(x, self.weight, self.bias, self.weight_gradient)


def weight_gradient(d_y: Tensor, x: Tensor, formulation: str, dtype: torch.dtype) -> Tensor:
    """dW (N, K) in `dtype`, of d_y (..., N) and x (..., K)."""
    rows = (t.reshape(-1, t.shape[-1]).contiguous() for t in (d_y, x))
    # In the layout at once, where the dtype changes; where it does not, `to` leaves the layout as it is.
    return FORMULATIONS[formulation](*rows).to(dtype, memory_format=torch.contiguous_format).contiguous()


def _someone_looks_inside(x: Tensor) -> bool:
    return contract.autocasting(x) or torch.compiler.is_compiling() or contract.transformed()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, formulation: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dtypes = [None if t is None else contract.gradient_dtype(t) for t in (weight, bias)]
        ctx.formulation = formulation
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        formulation = PLAIN if torch.is_grad_enabled() else ctx.formulation
        d_x = d_y @ weight if need_x else None
        d_weight = weight_gradient(d_y, x, formulation, ctx.dtypes[0]) if need_weight else None
        d_bias = d_y.reshape(-1, d_y.shape[-1]).sum(0, dtype=ctx.dtypes[1]) if need_bias else None
        return d_x, d_weight, d_bias, None

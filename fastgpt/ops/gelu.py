"""GELU: the input times the share of a normal distribution below it.

    none:  y = x * Phi(x) = x / 2 * (1 + erf(x / sqrt(2)))
    tanh:  y = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))

"Gaussian Error Linear Units", Hendrycks, Gimpel 2016 (arXiv:1606.08415), section 2. GPT-2 was trained with `tanh`.

With phi the density of that distribution, the derivative of the first is Phi(x) + x * phi(x). The kernels (csrc/gelu)
recompute it from x, in float32 (float64 for float64), round once, and have no second derivative.

x, y: (...), float64, float32, bfloat16 or float16, at least one dimension, which may be empty. Any strides; y is
contiguous. Raises ValueError for anything else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import native
from fastgpt.ops.contract import check_floating, needs_gradient, refuse_double_backward
from fastgpt.ops.registry import contiguous_like, register

APPROXIMATIONS = ("none", "tanh")


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """GELU of x (...), exact (`none`) or by its `tanh` approximation. Raises ValueError."""
    check_floating("gelu", "x", x)
    if x.dim() < 1:
        raise ValueError(f"gelu: x must have at least one dimension, got {tuple(x.shape)}")
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"gelu: approximate must be one of {', '.join(APPROXIMATIONS)}, got {approximate!r}")
    ops = native.select(x, "gelu")
    if ops is not None:
        tanh = approximate == "tanh"
        return _Kernels.apply(ops, x, tanh) if needs_gradient(x) else ops.gelu_forward.default(x, tanh)
    return reference(x, approximate=approximate)


def reference(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x.contiguous(), approximate=approximate)


# ---- kernels -------------------------------------------------------------------------------------------


SCHEMAS = {
    "gelu_forward": "(Tensor x, bool tanh) -> Tensor y",
    "gelu_backward": "(Tensor d_y, Tensor x, bool tanh) -> Tensor d_x",
}

register(
    SCHEMAS,
    {"gelu_forward": lambda x, tanh: contiguous_like(x), "gelu_backward": lambda d_y, x, tanh: contiguous_like(x)},
)


class _Kernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: Any, x: Tensor, tanh: bool) -> Tensor:
        ctx.ops, ctx.tanh = ops, tanh
        ctx.save_for_backward(x)
        return ops.gelu_forward.default(x, tanh)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[None, Tensor, None]:
        refuse_double_backward("gelu")
        (x,) = ctx.saved_tensors
        return None, ctx.ops.gelu_backward.default(d_y, x, ctx.tanh), None

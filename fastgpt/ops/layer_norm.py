"""LayerNorm over the last dimension, with the residual addition before it fused in.

    r = x + residual                                  (rounded to the dtype of x; r = x without a residual)
    y = (r - mean(r)) / sqrt(var(r) + eps) * weight + bias

mean and var (biased) are over C. "Layer Normalization", Ba, Kiros, Hinton 2016 (arXiv:1607.06450), equation 4.
Statistics and arithmetic are in float32 (float64 for float64), and y is rounded once. Forward and backward see the
same, rounded r.

| tensor       | shape    | dtype                                |
|--------------|----------|--------------------------------------|
| x, residual  | (..., C) | float64, float32, bfloat16, float16  |
| weight, bias | (C,)     | that of x, or float32                |
| y, r         | (..., C) | that of x; contiguous                |

C >= 1; other dimensions may be empty. Any strides. Raises ValueError for anything else.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastgpt import native
from fastgpt.ops.contract import accumulator, check_channel_weight, check_eps, check_like, check_rows


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
    native.select(x)
    return reference(x, weight, bias, eps=eps, residual=residual)


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

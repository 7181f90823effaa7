"""GELU: the input times the share of a normal distribution below it.

    none:  y = x * Phi(x) = x / 2 * (1 + erf(x / sqrt(2)))
    tanh:  y = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))

"Gaussian Error Linear Units", Hendrycks, Gimpel 2016 (arXiv:1606.08415), section 2. GPT-2 was trained with `tanh`.

x, y: (...), float64, float32, bfloat16 or float16, at least one dimension, which may be empty. Any strides; y is
contiguous. Raises ValueError for anything else.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastgpt import native
from fastgpt.ops.contract import check_floating

APPROXIMATIONS = ("none", "tanh")


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """GELU of x (...), exact (`none`) or by its `tanh` approximation. Raises ValueError."""
    check_floating("gelu", "x", x)
    if x.dim() < 1:
        raise ValueError(f"gelu: x must have at least one dimension, got {tuple(x.shape)}")
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"gelu: approximate must be one of {', '.join(APPROXIMATIONS)}, got {approximate!r}")
    native.select(x, "gelu")
    return reference(x, approximate=approximate)


def reference(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x.contiguous(), approximate=approximate)

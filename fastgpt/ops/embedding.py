"""Token embedding: rows of a table, by id.

    y[...] = weight[ids[...]];   d_weight[v] = sum of d_y over the places where ids == v

The gradient is dense, and summed in float32 (float64 for float64) before it is rounded once: a frequent token's
gradient in bfloat16 would otherwise stop growing after a few hundred terms.

| tensor | shape    | dtype                                       |
|--------|----------|---------------------------------------------|
| ids    | (...)    | int64 or int32, each in 0 .. V - 1          |
| weight | (V, C)   | float64, float32, bfloat16, float16; V, C>=1 |
| y      | (..., C) | that of weight; contiguous                  |

Raises ValueError for anything else. An id out of range is an IndexError from torch on a CPU (a device-side assertion on
a GPU): it is a value, and values are not read by the contract's checks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import native
from fastgpt.ops.contract import check_device, check_floating, check_tensor, dtype_name


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows (..., C) of weight (V, C) at ids (...); the module's docstring has the contract. Raises ValueError."""
    check_tensor("embedding", "ids", ids)
    check_floating("embedding", "weight", weight)
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"embedding: ids must be int64 or int32, got {dtype_name(ids.dtype)}")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"embedding: weight must have a shape (V, C) with V, C >= 1, got {tuple(weight.shape)}")
    check_device("embedding", "ids", ids, "weight", weight)
    native.select(weight, "embedding")
    return reference(ids, weight)


def reference(ids: Tensor, weight: Tensor) -> Tensor:
    if weight.dtype in (torch.bfloat16, torch.float16):
        return _SummedInFloat32.apply(ids, weight)
    return F.embedding(ids, weight)


class _SummedInFloat32(torch.autograd.Function):
    """F.embedding for 16-bit weights; torch's own backward would round after every addition."""

    @staticmethod
    def forward(ids: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(ids, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ids, weight = inputs
        ctx.save_for_backward(ids)
        ctx.rows = weight.shape[0]

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        # Differentiable, as every step of it is plain torch.
        summed = torch.ops.aten.embedding_dense_backward(d_y.float(), ids, ctx.rows, -1, False)
        return None, summed.to(d_y.dtype)

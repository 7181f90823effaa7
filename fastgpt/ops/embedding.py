"""Token embedding: rows of a table, by id.

    y[...] = weight[ids[...]];   d_weight[v] = sum of d_y over the places where ids == v

The gradient is dense, and summed in float32 (float64 for float64) before it is rounded once: a frequent token's
gradient in bfloat16 would otherwise stop growing after a few hundred terms.

| tensor | shape    | dtype                                       |
|--------|----------|---------------------------------------------|
| ids    | (...)    | int64 or int32, each in 0 .. V - 1          |
| weight | (V, C)   | float64, float32, bfloat16, float16; V, C>=1 |
| y      | (..., C) | that of weight; contiguous                  |

With vocab_size = n only the first n rows of weight are the table; the others, which it may be stored with, have no id
and the gradient 0. Where a weight's gradients are gathered in float32 (`weight.grad_dtype`), d_weight is not rounded at
all: with tied weights it is added to the gradient from the other side as it was summed.

Raises ValueError for anything else. An id out of range is an IndexError from torch on a CPU (a device-side assertion on
a GPU): it is a value, and values are not read by the contract's checks. The kernels (csrc/embedding) read nothing for
such an id: its row of y is NaN, and it adds to no row's gradient. They add up in an order that the ids alone decide, so
the gradient is the same every time, and have no second derivative.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import native
from fastgpt.ops.contract import (
    accumulator,
    check_device,
    check_floating,
    check_tensor,
    dtype_name,
    gradient_dtype,
    needs_gradient,
    refuse_double_backward,
)
from fastgpt.ops.registry import register


def embedding(ids: Tensor, weight: Tensor, *, vocab_size: int | None = None) -> Tensor:
    """Rows (..., C) of weight (V, C) at ids (...); the module's docstring has the contract. Raises ValueError."""
    check_tensor("embedding", "ids", ids)
    check_floating("embedding", "weight", weight)
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"embedding: ids must be int64 or int32, got {dtype_name(ids.dtype)}")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"embedding: weight must have a shape (V, C) with V, C >= 1, got {tuple(weight.shape)}")
    check_device("embedding", "ids", ids, "weight", weight)
    rows = weight.shape[0] if vocab_size is None else vocab_size
    if not 1 <= rows <= weight.shape[0]:
        raise ValueError(f"embedding: vocab_size must be in 1 .. {weight.shape[0]}, the rows of weight, got {rows}")
    ops = native.select(weight, "embedding")
    if ops is None:
        return reference(ids, weight, vocab_size=vocab_size)
    return _Kernels.apply(ops, ids, weight, rows) if needs_gradient(weight) else (
        ops.embedding_forward.default(ids, weight, rows)
    )  # fmt: skip


def reference(ids: Tensor, weight: Tensor, *, vocab_size: int | None = None) -> Tensor:
    rows = weight.shape[0] if vocab_size is None else vocab_size
    if weight.dtype in (torch.bfloat16, torch.float16):
        return _SummedInFloat32.apply(ids, weight, rows)
    return F.embedding(ids, weight if rows == weight.shape[0] else weight[:rows])


class _SummedInFloat32(torch.autograd.Function):
    """F.embedding for 16-bit weights; torch's own backward would round after every addition."""

    @staticmethod
    def forward(ids: Tensor, weight: Tensor, rows: int) -> Tensor:
        return F.embedding(ids, weight[:rows])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        ids, weight, _ = inputs
        ctx.save_for_backward(ids)
        ctx.rows, ctx.dtype = weight.shape[0], gradient_dtype(weight)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[None, Tensor, None]:
        (ids,) = ctx.saved_tensors
        # Differentiable, as every step of it is plain torch.
        summed = torch.ops.aten.embedding_dense_backward(d_y.float(), ids, ctx.rows, -1, False)
        return None, summed.to(ctx.dtype), None


# ---- kernels -------------------------------------------------------------------------------------------


SCHEMAS = {
    # Of the first rows of weight.
    "embedding_forward": "(Tensor ids, Tensor weight, int rows) -> Tensor y",
    # sorted = ids[order]; those of row v are begins[v] .. begins[v + 1]. wide: d_weight as it was summed.
    "embedding_backward": ("(Tensor d_y, Tensor sorted, Tensor order, Tensor begins, bool wide) -> Tensor d_weight"),
}

register(
    SCHEMAS,
    {
        "embedding_forward": lambda ids, weight, rows: weight.new_empty((*ids.shape, weight.shape[1])),
        "embedding_backward": lambda d_y, sorted, order, begins, wide: d_y.new_empty(
            (begins.shape[0] - 1, d_y.shape[-1]), dtype=accumulator(d_y.dtype) if wide else d_y.dtype
        ),
    },
)


class _Kernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: Any, ids: Tensor, weight: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.ops, ctx.rows, ctx.stored, ctx.dtype = ops, rows, weight.shape[0], gradient_dtype(weight)
        return ops.embedding_forward.default(ids, weight, rows)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[None, None, Tensor, None]:
        refuse_double_backward("embedding")
        (ids,) = ctx.saved_tensors
        # Stable, so that the places of an id are in their own order: the sums do not depend on how it is sorted.
        in_order, order = torch.sort(ids.flatten(), stable=True)
        rows = torch.arange(ctx.stored + 1, device=ids.device, dtype=ids.dtype)
        begins = torch.searchsorted(in_order, rows.clamp(max=ctx.rows))  # rows that have no id begin where ids end
        d_weight = ctx.ops.embedding_backward.default(d_y, in_order, order, begins, ctx.dtype != d_y.dtype)
        return None, None, d_weight, None

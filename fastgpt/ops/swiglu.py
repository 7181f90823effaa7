"""SwiGLU: a linear unit gated by another through SiLU.

    y = silu(gate) * up,   silu(z) = z * sigmoid(z)

"GLU Variants Improve Transformer", Shazeer 2020 (arXiv:2002.05202), equation 5 without its matrices. Gate and up come
packed side by side out of one projection, [gate | up], or as two tensors. The backward recomputes from them:
d_up = d_y * silu(gate), d_gate = d_y * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate))). The kernels
(csrc/swiglu) compute in float32 (float64 for float64) and round once; they have no second derivative.

| tensor   | shape     | dtype                               |
|----------|-----------|-------------------------------------|
| gate_up  | (..., 2F) | float64, float32, bfloat16, float16 |
| gate, up | (..., F)  | the same                            |
| y        | (..., F)  | that of the input; contiguous       |

F >= 1; other dimensions may be empty. Any strides. Raises ValueError for anything else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import native
from fastgpt.ops.contract import (
    autocast_rows,
    check_like,
    check_rows,
    hand_written_backward_serves,
    needs_gradient,
    refuse_double_backward,
)
from fastgpt.ops.registry import contiguous_like, nothing_like, register


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up, for one packed tensor (..., 2F) = [gate | up] or for two (..., F). Returns (..., F).

    Raises ValueError: an odd packed width, or two tensors that differ in shape, dtype or device.
    """
    width = check_rows("swiglu", "gate_up" if up is None else "gate", gate)
    if up is not None:
        check_like("swiglu", "up", up, "gate", gate)
    elif width % 2:
        raise ValueError(f"swiglu: gate_up must have an even last dimension, [gate | up], got {tuple(gate.shape)}")
    ops = native.select(gate, "swiglu")
    if ops is not None:
        gate, up = autocast_rows(gate, up)
        return _Kernels.apply(ops, gate, up) if needs_gradient(gate, up) else ops.swiglu_forward.default(gate, up)
    if up is None and hand_written_backward_serves(gate):
        return _PackedOnCpu.apply(gate)
    return reference(gate, up)


def reference(gate: Tensor, up: Tensor | None = None) -> Tensor:
    if up is None:
        gate, up = gate.contiguous().chunk(2, -1)
    return F.silu(gate.contiguous()) * up.contiguous()


class _PackedOnCpu(torch.autograd.Function):
    """The same, with both halves of the gradient written in place where autograd would concatenate them."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.contiguous().chunk(2, -1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_up, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Tensor:
        gate_up, activated = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative was asked for: leave the graph to autograd
            return torch.autograd.grad(reference(gate_up), gate_up, d_y, create_graph=True)[0]
        gate, up = gate_up.contiguous().chunk(2, -1)
        d_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        d_gate, d_up = d_gate_up.chunk(2, -1)
        torch.mul(activated, d_y, out=d_up)
        torch.ops.aten.silu_backward.grad_input(d_y * up, gate, grad_input=d_gate)
        return d_gate_up


# ---- kernels -------------------------------------------------------------------------------------------


SCHEMAS = {
    # gate is packed, [gate | up], where up is not given.
    "swiglu_forward": "(Tensor gate, Tensor? up) -> Tensor y",
    # d_gate is packed where gate is. What is not needed is empty.
    "swiglu_backward": (
        "(Tensor d_y, Tensor gate, Tensor? up, bool need_gate, bool need_up) -> (Tensor d_gate, Tensor d_up)"
    ),
}


def _fake_forward(gate: Tensor, up: Tensor | None) -> Tensor:
    return contiguous_like(gate) if up is not None else gate.new_empty((*gate.shape[:-1], gate.shape[-1] // 2))


def _fake_backward(
    d_y: Tensor, gate: Tensor, up: Tensor | None, need_gate: bool, need_up: bool
) -> tuple[Tensor, Tensor]:
    return (
        contiguous_like(gate) if need_gate else nothing_like(gate),
        contiguous_like(gate) if need_up and up is not None else nothing_like(gate),
    )


register(SCHEMAS, {"swiglu_forward": _fake_forward, "swiglu_backward": _fake_backward})


class _Kernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: Any, gate: Tensor, up: Tensor | None) -> Tensor:
        ctx.ops = ops
        ctx.save_for_backward(gate, up)
        return ops.swiglu_forward.default(gate, up)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("swiglu")
        _, need_gate, need_up = ctx.needs_input_grad
        d_gate, d_up = ctx.ops.swiglu_backward.default(d_y, *ctx.saved_tensors, need_gate, need_up)
        return None, d_gate if need_gate else None, d_up if need_up else None

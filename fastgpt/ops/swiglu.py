"""SwiGLU: a linear unit gated by another through SiLU.

    y = silu(gate) * up,   silu(z) = z * sigmoid(z)

"GLU Variants Improve Transformer", Shazeer 2020 (arXiv:2002.05202), equation 5 without its matrices. Gate and up come
packed side by side out of one projection, [gate | up], or as two tensors. The backward recomputes from them:
d_up = d_y * silu(gate), d_gate = d_y * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate))).

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
from fastgpt.ops.contract import check_like, check_rows, hand_written_backward_serves


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up, for one packed tensor (..., 2F) = [gate | up] or for two (..., F). Returns (..., F).

    Raises ValueError: an odd packed width, or two tensors that differ in shape, dtype or device.
    """
    width = check_rows("swiglu", "gate_up" if up is None else "gate", gate)
    if up is not None:
        check_like("swiglu", "up", up, "gate", gate)
    elif width % 2:
        raise ValueError(f"swiglu: gate_up must have an even last dimension, [gate | up], got {tuple(gate.shape)}")
    native.select(gate, "swiglu")
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

"""Checks that several ops share. Each raises ValueError, says which op refused, and prints what it saw.

They read metadata only (dtype, shape, device), never values, so that the same call is refused with the same words on
meta, CPU, CUDA and fake tensors, and so that nothing waits for a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(op: str, name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor, got {type(x).__name__}")


def check_floating(op: str, name: str, x: Any) -> None:
    """A tensor of one of the FLOATING dtypes."""
    check_tensor(op, name, x)
    if x.dtype not in FLOATING:
        raise ValueError(
            f"{op}: {name} must be {', '.join(map(dtype_name, FLOATING[:-1]))} or {dtype_name(FLOATING[-1])}, "
            f"got {dtype_name(x.dtype)}"
        )


def check_like(op: str, name: str, x: Any, other_name: str, other: Tensor) -> None:
    """`x` has the dtype, shape and device of `other`. Under autocast dtypes may differ: they are promoted."""
    check_floating(op, name, x)
    if x.dtype != other.dtype and not autocasting(other):
        raise ValueError(
            f"{op}: {name} must have the dtype of {other_name} ({dtype_name(other.dtype)}), got {dtype_name(x.dtype)}"
        )
    if x.shape != other.shape:
        raise ValueError(f"{op}: {name} must have the shape of {other_name} {tuple(other.shape)}, got {tuple(x.shape)}")
    check_device(op, name, x, other_name, other)


def check_device(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{op}: {name} must be on the device of {other_name} ({other.device}), got {x.device}")


def check_rows(op: str, name: str, x: Any) -> int:
    """A floating tensor (..., C) with C >= 1; returns C."""
    check_floating(op, name, x)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"{op}: {name} must have a shape (..., C) with C >= 1, got {tuple(x.shape)}")
    return x.shape[-1]


def check_channel_weight(op: str, name: str, weight: Any, x: Tensor) -> None:
    """A per-channel parameter (C,) for x (..., C), in the dtype of x or in float32, on its device."""
    check_tensor(op, name, weight)
    if weight.dtype not in (x.dtype, torch.float32) and not (autocasting(x) and weight.dtype in FLOATING):
        raise ValueError(
            f"{op}: {name} must be in the dtype of x ({dtype_name(x.dtype)}) or float32, got {dtype_name(weight.dtype)}"
        )
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: {name} must have shape ({x.shape[-1]},) for x {tuple(x.shape)}, "
                         f"got {tuple(weight.shape)}")  # fmt: skip
    check_device(op, name, weight, "x", x)


def check_eps(op: str, eps: Any) -> None:
    if not isinstance(eps, (int, float)) or not 0 <= eps < float("inf"):
        raise ValueError(f"{op}: eps must be a finite number >= 0, got {eps!r}")


def autocasting(x: Tensor) -> bool:
    """Whether torch.autocast is on for the device of `x`."""
    kind = x.device.type
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of torch.autocast where it is on, as it casts the inputs of a matrix product."""
    if not autocasting(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def autocast_rows(x: Tensor, residual: Tensor | None, *channels: Tensor | None) -> tuple[Tensor | None, ...]:
    """The arguments of a norm in dtypes that its contract allows without autocast; as they are where it is off.

    x and residual are promoted to one dtype, as their sum is; per-channel parameters of a third one become float32.
    """
    if not autocasting(x):
        return x, residual, *channels
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    allowed = (dtype, torch.float32)
    return (
        x.to(dtype),
        None if residual is None else residual.to(dtype),
        *(c if c is None or c.dtype in allowed else c.float() for c in channels),
    )


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would want to hear of an op on these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def refuse_double_backward(op: str) -> None:
    """To be called first in the backward of a kernel: what it returns has no history, so a second derivative through
    it would be silently wrong."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: the kernels have no second derivative; the reference on a CPU has")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums and statistics are kept in: float32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """What autograd wants its gradient in: its own dtype, or the wider one in which its owner sums gradients up."""
    wide = accumulator(parameter.dtype)
    asked = not torch.compiler.is_compiling() and parameter.is_leaf and parameter.grad_dtype == wide
    return wide if asked else parameter.dtype


def transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp ...) is at work: it needs plain, batchable, forward-differentiable code."""
    return torch._C._are_functorch_transforms_active()


def hand_written_backward_serves(x: Tensor) -> bool:
    """Whether the formulation with a backward of its own, there for speed on a CPU, may stand in for plain torch.

    Not where something looks inside the op: torch.compile and torch.func's transforms; and not under autocast, which
    would change dtypes in that backward.
    """
    return x.device.type == "cpu" and not (torch.compiler.is_compiling() or transformed() or autocasting(x))

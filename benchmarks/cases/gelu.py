"""gelu, forward and backward, exact and tanh: each dtype on vectors, and the generic path."""

from __future__ import annotations

from typing import Any

import torch

from . import SHORT, Case, normal

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def of(rows: int, F: int, dtype: torch.dtype, *, tanh: bool = False, path: str = "vector") -> list[Case]:
    """Both directions for (rows, F)."""
    what = f"{rows} x {F} {SHORT[dtype]}" + (", tanh" if tanh else "")
    size = rows * F * dtype.itemsize

    def forward(device: str) -> tuple[Any, ...]:
        return (normal(rows, F, dtype=dtype, device=device, seed=1), tanh)

    def backward(device: str) -> tuple[Any, ...]:
        return (normal(rows, F, dtype=dtype, device=device, seed=2), *forward(device))

    whole = 1.0 if path == "vector" else None
    return [
        Case("gelu_forward", what, path, forward, 2 * size, 1.0, whole),
        Case("gelu_backward", what, path, backward, 3 * size, 1.0, whole),
    ]


def cases() -> list[Case]:
    found = [case for dtype in (BF16, F16, F32, F64) for case in of(50, 1024, dtype)]
    found += of(50, 1024, BF16, tanh=True)
    # an odd number of elements in all: rows without gaps are taken as one
    return found + [case for dtype in (BF16, F16, F32, F64) for case in of(21, 515, dtype, path="generic")]

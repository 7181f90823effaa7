"""swiglu, forward and backward, packed and separate: each dtype on vectors, and the generic path."""

from __future__ import annotations

from typing import Any

import torch

from . import SHORT, Case, normal

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def of(rows: int, F: int, dtype: torch.dtype, *, packed: bool = True, path: str = "vector") -> list[Case]:
    """Both directions for a result of (rows, F)."""
    what = f"{rows} x {F} {SHORT[dtype]}" + ("" if packed else ", separate")
    size = rows * F * dtype.itemsize

    def forward(device: str) -> tuple[Any, ...]:
        if packed:
            return (normal(rows, 2 * F, dtype=dtype, device=device, seed=1), None)
        return tuple(normal(rows, F, dtype=dtype, device=device, seed=seed) for seed in (1, 2))

    def backward(device: str) -> tuple[Any, ...]:
        return (normal(rows, F, dtype=dtype, device=device, seed=3), *forward(device), True, True)

    whole = 1.0 if path == "vector" else None
    return [
        Case("swiglu_forward", what, path, forward, 3 * size, 1.0, whole),
        Case("swiglu_backward", what, path, backward, 5 * size, 1.0, whole),
    ]


def cases() -> list[Case]:
    found = [case for dtype in (BF16, F16, F32, F64) for case in of(50, 1024, dtype)]
    found += of(50, 1024, BF16, packed=False)
    return found + [case for dtype in (BF16, F16, F32, F64) for case in of(21, 515, dtype, path="generic")]

"""embedding, forward and backward: each dtype on vectors, and the generic path."""

from __future__ import annotations

from typing import Any

import torch

from . import SHORT, Case, normal

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def of(N: int, V: int, C: int, dtype: torch.dtype, *, path: str = "vector", wide: bool = False) -> list[Case]:
    """Both directions for N ids of a table (V, C), a twentieth of them the same."""
    what = f"{N} of {V} x {C} {SHORT[dtype]}" + (", summed in fp32" if wide else "")
    sums = 8 if dtype == F64 else 4

    def ids(device: str) -> torch.Tensor:
        drawn = torch.randint(V, (N,), generator=torch.Generator(device).manual_seed(1), device=device)
        drawn[::20] = 3
        return drawn

    def forward(device: str) -> tuple[Any, ...]:
        return ids(device), normal(V, C, dtype=dtype, device=device), V

    def backward(device: str) -> tuple[Any, ...]:
        in_order, order = torch.sort(ids(device), stable=True)
        begins = torch.searchsorted(in_order, torch.arange(V + 1, device=device))
        return normal(N, C, dtype=dtype, device=device, seed=2), in_order, order, begins, wide

    # A row of the table that several ids ask for comes from memory for each of them.
    moved_forward = N * (2 * C * dtype.itemsize + 8)
    moved_backward = N * (C * dtype.itemsize + 8) + V * (C * (sums if wide else dtype.itemsize) + 8)
    most, whole = (1.03, 1.0) if path == "vector" else (None, None)
    return [
        Case("embedding_forward", what, path, forward, moved_forward, most, whole),
        Case(
            "embedding_backward", what, path, backward, moved_backward, most, whole and 1.01
        ),  # two begins for each row
    ]


def cases() -> list[Case]:
    found = [case for dtype in (BF16, F16, F32, F64) for case in of(1500, 500, 768, dtype)]
    found += of(1500, 500, 768, BF16, wide=True)
    return found + [case for dtype in (BF16, F16, F32, F64) for case in of(300, 50, 131, dtype, path="generic")]

"""rotary, in place, out of place and with the norm: each dtype on vectors, and the generic path."""

from __future__ import annotations

from typing import Any

import torch

from fastgpt.ops import rotary_tables

from . import SHORT, Case, normal

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def of(
    T: int, H: int, KV: int, D: int, dtype: torch.dtype, *, B: int = 1, norm: bool = False, path: str = "vector"
) -> list[Case]:
    """All entries for a qkv of (B, T, H + 2 KV, D)."""
    what = f"{T} x {H} + {KV} heads of {D} {SHORT[dtype]}"
    compute = F64 if dtype == F64 else F32
    heads, head = H + 2 * KV, B * T * D * dtype.itemsize
    tables = T * D * compute.itemsize
    weights = 2 * D * dtype.itemsize

    def at(device: str) -> tuple[Any, ...]:
        return (*(t.to(compute) for t in rotary_tables(T, D, 10000.0, device=device)), None)

    def x(device: str) -> torch.Tensor:
        return normal(B, T, heads, D, dtype=dtype, device=device)

    def plain(device: str) -> tuple[Any, ...]:
        return x(device), *at(device), H, KV

    def with_norm(device: str) -> tuple[Any, ...]:
        q, k = (normal(D, dtype=dtype, device=device, seed=seed) for seed in (2, 3))
        return x(device), *at(device), q, k, H, KV, 1e-6

    def backward(device: str) -> tuple[Any, ...]:
        return normal(B, T, heads, D, dtype=dtype, device=device, seed=1), *with_norm(device), True, True

    # A token reads its row of both tables, whatever the others read: their positions may all be different.
    most, whole = (1.03, 1.0) if path == "vector" else (None, None)
    if whole and dtype.itemsize == 2:
        # A lane takes 32 bytes of a table in two halves of a sector, one right after the other: the second comes from
        # the L1 cache, so no memory beyond it sees more than 1.0. For heads of 64 both accesses of a table are within
        # one line of 128 bytes however the lanes share them out. To exchange halves would take 8 shuffles and 24
        # selections for each token and lane, and save no byte.
        whole = 1.05
    if norm:
        both = 3 * heads - KV  # the values of x are not read
        return [
            Case("rotary_norm_forward", what, path, with_norm, 2 * heads * head + tables + weights, most, whole),
            Case("rotary_norm_backward", what, path, backward, both * head + tables + 2 * weights, most, whole),
        ]
    moved = 2 * heads * head + tables
    return [
        Case("rotary_forward", what, path, plain, moved, most, whole),
        Case("rotary_forward_", what, path, plain, 2 * (H + KV) * head + tables, most, whole),
        Case("rotary_backward", what, path, plain, moved, most, whole),
    ]


def cases() -> list[Case]:
    found = []
    for norm in (False, True):
        for dtype in (BF16, F16, F32, F64):
            found += of(96, 12, 12, 64, dtype, norm=norm)
            found += of(20, 3, 1, 30, dtype, norm=norm, path="generic")
        found += of(64, 16, 4, 128, BF16, norm=norm)
    return found

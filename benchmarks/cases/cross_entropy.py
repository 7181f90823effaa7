"""cross_entropy: forward, backward, and both at once in place; each dtype on vectors, and the generic path, for a warp
and for a block to a row; and a row of which registers keep a part, shared memory the rest."""

from __future__ import annotations

from typing import Any

import torch

from . import SHORT, Case, normal

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
OPTIONS = (-100, 0.0, 0.0, 0.0, None)  # ignore_index, label_smoothing, z_loss, softcap, vocab_size


def of(rows: int, V: int, dtype: torch.dtype, path: str = "vector", most: float | None = 1.03) -> list[Case]:
    """For logits of (rows, V)."""
    size, number = rows * V * dtype.itemsize, 8 if dtype == F64 else 4
    what = f"{rows} x {V} {SHORT[dtype]}"
    wide = torch.promote_types(dtype, F32)

    def forward(device: str) -> tuple[Any, ...]:
        return normal(rows, V, dtype=dtype, device=device), torch.arange(rows, device=device) * 7 % V, *OPTIONS

    def backward(device: str) -> tuple[Any, ...]:
        logits, targets, *options = forward(device)
        known = torch.tensor([8.0, float(V)], dtype=wide, device=device).repeat(rows, 1)
        return torch.ones(rows, dtype=wide, device=device), logits, targets, known, *options

    def gradient(device: str) -> tuple[Any, ...]:
        logits, targets, *options = forward(device)
        return logits, targets, torch.ones(rows, dtype=wide, device=device), *options

    sectors = None if most is None else 1.0
    # Of the backward no goal: each warp reads 20 bytes of its row (32 in float64) beside the 1,024 that it moves, which
    # is 1.020 (1.031) times the least. They lie in one sector each, so 7 of 8 warps of a block find them in L1.
    return [  # of a row besides its logits: the target, the loss and its gradient, the largest logit and the sum
        Case("cross_entropy_forward", what, path, forward, size + rows * (8 + 3 * number), most, sectors),
        Case("cross_entropy_backward", what, path, backward, 2 * size + rows * (8 + 3 * number), None, sectors),
        Case("cross_entropy_gradient_", what, path, gradient, 2 * size + rows * (8 + 2 * number), most, sectors),
    ]


def cases() -> list[Case]:
    found = [case for dtype in (BF16, F16, F32, F64) for case in of(3, 20480, dtype)]
    found += of(2, 50304, BF16)
    found += [case for V, dtype in ((128256, BF16), (128256, F16), (65536, F32)) for case in of(1, V, dtype)]
    found += [case for dtype in (BF16, F16, F32, F64) for case in of(6, 128, dtype, most=None)]
    for V in (515, 101):
        found += [case for dtype in (BF16, F16, F32, F64) for case in of(6, V, dtype, "generic", None)]
    return found

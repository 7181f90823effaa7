"""attention, forward and backward on the generic path, and decoding: each tile in each dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import SHORT, Case, normal

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
OPTIONS = (True, None, 0.125, 0.0, None, None, None)  # causal, and no window, softcap, documents or lengths


def least_bytes(direction: str, B: int, Tq: int, Tk: int, H: int, KV: int, D: int, dtype: torch.dtype) -> int:
    """forward: q, k, v, O and LSE; backward: those, the gradient of O, and those of q, k and v."""
    times = 1 if direction == "forward" else 2
    of_rows = 8 if dtype in (F64, F32) else 4  # LSE, in float32 with what rounding took from it
    return B * (2 * times * (Tq * H + Tk * KV) * D * dtype.itemsize + Tq * H * of_rows)


def of(T: int, H: int, KV: int, D: int, dtype: torch.dtype) -> list[Case]:
    """Causal, one sequence, on a chip without a path of its own."""
    what = f"{T} x {H} + {KV} heads of {D} {SHORT[dtype]}"
    compute = F64 if dtype == F64 else F32

    def tensors(device: str) -> tuple[Tensor, ...]:
        return tuple(
            normal(1, T, heads, D, dtype=dtype, device=device, seed=seed) for seed, heads in enumerate((H, KV, KV))
        )

    def forward(device: str) -> tuple[Any, ...]:
        return *tensors(device), *OPTIONS

    def backward(device: str) -> tuple[Any, ...]:
        q, k, v = tensors(device)
        d_o, o = (normal(1, T, H, D, dtype=dtype, device=device, seed=seed) for seed in (3, 4))
        lse = torch.full((1, H, T), 3.0, dtype=compute, device=device)
        rest = torch.zeros(lse.shape if dtype == F32 else 0, dtype=F32, device=device)
        return d_o, None, q, k, v, o, lse, rest, *OPTIONS, True, True, True

    return [
        Case(f"attention_{name}", what, "generic", arguments, least_bytes(name, 1, T, T, H, KV, D, dtype), chip="sm_75")
        for name, arguments in (("forward", forward), ("backward", backward))
    ]


def decoding(B: int, Tk: int, H: int, KV: int, D: int, dtype: torch.dtype, most: float) -> Case:
    """One query of each head, in a full cache."""

    def arguments(device: str) -> tuple[Any, ...]:
        q = normal(B, 1, H, D, dtype=dtype, device=device)
        k, v = (normal(B, Tk, KV, D, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
        lengths = torch.full((B,), Tk, dtype=torch.int32, device=device)
        return q, k, v, *OPTIONS[:-1], lengths

    what = f"{B} x 1 over {Tk}, {H} + {KV} heads of {D} {SHORT[dtype]}"
    least = least_bytes("forward", B, 1, Tk, H, KV, D, dtype)
    return Case("attention_forward", what, "decode", arguments, least, most, 1.01)


def cases() -> list[Case]:
    found = [case for D, dtype in ((64, F32), (128, BF16), (80, F64)) for case in of(96, 2, 1, D, dtype)]
    for dtype in (BF16, F16, F32):
        found.append(decoding(1, 1100, 1, 1, 128, dtype, 1.05))
        found.append(decoding(1, 1100, 8, 1, 64, dtype, 1.13))  # what splits leave to be merged, of eight heads
    return found

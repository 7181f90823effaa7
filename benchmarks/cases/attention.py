"""attention, forward and backward on the generic path and on tensor cores, and decoding: each tile in each dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgpt.ops import document_bounds

from . import SHORT, Case, normal

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
OPTIONS = (True, None, 0.125, 0.0, None, None, None)  # causal, and no window, softcap, documents or lengths


def least_bytes(direction: str, B: int, Tq: int, Tk: int, H: int, KV: int, D: int, dtype: torch.dtype) -> int:
    """forward: q, k, v, O and LSE; backward: those, the gradient of O, and those of q, k and v."""
    times = 1 if direction == "forward" else 2
    of_rows = 8 if dtype == F64 else 4  # LSE
    return B * (2 * times * (Tq * H + Tk * KV) * D * dtype.itemsize + Tq * H * of_rows)


def of(
    T: int,
    H: int,
    KV: int,
    D: int,
    dtype: torch.dtype,
    *,
    chip: str = "sm_75",
    most: tuple[float | None, float | None] = (None, None),
    documents: int = 0,
) -> list[Case]:
    """Causal, one sequence, or one of `documents` tokens after the other; forward and backward held to `most`. A chip
    without a path of its own takes the generic one, which multiplies without matrix instructions."""
    what = f"{T} x {H} + {KV} heads of {D} {SHORT[dtype]}" + (", documents" if documents else "")
    path = {"sm_75": "generic", "sm_90a": "sm90"}.get(chip, "sm80")
    lengths = [min(documents or T, T - begin) for begin in range(0, T, documents or T)]
    product = 0 if path == "generic" else H * D * sum(n * (n + 1) for n in lengths)  # FLOPs of what the masks leave
    compute = F64 if dtype == F64 else F32

    def tensors(device: str) -> tuple[Tensor, ...]:
        return tuple(
            normal(1, T, heads, D, dtype=dtype, device=device, seed=seed) for seed, heads in enumerate((H, KV, KV))
        )

    def options(device: str) -> tuple[Any, ...]:
        if not documents:
            return OPTIONS
        bounds = document_bounds(torch.arange(0, T, documents, device=device), 1, T)
        return *OPTIONS[:4], *bounds, None

    def forward(device: str) -> tuple[Any, ...]:
        return *tensors(device), *options(device)

    def backward(device: str) -> tuple[Any, ...]:
        q, k, v = tensors(device)
        d_o, o = (normal(1, T, H, D, dtype=dtype, device=device, seed=seed) for seed in (3, 4))
        lse = torch.full((1, H, T), 3.0, dtype=compute, device=device)
        return d_o, None, q, k, v, o, lse, *options(device), True, True, True

    def case(direction: str, arguments: Callable[[str], tuple[Any, ...]], products: int, most: float | None) -> Case:
        least = least_bytes(direction, 1, T, T, H, KV, D, dtype)
        return Case(f"attention_{direction}", what, path, arguments, least, most, None, products * product, chip)

    return [case("forward", forward, 2, most[0]), case("backward", backward, 5, most[1])]


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
    found += of(1024, 1, 1, 64, BF16, chip="sm_80", most=(2.8, 5.2))  # keys come again for each tile of queries
    for dtype in (BF16, F16):
        found += [case for D in (64, 96, 128) for case in of(192, 2, 1, D, dtype, chip="sm_80")]
        found += [case for D in (96, 128) for case in of(192, 2, 1, D, dtype, chip="sm_86")]
        found += [case for D in (64, 96, 128) for case in of(192, 2, 1, D, dtype, chip="sm_90a")]
    found += of(1024, 1, 1, 64, BF16, chip="sm_90a", most=(2.8, 3.7))
    found += of(192, 2, 1, 64, BF16, chip="sm_90a", documents=50)
    found += of(192, 2, 1, 64, BF16, chip="sm_80", documents=50)
    found += of(192, 2, 1, 128, BF16, chip="sm_86", documents=50)
    for dtype in (BF16, F16, F32):
        found.append(decoding(1, 1100, 1, 1, 128, dtype, 1.05))
        found.append(decoding(1, 1100, 8, 1, 64, dtype, 1.13))  # what splits leave to be merged, of eight heads
    return found

"""grad_norm: each dtype on vectors, with sums in both, and a tensor that does not begin at a multiple of 16 bytes."""

from __future__ import annotations

from typing import Any

import torch

from . import SHORT, Case, normal

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def of(sizes: list[int], dtype: torch.dtype, *, path: str = "vector") -> Case:
    def arguments(device: str) -> tuple[Any, ...]:
        shift = path == "generic"
        return ([normal(n + shift, dtype=dtype, device=device, seed=i)[shift:] for i, n in enumerate(sizes)],)

    limits = (1.03, 1.0) if path == "vector" else (None, None)
    what = f"{len(sizes)} tensors, {sum(sizes):,} {SHORT[dtype]}"
    return Case("grad_norm", what, path, arguments, sum(sizes) * dtype.itemsize, *limits)


def cases() -> list[Case]:
    found = [of([20_000, 768, 8], dtype) for dtype in (BF16, F16, F32, F64)]
    # 171 are more than a launch takes
    return [*found, of([768] * 171, BF16), of([769, 5001], F32, path="generic"), of([769, 5001], F64, path="generic")]

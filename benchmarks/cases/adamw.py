"""adamw_: each kind of parameter on vectors, with gradients in both dtypes, and the generic path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import SHORT, Case, normal

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def of(sizes: list[int], dtype: torch.dtype, *, master: bool = False, wide_grad: bool = False) -> Case:
    """One update of tensors of these sizes, with all numbers on the device."""
    wide = F64 if dtype == F64 else F32
    grad = wide if wide_grad else dtype
    kind = (", master" if master else ", stochastic" if dtype == BF16 else "") + (", fp32 gradients" * wide_grad)
    # What is read and written: gradient, both moments, and the master and the parameter, which is not read then.
    each = grad.itemsize + 4 * wide.itemsize + (2 * wide.itemsize + dtype.itemsize if master else 2 * dtype.itemsize)
    whole = all(n % (16 // wide.itemsize) == 0 for n in sizes)

    def tensors(device: str, dtype: torch.dtype, seed: int) -> list[Tensor]:
        return [normal(n, dtype=dtype, device=device, seed=seed + i) for i, n in enumerate(sizes)]

    def arguments(device: str) -> tuple[Any, ...]:
        params = tensors(device, dtype, 1)
        number = {name: torch.tensor(x, device=device) for name, x in (("lr", 1e-3), ("step", 3.0), ("clip", 0.5))}
        return (
            params, tensors(device, grad, 2), tensors(device, wide, 3), [v.square() for v in tensors(device, wide, 4)],
            [p.to(wide) for p in params] if master else [],
            0.0, number["lr"], 0.9, 0.95, 1e-8, 0.1, 0.0, number["step"], 0.0, number["clip"],
            torch.tensor(False, device=device), 7, [0] * len(sizes), list(range(len(sizes))),
        )  # fmt: skip

    what = f"{len(sizes)} tensors, {sum(sizes):,} {SHORT[dtype]}{kind}"
    limits = (1.03, 1.0) if whole else (None, None)
    return Case("adamw_", what, "vector" if whole else "vector and generic", arguments, each * sum(sizes), *limits)


def cases() -> list[Case]:
    sizes = [10_240, 768, 2048, 4]
    odd = [1, 769, 5001]
    return [
        of(sizes, F32),
        *(of(sizes, dtype, master=True, wide_grad=wide) for dtype in (BF16, F16) for wide in (False, True)),
        *(of(sizes, BF16, wide_grad=wide) for wide in (False, True)),
        of(sizes, F64),
        of([768] * 60, F32),  # more than a launch takes
        *(of(odd, dtype) for dtype in (F32, BF16, F64)),
        of(odd, F16, master=True),
    ]

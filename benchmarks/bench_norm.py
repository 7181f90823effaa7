"""layer_norm and rms_norm, with the residual addition fused in, beside torch eager, torch.compile and Liger.

    python benchmarks/bench_norm.py [--seconds 150] [--only "rms_norm forward"] [--out FILE.json]

operations.py says how it is measured, cases/norm.py what the fewest bytes are. Widths are those of GPT-2 (768, 1024)
and of Llama-like models.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases.norm import Norm
from operations import DIRECTIONS, OURS, Case, Functions, compiled, contenders, least_of, main, normal, of_liger
from torch import Tensor

from fastgpt import ops

WIDTHS = (768, 1024, 2048, 4096, 8192)
DTYPES = (torch.bfloat16, torch.float32)
EPS = {"layer_norm": 1e-5, "rms_norm": 1e-6}


def layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    r = x + residual
    return F.layer_norm(r, weight.shape, weight, bias, EPS["layer_norm"]), r


def rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    r = x + residual
    return F.rms_norm(r, weight.shape, weight, EPS["rms_norm"]), r


def liger(op: str) -> Callable[..., Any]:
    if op == "layer_norm":  # Liger's has no residual in it: the addition is torch's
        theirs = of_liger("liger_layer_norm")
        return lambda x, residual, weight, bias: (theirs(r := x + residual, weight, bias, EPS[op]), r)
    theirs = of_liger("liger_fused_add_rms_norm")
    return lambda x, residual, weight: theirs(x, residual, weight, EPS[op])


EAGER = {"layer_norm": layer_norm, "rms_norm": rms_norm}
FUNCTIONS: dict[str, Functions] = {
    "layer_norm": {OURS: lambda: lambda x, residual, weight, bias: ops.layer_norm(x, weight, bias, residual=residual)},
    "rms_norm": {OURS: lambda: lambda x, residual, weight: ops.rms_norm(x, weight, residual=residual)},
}
for op, found in FUNCTIONS.items():
    found["eager"] = lambda op=op: EAGER[op]
    found["compile"] = lambda op=op: compiled(EAGER[op])
    found["liger"] = lambda op=op: liger(op)


def case(op: str, direction: str, columns: int, dtype: torch.dtype) -> Case:
    parameters = 2 if op == "layer_norm" else 1

    def least_bytes(rows: int) -> int:
        return least_of(Norm(op, rows, columns, dtype).cases(), f"{op}_{direction}")

    def inputs(device: str, rows: int) -> tuple[list[Tensor], list[Tensor]]:
        x, residual = (normal(rows, columns, dtype=dtype, device=device, seed=s) for s in (1, 2))
        return [x, residual, *(normal(columns, dtype=dtype, device=device, seed=3 + i) for i in range(parameters))], []

    return Case(op, direction, columns, dtype, least_bytes, contenders(FUNCTIONS[op], direction, inputs))


def cases() -> list[Case]:
    return [
        case(op, direction, columns, dtype)
        for dtype in DTYPES
        for columns in WIDTHS
        for op in EAGER
        for direction in DIRECTIONS
    ]


if __name__ == "__main__":
    sys.exit(main(cases(), (__doc__ or "").split("\n")[0]))

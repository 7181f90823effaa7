"""gelu, exact and by tanh, beside torch eager and torch.compile.

    python benchmarks/bench_gelu.py [--seconds 150] [--only "gelu_tanh forward"] [--out FILE.json]

operations.py says how it is measured, cases/gelu.py what the fewest bytes are. Widths F = 4 C are those of the GPT-2
sizes.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
import torch.nn.functional as F
from cases import gelu as entries
from operations import DIRECTIONS, OURS, Case, Functions, compiled, contenders, least_of, main, normal
from torch import Tensor

from fastgpt import ops

WIDTHS = (3072, 4096, 6400)
DTYPES = (torch.bfloat16, torch.float32)
APPROXIMATIONS = {"gelu": "none", "gelu_tanh": "tanh"}


def case(op: str, direction: str, width: int, dtype: torch.dtype) -> Case:
    ours, eager = (partial(function, approximate=APPROXIMATIONS[op]) for function in (ops.gelu, F.gelu))
    functions: Functions = {OURS: lambda: ours, "eager": lambda: eager, "compile": lambda: compiled(eager)}

    def inputs(device: str, rows: int) -> tuple[list[Tensor], list[Tensor]]:
        return [normal(rows, width, dtype=dtype, device=device)], []

    def least_bytes(rows: int) -> int:
        return least_of(entries.of(rows, width, dtype), f"gelu_{direction}")

    return Case(op, direction, width, dtype, least_bytes, contenders(functions, direction, inputs))


def cases() -> list[Case]:
    return [
        case(op, direction, width, dtype)
        for dtype in DTYPES
        for width in WIDTHS
        for op in APPROXIMATIONS
        for direction in DIRECTIONS
    ]


if __name__ == "__main__":
    sys.exit(main(cases(), (__doc__ or "").split("\n")[0]))

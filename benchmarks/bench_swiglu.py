"""swiglu of a packed [gate | up], beside torch eager, torch.compile, Liger and our twin in Triton.

    python benchmarks/bench_swiglu.py [--seconds 150] [--only "backward 8192"] [--out FILE.json]

operations.py says how it is measured, cases/swiglu.py what the fewest bytes are. Widths F are those of models as wide
as GPT-2 (2048), and like Llama. Liger's takes gate and up as two tensors, and gets them; its backward writes the
gradients over them, so each of its calls has other values than the one before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases import swiglu as entries
from operations import DIRECTIONS, OURS, Case, Functions, compiled, contenders, least_of, main, normal, of_liger
from torch import Tensor

from fastgpt import ops

WIDTHS = (2048, 4096, 8192, 14336)
DTYPES = (torch.bfloat16, torch.float32)


def eager(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def twin() -> Callable[..., Any]:
    from triton_twins import swiglu

    return swiglu


PACKED: Functions = {OURS: lambda: ops.swiglu, "eager": lambda: eager, "compile": lambda: compiled(eager)}
PACKED["triton"] = twin
APART: Functions = {"liger": lambda: of_liger("liger_swiglu")}


def case(direction: str, width: int, dtype: torch.dtype) -> Case:
    def packed(device: str, rows: int) -> tuple[list[Tensor], list[Tensor]]:
        return [normal(rows, 2 * width, dtype=dtype, device=device)], []

    def apart(device: str, rows: int) -> tuple[list[Tensor], list[Tensor]]:
        return [normal(rows, width, dtype=dtype, device=device, seed=seed) for seed in (1, 2)], []

    def least_bytes(rows: int) -> int:
        return least_of(entries.of(rows, width, dtype), f"swiglu_{direction}")

    found = {**contenders(PACKED, direction, packed), **contenders(APART, direction, apart)}
    return Case("swiglu", direction, width, dtype, least_bytes, found)


def cases() -> list[Case]:
    return [case(direction, width, dtype) for dtype in DTYPES for width in WIDTHS for direction in DIRECTIONS]


if __name__ == "__main__":
    sys.exit(main(cases(), (__doc__ or "").split("\n")[0]))

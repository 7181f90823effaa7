"""cross_entropy of logits, beside torch eager, torch.compile and Liger.

    python benchmarks/bench_cross_entropy.py [--seconds 150] [--only "gradient 50304"] [--out FILE.json]

operations.py says how it is measured, cases/cross_entropy.py what the fewest bytes are. Vocabularies are those of
GPT-2, padded (50304), of Llama 3 (128256), and a small one. "forward" reads the logits once; "backward" reads them once
more and writes their gradient; "gradient" is both in one call and in place, as linear_cross_entropy makes it of each
chunk: one read, one write. Liger's forward has the gradient in it, in place too, and stands beside that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases import cross_entropy as entries
from operations import (
    DIRECTIONS,
    EMULATED_ROWS,
    OURS,
    Case,
    Functions,
    Make,
    compiled,
    contenders,
    least_of,
    main,
    normal,
    of_liger,
)
from torch import Tensor

from fastgpt import native, ops

VOCABULARIES = (4096, 50304, 128256)
DTYPES = (torch.bfloat16, torch.float32)
MOST_BYTES = 4 << 30  # of logits: fewer rows of the largest ones


def fewer(rows: int, V: int, dtype: torch.dtype) -> int:
    """How many of the rows are taken; on the emulator two."""
    return 2 if rows <= EMULATED_ROWS else min(rows, MOST_BYTES // (V * dtype.itemsize))


def eager(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets)


FUNCTIONS: Functions = {
    OURS: lambda: ops.cross_entropy,
    "eager": lambda: eager,
    "compile": lambda: compiled(eager),
}


def in_place(logits: Tensor, targets: Tensor) -> Callable[[], Any]:
    entry = native.select(logits, "cross_entropy").cross_entropy_gradient_.default
    ones = torch.ones(len(logits), device=logits.device)
    return lambda: entry(logits, targets, ones, *entries.OPTIONS)


def in_place_by_liger(logits: Tensor, targets: Tensor) -> Callable[[], Any]:
    function, leaf = of_liger("liger_cross_entropy"), logits.requires_grad_()
    return lambda: function(leaf, targets)


def case(direction: str, V: int, dtype: torch.dtype) -> Case:
    def inputs(device: str, rows: int) -> tuple[list[Tensor], list[Tensor]]:
        rows = fewer(rows, V, dtype)
        return [normal(rows, V, dtype=dtype, device=device)], [torch.arange(rows, device=device) * 7 % V]

    def least_bytes(rows: int) -> int:
        name = "cross_entropy_gradient_" if direction == "gradient" else f"cross_entropy_{direction}"
        return least_of(entries.of(fewer(rows, V, dtype), V, dtype), name)

    def in_one_call(make: Callable[[Tensor, Tensor], Callable[[], Any]]) -> Make:
        def on(device: str, rows: int) -> Callable[[], Any]:
            (logits,), (targets,) = inputs(device, rows)
            return make(logits, targets)

        return on

    if direction == "gradient":
        found = {OURS: in_one_call(in_place), "liger": in_one_call(in_place_by_liger)}
    else:
        found = contenders(FUNCTIONS, direction, inputs)
    return Case("cross_entropy", direction, V, dtype, least_bytes, found)


def cases() -> list[Case]:
    return [
        case(direction, V, dtype) for dtype in DTYPES for V in VOCABULARIES for direction in (*DIRECTIONS, "gradient")
    ]


if __name__ == "__main__":
    sys.exit(main(cases(), (__doc__ or "").split("\n")[0]))

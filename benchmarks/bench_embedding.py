"""embedding, rows of a table and the table's gradient, beside torch eager and torch.compile.

    python benchmarks/bench_embedding.py [--seconds 150] [--only "backward 768"] [--out FILE.json]

operations.py says how it is measured. The table has the rows of GPT-2's, padded. Ids are as frequent as words are, one
over the rank (Zipf's law), so that the first takes a sixteenth of all places and many rows of the gradient are zero.
The fewest bytes are each row of the table that occurs, read once, and all of the gradient, written once. The sort of
the ids, with which ours begins, is in the time and not in the bytes.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from operations import DIRECTIONS, EMULATED_ROWS, OURS, Case, Functions, compiled, contenders, main, normal
from torch import Tensor

from fastgpt import ops

VOCABULARY, EMULATED_VOCABULARY = 50304, 512
WIDTHS = (768, 1024, 2048, 4096)
DTYPES = (torch.bfloat16, torch.float32)


def vocabulary(rows: int) -> int:
    """Rows of the table; on the emulator fewer."""
    return EMULATED_VOCABULARY if rows <= EMULATED_ROWS else VOCABULARY


def ids_of(rows: int) -> Tensor:
    """(rows,): e^(u ln V), u even in 0 .. 1, has the density 1 / id."""
    V = vocabulary(rows)
    u = torch.rand(rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (V**u).long().clamp(max=V) - 1


def eager(weight: Tensor, ids: Tensor) -> Tensor:
    return F.embedding(ids, weight)


FUNCTIONS: Functions = {
    OURS: lambda: lambda weight, ids: ops.embedding(ids, weight),
    "eager": lambda: eager,
    "compile": lambda: compiled(eager),
}


def case(direction: str, columns: int, dtype: torch.dtype) -> Case:
    def inputs(device: str, rows: int) -> tuple[list[Tensor], list[Tensor]]:
        return [normal(vocabulary(rows), columns, dtype=dtype, device=device)], [ids_of(rows).to(device)]

    def least_bytes(rows: int) -> int:
        table_rows = len(ids_of(rows).unique()) if direction == "forward" else vocabulary(rows)
        return (rows + table_rows) * columns * dtype.itemsize + 8 * rows

    return Case("embedding", direction, columns, dtype, least_bytes, contenders(FUNCTIONS, direction, inputs))


def cases() -> list[Case]:
    return [case(direction, columns, dtype) for dtype in DTYPES for columns in WIDTHS for direction in DIRECTIONS]


if __name__ == "__main__":
    sys.exit(main(cases(), (__doc__ or "").split("\n")[0]))

"""cross_entropy: vectors and single elements, each tile, rows that stay in shared memory, padding, and blocks that
come to a second row."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt import ops
from tests.mutation.mutants import Scenario
from tests.rule import outputs_and_gradients, randn


def cross_entropy(rows: int, V: int, dtype: torch.dtype, columns: int | None = None, chip: str = "sm_90a") -> Scenario:
    """Forward and backward, and both at once in place; `columns` of which V are no padding."""

    def run() -> list[Tensor]:
        x, targets = randn(rows, columns or V, dtype=dtype), torch.arange(rows) * 7 % V
        targets[1] = -100
        options = dict(label_smoothing=0.1, z_loss=0.01, vocab_size=V)
        found = outputs_and_gradients(lambda x: ops.cross_entropy(x, targets, reduction="none", **options), [x])
        losses = torch.ops.fastgpt_emulated.cross_entropy_gradient_(
            x, targets, torch.ones_like(found[0]), -100, 0.1, 0.01, 0.0, V
        )
        return [*found, losses, x]

    return Scenario(f"cross_entropy of {rows} rows of {V} in {dtype}", run, chip)


SCENARIOS = [
    cross_entropy(5, 21, torch.bfloat16, columns=40),  # a warp for each row
    cross_entropy(5, 13, torch.float64),
    cross_entropy(6, 520, torch.float32),  # a block for each row, and more rows than blocks that stay
    cross_entropy(6, 129, torch.float16),
    cross_entropy(2, 50500, torch.bfloat16, columns=50512, chip="sm_86"),  # registers keep a part of a row
]

"""layer_norm and rms_norm: each tile of both paths, its columns not filled, and blocks that come to a second row."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt import ops
from tests.mutation.mutants import Scenario
from tests.rule import outputs_and_gradients, randn


def norm(op: str, rows: int, C: int, dtype: torch.dtype) -> Scenario:
    def run() -> list[Tensor]:
        x, residual = (randn(rows, C, dtype=dtype, seed=seed) for seed in (1, 2))
        weight, bias = (randn(C, dtype=dtype, seed=seed) for seed in (3, 4))
        if op == "rms_norm":
            return outputs_and_gradients(lambda x, w, r: ops.rms_norm(x, w, residual=r), [x, weight, residual])
        return outputs_and_gradients(
            lambda x, w, b, r: ops.layer_norm(x, w, b, residual=r), [x, weight, bias, residual]
        )

    return Scenario(f"{op} of {rows} rows of {C} in {dtype}", run)


SCENARIOS = [
    norm("layer_norm", 9, 24, torch.bfloat16),  # the narrow tile
    norm("rms_norm", 9, 24, torch.float16),
    norm("layer_norm", 20, 1032, torch.bfloat16),  # the middle one: more rows than blocks that stay
    norm("rms_norm", 5, 2056, torch.bfloat16),  # the wide one
    norm("layer_norm", 1540, 4, torch.float32),  # more runs of rows than blocks
    norm("layer_norm", 9, 13, torch.float64),  # the generic path, a warp for each row
    norm("layer_norm", 9, 1025, torch.float32),  # and a block for each row
    norm("rms_norm", 9, 1025, torch.float32),
]

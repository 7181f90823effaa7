"""embedding: vectors and single elements, rows that do not fill a warp, ids that are not there, whole runs of one."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt import ops
from tests.mutation.mutants import Scenario
from tests.rule import outputs_and_gradients, randn


def embedding(C: int, dtype: torch.dtype) -> Scenario:
    def run() -> list[Tensor]:
        ids = torch.tensor([2, 0, -1, 5] + [1] * 130)
        return outputs_and_gradients(lambda w: ops.embedding(ids, w), [randn(5, C, dtype=dtype)])

    return Scenario(f"embedding of rows of {C} in {dtype}", run)


SCENARIOS = [embedding(24, torch.bfloat16), embedding(3, torch.float32)]

"""embedding: vectors and single elements, rows that do not fill a warp, ids that are not there, whole runs of one, and
a gradient in float32 whose last vector has no neighbour."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt import ops
from tests.mutation.mutants import Scenario
from tests.rule import outputs_and_gradients, randn

IDS = torch.tensor([2, 0, -1, 5] + [1] * 130)


def embedding(C: int, dtype: torch.dtype) -> Scenario:
    def run() -> list[Tensor]:
        return outputs_and_gradients(lambda w: ops.embedding(IDS, w), [randn(5, C, dtype=dtype)])

    return Scenario(f"embedding of rows of {C} in {dtype}", run)


def summed_in_float32(C: int) -> Scenario:
    def run() -> list[Tensor]:
        weight = randn(5, C, dtype=torch.bfloat16).requires_grad_()
        weight.grad_dtype = torch.float32
        ops.embedding(IDS, weight).backward(randn(len(IDS), C, dtype=torch.bfloat16, seed=1))
        return [weight.grad]

    return Scenario(f"embedding of rows of {C} in bfloat16, summed in float32", run)


SCENARIOS = [embedding(24, torch.bfloat16), embedding(3, torch.float32), summed_in_float32(24)]

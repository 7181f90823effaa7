"""swiglu and gelu: vectors and single elements, and a block that is not filled."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastgpt import ops
from tests.mutation.mutants import Scenario
from tests.rule import outputs_and_gradients, randn


def activation(name: str, rows: int, width: int, dtype: torch.dtype) -> Scenario:
    """Of inputs of this width."""
    functions = {"swiglu": ops.swiglu, "gelu": ops.gelu, "gelu by tanh": partial(ops.gelu, approximate="tanh")}

    def run() -> list[Tensor]:
        return outputs_and_gradients(functions[name], [randn(rows, width, dtype=dtype)])

    return Scenario(f"{name} of {rows} rows of {width} in {dtype}", run)


SCENARIOS = [
    activation("swiglu", 3, 48, torch.bfloat16),
    activation("swiglu", 3, 26, torch.float32),
    activation("gelu", 3, 24, torch.float16),
    activation("gelu", 3, 13, torch.float64),
    activation("gelu by tanh", 3, 13, torch.bfloat16),
]

"""grad_norm: each dtype, vectors that the tensor does not fill, and single elements."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt import ops
from tests.mutation.mutants import Scenario
from tests.rule import randn


def grad_norm(n: int, dtypes: tuple[torch.dtype, ...], shift: int = 0) -> Scenario:
    def run() -> list[Tensor]:
        return [ops.grad_norm([randn(n + shift, dtype=dtype)[shift:] for dtype in dtypes])]

    return Scenario(f"grad_norm of {n} in {', '.join(map(str, dtypes))}{', shifted' * bool(shift)}", run)


SIXTEEN = (torch.bfloat16, torch.float16)
SCENARIOS = [
    grad_norm(4101, (torch.float32, *SIXTEEN)),
    grad_norm(4101, (torch.float32, *SIXTEEN), shift=1),
    grad_norm(2051, (torch.float64, torch.float32, *SIXTEEN)),
    grad_norm(2051, (torch.float64, torch.float32, *SIXTEEN), shift=1),
]

"""adamw_: vectors and single elements, chunks that are not filled, several tensors, random bits that straddle."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt import ops
from tests.mutation.mutants import Scenario
from tests.rule import randn


def adamw(*sizes: int, dtype: torch.dtype, master: bool = False, shift: int = 0) -> Scenario:
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def run() -> list[Tensor]:
        p, g = ([randn(n + shift, dtype=dtype, seed=s + n)[shift:] for n in sizes] for s in (1, 2))
        m, v = ([torch.ones(n, dtype=wide) for n in sizes] for _ in range(2))
        masters = [t.to(wide) for t in p] if master else [None for _ in p]
        ops.adamw_(
            p, g, m, v, lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=torch.tensor(2.0),
            masters=masters, seed=3, offsets=[3 for _ in p],
        )  # fmt: skip
        return [*p, *m, *v, *(t for t in masters if t is not None)]

    return Scenario(f"adamw_ of {sizes} in {dtype}{', masters' if master else ''}{', shifted' * bool(shift)}", run)


SCENARIOS = [
    adamw(2052, 8, dtype=torch.float32),
    adamw(2052, 8, dtype=torch.bfloat16, master=True),
    adamw(2052, 8, dtype=torch.float16, master=True),
    adamw(2052, 8, dtype=torch.bfloat16),
    adamw(1026, 8, dtype=torch.float64),
    adamw(2053, 9, dtype=torch.float32, shift=1),
    adamw(9, dtype=torch.float64, shift=1),
]

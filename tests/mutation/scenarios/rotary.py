"""rotary: vectors and single elements, in place or not, with and without the norm; heads and tokens that do not fill
what takes them, parts of a head that are not rotated, positions that are not in the tables."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt import ops
from tests.mutation.mutants import Scenario
from tests.rule import outputs_and_gradients, randn


def rotary(T: int, D: int, R: int, dtype: torch.dtype, *, heads: int = 3, norm: bool = False) -> Scenario:
    def run() -> list[Tensor]:
        tables = ops.rotary_tables(T, R, 100.0)
        qkv = randn(1, T, heads + 2, D, dtype=dtype)
        weights = [randn(D, dtype=dtype, seed=seed) for seed in (1, 2)] if norm else []
        positions = torch.arange(T, dtype=torch.int32)
        positions[-1] = T  # is not there

        def turned(x: Tensor, *w: Tensor) -> Tensor:
            q, k = w or (None, None)
            return ops.rotary(x, *tables, n_head=heads, n_kv_head=1, positions=positions, q_weight=q, k_weight=k)

        found = outputs_and_gradients(turned, [qkv, *weights])
        if not norm:
            found.append(ops.rotary(qkv.clone(), *tables, n_head=heads, n_kv_head=1, may_overwrite=True))
        return found

    return Scenario(f"rotary of {T} tokens, {R} of {D}, in {dtype}" + (" with a norm" if norm else ""), run)


SCENARIOS = [
    rotary(3, 24, 16, torch.bfloat16),  # the last part of a head is a vector without another
    rotary(3, 3, 2, torch.float64),
    rotary(17, 24, 16, torch.bfloat16, norm=True),
    rotary(9, 96, 96, torch.float32, norm=True),  # lanes without a slot
    rotary(9, 3, 2, torch.float64, norm=True),
]

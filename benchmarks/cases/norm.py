"""layer_norm and rms_norm, forward and backward: each tile of the vector path in each dtype, and the generic path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import SHORT, Case, normal

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Norm:
    """N rows of C elements, and what comes with them."""

    op: str
    rows: int
    C: int
    dtype: torch.dtype
    weight_dtype: torch.dtype | None = None
    """That of the rows where it is not given."""
    residual: bool = True

    def cases(self, path: str = "vector", most: tuple[float | None, float | None] = (None, None)) -> list[Case]:
        """Its forward and its backward, held to `most` times the least bytes."""
        words = [f"{self.rows} x {self.C} {SHORT[self.dtype]}"]
        if self.weight_dtype is not None:
            words.append(f"{SHORT[self.weight_dtype]} weight")
        if not self.residual:
            words.append("no residual")
        what = ", ".join(words)
        rows, statistics, channels = self._bytes()
        tensors = 4 if self.residual else 2  # x, residual, y, x + residual
        forward = tensors * rows + statistics + self._parameters * channels
        gradients = 4 if self.residual else 3  # of y, of x + residual, the sum itself, of x
        backward = gradients * rows + statistics + (1 + self._parameters) * channels
        # Where a weight has more bits than the rows, a block takes two halves of a sector, one after the other, once.
        whole = 1.0 if path == "vector" and self.weight_dtype is None else None
        return [
            Case(f"{self.op}_forward", what, path, self.forward, forward, most[0], whole),
            Case(f"{self.op}_backward", what, path, self.backward, backward, most[1], whole),
        ]

    def forward(self, device: str) -> tuple[Any, ...]:
        """x, residual, weight, (bias,) eps"""
        x, residual, weight = self._rows(device, 1), self._rows(device, 2), self._channels(device)
        parameters = [weight] * self._parameters
        return (x, residual if self.residual else None, *parameters, 1e-5)

    def backward(self, device: str) -> tuple[Any, ...]:
        """d_y, d_new_residual, r, weight, (bias, mean,) rstd, and that every gradient is wanted"""
        d_y, d_residual, r = (self._rows(device, seed) for seed in (1, 2, 3))
        statistic = torch.ones(self.rows, dtype=F64 if self.dtype == F64 else F32, device=device)
        weight = self._channels(device)
        kept = [weight, weight, statistic, statistic] if self.op == "layer_norm" else [weight, statistic]
        return (d_y, d_residual if self.residual else None, r, *kept, True, *[True] * self._parameters)

    @property
    def _parameters(self) -> int:
        return 2 if self.op == "layer_norm" else 1  # weight and bias, weight

    def _bytes(self) -> tuple[int, int, int]:
        """Of one tensor of rows, of the statistics, of one parameter."""
        statistics = self._parameters * self.rows * (8 if self.dtype == F64 else 4)  # mean and rstd, or rstd
        return self.rows * self.C * self.dtype.itemsize, statistics, self.C * (self.weight_dtype or self.dtype).itemsize

    def _rows(self, device: str, seed: int) -> Tensor:
        return normal(self.rows, self.C, dtype=self.dtype, device=device, seed=seed)

    def _channels(self, device: str) -> Tensor:
        return normal(self.C, dtype=self.weight_dtype or self.dtype, device=device)


def cases() -> list[Case]:
    # Rows enough that weights and partial sums, which are read and written once for each block, are few among them.
    # The widths are the widest of a tile: norm.cu says which.
    many = [
        (Norm("layer_norm", 1000, 768, BF16), (1.03, 1.10)),
        (Norm("layer_norm", 400, 2048, BF16), (1.03, 1.10)),
        (Norm("layer_norm", 100, 4096, BF16), (1.03, 1.10)),
        (Norm("rms_norm", 1000, 384, F32), (1.03, 1.10)),
        (Norm("rms_norm", 400, 1024, BF16, weight_dtype=F32), (1.03, 1.10)),
        (Norm("rms_norm", 200, 1024, F32, residual=False), (1.03, 1.10)),
    ]
    # The other instantiations, and what else changes the traffic.
    few = [Norm("rms_norm", 4, 4096, F32), *(Norm("rms_norm", 8, C, F16) for C in (768, 2048, 4096))]
    generic = [Norm("layer_norm", 40, C, dtype) for dtype in (F64, BF16) for C in (769, 1025)]
    found = [case for norm, most in many for case in norm.cases(most=most)]
    found += [case for norm in few for case in norm.cases()]
    return found + [case for norm in generic for case in norm.cases("generic")]

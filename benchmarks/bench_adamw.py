"""adamw_ and grad_norm, beside torch's fused AdamW and its norm of many tensors.

    python benchmarks/bench_adamw.py [--seconds 60] [--only "master"] [--out FILE.json]

operations.py says how it is measured, cases/adamw.py and cases/grad_norm.py what the fewest bytes are. A model has
rows x columns parameters: one matrix for a third of the rows, as an embedding is, and 48 for the others, with 98
vectors beside them. An update moves 28 bytes of a parameter: fp32 ("plain"), or bf16 with a master; "wide" is with
fp32 gradients, 30 bytes; "stochastic" without a master, 22. "squares" is the norm, 2 or 4.

All of ours are clipped, by a number on the device. torch's are not: its fused AdamW has clipping in a pass before. It
has no masters: what stands beside ours there updates fp32 parameters and copies them to the 16-bit ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from cases import adamw as updates
from cases import grad_norm as norms
from operations import EMULATED_ROWS, OURS, Case, main, normal
from torch import Tensor

from fastgpt import ops

COLUMNS = 4096  # 134 million parameters on a GPU: GPT-2 has 124 million
MATRICES, VECTORS, WIDTH = 48, 98, 768
HYPER: dict[str, Any] = dict(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
F32, BF16 = torch.float32, torch.bfloat16


def sizes(rows: int) -> list[int]:
    """Of all tensors; on the emulator fewer of each."""
    few = rows <= EMULATED_ROWS
    matrices, vectors, width = (4, 4, COLUMNS // 32) if few else (MATRICES, VECTORS, COLUMNS)
    rest = rows - rows // 3
    split = [rest // matrices + (i < rest % matrices) for i in range(matrices)]
    return [n * width for n in (rows // 3, *split)] + [WIDTH] * vectors


def tensors(rows: int, dtype: torch.dtype, device: str, seed: int) -> list[Tensor]:
    return [normal(n, dtype=dtype, device=device, seed=seed + i) for i, n in enumerate(sizes(rows))]


Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]  # parameters, gradients, moments


def lists(rows: int, dtype: torch.dtype, grad: torch.dtype, device: str) -> Lists:
    m, v = (tensors(rows, F32, device, seed) for seed in (3, 4))
    return tensors(rows, dtype, device, 1), tensors(rows, grad, device, 2), m, [x.square_() for x in v]


def ours(state: Lists, master: bool) -> Callable[[], Any]:
    device = state[0][0].device
    numbers = dict(step=torch.tensor(3.0, device=device), clip=torch.tensor(1.0, device=device))
    numbers["skip"] = torch.tensor(False, device=device)
    masters = [p.float() for p in state[0]] if master else None

    def call() -> list[Tensor]:
        ops.adamw_(*state, **HYPER, **numbers, masters=masters, seed=7)
        return state[0]

    return call


def fused(state: Lists, master: bool) -> Callable[[], Any]:
    params, grads, m, v = state
    targets = [p.float() for p in params] if master else params
    steps = [torch.tensor(3.0, device=params[0].device) for _ in params]

    def call() -> list[Tensor]:
        wide = [g.float() for g in grads] if grads[0].dtype != targets[0].dtype else grads
        torch._fused_adamw_(targets, wide, m, v, [], steps, **HYPER, amsgrad=False, maximize=False)
        if master:
            torch._foreach_copy_(params, targets)
        return params

    return call


def update(dtype: torch.dtype, *, master: bool = False, wide: bool = False) -> Case:
    grad = F32 if wide else dtype
    stochastic = dtype == BF16 and not master
    kind = ("master" if master else "stochastic" if stochastic else "plain") + ", wide" * wide

    def contender(make: Callable[[Lists, bool], Callable[[], Any]]) -> Callable[[str, int], Callable[[], Any]]:
        return lambda device, rows: make(lists(rows, dtype, grad, device), master)

    contenders = {OURS: contender(ours)}
    if not stochastic:  # torch's has no such rounding
        contenders["eager"] = contender(fused)

    def least_bytes(rows: int) -> int:
        return updates.of(sizes(rows), dtype, master=master, wide_grad=wide).least_bytes

    return Case("adamw", kind, COLUMNS, dtype, least_bytes, contenders)


def squares(dtype: torch.dtype) -> Case:
    def make(function: Callable[[list[Tensor]], Tensor]) -> Callable[[str, int], Callable[[], Any]]:
        def contender(device: str, rows: int) -> Callable[[], Any]:
            grads = tensors(rows, dtype, device, 2)
            return lambda: function(grads)

        return contender

    contenders = {OURS: make(ops.grad_norm), "eager": make(lambda grads: torch.nn.utils.get_total_norm(grads).square())}
    return Case(
        "grad_norm", "squares", COLUMNS, dtype, lambda rows: norms.of(sizes(rows), dtype).least_bytes, contenders
    )


def cases() -> list[Case]:
    masters = [update(BF16, master=True), update(BF16, master=True, wide=True)]
    return [update(F32), *masters, update(BF16), squares(BF16), squares(F32)]


if __name__ == "__main__":
    sys.exit(main(cases(), (__doc__ or "").split("\n")[0]))

"""The squared L2 norm of all gradients together, in a fixed order.

    s = sum over tensors, over elements, of g^2

The caller adds s over its processes and takes the root; scaling by min(1, limit / root) is then what "On the
difficulty of training recurrent neural networks", Pascanu, Mikolov, Bengio 2013 (arXiv:1211.5063), algorithm 1, calls
clipping. Summed in float32, or in float64 if any gradient is float64. The tensors, each in row-major order, are cut
into runs, which are summed one by one and then together: the same bits for any number of threads and any GPU, and
without the error that one long float32 sum gathers (torch.linalg.vector_norm was seen off by 4e-4). The reference lays
the tensors end to end first. The kernels begin a run with each tensor, and add up the sums of threads and runs in
float64, rounding once; a gradient with gaps between its elements is copied first.

grads: any number of float64, float32, bfloat16, float16 tensors, of any shapes and strides, empty ones too, all on one
device; none at all gives 0. They are not modified. A NaN or an inf gives a NaN or an inf. Not differentiable. Raises
ValueError for anything else.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastgpt import native
from fastgpt.ops.contract import check_device, check_floating
from fastgpt.ops.registry import register

# Elements in a run.
RUN = 4096
# Elements that are laid end to end at once: they stay in the cache, and need no memory to speak of.
PIECE = 1 << 18


def grad_norm(grads: Iterable[Tensor]) -> Tensor:
    """Sum of the squares of all elements of all `grads`, () in float32, or float64 if any is. Raises ValueError."""
    grads = list(grads)
    for i, g in enumerate(grads):
        check_floating("grad_norm", f"grads[{i}]", g)
        check_device("grad_norm", f"grads[{i}]", g, "grads[0]", grads[0])
    ops = native.select(grads[0], "grad_norm") if grads else None
    if ops is None:
        return reference(grads)
    with torch.no_grad():
        return ops.grad_norm.default(grads)


@torch.no_grad()
def reference(grads: list[Tensor]) -> Tensor:
    wide = _sums(grads)
    sums, group, size = [], [], 0
    for piece in (piece for g in grads for piece in g.reshape(-1).split(PIECE)):
        group.append(piece.to(wide))
        size += piece.numel()
        if size >= PIECE:
            sums.append(_sum(torch.cat(group).square_()))
            group, size = [], 0
    if group:
        sums.append(_sum(torch.cat(group).square_()))
    return _sum(torch.stack(sums)) if sums else torch.zeros((), dtype=wide)


def _sums(grads: list[Tensor]) -> torch.dtype:
    """What the squares are summed in."""
    return torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32


def _sum(x: Tensor) -> Tensor:
    """Sum of x (n,), by runs while there is more than one, as a sum along a row is never split between threads."""
    while x.numel() > RUN:
        whole = x.numel() // RUN * RUN
        x = torch.cat([x[:whole].view(-1, RUN).sum(1), x[whole:].sum(0, keepdim=True)])
    return x.sum()


# ---- kernels -------------------------------------------------------------------------------------------

SCHEMAS = {"grad_norm": "(Tensor[] grads) -> Tensor"}


def _fake(grads: list[Tensor]) -> Tensor:
    return grads[0].new_empty((), dtype=_sums(grads))


register(SCHEMAS, {"grad_norm": _fake})

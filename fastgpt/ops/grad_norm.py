"""The squared L2 norm of all gradients together, in a fixed order.

    s = sum over tensors, over elements, of g^2

The caller adds s over its processes and takes the root; scaling by min(1, limit / root) is then what "On the
difficulty of training recurrent neural networks", Pascanu, Mikolov, Bengio 2013 (arXiv:1211.5063), algorithm 1, calls
clipping. Summed in float32, or in float64 if any gradient is float64. Each tensor is cut, in row-major order, into
runs of RUN elements, which are summed one by one and then together: the same bits for any number of threads, and
without the error that one long float32 sum gathers (torch.linalg.vector_norm was seen off by 4e-4).

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

# Elements that are summed at once.
RUN = 4096
# Elements that are squared at once, so that the squares stay in the cache and need no memory to speak of: some RUNs.
PIECE = 1 << 18


def grad_norm(grads: Iterable[Tensor]) -> Tensor:
    """Sum of the squares of all elements of all `grads`, () in float32, or float64 if any is. Raises ValueError."""
    grads = list(grads)
    for i, g in enumerate(grads):
        check_floating("grad_norm", f"grads[{i}]", g)
        check_device("grad_norm", f"grads[{i}]", g, "grads[0]", grads[0])
    if grads:
        native.select(grads[0])
    return reference(grads)


@torch.no_grad()
def reference(grads: list[Tensor]) -> Tensor:
    wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    sums = [_sum_of_squares(g, wide) for g in grads if g.numel()]
    if not sums:
        return torch.zeros((), dtype=wide, device=grads[0].device if grads else None)
    return _sum(torch.stack(sums))


def _sum_of_squares(g: Tensor, dtype: torch.dtype) -> Tensor:
    return _sum(torch.stack([_sum(piece.to(dtype).square()) for piece in g.reshape(-1).split(PIECE)]))


def _sum(x: Tensor) -> Tensor:
    """Sum of x (n,), by runs while there is more than one, as a sum along a row is never split between threads."""
    while x.numel() > RUN:
        whole = x.numel() // RUN * RUN
        x = torch.cat([x[:whole].view(-1, RUN).sum(1), x[whole:].sum(0, keepdim=True)])
    return x.sum()

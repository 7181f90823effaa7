"""How exact each op is on this machine, beside torch's own functions: on one small input that is always the same.

`fastgpt doctor` shows it, and on a GPU how long both take. The tests hold the ops to far more (tests/rule.py).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops

DTYPES = (torch.bfloat16, torch.float32)
ROTARY_HEADS = 4, 2


@dataclass(frozen=True)
class Trial:
    """An op and what torch has in its place, as functions of the same tensors."""

    inputs: Callable[[int], Sequence[Tensor]]
    """float64 and integer tensors; the argument times more rows than the smallest."""
    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]
    differentiable: bool = True


@dataclass(frozen=True)
class Errors:
    """The largest errors against float64, each a share of the largest value there, over outputs and gradients."""

    ours: float
    torchs: float
    within: bool
    """At most twice torch's own, and the rounding of the dtype."""


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _ids(below: int, *shape: int) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(9))


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _rotary(qkv: Tensor) -> Tensor:
    cos, sin = ops.rotary_tables(qkv.shape[1], qkv.shape[-1], 10_000.0, device=qkv.device)
    return ops.rotary(qkv, cos, sin, n_head=ROTARY_HEADS[0], n_kv_head=ROTARY_HEADS[1])


def _rotated(qkv: Tensor) -> Tensor:
    tables = ops.rotary_tables(qkv.shape[1], qkv.shape[-1], 10_000.0, device=qkv.device)
    cos, sin = (table.to(qkv.dtype).unsqueeze(1) for table in tables)
    heads, values = qkv.split([sum(ROTARY_HEADS), ROTARY_HEADS[1]], dim=2)
    first, second = heads.chunk(2, -1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return torch.cat([turned, values], 2)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x.clone()


def _adamw(p: Tensor, g: Tensor) -> Tensor:
    p, wide = p.clone(), _wide(p)
    moments = [[torch.zeros_like(wide)], [torch.zeros_like(wide)]]
    master = None if wide.dtype == p.dtype else wide
    options = dict(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=1)
    ops.adamw_([p], [g], *moments, masters=[master], **options)
    return p if master is None else master


def _plain_adamw(p: Tensor, g: Tensor) -> Tensor:
    """The first step, when the moments are the gradient and its square: torch.optim takes seconds to import."""
    p, g = _wide(p), g.to(_wide(p).dtype)
    m, v = (1 - 0.9) * g, (1 - 0.95) * g.square()
    return p * (1 - 0.1 * 0.1) - 0.1 * (m / (1 - 0.9)) / ((v / (1 - 0.95)).sqrt() + 1e-8)


def _squares(g: Tensor) -> Tensor:
    return torch.linalg.vector_norm(g, dtype=_wide(g[:1]).dtype).square()


TRIALS = {
    "swiglu": Trial(
        lambda n: [_normal(8 * n, 96)], ops.swiglu, lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]
    ),
    "gelu": Trial(lambda n: [_normal(8 * n, 96)], ops.gelu, F.gelu),
    "layer_norm": Trial(
        lambda n: [_normal(8 * n, 96), _normal(96, seed=1), _normal(96, seed=2)],
        ops.layer_norm,
        lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias),
    ),
    "rms_norm": Trial(
        lambda n: [_normal(8 * n, 96), _normal(96, seed=1)],
        ops.rms_norm,
        lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6),
    ),
    "attention": Trial(lambda n: [_normal(n, 32, 2, 16, seed=seed) for seed in range(3)], ops.attention, _sdpa),
    "rotary": Trial(lambda n: [_normal(n, 16, sum(ROTARY_HEADS) + ROTARY_HEADS[1], 16)], _rotary, _rotated),
    "cross_entropy": Trial(lambda n: [_normal(8 * n, 200), _ids(200, 8 * n)], ops.cross_entropy, F.cross_entropy),
    "linear_cross_entropy": Trial(
        lambda n: [_normal(8 * n, 32), _normal(200, 32, seed=1) / 6, _ids(200, 8 * n)],
        ops.linear_cross_entropy,
        lambda x, weight, targets: F.cross_entropy(x @ weight.T, targets),
    ),
    "embedding": Trial(lambda n: [_ids(200, 64 * n), _normal(200, 32)], ops.embedding, F.embedding),
    "adamw": Trial(lambda n: [_normal(800 * n), _normal(800 * n, seed=1)], _adamw, _plain_adamw, False),
    "grad_norm": Trial(lambda n: [_normal(800 * n)], lambda g: ops.grad_norm([g]), _squares, False),
}


def errors(op: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Errors:
    """Of an op of TRIALS, through whatever serves it there now."""
    trial = TRIALS[op]
    rounded = [_to(x, dtype, device) for x in trial.inputs(1)]
    exact = _run(trial.torchs, [_to(x, torch.float64, device) for x in rounded], trial.differentiable)
    ours = _largest(_run(trial.ours, rounded, trial.differentiable), exact)
    torchs = _largest(_run(trial.torchs, rounded, trial.differentiable), exact)
    return Errors(ours, torchs, ours <= 2 * torchs + torch.finfo(dtype).eps)


def _to(x: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return x.to(device, dtype if x.is_floating_point() else None)


def _run(function: Callable[..., Tensor], inputs: Sequence[Tensor], differentiable: bool) -> list[Tensor]:
    """The output, and the gradients of the inputs that can have one."""
    inputs = [x.detach().requires_grad_(differentiable and x.is_floating_point()) for x in inputs]
    y = function(*inputs)
    leaves = [x for x in inputs if x.requires_grad]
    upstream = torch.linspace(0.5, 1.5, max(1, y.numel()), dtype=torch.float64, device=y.device).view(y.shape)
    return [y.detach(), *(torch.autograd.grad(y, leaves, upstream.to(y.dtype)) if leaves else ())]


def _largest(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    return max(
        ((a.double() - b).abs().max() / b.abs().max()).item() if a.isfinite().all() else float("inf")
        for a, b in zip(found, exact, strict=True)
    )


def microseconds(
    op: str,
    device: torch.device | str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    times_larger: int = 512,
    repeats: int = 5,
    calls: int = 10,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Of one call, ours and torch's, forward alone: each the median of a few turns, which they take one by one."""
    trial = TRIALS[op]
    inputs = [_to(x, dtype, device) for x in trial.inputs(times_larger)]

    def turn(function: Callable[..., Any]) -> float:
        _synchronise(device)
        began = clock()
        for _ in range(calls):
            function(*inputs)
        _synchronise(device)
        return (clock() - began) / calls * 1e6

    with torch.no_grad():
        turns = [(turn(trial.ours), turn(trial.torchs)) for _ in range(repeats + 1)][1:]  # the first one warms up
    return statistics.median(ours for ours, _ in turns), statistics.median(torchs for _, torchs in turns)


def _synchronise(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)

"""AdamW over many tensors, in place.

    g = clip * grad
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g^2
    p = p * (1 - lr * weight_decay) - lr * (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)

"Decoupled Weight Decay Regularization", Loshchilov, Hutter 2019 (arXiv:1711.05101), algorithm 2, with the schedule
folded into lr. Arithmetic is in float32 (float64 for float64 parameters). Where skip is not 0 nothing changes. The
gradients are never modified.

| list        | dtype of each tensor                                                                          |
|-------------|-----------------------------------------------------------------------------------------------|
| params      | float64, float32, bfloat16, float16                                                           |
| grads       | that of its parameter, or float32 (accumulated so) for a 16-bit one; any strides              |
| exp_avgs    | float32; float64 for float64 parameters                                                       |
| exp_avg_sqs | the same                                                                                      |
| masters     | float32 for 16-bit parameters, None for others; the list may be left out                      |

Entry i of every list has one shape (empty is fine) and all are on one device; all but gradients are contiguous. A
16-bit parameter loses small updates to rounding, so it needs one of two things:

- a master: it takes the update, and the parameter becomes the master, rounded to nearest;
- a seed, for a bfloat16 parameter without a master: the new value is rounded up or down at random, with a probability
  proportional to its closeness to either neighbour, so that the expected value is exact.

The random bits are Philox4x32-10 ("Parallel random numbers: as easy as 1, 2, 3", Salmon et al. 2011) keyed by the seed,
on the counter (element // 8, tensor id, step): its eight 16-bit halves, low half first, serve eight neighbouring
elements. `element` is the position in row-major order plus the tensor's entry of offsets. So a shard that knows its
offset rounds as the whole tensor would, whatever the sharding and the number of threads.

Raises ValueError for anything else, before anything is written.

The kernels take all tensors in one launch, or a few, in vectors of 16 bytes of moments; single elements where a tensor
begins elsewhere than at a multiple of its vectors, and for what does not fill one. A gradient with gaps between its
elements is copied first. They can be captured in a CUDA graph: lr, step, clip and skip are then tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgpt import native
from fastgpt.ops.contract import accumulator, check_device, check_floating, dtype_name
from fastgpt.ops.registry import register

# Elements that are updated at once where a temporary is needed: it stays in the cache, and is bounded.
CHUNK = 1 << 18

_PHILOX_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_PHILOX_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_PHILOX_ROUNDS = 10
_LOW_32 = 0xFFFFFFFF
_LANES = 8  # 16-bit halves of one Philox result: elements served by it


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int | float | Tensor,
    clip: float | Tensor | None = None,
    skip: bool | Tensor | None = None,
    masters: Sequence[Tensor | None] | None = None,
    seed: int | None = None,
    offsets: Sequence[int] | None = None,
    tensor_ids: Sequence[int] | None = None,
) -> None:
    """One AdamW step on `params`, their moments and masters, in place; the module's docstring has the contract.

    lr, step, clip, skip: numbers, or 0-dim tensors on the parameters' device, which the host then never reads. step
    counts from 1. clip multiplies the gradients. seed (0 .. 2^64 - 1) turns stochastic rounding on for the bfloat16
    parameters without a master, where offsets (0 by default) are the elements that lie before a local shard in its
    whole tensor, and tensor_ids (0, 1, 2 ... by default) keep tensors apart whose steps are made by several calls.
    Raises ValueError.
    """
    params, grads, exp_avgs, exp_avg_sqs = list(params), list(grads), list(exp_avgs), list(exp_avg_sqs)
    n = len(params)
    masters = [None] * n if masters is None else list(masters)
    offsets = [0] * n if offsets is None else list(offsets)
    tensor_ids = list(range(n)) if tensor_ids is None else list(tensor_ids)
    scalars = dict(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, step=step, clip=clip, skip=skip)
    _check(params, grads, exp_avgs, exp_avg_sqs, masters, seed, offsets, tensor_ids, scalars)
    if not params:
        return
    ops = native.select(params[0], "adamw")
    update = reference if ops is None else partial(_update_by_kernels, ops)
    update(
        params, grads, exp_avgs, exp_avg_sqs, masters=masters, seed=seed, offsets=offsets, tensor_ids=tensor_ids,
        **scalars
    )  # fmt: skip
    if not torch.compiler.is_compiling():  # neither kernels nor torch's fused one tell autograd what they write
        torch.autograd.graph.increment_version(
            [*params, *exp_avgs, *exp_avg_sqs, *(m for m in masters if m is not None)]
        )


@torch.no_grad()
def reference(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int | float | Tensor,
    clip: float | Tensor | None,
    skip: bool | Tensor | None,
    masters: list[Tensor | None],
    seed: int | None,
    offsets: list[int],
    tensor_ids: list[int],
) -> None:
    """By torch's own fused AdamW: in one call for the tensors it takes as they are, by chunks for the others."""
    device = params[0].device
    count = torch.as_tensor(step, dtype=torch.float32, device=device)
    skip = None if skip is None else torch.as_tensor(skip, device=device) != 0

    def update(targets: list[Tensor], gs: list[Tensor], ms: list[Tensor], vs: list[Tensor]) -> None:
        rate = lr.float() if isinstance(lr, Tensor) and lr.is_cuda else lr  # all that the fused kernel reads there
        hyper = dict(lr=rate, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
        if torch.compiler.is_compiling():  # which cannot trace the fused kernel (its empty list for amsgrad)
            for one in zip(targets, gs, ms, vs, strict=True):
                _update_plainly(*one, **hyper, step=count, skip=skip)
            return
        found_inf = None if skip is None else skip.float()  # the fused kernel skips on exactly 1
        torch._fused_adamw_(
            targets, gs, ms, vs, [], [count] * len(targets), **hyper, amsgrad=False, maximize=False,
            grad_scale=None, found_inf=found_inf
        )  # fmt: skip

    whole: dict[torch.dtype, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}
    for i, (p, g, m, v, master) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, masters, strict=True)):
        target = p if p.dtype == m.dtype else master
        if target is not None and clip is None and g.dtype == m.dtype and g.is_contiguous():
            whole.setdefault(m.dtype, []).append((target, g, m, v))
            continue
        flat = [p.view(-1), g.reshape(-1), m.view(-1), v.view(-1), None if target is None else target.view(-1)]
        for start in range(0, p.numel(), CHUNK):
            p_, g_, m_, v_, target_ = (None if t is None else t[start : start + CHUNK] for t in flat)
            g_ = g_.to(m.dtype).contiguous() if clip is None else g_.to(m.dtype) * clip
            new = p_.to(m.dtype) if target_ is None else target_
            update([new], [g_], [m_], [v_])
            if target_ is None:
                bits = random_bits(seed, step, tensor_ids[i], offsets[i] + start, p_.numel(), device)
                p_.copy_(round_stochastically(new, bits))  # where skipped, exactly what it was
    for members in whole.values():
        update(*(list(column) for column in zip(*members, strict=True)))
    for p, master in zip(params, masters, strict=True):
        if master is not None:
            p.copy_(master if skip is None else torch.where(skip, p, master.to(p.dtype)))


def _update_plainly(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: Tensor,
    skip: Tensor | None,
) -> None:
    new_m = beta1 * m + (1 - beta1) * g
    new_v = beta2 * v + (1 - beta2) * g * g
    update = new_m / (1 - beta1**step) / ((new_v / (1 - beta2**step)).sqrt() + eps)
    for old, new in ((p, p * (1 - lr * weight_decay) - lr * update), (m, new_m), (v, new_v)):
        old.copy_(new if skip is None else torch.where(skip, old, new))


# ---- stochastic rounding ----------------------------------------------------------------------


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10 of four words of counter and two of key: unsigned 32-bit words in int64 tensors or ints."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        # A product of two words overflows int64; it wraps, and the mask takes off what the signed shift brought in.
        a, b = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (b >> 32) & _LOW_32 ^ c1 ^ k0, b & _LOW_32, (a >> 32) & _LOW_32 ^ c3 ^ k1, a & _LOW_32
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & _LOW_32, (k1 + _PHILOX_KEY_STEPS[1]) & _LOW_32
    return c0, c1, c2, c3


def random_bits(
    seed: int, step: int | float | Tensor, tensor_id: int, first: int, n: int, device: torch.device
) -> Tensor:
    """The 16 random bits of each of the elements first .. first + n - 1 of a tensor: (n,) int32 in 0 .. 65535."""
    blocks = torch.arange(first // _LANES, (first + n - 1) // _LANES + 1, dtype=torch.int64, device=device)
    count = (step.to(torch.int64) if isinstance(step, Tensor) else int(step)) & _LOW_32
    words = torch.stack(
        philox((blocks & _LOW_32, blocks >> 32, tensor_id, count), (seed & _LOW_32, seed >> 32)), dim=-1
    )  # (blocks, 4)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).view(-1)
    return halves[first % _LANES :][:n].to(torch.int32)


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """x (n,) float32 to bfloat16, away from zero where the 16 bits it loses and `bits` (n,) add up to a carry."""
    rounded = ((x.view(torch.int32) + bits) & ~0xFFFF).view(torch.float32)
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)


# ---- kernels ----------------------------------------------------------------------------------

SCHEMAS = {
    # A tensor in the place of a number is read on the device. masters: none, or one for each parameter.
    "adamw_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] masters, "
        "float lr, Tensor? lr_tensor, float beta1, float beta2, float eps, float weight_decay, "
        "float step, Tensor? step_tensor, float clip, Tensor? clip_tensor, Tensor? skip, "
        "int seed, int[] offsets, int[] tensor_ids) -> ()"
    ),
}

register(SCHEMAS, {"adamw_": lambda *arguments: None})

_READ_ON_DEVICE = (torch.float64, torch.float32, torch.int64, torch.bool)


@torch.no_grad()
def _update_by_kernels(
    ops: Any,
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int | float | Tensor,
    clip: float | Tensor | None,
    skip: bool | Tensor | None,
    masters: list[Tensor | None],
    seed: int | None,
    offsets: list[int],
    tensor_ids: list[int],
) -> None:
    if not isinstance(skip, Tensor):
        if skip:
            return
        skip = None
    clip = 1.0 if clip is None else clip
    signed_seed = 0 if seed is None else seed - (seed >> 63 << 64)  # the same 64 bits
    with_master = [i for i, master in enumerate(masters) if master is not None]
    without = [i for i, master in enumerate(masters) if master is None]
    for members in filter(None, (with_master, without)):
        lists = ([ts[i] for i in members] for ts in (params, grads, exp_avgs, exp_avg_sqs))
        ops.adamw_.default(
            *lists, [masters[i] for i in members] if members is with_master else [],
            *_number(lr), beta1, beta2, eps, weight_decay, *_number(step), *_number(clip), _readable(skip),
            signed_seed, [offsets[i] for i in members], [tensor_ids[i] for i in members],
        )  # fmt: skip


def _number(value: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, _readable(value)) if isinstance(value, Tensor) else (float(value), None)


def _readable(x: Tensor | None) -> Tensor | None:
    """x in a dtype that the kernels read."""
    return x if x is None or x.dtype in _READ_ON_DEVICE else x.to(torch.float64)


# ---- contract ---------------------------------------------------------------------------------


def _check(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor | None],
    seed: int | None,
    offsets: list[int],
    tensor_ids: list[int],
    scalars: dict[str, Any],
) -> None:
    lists = dict(grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, masters=masters, offsets=offsets,
                 tensor_ids=tensor_ids)  # fmt: skip
    for name, values in lists.items():
        if len(values) != len(params):
            raise ValueError(f"adamw_: {name} must have one entry per parameter ({len(params)}), got {len(values)}")
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**64):
        raise ValueError(f"adamw_: seed must be a whole number in 0 .. 2^64 - 1, got {seed!r}")
    for i, p in enumerate(params):
        _check_state(f"params[{i}]", p, p, None)
        check_device("adamw_", f"params[{i}]", p, "params[0]", params[0])
        wide = accumulator(p.dtype)
        _check_grad(f"grads[{i}]", grads[i], p)
        _check_state(f"exp_avgs[{i}]", exp_avgs[i], p, wide)
        _check_state(f"exp_avg_sqs[{i}]", exp_avg_sqs[i], p, wide)
        if masters[i] is not None:
            if p.dtype == wide:
                raise ValueError(f"adamw_: masters[{i}] must be None for a {dtype_name(p.dtype)} parameter")
            _check_state(f"masters[{i}]", masters[i], p, wide)
        elif p.dtype != wide and (seed is None or p.dtype != torch.bfloat16):
            remedy = "a float32 master or a seed" if p.dtype == torch.bfloat16 else "a float32 master"
            raise ValueError(f"adamw_: params[{i}] is {dtype_name(p.dtype)} and needs {remedy}, got neither")
        for name, value, limit in (("offsets", offsets[i], 2**63), ("tensor_ids", tensor_ids[i], 2**32)):
            if not isinstance(value, int) or not 0 <= value < limit:
                raise ValueError(f"adamw_: {name}[{i}] must be a whole number from 0, got {value!r}")
    for name, value in scalars.items():
        _check_scalar(name, value, params)


def _check_state(name: str, x: Any, param: Tensor, dtype: torch.dtype | None) -> None:
    """A contiguous tensor in the shape and on the device of its parameter, in `dtype` if one is given."""
    check_floating("adamw_", name, x)
    if dtype is not None and x.dtype != dtype:
        raise ValueError(
            f"adamw_: {name} must be {dtype_name(dtype)} for a {dtype_name(param.dtype)} parameter, "
            f"got {dtype_name(x.dtype)}"
        )
    _check_place(name, x, param)
    if not x.is_contiguous():
        raise ValueError(f"adamw_: {name} must be contiguous, got strides {x.stride()} for shape {tuple(x.shape)}")


def _check_grad(name: str, g: Any, param: Tensor) -> None:
    check_floating("adamw_", name, g)
    if g.dtype not in (param.dtype, accumulator(param.dtype)):
        kinds = " or ".join(dict.fromkeys(map(dtype_name, (param.dtype, accumulator(param.dtype)))))
        raise ValueError(
            f"adamw_: {name} must be {kinds} for a {dtype_name(param.dtype)} parameter, got {dtype_name(g.dtype)}"
        )
    _check_place(name, g, param)


def _check_place(name: str, x: Tensor, param: Tensor) -> None:
    if x.shape != param.shape:
        raise ValueError(
            f"adamw_: {name} must have the shape of its parameter {tuple(param.shape)}, got {tuple(x.shape)}"
        )
    check_device("adamw_", name, x, "its parameter", param)


# What a plain number may be: (lowest, below this, in words). Values in tensors are not read.
_RANGES = {
    "lr": (0.0, math.inf, "a finite number >= 0"),
    "beta1": (0.0, 1.0, "at least 0 and less than 1"),
    "beta2": (0.0, 1.0, "at least 0 and less than 1"),
    "eps": (0.0, math.inf, "a finite number >= 0"),
    "weight_decay": (0.0, math.inf, "a finite number >= 0"),
    "step": (1, 2**32, "1 or more"),
}


def _check_scalar(name: str, value: Any, params: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        if name not in ("lr", "step", "clip", "skip"):
            raise ValueError(f"adamw_: {name} must be a number, got a tensor")
        if value.dim() != 0 or value.is_complex():
            raise ValueError(
                f"adamw_: {name} must be a number or a real 0-dim tensor, got {tuple(value.shape)} {value.dtype}"
            )
        if params:
            check_device("adamw_", name, value, "the parameters", params[0])
    elif value is None:
        if name not in ("clip", "skip"):
            raise ValueError(f"adamw_: {name} must be a number, got None")
    elif not isinstance(value, (int, float)):
        raise ValueError(f"adamw_: {name} must be a number, got {type(value).__name__}")
    elif name in _RANGES:
        low, high, words = _RANGES[name]
        if not low <= value < high:
            raise ValueError(f"adamw_: {name} must be {words}, got {value!r}")

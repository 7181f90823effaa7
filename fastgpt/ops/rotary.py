"""Rotary position embedding of the query and key heads of a packed QKV projection, with an optional norm before it.

With R rotated dimensions, x = [x1 | x2 | rest], x1 and x2 R/2 wide, and the token's position t

    y1_i = x1_i cos(t f_i) - x2_i sin(t f_i)
    y2_i = x2_i cos(t f_i) + x1_i sin(t f_i)         f_i = theta^(-2i / R),  i = 0 .. R/2 - 1
    rest is kept

so dimension i is paired with i + R/2 ("half-split", as Llama has it in Hugging Face; the paper pairs 2i and 2i + 1,
which is the same up to a permutation of the projection's rows). With q_weight and k_weight each head is first
normalised: x <- x / sqrt(mean(x^2) + eps) * weight.

Contract
    qkv          (B, T, H + 2 KV, D): heads in the order [Q | K | V]; fp64, fp32, bf16 or fp16; any strides.
    cos, sin     (T_max, R / 2) fp32 (or fp64), from `rotary_tables`; R <= D.
    positions    (B, T) or (T,) int32 or int64, in 0 .. T_max - 1; 0 .. T - 1 when not given, then T <= T_max.
    q_weight, k_weight   (D,), both or none, in qkv's dtype or fp32.
    returns      (B, T, H + 2 KV, D), contiguous, in qkv's dtype: new memory, or with may_overwrite perhaps qkv's. V is
                 unchanged. Computed in fp32 (fp64 for fp64), rounded once.
    may_overwrite   the caller has no more use for qkv's values. Kernels then rotate a contiguous qkv where it is, which
                 leaves V untouched and so moves a third less (H = KV); with a norm, whose backward needs qkv, they do
                 not. Autograd knows of it: what was saved of qkv before is refused in a backward.
    a position that is not in the tables   is an IndexError on a CPU; kernels read nothing there, and the rotated
                 dimensions of that token become NaN.
    ValueError   where a shape, dtype, device or option is otherwise; the same on every device.

The kernels (csrc/rotary) are deterministic, never write the gradient from upstream, and have no second derivative.

Sources: Su et al. 2021 (RoFormer), equation 34; the norm: Henry et al. 2020, Dehghani et al. 2023; scaling "linear":
Chen et al. 2023; "llama3": Llama 3.1's published model code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import native
from fastgpt.ops import contract
from fastgpt.ops.registry import contiguous_like, nothing_like, register


def rotary(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    n_head: int,
    n_kv_head: int,
    positions: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    may_overwrite: bool = False,
) -> Tensor:
    """qkv (B, T, H + 2 KV, D) with its query and key heads rotated by cos, sin (T_max, R / 2).

    The contract is at the top of this file. Raises ValueError where it is broken.
    """
    _check(qkv, cos, sin, n_head, n_kv_head, positions, q_weight, k_weight, eps)
    ops = native.select(qkv, "rotary")
    if ops is not None:
        qkv, _, q_weight, k_weight = contract.autocast_rows(qkv, None, q_weight, k_weight)
        heads = (n_head, n_kv_head)
        return _on_kernels(ops, qkv, cos, sin, positions, q_weight, k_weight, heads, eps, may_overwrite)
    return reference(
        qkv,
        cos,
        sin,
        n_head=n_head,
        n_kv_head=n_kv_head,
        positions=positions,
        q_weight=q_weight,
        k_weight=k_weight,
        eps=eps,
    )


def reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    n_head: int,
    n_kv_head: int,
    positions: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The equations in torch. Differentiable any number of times in qkv and the weights (not in cos and sin)."""
    compute = contract.accumulator(qkv.dtype)
    if positions is None:
        cos, sin = cos[: qkv.shape[1]], sin[: qkv.shape[1]]
    else:
        cos, sin = cos[positions], sin[positions]
    # One entry for every rotated dimension, the same for all heads: (B or 1, T, 1, R).
    cos = torch.cat([cos, cos], -1).to(compute).unsqueeze(-2)
    sin = torch.cat([-sin, sin], -1).to(compute).unsqueeze(-2)
    rotated = n_head + n_kv_head
    if q_weight is None:
        rotate = _rotate if contract.transformed() else _Rotate.apply
        return rotate(qkv, cos, sin, rotated)
    q, k = qkv.to(compute)[:, :, :rotated].split([n_head, n_kv_head], 2)
    q = F.rms_norm(q, q.shape[-1:], q_weight.to(compute), eps)
    k = F.rms_norm(k, k.shape[-1:], k_weight.to(compute), eps)
    turned = _rotate(torch.cat([q, k], 2), cos, sin, rotated)
    return torch.cat([turned.to(qkv.dtype), qkv[:, :, rotated:]], 2)


def rotary_tables(
    T: int, R: int, theta: float, scaling: Any = None, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of t * f_i, each (T, R / 2) fp32 on `device`, for positions t < T.

    scaling: None, or an object with .kind and .factor; "linear" divides every f_i by factor. "llama3" also has
    .low_freq_factor, .high_freq_factor and .original_block_size, and with the wavelength w_i = 2 pi / f_i divides f_i
    where w_i > original / low, keeps it where w_i < original / high, and blends linearly in 1 / w_i between.
    Angles are computed in fp64, so the tables are exact to fp32 at any position.
    Raises ValueError where R is odd, T or theta is not positive, or the kind of scaling is unknown.
    """
    if R <= 0 or R % 2:
        raise ValueError(f"the number of rotated dimensions must be even and positive, got {R}")
    if T < 0 or not theta > 0:
        raise ValueError(f"T must be 0 or more and theta more than 0, got {T} and {theta}")
    frequency = theta ** (torch.arange(0, R, 2, dtype=torch.float64, device="cpu") / -R)
    if scaling is None or scaling.kind == "none":
        pass
    elif scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling.kind == "llama3":
        turns = scaling.original_block_size * frequency / (2 * math.pi)  # original / wavelength
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        frequency = frequency * (keep + (1.0 - keep) / scaling.factor)
    else:
        raise ValueError(f"scaling must be none, linear or llama3, got {scaling.kind!r}")
    angle = torch.arange(T, dtype=torch.float64, device="cpu")[:, None] * frequency
    cos, sin = (table.float().to(device, non_blocking=True) for table in (angle.cos(), angle.sin()))
    return cos, sin


class _Rotate(torch.autograd.Function):
    """The rotation, whose backward is the rotation the other way: no activation is kept, and any order works.

    On a CPU at the demo's shape two and a half times as fast, forward and backward, as the same by autograd in fp32.
    """

    @staticmethod
    def forward(ctx, qkv, cos, sin, heads):
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        return _rotate_into_new(qkv, cos, sin, heads)

    @staticmethod
    def backward(ctx, d_out):
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(d_out, cos, -sin, ctx.heads), None, None, None


def _rotate_into_new(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """The first `heads` heads rotated, the others copied. cos, sin (B or 1, T, 1, R), sin with each half's sign."""
    R = cos.shape[-1]
    out = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    out[:, :, heads:] = qkv[:, :, heads:]
    out[:, :, :heads, R:] = qkv[:, :, :heads, R:]
    x = qkv[:, :, :heads, :R].to(cos.dtype)
    swapped = torch.cat([x[..., R // 2 :], x[..., : R // 2]], -1)
    out[:, :, :heads, :R] = swapped.mul_(sin).addcmul_(x, cos)
    return out


def _rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """`_rotate_into_new` in differentiable steps."""
    R = cos.shape[-1]
    turning = qkv[:, :, :heads]
    x = turning[..., :R].to(cos.dtype)
    swapped = torch.cat([x[..., R // 2 :], x[..., : R // 2]], -1)
    turned = (swapped * sin + x * cos).to(qkv.dtype)
    return torch.cat([torch.cat([turned, turning[..., R:]], -1), qkv[:, :, heads:]], 2)


def _check(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_head: int,
    n_kv_head: int,
    positions: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> None:
    contract.check_floating("rotary", "qkv", qkv)
    if n_head < 1 or n_kv_head < 1 or n_head % n_kv_head:
        raise ValueError(f"rotary: n_head must be a positive multiple of n_kv_head, got {n_head} and {n_kv_head}")
    if qkv.dim() != 4 or qkv.shape[2] != n_head + 2 * n_kv_head:
        raise ValueError(f"rotary: qkv must be (B, T, {n_head + 2 * n_kv_head}, D), got {tuple(qkv.shape)}")
    (_, T, _, D) = qkv.shape
    for name, given in (("cos", cos), ("sin", sin), ("positions", positions)):
        if given is not None or name != "positions":
            contract.check_tensor("rotary", name, given)
    if cos.dim() != 2 or cos.shape != sin.shape or not 1 <= cos.shape[1] <= D // 2:
        raise ValueError(
            f"rotary: cos and sin must both be (T_max, R / 2) with R <= {D}, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"rotary: {name} must be float32 or float64, got {table.dtype}")
        contract.check_device("rotary", name, table, "qkv", qkv)
    if positions is None:
        if cos.shape[0] < T:
            raise ValueError(f"rotary: cos and sin hold {cos.shape[0]} positions, but qkv has {T} tokens")
    else:
        if positions.shape not in (qkv.shape[:2], qkv.shape[1:2]) or positions.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"rotary: positions must be (B, T) or (T,) int32 or int64 for qkv {tuple(qkv.shape)}, "
                f"got {tuple(positions.shape)} {positions.dtype}"
            )
        contract.check_device("rotary", "positions", positions, "qkv", qkv)
    if (q_weight is None) != (k_weight is None):
        raise ValueError("rotary: q_weight and k_weight must be given together")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            contract.check_channel_weight("rotary", name, weight, qkv)
    contract.check_eps("rotary", eps)


# ---- kernels -------------------------------------------------------------------------------------------


SCHEMAS = {
    "rotary_forward": (
        "(Tensor qkv, Tensor cos, Tensor sin, Tensor? positions, int n_head, int n_kv_head) -> Tensor y"
    ),
    "rotary_forward_": ("(Tensor(a!) qkv, Tensor cos, Tensor sin, Tensor? positions, int n_head, int n_kv_head) -> ()"),
    "rotary_backward": (
        "(Tensor d_y, Tensor cos, Tensor sin, Tensor? positions, int n_head, int n_kv_head) -> Tensor d_qkv"
    ),
    "rotary_norm_forward": (
        "(Tensor qkv, Tensor cos, Tensor sin, Tensor? positions, Tensor q_weight, Tensor k_weight, int n_head, "
        "int n_kv_head, float eps) -> Tensor y"
    ),
    # What is not needed is empty.
    "rotary_norm_backward": (
        "(Tensor d_y, Tensor qkv, Tensor cos, Tensor sin, Tensor? positions, Tensor q_weight, Tensor k_weight, "
        "int n_head, int n_kv_head, float eps, bool need_qkv, bool need_weights) "
        "-> (Tensor d_qkv, Tensor d_q_weight, Tensor d_k_weight)"
    ),
}


def _fake_norm_backward(
    d_y: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    n_head: int,
    n_kv_head: int,
    eps: float,
    need_qkv: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        contiguous_like(qkv) if need_qkv else nothing_like(qkv),
        contiguous_like(q_weight) if need_weights else nothing_like(q_weight),
        contiguous_like(k_weight) if need_weights else nothing_like(k_weight),
    )


register(
    SCHEMAS,
    {
        "rotary_forward": lambda qkv, *_: contiguous_like(qkv),
        "rotary_forward_": lambda qkv, *_: None,
        "rotary_backward": lambda d_y, *_: contiguous_like(d_y),
        "rotary_norm_forward": lambda qkv, *_: contiguous_like(qkv),
        "rotary_norm_backward": _fake_norm_backward,
    },
)


def _on_kernels(
    ops: Any,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    heads: tuple[int, int],
    eps: float,
    may_overwrite: bool,
) -> Tensor:
    compute = contract.accumulator(qkv.dtype)
    at = (cos.to(compute), sin.to(compute), positions)
    if q_weight is not None and k_weight is not None:
        if contract.needs_gradient(qkv, q_weight, k_weight):
            return _NormKernels.apply(ops, qkv, *at, q_weight, k_weight, *heads, eps)
        return ops.rotary_norm_forward.default(qkv, *at, q_weight, k_weight, *heads, eps)
    memory = _memory_of(qkv) if may_overwrite else None
    if memory is not None:
        return _InPlace.apply(ops, memory, qkv.shape, *at, *heads).view(qkv.shape)
    if contract.needs_gradient(qkv):
        return _Kernels.apply(ops, qkv, *at, *heads)
    return ops.rotary_forward.default(qkv, *at, *heads)


def _memory_of(qkv: Tensor) -> Tensor | None:
    """The tensor to change in place for a new qkv; None where there is none.

    Not qkv itself if it is a view of another: autograd would copy the whole gradient three times in the backward. But
    then the other must be all of it, as the output of a linear layer is.
    """
    if torch.compiler.is_compiling() or not qkv.is_contiguous():  # a compiler plans its memory by itself
        return None
    memory = qkv._base if qkv._is_view() and qkv._base is not None else qkv
    whole = memory.numel() == qkv.numel() and memory.is_contiguous()
    return None if not whole or memory.dtype != qkv.dtype or (memory.is_leaf and memory.requires_grad) else memory


class _Kernels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ops: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        n_head: int,
        n_kv_head: int,
    ) -> Tensor:
        ctx.save_for_backward(cos, sin, positions)
        ctx.ops, ctx.heads = ops, (n_head, n_kv_head)
        return ops.rotary_forward.default(qkv, cos, sin, positions, n_head, n_kv_head)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        contract.refuse_double_backward("rotary")
        return None, ctx.ops.rotary_backward.default(d_y, *ctx.saved_tensors, *ctx.heads), *(None,) * 5


class _InPlace(torch.autograd.Function):
    """Of memory that holds qkv, whatever its shape."""

    @staticmethod
    def forward(
        ctx: Any,
        ops: Any,
        memory: Tensor,
        shape: torch.Size,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        n_head: int,
        n_kv_head: int,
    ) -> Tensor:
        ops.rotary_forward_.default(memory.view(shape), cos, sin, positions, n_head, n_kv_head)
        ctx.mark_dirty(memory)
        ctx.save_for_backward(cos, sin, positions)
        ctx.ops, ctx.shape, ctx.heads = ops, shape, (n_head, n_kv_head)
        return memory

    @staticmethod
    def backward(ctx: Any, d_memory: Tensor) -> tuple[Tensor | None, ...]:
        contract.refuse_double_backward("rotary")
        d_y = d_memory.reshape(ctx.shape)
        d_qkv = ctx.ops.rotary_backward.default(d_y, *ctx.saved_tensors, *ctx.heads)
        return None, d_qkv.view(d_memory.shape), *(None,) * 6


class _NormKernels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ops: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        q_weight: Tensor,
        k_weight: Tensor,
        n_head: int,
        n_kv_head: int,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(qkv, cos, sin, positions, q_weight, k_weight)
        ctx.ops, ctx.options = ops, (n_head, n_kv_head, eps)
        return ops.rotary_norm_forward.default(qkv, cos, sin, positions, q_weight, k_weight, *ctx.options)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        contract.refuse_double_backward("rotary")
        need_qkv, need_q, need_k = (ctx.needs_input_grad[i] for i in (1, 5, 6))
        d_qkv, d_q, d_k = ctx.ops.rotary_norm_backward.default(
            d_y, *ctx.saved_tensors, *ctx.options, need_qkv, need_q or need_k
        )
        return (
            None,
            d_qkv if need_qkv else None,
            *(None,) * 3,
            d_q if need_q else None,
            d_k if need_k else None,
            *(None,) * 3,
        )

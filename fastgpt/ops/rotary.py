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
    returns      (B, T, H + 2 KV, D), contiguous, in qkv's dtype: new memory. V is unchanged. Computed in fp32 (fp64 for
                 fp64), rounded once.
    ValueError   where a shape, dtype, device or option is otherwise; the same on every device.

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
) -> Tensor:
    """qkv (B, T, H + 2 KV, D) with its query and key heads rotated by cos, sin (T_max, R / 2).

    The contract is at the top of this file. Raises ValueError where it is broken.
    """
    _check(qkv, cos, sin, n_head, n_kv_head, positions, q_weight, k_weight, eps)
    native.select(qkv, "rotary")
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

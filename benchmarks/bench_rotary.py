"""rotary of a packed QKV, with and without the norm of queries and keys, beside torch eager, torch.compile and Liger.

    python benchmarks/bench_rotary.py [--seconds 150] [--only "in place 2304"] [--out FILE.json]

operations.py says how it is measured, cases/rotary.py what the fewest bytes are. Rows are tokens, in sequences of up to
1,024; columns (H + 2 KV) D, as in GPT-2 (12 heads of 64) and in Llama-like models. "in place" is the forward of rotary
where the caller has no more use for its input: value heads are not touched. Liger's rotates queries and keys in place
too, from tensors of their own, without norm, and stands beside that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from cases import rotary as entries
from operations import DIRECTIONS, OURS, Case, Functions, compiled, contenders, least_of, main, normal, of_liger
from torch import Tensor

from fastgpt import ops

LONGEST = 1024  # tokens of a sequence
EPS = 1e-6
DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Heads:
    """H query heads and KV key and value heads of D each."""

    H: int
    KV: int
    D: int

    @property
    def columns(self) -> int:
        return (self.H + 2 * self.KV) * self.D


SHAPES = (Heads(12, 12, 64), Heads(32, 8, 64), Heads(32, 8, 128))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    cos, sin = (table[: x.shape[1], None] for table in (cos, sin))
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def functions(op: str, heads: Heads, in_place: bool) -> Functions:
    """Of qkv (B, T, H + 2 KV, D), with the norm also q_weight and k_weight (D,), then cos and sin (T, D / 2)."""
    H, KV = heads.H, heads.KV

    def rotary(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.cat([turned(qkv[:, :, : H + KV], cos, sin), qkv[:, :, H + KV :]], 2)

    def rotary_norm(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = qkv.split([H, KV, KV], 2)
        q, k = (F.rms_norm(x, w.shape, w, EPS) for x, w in ((q, q_weight), (k, k_weight)))
        return torch.cat([turned(torch.cat([q, k], 2), cos, sin), v], 2)

    def ours(qkv: Tensor, *rest: Tensor) -> Tensor:
        *weights, cos, sin = rest
        named = dict(zip(("q_weight", "k_weight"), weights, strict=False))
        return ops.rotary(qkv, cos, sin, n_head=H, n_kv_head=KV, eps=EPS, may_overwrite=in_place, **named)

    eager = {"rotary": rotary, "rotary_norm": rotary_norm}[op]
    return {OURS: lambda: ours, "eager": lambda: eager, "compile": lambda: compiled(eager)}


def by_liger() -> Callable[..., Any]:
    """Of q and k as Liger wants them, (B, heads, T, D) with tokens before heads in memory."""
    theirs = of_liger("liger_rope")
    return lambda q, k, cos, sin: theirs(q.transpose(1, 2), k.transpose(1, 2), cos, sin)


def case(op: str, direction: str, heads: Heads, dtype: torch.dtype) -> Case:
    H, KV, D = heads.H, heads.KV, heads.D
    in_place = direction == "in place"
    way = "forward" if in_place else direction

    def shape(rows: int) -> tuple[int, int]:
        T = min(rows, LONGEST)
        return rows // T, T

    def least_bytes(rows: int) -> int:
        B, T = shape(rows)
        entry = f"{op}_forward_" if in_place else f"{op}_{direction}"
        return least_of(entries.of(T, H, KV, D, dtype, B=B, norm=op == "rotary_norm"), entry)

    def inputs(device: str, rows: int) -> tuple[list[Tensor], list[Tensor]]:
        B, T = shape(rows)
        qkv = normal(B, T, H + 2 * KV, D, dtype=dtype, device=device)
        weights = [normal(D, dtype=dtype, device=device, seed=s) for s in (1, 2)] if op == "rotary_norm" else []
        return [qkv, *weights], list(ops.rotary_tables(T, D, 10000.0, device=device))

    def queries_and_keys(device: str, rows: int) -> tuple[list[Tensor], list[Tensor]]:
        B, T = shape(rows)
        leaves = [normal(B, T, heads, D, dtype=dtype, device=device, seed=heads) for heads in (H, KV)]
        tables = ops.rotary_tables(T, D, 10000.0, device=device)
        return leaves, [torch.cat([table, table], -1).to(dtype)[None] for table in tables]

    found = contenders(functions(op, heads, in_place), way, inputs)
    if in_place:
        found |= contenders({"liger": by_liger}, way, queries_and_keys)
    return Case(op, direction, heads.columns, dtype, least_bytes, found)


def cases() -> list[Case]:
    return [
        case(op, direction, heads, dtype)
        for dtype in DTYPES
        for heads in SHAPES
        for op, directions in (("rotary", ("in place", *DIRECTIONS)), ("rotary_norm", tuple(DIRECTIONS)))
        for direction in directions
    ]


if __name__ == "__main__":
    sys.exit(main(cases(), (__doc__ or "").split("\n")[0]))

"""attention: the generic path in each tile, with rows, columns and widths that do not fill it, documents, and blocks
that come to a second tile; decoding of one row and of many, split and whole; tensor cores in each tile, likewise, with
blocks that come to further tiles of keys and of queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt import ops
from tests.mutation.mutants import Scenario
from tests.rule import outputs_and_gradients, randn


def attention(T: int, heads: tuple[int, int], D: int, dtype: torch.dtype, *, cut: int | None = None) -> Scenario:
    """Forward and backward, of two documents or of the last T - 3 tokens against all."""

    def run() -> list[Tensor]:
        q, k, v = (randn(1, T, h, D, dtype=dtype, seed=h) for h in (heads[0], heads[1], heads[1]))
        options = {}
        if cut is None:
            q = q[:, 3:]
        else:
            bounds = ops.document_bounds(torch.tensor([0, cut]), 1, T)
            options = dict(zip(("doc_start", "doc_end"), bounds, strict=True))
        return outputs_and_gradients(lambda *t: ops.attention(*t, return_lse=True, **options), [q, k, v])

    return Scenario(f"attention of {T} tokens, {heads} heads of {D} in {dtype}", run, chip="sm_75")


def decoding(Tq: int, Tk: int, heads: tuple[int, int], D: int, dtype: torch.dtype) -> Scenario:
    def run() -> list[Tensor]:
        q = randn(1, Tq, heads[0], D, dtype=dtype)
        k, v = (randn(1, Tk, heads[1], D, dtype=dtype, seed=seed) for seed in (1, 2))
        with torch.no_grad():
            return list(ops.attention(q, k, v, return_lse=True))

    return Scenario(f"decoding of {Tq} over {Tk}, {heads} heads of {D} in {dtype}", run)


def tensor_cores(
    T: int, heads: tuple[int, int], D: int, *, chip: str = "sm_80", batches: int = 1, documents: int = 0
) -> Scenario:
    """Forward and backward of the last T - 3 tokens against all, or on documents."""

    def run() -> list[Tensor]:
        q, k, v = (randn(batches, T, h, D, dtype=torch.bfloat16, seed=h) for h in (heads[0], heads[1], heads[1]))
        options = {}
        if documents:
            bounds = ops.document_bounds(torch.arange(0, T, documents), batches, T)
            options = dict(zip(("doc_start", "doc_end"), bounds, strict=True))
        else:
            q = q[:, 3:]
        return outputs_and_gradients(lambda *t: ops.attention(*t, return_lse=True, **options), [q, k, v])

    what = "documents" if documents else "tokens"
    return Scenario(f"attention of {batches} x {T} {what} on tensor cores, {heads} heads of {D}, {chip}", run, chip)


def hopper(
    T: int,
    heads: tuple[int, int],
    D: int,
    *,
    more_keys: int = 0,
    documents: tuple[int, ...] = (),
    late: int = 0,
    early: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    backward: bool = False,
    **masks: Any,
) -> Scenario:
    """The forward of T tokens, or with the backward, against these and `more_keys` before them, or on documents that
    begin there; the first `late` tokens see no more than the end, or the first `early` ones the beginning and the
    others the end."""

    def run() -> list[Tensor]:
        q = randn(1, T, heads[0], D, dtype=dtype)
        k, v = (randn(1, T + more_keys, heads[1], D, dtype=dtype, seed=seed) for seed in (1, 2))
        options = dict(masks)
        if documents:
            start, end = ops.document_bounds(torch.tensor([*documents, T]), 1, T)
            start[:, :late] = T - 64
            if early:
                end[:, :early], start[:, early:] = 64, T - 200
            options |= dict(doc_start=start, doc_end=end)
        if backward:
            return outputs_and_gradients(lambda *t: ops.attention(*t, return_lse=True, **options), [q, k, v])
        with torch.no_grad():
            return list(ops.attention(q, k, v, return_lse=True, **options))

    what = f"documents from {documents}" if documents else f"{more_keys} more keys"
    return Scenario(f"attention of {T} tokens on Hopper, {what}, {heads} heads of {D}, {masks}", run)


SCENARIOS = [
    attention(70, (2, 1), 5, torch.bfloat16),
    attention(9, (1, 1), 70, torch.float32),  # two steps of the products, two chunks of a result
    attention(97, (1, 1), 3, torch.float64, cut=32),  # tiles of queries that a tile of keys passes over
    decoding(1, 70, (1, 1), 24, torch.bfloat16),
    decoding(3, 513, (3, 1), 8, torch.float32),  # two splits, two groups of rows
    tensor_cores(80, (1, 1), 56),
    tensor_cores(80, (1, 1), 88),
    tensor_cores(40, (2, 1), 120),
    tensor_cores(70, (1, 1), 120, chip="sm_86"),
    tensor_cores(70, (1, 1), 88, chip="sm_86"),
    tensor_cores(140, (1, 1), 8, batches=8),  # one block for each head, and two tiles of keys
    tensor_cores(140, (1, 1), 8, batches=8, documents=70),
    tensor_cores(40, (1, 1), 120, chip="sm_86", documents=10),
    # Half a tile; a warpgroup without queries; blocks that come to a third tile before the first one is finished.
    hopper(20, (6, 1), 8, more_keys=3, backward=True),
    hopper(140, (2, 1), 8, more_keys=-132),  # a tile of queries that see nothing
    hopper(100, (1, 1), 72, more_keys=330),  # whole tiles, a ring that comes round, half a tile at the end
    hopper(140, (2, 1), 120, more_keys=400, window=150, dtype=torch.float16),
    # One warpgroup is done, after half a tile, two, one and a half, or has not begun, and the other one goes on.
    hopper(700, (1, 1), 8, documents=(0, 64), causal=False),  # so long that an arrival too many is one phase too many
    hopper(700, (1, 1), 8, documents=(0, 100, 320), causal=False),
    hopper(700, (1, 1), 8, documents=(0, 192), causal=False),
    hopper(512, (1, 1), 8, documents=(0, 448)),
    hopper(500, (1, 1), 16, documents=(0,), late=64, causal=False),
    hopper(600, (1, 1), 8, documents=(0,), early=64, causal=False),  # both leave tiles out
    # Two blocks for a head, which come to two tiles of keys; one block, and a tile that nobody sees.
    hopper(390, (2, 1), 8, backward=True),
    hopper(140, (2, 2), 72, more_keys=400, window=150, dtype=torch.float16, backward=True),
    hopper(300, (1, 1), 24, documents=(0, 100), backward=True),
    hopper(140, (1, 1), 120, documents=(0, 30), backward=True),
]

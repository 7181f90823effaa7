"""attention, forward and backward, beside PyTorch's: FlashAttention 2, cuDNN, and with a mask the memory-efficient one.

    python benchmarks/bench_attention.py [--seconds 150] [--only "forward causal"] [--out FILE.json]

operations.py says how it is measured. Heads are those of GPT-2 (12 of 64) and of Llama 3 8B (32 of 128, which share 8
of keys and values); there are 32,768 tokens, in sequences of T. FLOPs are those of the pairs that the masks leave, two
matrix products forward and five backward. "decode" is one query for each of 16 sequences over a full cache: there the
bytes of the cache count. On the emulator it is 128 tokens, or a cache of 1,024, and the heads of one key/value head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from cases.attention import least_bytes
from operations import DIRECTIONS, EMULATED_ROWS, OURS, Case, main, normal
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt import ops

BF16 = torch.bfloat16
HEADS = {64: (12, 12), 128: (32, 8)}  # width: query heads, key/value heads
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
CACHES = (2048, 8192, 32768)
DECODED = 16  # sequences
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees, and how often."""

    name: str
    causal: bool = True
    window: int | None = None
    document: int | None = None
    """Tokens of each document."""

    def pairs(self, T: int) -> int:
        """Of queries and keys in a sequence."""
        if not self.causal:
            return T * T
        reach = min(T, self.document or T, T if self.window is None else self.window + 1)
        if self.document:
            return T // reach * reach * (reach + 1) // 2
        return reach * (reach + 1) // 2 + (T - reach) * reach

    def options(self, B: int, T: int, device: str) -> dict[str, Any]:
        """For `ops.attention`."""
        found: dict[str, Any] = dict(causal=self.causal, window=self.window)
        if self.document:
            bounds = torch.arange(0, B * T + 1, min(self.document, T), dtype=torch.int32, device=device)
            found["doc_start"], found["doc_end"] = ops.document_bounds(bounds, B, T)
        return found

    def matrix(self, T: int, device: str) -> Tensor | None:
        """(T, T) bool for PyTorch; None where it needs none."""
        if self.window is None and self.document is None:
            return None
        query, key = torch.arange(T, device=device)[:, None], torch.arange(T, device=device)
        seen = key <= query
        if self.window is not None:
            seen = seen & (key >= query - self.window)
        return seen & (key // self.document == query // self.document) if self.document else seen


CAUSAL = Mask("causal")
OTHERS = (Mask("full", causal=False), Mask("window 1024", window=1024), Mask("documents of 1024", document=1024))


def heads_of(D: int, rows: int) -> tuple[int, int]:
    """Query heads, and those of keys and values; on the emulator those of one key/value head."""
    H, KV = HEADS[D]
    return (H // KV, 1) if rows <= EMULATED_ROWS else (H, KV)


def sdpa(backend: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    with sdpa_kernel(BACKENDS[backend]):
        o = F.scaled_dot_product_attention(*heads_first, enable_gqa=q.shape[2] != k.shape[2], **options)
    return o.transpose(1, 2)


def training(direction: str, mask: Mask, T: int, D: int) -> Case:
    def shape(rows: int) -> tuple[int, int, int, int]:
        return max(1, rows // T), min(rows, T), *heads_of(D, rows)

    def contender(name: str) -> Callable[[str, int], Callable[[], Any]]:
        def make(device: str, rows: int) -> Callable[[], Any]:
            B, length, H, KV = shape(rows)
            # views of one projection, as in the model
            packed = normal(B, length, H + 2 * KV, D, dtype=BF16, device=device)
            views = list(packed.split([H, KV, KV], 2))
            if name == OURS:
                options = mask.options(B, length, device)
                return DIRECTIONS[direction](lambda q, k, v: ops.attention(q, k, v, **options), views)
            matrix = mask.matrix(length, device)
            given = dict(is_causal=mask.causal) if matrix is None else dict(attn_mask=matrix)
            return DIRECTIONS[direction](lambda q, k, v: sdpa(name, q, k, v, **given), views)

        return make

    def fewest(rows: int) -> int:
        B, length, H, KV = shape(rows)
        return least_bytes(direction, B, length, length, H, KV, D, BF16)

    def flops(rows: int) -> int:
        B, length, H, _ = shape(rows)
        return (4 if direction == "forward" else 10) * B * H * D * mask.pairs(length)

    masked = mask.window is not None or mask.document is not None
    names = (OURS, "efficient") if masked else (OURS, "flash", "cudnn")
    H, KV = HEADS[D]
    what = f"{mask.name}, T {T}, {H} + {KV} heads of {D}"
    return Case("attention", direction, D, BF16, fewest, {n: contender(n) for n in names}, what, flops)


def decoding(cache: int, D: int) -> Case:
    def shape(rows: int) -> tuple[int, int, int, int]:
        return DECODED if rows > EMULATED_ROWS else 1, min(cache, 8 * rows), *heads_of(D, rows)

    def contender(name: str) -> Callable[[str, int], Callable[[], Any]]:
        def make(device: str, rows: int) -> Callable[[], Any]:
            B, room, H, KV = shape(rows)
            q = normal(B, 1, H, D, dtype=BF16, device=device)
            k, v = (normal(B, room, KV, D, dtype=BF16, device=device, seed=seed) for seed in (1, 2))
            if name != OURS:
                return DIRECTIONS["forward"](lambda *t: sdpa(name, *t), [q, k, v])
            lengths = torch.full((B,), room, dtype=torch.int32, device=device)
            return DIRECTIONS["forward"](lambda *t: ops.attention(*t, kv_lengths=lengths), [q, k, v])

        return make

    def fewest(rows: int) -> int:
        B, room, H, KV = shape(rows)
        return least_bytes("forward", B, 1, room, H, KV, D, BF16)

    H, KV = HEADS[D]
    what = f"{DECODED} x 1 over {cache}, {H} + {KV} heads of {D}"
    names = (OURS, "flash", "cudnn")
    return Case("attention", "decode", D, BF16, fewest, {n: contender(n) for n in names}, what)


def cases() -> list[Case]:
    found = [training(direction, CAUSAL, T, D) for T in LENGTHS for D in HEADS for direction in DIRECTIONS]
    found += [decoding(cache, D) for cache in CACHES for D in HEADS]
    return found + [training(direction, mask, 8192, D) for mask in OTHERS for D in HEADS for direction in DIRECTIONS]


if __name__ == "__main__":
    sys.exit(main(cases(), (__doc__ or "").split("\n")[0]))

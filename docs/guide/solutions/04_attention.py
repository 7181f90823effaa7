"""Exercise 4: attention with grouped heads and a sliding window."""

import math

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention in which query heads share key/value heads and no query sees far back.

    q:      (B, T, H, D).
    k, v:   (B, T, KV, D), with H a multiple of KV. Query head h reads key/value head h // (H / KV): with four query
            heads and two others, query heads 0 and 1 read head 0, and 2 and 3 read head 1.
    window: a query at position i sees the keys j with i - window <= j <= i: itself, and `window` before it.

    The score of query i for key j is q_i . k_j / sqrt(D). Returns (B, T, H, D).

    To be written with torch's elementary operations (matmul or einsum, masked_fill, softmax, repeat_interleave), not
    with a ready-made attention.
    """
    T, H, D = q.shape[1:]
    group = H // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(D)
    i, j = torch.arange(T)[:, None], torch.arange(T)
    seen = (j <= i) & (j >= i - window)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)

"""Documents packed into one batch: from `cu_seqlens` to the bounds that attention masks with.

Tokens of several documents share the B rows of T tokens of a batch. `cu_seqlens`, the way varlen attention is
called everywhere, holds the documents' bounds in the B * T tokens taken row after row. Kernels want two fixed shapes
instead: for every token the first position of its document in its row and the position after the last,

    token t of row b sees key j of row b  iff  doc_start[b, t] <= j < doc_end[b, t]      (and the causal mask)
    position of token t in its document    =  t - doc_start[b, t]

A row's start always begins a document: what continues from the row before cannot be seen from here. Everything runs
on the tensors' device, with shapes that do not depend on values: no host synchronisation, safe in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = (torch.int32, torch.int64)


def document_bounds(cu_seqlens: Tensor, B: int, T: int) -> tuple[Tensor, Tensor]:
    """(doc_start, doc_end), each (B, T) int32, from the bounds of documents in the flattened B * T tokens.

    cu_seqlens: (n,) int32 or int64, non-decreasing. 0 and B * T may be left out; repeated values (documents without
    tokens, or padding to a fixed length) are harmless.
    Raises ValueError where cu_seqlens is no 1-D integer tensor, or B or T is negative.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in _INTEGERS:
        raise ValueError(
            f"cu_seqlens must be (documents + 1,) int32 or int64, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    if B < 0 or T < 0:
        raise ValueError(f"B and T must not be negative, got {B} and {T}")
    bounds = cu_seqlens.long()
    bounds = torch.cat([bounds.new_zeros(1), bounds, bounds.new_full((1,), B * T)])
    token = torch.arange(B * T, device=bounds.device)
    after = torch.searchsorted(bounds, token, right=True).clamp_(max=bounds.numel() - 1)  # the first bound past it
    row = torch.arange(B, device=bounds.device)[:, None] * T
    start = (bounds[after - 1].view(B, T) - row).clamp_(min=0)
    end = (bounds[after].view(B, T) - row).clamp_(max=T)
    return start.int(), end.int()


def cu_seqlens_from_lengths(lengths: Tensor) -> Tensor:
    """(n + 1,) int32 bounds of n documents that follow each other, from their lengths (n,)."""
    if lengths.dim() != 1 or lengths.dtype not in _INTEGERS:
        raise ValueError(f"lengths must be (n,) int32 or int64, got {tuple(lengths.shape)} {lengths.dtype}")
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=lengths.dtype)]).int()


def bounds_from_document_ids(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(doc_start, doc_end), each (B, T) int32, from ids (B, T): tokens next to each other with one id are a document.

    The document ids may be any integers; 0 0 1 1 1 0 is three documents.
    """
    if ids.dim() != 2 or ids.dtype not in _INTEGERS:
        raise ValueError(f"document ids must be (B, T) int32 or int64, got {tuple(ids.shape)} {ids.dtype}")
    return _bounds_from_first(torch.cat([torch.ones_like(ids[:, :1]), ids[:, 1:] - ids[:, :-1]], 1) != 0)


def bounds_from_end_of_text(idx: Tensor, end_of_text: int) -> tuple[Tensor, Tensor]:
    """(doc_start, doc_end), each (B, T) int32, from token ids (B, T) in which `end_of_text` closes a document."""
    if idx.dim() != 2 or idx.dtype not in _INTEGERS:
        raise ValueError(f"token ids must be (B, T) int32 or int64, got {tuple(idx.shape)} {idx.dtype}")
    closes = idx == end_of_text
    return _bounds_from_first(torch.cat([torch.ones_like(closes[:, :1]), closes[:, :-1]], 1))


def _bounds_from_first(first: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds from a (B, T) mask of the tokens that begin a document; a row's first token always does."""
    B, T = first.shape
    if T == 0:
        empty = torch.zeros(B, 0, dtype=torch.int32, device=first.device)
        return empty, empty.clone()
    t = torch.arange(T, device=first.device).expand(B, T)
    start = torch.where(first, t, 0).cummax(1).values
    # The next beginning to the right of a token, read from right to left; T where there is none.
    begins = torch.cat([torch.where(first, t, T)[:, 1:], t.new_full((B, 1), T)], 1)
    end = begins.flip(1).cummin(1).values.flip(1)
    return start.int(), end.int()

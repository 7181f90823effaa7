"""Bounds of packed documents against a loop over them."""

import pytest
import torch

from fastgpt.ops import document_bounds
from fastgpt.ops.documents import bounds_from_document_ids, bounds_from_end_of_text, cu_seqlens_from_lengths

CASES = (
    ([0, 12], 3, 4),
    ([0, 3, 7, 12], 3, 4),
    ([0, 3, 3, 3, 7, 12, 12], 3, 4),  # documents without tokens, and at the end
    ([0, 0, 12], 3, 4),
    ([3, 7], 3, 4),  # the outer bounds left out
    ([], 3, 4),
    ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], 3, 4),
    ([0, 1], 1, 1),
    ([0], 0, 4),
    ([0], 2, 0),
)


def by_loop(bounds: list[int], B: int, T: int) -> tuple[list, list]:
    cuts = {0, B * T, *bounds, *range(0, B * T + 1, max(T, 1))}
    start = [[max(c for c in cuts if c <= b * T + t) - b * T for t in range(T)] for b in range(B)]
    end = [[min(c for c in cuts if c > b * T + t) - b * T for t in range(T)] for b in range(B)]
    return start, end


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bounds(device, case, dtype):
    bounds, B, T = case
    start, end = document_bounds(torch.tensor(bounds, dtype=dtype, device=device), B, T)
    assert start.dtype == end.dtype == torch.int32
    assert start.shape == end.shape == (B, T)
    assert (start.tolist(), end.tolist()) == by_loop(bounds, B, T)


def test_padding_cu_seqlens_to_a_fixed_length_changes_nothing(device):
    short = torch.tensor([0, 3, 7, 12], device=device)
    padded = torch.cat([short, short.new_full((5,), 12)])
    for a, b in zip(document_bounds(short, 3, 4), document_bounds(padded, 3, 4), strict=True):
        assert torch.equal(a, b)


def test_no_value_is_read(device):
    for t in document_bounds(torch.empty(4, dtype=torch.int32, device="meta"), 3, 4):
        assert (t.shape, t.dtype, t.device.type) == ((3, 4), torch.int32, "meta")
    compiled = torch.compile(document_bounds, fullgraph=True, backend="aot_eager")
    cu_seqlens = torch.tensor([0, 3, 7, 12], device=device)
    for a, b in zip(compiled(cu_seqlens, 3, 4), document_bounds(cu_seqlens, 3, 4), strict=True):
        assert torch.equal(a, b)


def test_from_lengths(device):
    got = cu_seqlens_from_lengths(torch.tensor([3, 0, 4], device=device))
    assert got.tolist() == [0, 3, 3, 7]
    assert got.dtype == torch.int32
    assert cu_seqlens_from_lengths(torch.tensor([], dtype=torch.int64, device=device)).tolist() == [0]


def test_from_document_ids(device):
    ids = torch.tensor([[7, 7, 3, 3, 3, 7], [7, 7, 7, 7, 7, 7], [1, 2, 3, 4, 5, 6]], device=device)
    start, end = bounds_from_document_ids(ids)
    assert start.tolist() == [[0, 0, 2, 2, 2, 5], [0] * 6, [0, 1, 2, 3, 4, 5]]
    assert end.tolist() == [[2, 2, 5, 5, 5, 6], [6] * 6, [1, 2, 3, 4, 5, 6]]
    assert start.dtype == end.dtype == torch.int32


def test_from_end_of_text(device):
    idx = torch.tensor([[5, 0, 6, 6, 0, 0], [0, 1, 1, 1, 1, 1]], device=device)
    start, end = bounds_from_end_of_text(idx, 0)
    assert start.tolist() == [[0, 0, 2, 2, 2, 5], [0, 1, 1, 1, 1, 1]]
    assert end.tolist() == [[2, 2, 5, 5, 5, 6], [1, 6, 6, 6, 6, 6]]


@pytest.mark.parametrize("T", (0, 1))
def test_short_rows(device, T):
    ids = torch.zeros(2, T, dtype=torch.int64, device=device)
    for start, end in (bounds_from_document_ids(ids), bounds_from_end_of_text(ids, 0)):
        assert start.tolist() == [[0] * T] * 2
        assert end.tolist() == [[1] * T] * 2


def test_refusals():
    for where in ("cpu", "meta"):
        with pytest.raises(ValueError, match="cu_seqlens must be"):
            document_bounds(torch.zeros(3, device=where), 1, 3)
        with pytest.raises(ValueError, match="cu_seqlens must be"):
            document_bounds(torch.zeros(1, 3, dtype=torch.int32, device=where), 1, 3)
        with pytest.raises(ValueError, match="must not be negative"):
            document_bounds(torch.zeros(3, dtype=torch.int32, device=where), -1, 3)
        with pytest.raises(ValueError, match="lengths must be"):
            cu_seqlens_from_lengths(torch.zeros(3, device=where))
        with pytest.raises(ValueError, match="document ids must be"):
            bounds_from_document_ids(torch.zeros(3, dtype=torch.int64, device=where))
        with pytest.raises(ValueError, match="token ids must be"):
            bounds_from_end_of_text(torch.zeros(3, 3, device=where), 0)

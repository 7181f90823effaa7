"""attention's backward on Hopper: by the rule and to the bit, on the emulator; and what it costs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import native
from fastgpt.ops import attention
from tests.ops import kernels, test_attention_sm90
from tests.ops.test_attention import (
    check_that_other_documents_do_not_matter,
    inputs,
    naive,
    naive_apart,
    naive_with_lse,
)
from tests.ops.test_attention_sm90 import BF16, F16, SERVED, code_of_kernels, packed, share_of_flops
from tests.rule import assert_within_rule, check_by_rule, in_layout, outputs_and_gradients, upstream


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    with kernels.at(kernels.EMULATED, chip="sm_90a"):
        yield


def by_rule(arguments: list[Tensor], torchs: Callable[..., Any] | None = None, **options: Any) -> None:
    """Outputs and gradients against `torchs` or the equations; the last of the paths was the backward's."""
    check_by_rule(
        lambda *t: attention(*t, **options),
        torchs or (lambda *t: naive(*t, **options)),
        arguments,
        f"{[tuple(t.shape) for t in arguments[:2]]} {arguments[0].dtype} {options}",
    )
    assert kernels.last_path() == SERVED


# ---- lengths, masks, widths, heads -----------------------------------------------------------------------

MASKS = (dict(), dict(causal=False), dict(window=0), dict(window=70), dict(causal=False, window=3), dict(window=9999))
LENGTHS = [(1, 1), (1, 3), (2, 1), (63, 65), (64, 64), (65, 63), (127, 129), (128, 128), (129, 127)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_edge_lengths_and_masks(lengths: tuple[int, int]) -> None:
    """One, one off a tile either way (of 64 and 128), and both ways unequal; both sizes of tiles of queries."""
    for i, masks in enumerate(MASKS):
        D = (16, 72)[i % 2]
        by_rule(inputs(1, *lengths, 2, 1, D, (BF16, F16)[(sum(lengths) + i) % 2]), **masks)


@pytest.mark.parametrize(
    ("lengths", "dtype", "masks"),
    [
        ((239, 1), BF16, dict(causal=False)),
        ((799, 3), F16, dict()),
        ((3, 799), F16, dict()),
        ((3, 799), BF16, dict(window=100)),
        ((113, 203), BF16, dict()),
        ((113, 203), F16, dict(causal=False, window=30)),
        ((108, 256), F16, dict(causal=False)),
        ((600, 599), BF16, dict(window=80)),
        ((599, 600), F16, dict()),
    ],
    ids=str,
)
def test_long_lengths(lengths: tuple[int, int], dtype: torch.dtype, masks: dict[str, Any]) -> None:
    """One head has two blocks, and each of them several tiles of keys."""
    by_rule(inputs(1, *lengths, 1, 1, 64, dtype), **masks)


@pytest.mark.parametrize("D", [8, 40, 64, 72, 96, 104, 120, 128])
def test_widths(D: int) -> None:
    """Each tile, full and with columns that are zeros."""
    by_rule(inputs(1, 140, 270, 1, 1, D, (BF16, F16)[D // 8 % 2]), causal=D % 16 == 0)


@pytest.mark.parametrize("heads", [(3, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("masks", [dict(), dict(window=40)], ids=str)
def test_grouped_heads(heads: tuple[int, int], masks: dict[str, Any]) -> None:
    """One block for each head of keys, which comes to all of its tiles."""
    by_rule(inputs(2, 150, 300, *heads, 24, BF16), **masks)


@pytest.mark.parametrize(
    "options", [dict(softcap=2.0), dict(scale=0.3), dict(scale=0.5, softcap=5.0, window=4)], ids=str
)
def test_scale_and_softcap(options: dict[str, Any]) -> None:
    by_rule(inputs(1, 140, 140, 2, 1, 80, F16 if "softcap" in options else BF16), **options)


def test_nothing_to_do() -> None:
    for sizes in (dict(B=0), dict(Tq=0), dict(Tk=0), dict(H=0)):
        arguments = inputs(**{**dict(B=1, Tq=70, Tk=70, H=1, KV=1, D=8, dtype=BF16), **sizes})
        gradients = outputs_and_gradients(attention, arguments)[1:]
        assert all((t == 0).all() for t in gradients) and [t.shape for t in gradients] == [t.shape for t in arguments]


@pytest.mark.parametrize("use", [None, [0], [1]], ids=str)
def test_lse_by_the_rule(use: list[int] | None) -> None:
    """Beside O, and its gradient with O's and alone."""

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return attention(q, k, v, return_lse=True)

    check_by_rule(ours, naive_with_lse, inputs(1, 177, 177, 2, 1, 16, BF16), f"LSE, {use} used", use)
    assert kernels.last_path() == SERVED


def test_gradients_of_a_query_that_is_not_finite() -> None:
    """They are its own, not the others'; and values that it does not see know nothing of it."""
    q, k, v = inputs(1, 150, 150, 1, 1, 64, BF16)
    clean = outputs_and_gradients(attention, [q, k, v])
    q[0, 40, 0, 3] = math.nan
    _, d_q, _, d_v = outputs_and_gradients(attention, [q, k, v])
    others = torch.arange(150) != 40
    assert d_q[0, 40].isnan().all() and torch.equal(d_q[0, others], clean[1][0, others])
    assert d_v[0, :41].isnan().all() and torch.equal(d_v[0, 41:], clean[3][0, 41:])


def test_a_key_that_is_infinite_and_weighs_nothing() -> None:
    """Rows past the end are zeros, whose product with it is NaN: they must not be looked at."""
    q, k, v = inputs(1, 100, 100, 1, 1, 64, BF16)
    q, k[0, 5] = q.abs(), 0
    k[0, 5, 0, 3] = -math.inf
    _, _, d_k, d_v = outputs_and_gradients(lambda *t: attention(*t, causal=False), [q, k, v])
    assert kernels.last_path() == SERVED
    assert (d_k[0, 5] == 0).all() and (d_v[0, 5] == 0).all() and d_k.isfinite().all() and d_v.isfinite().all()


# ---- documents -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", [dict(), dict(window=7), dict(causal=False)], ids=str)
@pytest.mark.parametrize("D", [16, 72])
def test_documents_by_the_rule(D: int, masks: dict[str, Any]) -> None:
    start, end = packed()
    by_rule(
        inputs(1, 330, 330, 2, 1, D, BF16), naive_apart((start, end), **masks), doc_start=start, doc_end=end, **masks
    )


@pytest.mark.parametrize("batches", [1, 3])
def test_other_documents_do_not_matter_to_the_bit(batches: int) -> None:
    """Whether a head has two blocks for its tiles of keys, or one that comes to all of them."""
    start, end = (bound.expand(batches, -1) for bound in packed())
    clean = inputs(batches, 330, 330, 1, 1, 8, BF16)
    check_that_other_documents_do_not_matter(clean, (start, end), slice(64, 128))


def test_tiles_that_nobody_sees() -> None:
    """Of keys, whose gradients are zeros, and of queries; between others. So all that a part of d_q has is written."""
    start, end = torch.zeros(2, 1, 700, dtype=torch.int32)
    for first, last, keys_from, keys_to in ((0, 130, 0, 60), (260, 400, 300, 310), (600, 700, 500, 700)):
        start[0, first:last], end[0, first:last] = keys_from, keys_to
    q, k, v = inputs(1, 700, 700, 1, 1, 16, BF16)
    options = dict(causal=False, doc_start=start, doc_end=end)

    def apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [q[:, 130:260] * 0, q[:, 400:600] * 0]
        seen = [
            naive(q[:, a:b], k[:, c:d], v[:, c:d], causal=False)
            for a, b, c, d in ((0, 130, 0, 60), (260, 400, 300, 310), (600, 700, 500, 700))
        ]
        return torch.cat([seen[0], rows[0], seen[1], rows[1], seen[2]], 1)

    by_rule([q, k, v], apart, **options)


# ---- which path ------------------------------------------------------------------------------------------

REFUSED = {"no queries": lambda: (inputs(1, 0, 9, D=16, dtype=BF16), {}), **test_attention_sm90.REFUSED}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_tma_does_not_serve_goes_to_the_sm80_path(reason: str) -> None:
    arguments, options = REFUSED[reason]()
    with native.emulated(checked="far" not in reason):  # the checks keep a byte for each element between
        found = outputs_and_gradients(lambda *t: attention(*t, **options), arguments)
    assert kernels.last_path() == ("sm80", reason)
    with native.emulated(chip="sm_80"):
        plain = outputs_and_gradients(lambda *t: attention(*t, **options), [t.clone() for t in arguments])
    assert kernels.same(found, plain)


def test_a_gradient_from_upstream_that_it_does_not_take() -> None:
    """One row for all goes to the sm_80 path, rows that are not aligned to the generic one."""
    arguments = [t.requires_grad_() for t in inputs(1, 20, 20, D=16, dtype=BF16)]
    o = attention(*arguments)
    torch.autograd.grad(o, arguments, torch.ones(16, dtype=BF16).expand(o.shape), retain_graph=True)
    assert kernels.last_path() == ("sm80", "rows of a tensor overlap")
    torch.autograd.grad(o, arguments, in_layout(upstream([o])[0], "offset"))
    assert kernels.last_path() == ("generic", "a tensor does not begin at a multiple of 16 bytes")


def test_which_chips_it_serves() -> None:
    """Newer ones have no wgmma."""
    arguments = inputs(1, 9, 9, D=16, dtype=BF16)
    for chip, path in (("sm_80", "sm80"), ("sm_90a", "sm90"), ("sm_100", "sm80")):
        with native.emulated(chip=chip):
            outputs_and_gradients(attention, arguments)
            assert kernels.last_path()[0] == path


def test_paths_agree() -> None:
    """Each by the rule, on one call, from the same O and LSE."""
    q, k, v = inputs(1, 100, 140, 2, 1, 40, F16)
    entries, options = torch.ops.fastgpt_emulated, (True, 50, 0.3, 0.0, None, None, None)
    o, *kept = entries.attention_forward(q, k, v, *options)
    (d_o,) = upstream([o])
    found = {}
    for chip, path in (("sm_75", "generic"), ("sm_80", "sm80"), ("sm_90a", "sm90")):
        with native.emulated(chip=chip):
            found[chip] = entries.attention_backward(d_o, None, q, k, v, o, *kept, *options, True, True, True)
            assert kernels.last_path()[0] == path
    exact = outputs_and_gradients(lambda *t: naive(*t, window=50, scale=0.3), [q, k, v], dtype=torch.float64)[1:]
    for a, b, c in zip(found["sm_90a"], found["sm_75"], exact, strict=True):
        assert_within_rule(a, b, c, "against the generic path")


def test_strides_are_taken_as_they_are() -> None:
    """Views of one projection, tokens and heads in another order, rows with gaps; gradients of any strides."""
    q, k, v = inputs(2, 67, 67, 4, 2, 16, BF16)
    expected = outputs_and_gradients(attention, [q, k, v])  # its gradient from upstream is full of gaps
    together = torch.cat([q, k, v], 2)
    views = [
        list(together.split([4, 2, 2], 2)),
        [t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for t in (q, k, v)],
        [torch.cat([t, t], -1)[..., :16] for t in (q, k, v)],
    ]
    for arguments in views:
        assert kernels.same(outputs_and_gradients(attention, arguments), expected)
        assert kernels.last_path() == SERVED
    leaves = [t.requires_grad_() for t in (q, k, v)]
    o = attention(*leaves)
    apart = torch.cat([upstream([o])[0], o.detach()], -1)[..., :16]  # what may be taken as it is
    assert kernels.same(list(torch.autograd.grad(o, leaves, apart)), expected[1:])
    assert kernels.last_path() == SERVED


# ---- the same every time ---------------------------------------------------------------------------------


@pytest.mark.parametrize("D", [24, 72])
def test_bitwise_the_same_over_schedules(D: int) -> None:
    """Fixed orders and no atomics but those of one thread after the other."""
    arguments = inputs(1, 200, 200, 2, 1, D, BF16)
    runs = []
    for seed in (1, 2, 3):
        with native.emulated(seed=seed):
            runs.append(outputs_and_gradients(lambda *t: attention(*t, return_lse=True), arguments))
    assert kernels.same(runs[0], runs[1]) and kernels.same(runs[1], runs[2])
    assert not native.findings()


def test_only_what_is_needed_is_written() -> None:
    """And nothing of it depends on what else is."""
    q, k, v = inputs(1, 140, 140, 2, 1, 16, BF16)
    entries = torch.ops.fastgpt_emulated
    options = (True, None, 0.3, 0.0, None, None, None)
    o, *kept = entries.attention_forward(q, k, v, *options)
    d_o = o.clone()
    whole = entries.attention_backward(d_o, None, q, k, v, o, *kept, *options, True, True, True)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        with native.emulated(profile=True):
            native.counters()
            found = entries.attention_backward(d_o, None, q, k, v, o, *kept, *options, *needs)
            lines = native.counters()
        assert any("sum_queries" in line["kernel"] for line in lines) == needs[0]
        for a, b, needed in zip(found, whole, needs, strict=True):
            assert torch.equal(a, b) if needed else a.numel() == 0


# ---- what it costs ---------------------------------------------------------------------------------------


def counted(arguments: list[Tensor], **options: Any) -> list[dict[str, Any]]:
    """Of the backward's kernels."""
    with native.emulated(profile=True, checked=False):
        native.counters()
        outputs_and_gradients(lambda *t: attention(*t, **options), arguments)
        lines = native.counters()
    return [line for line in lines if re.search("backward_sm90|sum_queries|visible", line["kernel"])]


@pytest.mark.parametrize(("D", "most"), [(64, 1.125), (128, 1.075)])
def test_flops_executed_over_those_that_a_causal_mask_leaves(D: int, most: float) -> None:
    """At T = 1024: whole squares of 128 at D = 64; wider heads leave out 64 keys of a tile."""
    T = 1024
    lines = counted(inputs(1, T, T, 1, 1, D, BF16))
    assert 1 <= sum(line.get("flops", 0) for line in lines) / (5 * D * T * (T + 1)) <= most
    assert not any(line.get("bank_conflicts") for line in lines)


@pytest.mark.parametrize("D", [40, 72, 96])
def test_no_bank_conflicts(D: int) -> None:
    start, end = packed()
    lines = counted(inputs(1, 330, 330, 2, 1, D, F16), doc_start=start, doc_end=end)
    assert not any(line.get("bank_conflicts") for line in lines)


def test_what_the_masks_hide_is_not_computed() -> None:
    """Of 1024 keys a window of 9 leaves a tile or two for each tile of queries, and a document as much."""
    assert max(share_of_flops(counted)) < 0.45


# ---- what the compiler made of it ------------------------------------------------------------------------


def test_instantiations_are_few() -> None:
    """Each one costs everybody's build time, for every architecture."""
    found = kernels.instantiations(r"attention_backward_sm90_kernel")
    assert len(found) == 6, sorted(found)


def test_exponentials_are_in_front_of_the_wait_that_they_overlap_with(tmp_path: Path) -> None:
    """In the machine code: the wait for Q K^T, exponentials (as many again for a softcap), the wait for d_o V^T."""
    codes = code_of_kernels("backward_sm90", tmp_path)
    assert len(codes) == 6
    for code in codes:
        assert code.count("USETMAXREG") == 2
        assert all(instruction in code for instruction in ("UTMALDG", "UTMASTG", "UTMAREDG", "STSM"))
        between = re.findall(r"DEPBAR\.LE gsb0, 0x1 (.*?)DEPBAR\.LE gsb0, 0x0 ", code, re.S)
        of_queries = 64 if "64ELi128E" in code.split("\n")[0] else 32
        assert between[0].count("MUFU.EX2") == 2 * of_queries

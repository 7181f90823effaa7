"""attention on tensor cores from sm_80 on: by the rule and to the bit, on the emulator; and what its tiles cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import native
from fastgpt.ops import attention, document_bounds
from tests.ops import kernels
from tests.ops.test_attention import (
    check_that_only_who_sees_it_knows_of_what_is_not_finite,
    check_that_other_documents_do_not_matter,
    inputs,
    naive,
    naive_apart,
    naive_with_lse,
)
from tests.rule import assert_within_rule, check_by_rule, in_layout, outputs_and_gradients, upstream

BF16, F16 = torch.bfloat16, torch.float16
SMALL = "sm_86"  # 99 KB of shared memory for a block: the backward's small tiles


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    with kernels.at(kernels.EMULATED, chip="sm_80"):
        yield


def path_of(entry: str, arguments: list[Tensor], **options: Any) -> tuple[str, str]:
    """Which path serves the call, and why: of the forward or the backward."""
    if entry == "forward":
        with torch.no_grad():
            attention(*arguments, **options)
    else:
        outputs_and_gradients(lambda *t: attention(*t, **options), arguments)
    return kernels.last_path()


def by_rule(arguments: list[Tensor], **options: Any) -> None:
    check_by_rule(
        lambda *t: attention(*t, **options),
        lambda *t: naive(*t, **options),
        arguments,
        f"{[tuple(t.shape) for t in arguments[:2]]} {arguments[0].dtype} {options}",
    )
    assert kernels.last_path()[0] == "sm80"  # of the backward


# ---- lengths, masks, widths, heads -----------------------------------------------------------------------

MASKS = (dict(), dict(causal=False), dict(window=0), dict(window=70), dict(causal=False, window=3), dict(window=9999))


@pytest.mark.parametrize("lengths", [(1, 1), (1, 3), (2, 1), (63, 65), (64, 64), (127, 129), (129, 127)], ids=str)
@pytest.mark.parametrize("masks", MASKS, ids=str)
def test_edge_lengths_and_masks(lengths: tuple[int, int], masks: dict[str, Any]) -> None:
    """One, one off a tile either way (of 64 and 128), and both ways unequal."""
    by_rule(inputs(1, *lengths, 2, 1, 16, (BF16, F16)[(sum(lengths) + MASKS.index(masks)) % 2]), **masks)


@pytest.mark.parametrize(
    ("lengths", "dtype", "masks"),
    [
        ((239, 1), BF16, dict()),
        ((239, 1), F16, dict(causal=False)),
        ((799, 3), BF16, dict()),
        ((799, 3), F16, dict(causal=False)),
        ((3, 799), F16, dict()),
        ((3, 799), BF16, dict(window=100)),
        ((113, 203), BF16, dict()),
        ((113, 203), F16, dict(causal=False, window=30)),
        ((108, 256), F16, dict()),
        ((108, 256), BF16, dict(causal=False)),
        ((1023, 1024), BF16, dict(window=80)),
        ((1024, 1023), F16, dict()),
    ],
    ids=str,
)
def test_long_lengths(lengths: tuple[int, int], dtype: torch.dtype, masks: dict[str, Any]) -> None:
    by_rule(inputs(1, *lengths, 1, 1, 64, dtype), **masks)


@pytest.mark.parametrize("chip", ["sm_80", SMALL])
@pytest.mark.parametrize("D", [8, 40, 64, 72, 96, 104, 120, 128])
def test_widths(D: int, chip: str) -> None:
    """Each tile, full and with columns that are zeros."""
    with native.emulated(chip=chip):
        by_rule(inputs(1, 70, 140, 1, 1, D, (BF16, F16)[D // 8 % 2]), causal=D % 16 == 0)


@pytest.mark.parametrize("heads", [(3, 1), (4, 2)], ids=str)
def test_grouped_heads(heads: tuple[int, int]) -> None:
    by_rule(inputs(2, 70, 70, *heads, 24, BF16))


@pytest.mark.parametrize("masks", [dict(), dict(window=40), dict(causal=False, window=150)], ids=str)
def test_a_block_comes_to_many_tiles_of_keys(masks: dict[str, Any]) -> None:
    """With so many heads each has one block: its sums of d_q begin, go on, and have gaps."""
    by_rule(inputs(4, 90, 300, 2, 2, 8, F16), **masks)


@pytest.mark.parametrize(
    "options", [dict(softcap=2.0), dict(scale=0.3), dict(scale=0.5, softcap=5.0, window=4)], ids=str
)
@pytest.mark.parametrize("chip", ["sm_80", SMALL])
def test_scale_and_softcap(options: dict[str, Any], chip: str) -> None:
    with native.emulated(chip=chip):
        by_rule(inputs(1, 70, 70, 2, 1, 80, F16 if "softcap" in options else BF16), **options)


@pytest.mark.parametrize(("softcap", "path"), [(1e-2, "sm80"), (1e3, "sm80"), (1e6, "generic")])
def test_extreme_softcaps(softcap: float, path: str) -> None:
    """The least and the largest that tensor cores take, and beyond: 1e6 times what their tanh is off by is some 0.1."""
    arguments = inputs(1, 20, 20, 1, 1, 16, BF16)
    check_by_rule(
        lambda *t: attention(*t, softcap=softcap), lambda *t: naive(*t, softcap=softcap), arguments, f"{softcap=}"
    )
    assert kernels.last_path()[0] == path


def test_nothing_to_do() -> None:
    for sizes in (dict(B=0), dict(Tq=0), dict(Tk=0), dict(H=0)):
        arguments = inputs(**{**dict(B=1, Tq=70, Tk=70, H=1, KV=1, D=8, dtype=BF16), **sizes})
        o, lse, *gradients = outputs_and_gradients(lambda *t: attention(*t, return_lse=True), arguments)
        assert all((t == 0).all() for t in (o, *gradients)) and (lse == -math.inf).all()
        assert [t.shape for t in gradients] == [t.shape for t in arguments]


@pytest.mark.parametrize("use", [None, [0], [1]], ids=str)
def test_lse_by_the_rule(use: list[int] | None) -> None:
    """Beside O, and its gradient with O's and alone."""

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return attention(q, k, v, return_lse=True)

    check_by_rule(ours, naive_with_lse, inputs(1, 77, 77, 2, 1, 16, BF16), f"LSE, {use} used", use)


def test_of_what_is_not_finite_only_those_who_see_it_know() -> None:
    check_that_only_who_sees_it_knows_of_what_is_not_finite()


@pytest.mark.parametrize("chip", ["sm_80", SMALL])
def test_a_key_that_is_infinite_and_weighs_nothing(chip: str) -> None:
    """Rows past the end are zeros, whose product with it is NaN: they must not be looked at."""
    q, k, v = inputs(1, 100, 100, 1, 1, 64, BF16)
    q, k[0, 5] = q.abs(), 0
    k[0, 5, 0, 3] = -math.inf
    with native.emulated(chip=chip):
        _, _, d_k, d_v = outputs_and_gradients(lambda *t: attention(*t, causal=False), [q, k, v])
        assert kernels.last_path()[0] == "sm80"
    assert (d_k[0, 5] == 0).all() and (d_v[0, 5] == 0).all() and d_k.isfinite().all() and d_v.isfinite().all()


# ---- documents and lengths -------------------------------------------------------------------------------


def packed() -> tuple[Tensor, Tensor]:
    """Bounds of documents that begin and end inside and at the bounds of tiles, some of them empty."""
    return document_bounds(torch.tensor([0, 5, 5, 60, 64, 128, 203, 203, 330]), 1, 330)


@pytest.mark.parametrize("masks", [dict(), dict(window=7), dict(causal=False)], ids=str)
def test_documents_by_the_rule(masks: dict[str, Any]) -> None:
    start, end = packed()

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, doc_start=start, doc_end=end, **masks)

    check_by_rule(ours, naive_apart((start, end), **masks), inputs(1, 330, 330, 2, 1, 16, BF16), f"documents {masks}")
    assert kernels.last_path()[0] == "sm80"


@pytest.mark.parametrize("batches", [1, 8])
def test_other_documents_do_not_matter_to_the_bit(batches: int) -> None:
    """Whether a head has blocks of its own for its tiles of keys, or one that comes to all of them."""
    start, end = (bound.expand(batches, -1) for bound in packed())
    clean = inputs(batches, 330, 330, 1, 1, 8, BF16)
    check_that_other_documents_do_not_matter(clean, (start, end), slice(64, 128))


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_lengths_equal_shorter_keys_and_ignore_the_rest(integer: torch.dtype) -> None:
    """Gradients too. Lengths that are not in 0 .. Tk are no way out of the tensors."""
    lengths = torch.tensor([140, 40, 0, 199, -4], dtype=integer)
    real = (140, 40, 0, 140, 0)
    q, k, v = inputs(5, 12, 140, 1, 1, 16, BF16)

    def existing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [
            naive(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n]) if n else q[b : b + 1] * 0
            for b, n in enumerate(real)
        ]
        return torch.cat(rows)

    for b, n in enumerate(real):
        k[b, n:], v[b, n:] = 1e4, -1e4
    check_by_rule(lambda *t: attention(*t, kv_lengths=lengths), existing, [q, k, v], f"lengths in {integer}")
    clean = outputs_and_gradients(lambda *t: attention(*t, kv_lengths=lengths), [q, k, v])
    for b, n in enumerate(real):
        k[b, n:], v[b, n:] = math.nan, math.nan  # memory that was never written
    assert kernels.same(outputs_and_gradients(lambda *t: attention(*t, kv_lengths=lengths), [q, k, v]), clean)


# ---- which path ------------------------------------------------------------------------------------------

REFUSED = {
    "not a dtype of 16 bits": lambda: (inputs(1, 9, 9, D=16, dtype=torch.float32), {}),
    "a head is too wide for tensor cores": lambda: (inputs(1, 9, 9, D=136, dtype=BF16), {}),
    "heads without elements": lambda: (inputs(1, 9, 9, D=0, dtype=BF16), {}),
    "the width is no multiple of 16 bytes": lambda: (inputs(1, 9, 9, D=20, dtype=BF16), {}),
    "a scale that is not positive, or extreme": lambda: (inputs(1, 9, 9, D=16, dtype=BF16), dict(scale=-0.2)),
    "a softcap that is extreme": lambda: (inputs(1, 9, 9, D=16, dtype=BF16), dict(softcap=1001.0)),
    "a tensor does not begin at a multiple of 16 bytes": lambda: (
        [in_layout(t, "offset") for t in inputs(1, 9, 9, D=16, dtype=BF16)],
        {},
    ),
    "a row does not begin at a multiple of 16 bytes": lambda: (
        [torch.cat([t, t[..., :1]], -1)[..., :-1] for t in inputs(1, 9, 9, D=16, dtype=BF16)],
        {},
    ),
}


@pytest.mark.parametrize("entry", ["forward", "backward"])
@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_does_not_serve_goes_to_the_generic_path(reason: str, entry: str) -> None:
    arguments, options = REFUSED[reason]()
    assert path_of(entry, arguments, **options) == ("generic", reason)


@pytest.mark.parametrize("entry", ["forward", "backward"])
def test_which_chips_it_serves(entry: str) -> None:
    arguments = inputs(1, 9, 9, D=16, dtype=BF16)
    for chip in ("sm_80", "sm_86", "sm_90a"):
        path = "sm90" if chip == "sm_90a" else "sm80"
        with native.emulated(chip=chip):
            assert path_of(entry, arguments)[0] == path
    with native.emulated(chip="sm_75"):
        assert path_of(entry, arguments)[0] == "generic"


def test_an_unaligned_gradient_from_upstream() -> None:
    """Which is the backward's alone to refuse."""
    arguments = [t.requires_grad_() for t in inputs(1, 20, 20, D=16, dtype=BF16)]
    o = attention(*arguments)
    (d_o,) = upstream([o])
    expected = torch.autograd.grad(o, arguments, d_o, retain_graph=True)
    found = torch.autograd.grad(o, arguments, in_layout(d_o, "offset"))
    assert kernels.last_path() == ("generic", "a tensor does not begin at a multiple of 16 bytes")
    exact = outputs_and_gradients(lambda *t: attention(*t), [t.detach() for t in arguments], dtype=torch.float64)[1:]
    for a, b, c in zip(found, expected, exact, strict=True):
        assert_within_rule(a, b, c, "an unaligned gradient")


def test_paths_agree() -> None:
    """Each by the rule, on one call."""
    arguments = inputs(1, 100, 140, 2, 1, 40, F16)
    for chip, path in (("sm_75", "generic"), ("sm_80", "sm80")):
        with native.emulated(chip=chip):
            check_by_rule(lambda *t: attention(*t, window=50), lambda *t: naive(*t, window=50), arguments, chip)
            assert kernels.last_path()[0] == path


def test_strides_are_taken_as_they_are() -> None:
    """Views of one projection, tokens and heads in another order, stride 0 of expand(); gradients of any strides."""
    q, k, v = inputs(2, 33, 33, 4, 2, 16, BF16)
    expected = outputs_and_gradients(attention, [q, k, v])  # its gradient from upstream is full of gaps
    packed = torch.cat([q, k, v], 2)
    views = [
        list(packed.split([4, 2, 2], 2)),
        [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)],
        [t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for t in (q, k, v)],
        [torch.cat([t, t], -1)[..., :16] for t in (q, k, v)],
    ]
    assert views[0][1].data_ptr() == packed.data_ptr() + 4 * 16 * 2
    for arguments in views:
        assert kernels.same(outputs_and_gradients(attention, arguments), expected)
        assert path_of("forward", arguments)[0] == path_of("backward", arguments)[0] == "sm80"
    shared = [t[:1].expand(t.shape) for t in (k, v)]
    assert kernels.same(
        outputs_and_gradients(attention, [q, *shared]),
        outputs_and_gradients(attention, [q, *(t.clone() for t in shared)]),
    )
    leaves = [t.requires_grad_() for t in (q, k, v)]
    o = attention(*leaves)
    apart = torch.cat([upstream([o])[0], o.detach()], -1)[..., :16]  # what may be taken as it is
    assert kernels.same(list(torch.autograd.grad(o, leaves, apart)), expected[1:])
    assert kernels.last_path()[0] == "sm80"


def test_a_head_may_lie_beyond_two_billion_elements() -> None:
    """Its place is counted in 64 bits. Nothing between the tokens is touched, so it takes no memory."""
    arguments = inputs(1, 9, 9, 1, 1, 8, BF16)
    far = [torch.empty(9 * 2**30 + 64, dtype=BF16).as_strided(t.shape, (8, 2**30, 8, 1)).copy_(t) for t in arguments]
    with native.emulated(chip="sm_80", checked=False):  # the checks keep a byte for each element between
        assert kernels.same(outputs_and_gradients(attention, far), outputs_and_gradients(attention, arguments))
        assert kernels.last_path()[0] == "sm80"


# ---- the same every time ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chip", ["sm_80", SMALL])
def test_bitwise_the_same_over_schedules(chip: str) -> None:
    """Fixed orders and no atomics."""
    arguments = inputs(1, 150, 150, 2, 1, 72, BF16)
    runs = []
    for seed in (1, 2, 3):
        with native.emulated(chip=chip, seed=seed):
            runs.append(outputs_and_gradients(lambda *t: attention(*t, return_lse=True), arguments))
    assert kernels.same(runs[0], runs[1]) and kernels.same(runs[1], runs[2])
    assert not native.findings()


def test_only_what_is_needed_is_computed() -> None:
    """And nothing of it depends on what else is."""
    q, k, v = inputs(1, 70, 70, 2, 1, 16, BF16)
    entries = torch.ops.fastgpt_emulated
    options = (True, None, 0.3, 0.0, None, None, None)
    o, *kept = entries.attention_forward(q, k, v, *options)
    d_o = o.clone()
    whole = entries.attention_backward(d_o, None, q, k, v, o, *kept, *options, True, True, True)
    flops = {}
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        with native.emulated(chip="sm_80", profile=True):
            native.counters()
            found = entries.attention_backward(d_o, None, q, k, v, o, *kept, *options, *needs)
            lines = native.counters()
        flops[needs] = sum(line.get("flops", 0) for line in lines)
        assert any("sum_queries" in line["kernel"] for line in lines) == needs[0]
        for a, b, needed in zip(found, whole, needs, strict=True):
            assert torch.equal(a, b) if needed else a.numel() == 0
    assert all(flops[needs] * 5 == flops[True, True, True] * 3 for needs in list(flops)[1:])


# ---- what it costs ---------------------------------------------------------------------------------------


def test_flops_executed_over_those_that_a_causal_mask_leaves() -> None:
    """At T = 1024, D = 64: what is hidden is left out by pieces of 16 keys."""
    T, D = 1024, 64
    with native.emulated(chip="sm_80", profile=True, checked=False):
        native.counters()
        outputs_and_gradients(attention, inputs(1, T, T, 1, 1, D, BF16))
        lines = native.counters()

    def over_ideal(kernel: str, products: int) -> float:
        flops = sum(line.get("flops", 0) for line in lines if kernel in line["kernel"])
        return flops / (products * 2 * D * T * (T + 1) / 2)

    assert 1 <= over_ideal("attention_forward_sm80", 2) <= 1.04
    assert 1 <= over_ideal("attention_backward_sm80", 5) <= 1.07
    assert not any(line.get("bank_conflicts") for line in lines)


@pytest.mark.parametrize("chip", ["sm_80", SMALL])
@pytest.mark.parametrize("D", [40, 64, 72, 96, 128])
def test_no_bank_conflicts_and_whole_sectors(D: int, chip: str) -> None:
    with native.emulated(chip=chip, profile=True, checked=False):
        native.counters()
        outputs_and_gradients(attention, inputs(1, 160, 160, 2, 1, D, BF16))
        lines = [line for line in native.counters() if "sm80" in line["kernel"] or "sum_queries" in line["kernel"]]
    for line in lines:
        assert not line.get("bank_conflicts"), line
        assert D % 16 or line.get("sectors") == line.get("ideal_sectors"), line


def test_what_the_masks_hide_is_not_computed() -> None:
    """Of 768 keys a window of 9 leaves a tile or two for each tile of queries, and a document as much."""
    arguments = inputs(1, 768, 768, 1, 1, 8, BF16)
    start, end = document_bounds(torch.arange(0, 768, 10), 1, 768)
    flops = []
    for masks in (dict(), dict(window=9), dict(doc_start=start, doc_end=end)):
        with native.emulated(chip="sm_80", profile=True, checked=False):
            native.counters()
            outputs_and_gradients(lambda *t, masks=masks: attention(*t, **masks), arguments)
            lines = native.counters()
        both = ("attention_forward", "attention_backward")
        flops.append([sum(line.get("flops", 0) for line in lines if kernel in line["kernel"]) for kernel in both])
    for few in flops[1:]:
        assert all(a < 0.25 * b for a, b in zip(few, flops[0], strict=True)), flops


# ---- how many --------------------------------------------------------------------------------------------

# In two dtypes: three tiles forward, three and two small ones backward, the sum of d_q.
KERNELS = 2 * (3 + 5 + 1)


def test_instantiations_are_few() -> None:
    """Each one costs everybody's build time, for every architecture."""
    found = kernels.instantiations(r"attention_\w*(?:sm80|sum_queries)_kernel")
    assert len(found) == KERNELS, sorted(found)

"""The kernels behind attention: the generic path and decoding, by the rule and to the bit; which serve a call, and why.

What does not depend on a kernel's tiles is shown by those tests of test_attention.py that run on the kernels too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import native
from fastgpt.config import ModelConfig
from fastgpt.model import GPT, KVCache
from fastgpt.ops import attention, document_bounds
from tests.ops import checks, kernels
from tests.ops.test_attention import (
    check_that_other_documents_do_not_matter,
    inputs,
    naive,
    naive_apart,
    naive_with_lse,
)
from tests.rule import assert_within_rule, check_by_rule, in_layout, outputs_and_gradients, upstream

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
page = import_module("fastgpt.ops.attention")


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    """A chip on which the generic path serves whatever decoding does not."""
    with kernels.at(kernels.EMULATED, chip="sm_75"):
        yield


def by_rule(arguments: list[Tensor], path: str, **options: Any) -> None:
    check_by_rule(
        lambda *t: attention(*t, **options),
        lambda *t: naive(*t, **options),
        arguments,
        f"{[tuple(t.shape) for t in arguments[:2]]} {arguments[0].dtype} {options}",
    )
    with torch.no_grad():
        attention(*arguments, **options)
    assert kernels.last_path()[0] == path


def plain(kernel: str) -> str:
    """attention_decode_kernel, of fastgpt::(anonymous namespace)::attention_decode_kernel<float, 1>."""
    found = re.search(r"attention_\w+", kernel)
    assert found
    return found[0]


# ---- lengths, masks, widths, heads -----------------------------------------------------------------------

LENGTHS = ((1, 1), (1, 3), (2, 1), (31, 33), (32, 64), (33, 65), (65, 32))
MASKS = (dict(), dict(causal=False), dict(window=0), dict(window=5), dict(causal=False, window=3), dict(window=9999))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("masks", MASKS, ids=str)
def test_edge_lengths_and_masks(lengths: tuple[int, int], masks: dict[str, Any]) -> None:
    """One, one off a tile of rows (32) or columns (64; of float64 32) either way, and both ways unequal."""
    dtype = (F32, BF16, F16)[(LENGTHS.index(lengths) + MASKS.index(masks)) % 3]
    if lengths[0] < 9:
        by_rule(inputs(2, *lengths, dtype=dtype), "decode", **masks)
    else:
        by_rule(inputs(1, *lengths, 2, 1, 16, dtype), "generic", **masks)


@pytest.mark.parametrize("masks", MASKS, ids=str)
def test_masks_in_float64(masks: dict[str, Any]) -> None:
    by_rule(inputs(1, 33, 65, 2, 1, 3, F64), "generic", **masks)


@pytest.mark.parametrize(
    ("lengths", "dtype", "masks"),
    [
        ((239, 1), F32, dict()),
        ((239, 1), BF16, dict(causal=False)),
        ((799, 3), F16, dict(causal=False)),
        ((799, 3), F32, dict()),
        ((3, 799), F32, dict()),
        ((3, 799), BF16, dict(window=100)),
        ((113, 203), BF16, dict()),
        ((113, 203), F32, dict(causal=False, window=30)),
        ((108, 256), F16, dict()),
        ((108, 256), F32, dict(causal=False)),
        ((1023, 1024), BF16, dict()),
        ((1024, 1023), F32, dict()),
    ],
    ids=str,
)
def test_long_lengths(lengths: tuple[int, int], dtype: torch.dtype, masks: dict[str, Any]) -> None:
    million = lengths[0] * lengths[1] > 1_000_000
    with native.emulated(chip="sm_75", checked=not million):  # the checks take twenty times as long
        by_rule(inputs(1, *lengths, 1, 1, 8, dtype), "decode" if lengths[0] < 9 else "generic", **masks)


@pytest.mark.parametrize("lengths", [(1, 3), (3, 3), (1, 17), (9, 9)], ids=str)
def test_few_keys_in_float32(lengths: tuple[int, int]) -> None:
    """Where one key has most of the weight, d_o . v and delta nearly cancel: both must be wrong by the same."""
    with native.emulated(chip="sm_75", checked=False):
        for seed in range(8):
            given = inputs(4, *lengths, dtype=F32, seed=seed)
            by_rule(given, "decode" if lengths[0] < 9 else "generic")


@pytest.mark.parametrize("Tq", [1, 9])
def test_many_keys_of_nearly_the_same_weight_in_float32(Tq: int) -> None:
    """Scores are small and LSE is not: what is lost in their difference, and in LSE, would be most of the error."""
    for seed in range(3):
        given = inputs(1, Tq, 1500, 1, 1, 8, F32, seed=seed)
        by_rule(given, "decode" if Tq < 9 else "generic", causal=False, scale=0.05)


def test_one_key_has_all_the_weight_in_float32() -> None:
    """All of a float's 1, so its score has no gradient, exactly; as torch's has none."""
    by_rule(inputs(1, 40, 40, 2, 1, 8, F32), "generic", scale=1e5)


def test_scores_of_minus_infinity_in_float32() -> None:
    q, k, v = inputs(1, 20, 20, 2, 1, 8, F32)
    q, k[:, 3:5] = q.abs(), -math.inf
    by_rule([q, k, v], "generic")


@pytest.mark.parametrize(
    ("D", "dtype"),
    [(1, F64), (3, F64), (63, BF16), (65, F32), (96, F16), (128, F32), (129, F32), (130, F64), (256, BF16), (260, F32)],
    ids=str,
)
def test_widths(D: int, dtype: torch.dtype) -> None:
    """One element, a step of the products and one off it either way, all that a block holds of a result, and more."""
    by_rule(inputs(1, 35, 35, 2, 1, D, dtype), "generic")


@pytest.mark.parametrize(("heads", "dtype"), [((3, 1), F32), ((4, 2), BF16), ((2, 2), F32)], ids=str)
def test_grouped_heads(heads: tuple[int, int], dtype: torch.dtype) -> None:
    by_rule(inputs(2, 40, 40, *heads, 24, dtype), "generic")


@pytest.mark.parametrize(
    "options", [dict(softcap=2.0), dict(scale=0.3), dict(scale=0.5, softcap=5.0, window=4)], ids=str
)
@pytest.mark.parametrize("dtype", [F64, F32, F16])
def test_scale_and_softcap(options: dict[str, Any], dtype: torch.dtype) -> None:
    by_rule(inputs(2, 20, 20, dtype=dtype), "generic", **options)


def test_no_elements_in_a_head() -> None:
    q, k, v = inputs(1, 9, 4, D=0, dtype=F32)
    o, lse = attention(q, k, v, causal=False, return_lse=True)
    assert o.shape == q.shape and torch.equal(lse, torch.full((1, 4, 9), math.log(4)))


def test_lse_by_the_rule() -> None:
    """Beside O, and its gradient with O's and alone."""

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = attention(q, k, v, return_lse=True)
        return o, lse

    for use in (None, [0], [1]):
        check_by_rule(ours, naive_with_lse, inputs(2, 37, 37, dtype=F32), f"LSE, {use} used", use)


# ---- derivatives -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "options"),
    [((4, 4), dict()), ((2, 4), dict(window=2)), ((4, 2), dict()), ((3, 3), dict(causal=False, softcap=2.0))],
    ids=str,
)
def test_gradcheck(lengths: tuple[int, int], options: dict[str, Any]) -> None:
    checks.check_gradients(lambda *t: attention(*t, **options), inputs(1, *lengths, 2, 1, 2), twice=False)


def test_gradcheck_of_documents_and_of_lse() -> None:
    start, end = document_bounds(torch.tensor([0, 2]), 1, 4)
    checks.check_gradients(
        lambda *t: attention(*t, doc_start=start, doc_end=end, return_lse=True), inputs(1, 4, 4, 2, 1, 2), twice=False
    )
    lengths = torch.tensor([3, 0])
    checks.check_gradients(lambda *t: attention(*t, kv_lengths=lengths), inputs(2, 2, 4, 2, 1, 2), twice=False)


def test_a_second_derivative_is_refused() -> None:
    arguments = [t.requires_grad_() for t in inputs(1, 4, 4)]
    with pytest.raises(RuntimeError, match="attention: the kernels have no second derivative"):
        torch.autograd.grad(attention(*arguments).sum(), arguments, create_graph=True)


@pytest.mark.parametrize("D", [8, 130])
def test_only_what_is_needed_is_computed(D: int) -> None:
    q, k, v = inputs(1, 40, 40, 2, 1, D, F32)
    entries = torch.ops.fastgpt_emulated
    options = (True, None, 0.3, 0.0, None, None, None)
    o, *stats = entries.attention_forward(q, k, v, *options)
    (d_o,) = upstream([o])
    whole = entries.attention_backward(d_o, None, q, k, v, o, *stats, *options, True, True, True)
    of_queries: dict[bool, int] = {}
    for needs in ((True, False, False), (False, True, False), (False, False, True), (True, False, True)):
        with kernels.counted() as counts:
            found = entries.attention_backward(d_o, None, q, k, v, o, *stats, *options, *needs)
        moved = {plain(kernel): row["bytes"] for kernel, row in counts.items()}
        assert ("attention_keys_backward_generic_kernel" in moved) == any(needs[1:])
        of_queries[needs[0]] = moved["attention_queries_backward_generic_kernel"]  # it runs first, for what it finds
        for a, b, needed in zip(found, whole, needs, strict=True):
            assert torch.equal(a, b) if needed else a.numel() == 0
    assert of_queries[False] < 0.8 * of_queries[True]


# ---- documents and lengths -------------------------------------------------------------------------------


def packed_in_tiles() -> tuple[Tensor, Tensor]:
    """Bounds of documents that begin and end inside and at the bounds of tiles, some of them empty."""
    return document_bounds(torch.tensor([0, 5, 5, 40, 64, 96, 103, 103, 166]), 1, 166)


@pytest.mark.parametrize("masks", [dict(), dict(window=7), dict(causal=False)], ids=str)
def test_documents_by_the_rule(masks: dict[str, Any]) -> None:
    start, end = packed_in_tiles()

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, doc_start=start, doc_end=end, **masks)

    check_by_rule(ours, naive_apart((start, end), **masks), inputs(1, 166, 166, 2, 1, 8, F32), f"documents {masks}")


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_other_documents_do_not_matter_to_the_bit(dtype: torch.dtype) -> None:
    start, end = packed_in_tiles()
    clean = inputs(1, 166, 166, 2, 1, 8, dtype)
    check_that_other_documents_do_not_matter(clean, (start, end), slice(5, 40))


def test_what_the_masks_hide_is_not_read() -> None:
    """Of 640 keys a window of 9 leaves a tile or two for each tile of rows, and a document as much."""
    q, k, v = inputs(1, 640, 640, 1, 1, 8, F32)
    bounds = document_bounds(torch.arange(0, 640, 10), 1, 640)
    counted = {}
    for name, masks in {
        "causal": dict(),
        "window": dict(window=9),
        "documents": dict(doc_start=bounds[0], doc_end=bounds[1]),
    }.items():
        with kernels.counted() as counts:
            outputs_and_gradients(lambda *t, masks=masks: attention(*t, **masks), [q, k, v])
        counted[name] = {plain(kernel): row["bytes"] for kernel, row in counts.items()}
    for narrow in ("window", "documents"):
        for kernel in ("attention_forward", "attention_keys_backward", "attention_queries_backward"):
            few, many = (counted[name][f"{kernel}_generic_kernel"] for name in (narrow, "causal"))
            assert few < 0.35 * many, (narrow, kernel, few, many)


@pytest.mark.parametrize(
    ("Tq", "dtype", "integer"),
    [(1, BF16, torch.int32), (3, F16, torch.int64), (3, F64, torch.int32), (12, F32, torch.int64)],
    ids=str,
)
def test_lengths_equal_shorter_keys_and_ignore_the_rest(Tq: int, dtype: torch.dtype, integer: torch.dtype) -> None:
    """Gradients too. Lengths that are not in 0 .. Tk are no way out of the tensors."""
    lengths = torch.tensor([70, 40, 0, 99, -4], dtype=integer)
    real = (70, 40, 0, 70, 0)
    q, k, v = inputs(5, Tq, 70, 2, 1, 8, dtype)

    def existing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [
            naive(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n]) if n else q[b : b + 1] * 0
            for b, n in enumerate(real)
        ]
        return torch.cat(rows)

    for b, n in enumerate(real):
        k[b, n:], v[b, n:] = 1e4, -1e4
    check_by_rule(lambda *t: attention(*t, kv_lengths=lengths), existing, [q, k, v], f"{Tq} queries, {dtype}")
    clean = attention(q, k, v, kv_lengths=lengths)
    for b, n in enumerate(real):
        k[b, n:], v[b, n:] = math.nan, math.nan  # memory that was never written
    assert torch.equal(attention(q, k, v, kv_lengths=lengths), clean)


# ---- decoding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("Tq", "H", "KV", "D", "dtype", "options"),
    [
        (1, 2, 2, 8, BF16, dict()),
        (1, 2, 2, 4, F32, dict(causal=False)),
        (1, 8, 1, 64, F16, dict(window=20)),
        (1, 3, 1, 24, F32, dict()),
        (5, 4, 1, 40, BF16, dict(softcap=3.0, scale=0.4)),
        (8, 2, 1, 128, F32, dict(window=20)),
        (2, 10, 1, 96, F16, dict()),
        (1, 4, 2, 256, BF16, dict(causal=False)),
    ],
    ids=str,
)
def test_decoding(Tq: int, H: int, KV: int, D: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """One lane for a key and a whole warp, lanes without an element, one row and more than a block takes."""
    given = inputs(2, Tq, 70, H, KV, D, dtype)
    o = attention(*given, **options)
    assert kernels.last_path()[0] == "decode"
    exact = naive(*(t.double() for t in given), **options)
    assert_within_rule(o, naive(*given, **options), exact, f"decoding, {options}")


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("masks", [dict(), dict(window=300)], ids=str)
def test_decoding_over_a_long_cache_is_split(masks: dict[str, Any], dtype: torch.dtype) -> None:
    """By its room: full, a part of it, one key, and none."""
    room = 1200
    q, k, v = inputs(4, 1, room, 2, 1, 16, dtype)
    lengths = torch.tensor([room, 700, 1, 0], dtype=torch.int32)
    with torch.no_grad(), kernels.counted() as counts:
        o, lse = attention(q[:1], k[:1], v[:1], kv_lengths=lengths[:1], return_lse=True, **masks)
    assert [plain(name) for name in counts] == ["attention_decode_kernel", "attention_decode_merge_kernel"]
    for b, n in enumerate(lengths.tolist()):
        o, lse = attention(*(t[b : b + 1] for t in (q, k, v)), kv_lengths=lengths[b : b + 1], return_lse=True, **masks)
        if n == 0:
            assert (o == 0).all() and (lse == -math.inf).all()
            continue
        given = [q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n]]
        exact = naive(*(t.double() for t in given), **masks)
        assert_within_rule(o, naive(*given, **masks), exact, f"{n} of {room}, {masks}")
        whole, exact_lse = attention(*(t.double() for t in given), return_lse=True, **masks)
        torch.testing.assert_close(whole, exact)
        torch.testing.assert_close(lse, exact_lse.float())


def test_heads_that_share_keys_load_them_once() -> None:
    q, k, v = inputs(1, 1, 512, 8, 1, 64, BF16)
    with kernels.counted() as counts:
        attention(q, k, v)
    assert kernels.total(counts, "bytes") < 1.2 * 2 * k.numel() * k.element_size()


def test_decoding_to_the_bit_over_schedules_and_layouts() -> None:
    q, k, v = inputs(1, 2, 700, 4, 2, 32, BF16)
    lengths = torch.tensor([650])
    found = []
    for seed in (1, 2, 3):
        with native.emulated(chip="sm_75", seed=seed):
            found.append(attention(q, k, v, kv_lengths=lengths))
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
    cache = torch.zeros(2, 1, 900, 2, 48, dtype=BF16)
    cache[0, :, :700, :, 8:40], cache[1, :, :700, :, 8:40] = k, v
    again = attention(q, cache[0, :, :700, :, 8:40], cache[1, :, :700, :, 8:40], kv_lengths=lengths)
    assert torch.equal(again, found[0]) and kernels.last_path()[0] == "decode"


# ---- which path ------------------------------------------------------------------------------------------

PATHS: dict[str, Callable[..., tuple[list[Tensor], dict[str, Any]]]] = {
    "few queries": lambda: (inputs(1, 2, 9, D=16, dtype=BF16), {}),
    "float64": lambda: (inputs(1, 2, 9, D=16), {}),
    "more queries than decoding takes": lambda: (inputs(1, 9, 9, D=16, dtype=BF16), {}),
    "documents": lambda: (
        inputs(1, 5, 5, D=16, dtype=BF16),
        dict(zip(("doc_start", "doc_end"), document_bounds(torch.tensor([0, 2]), 1, 5), strict=True)),
    ),
    "a head is too wide for decoding": lambda: (inputs(1, 2, 9, D=264, dtype=BF16), {}),
    "the width is no multiple of 16 bytes": lambda: (inputs(1, 2, 9, D=20, dtype=BF16), {}),
    "a tensor does not begin at a multiple of 16 bytes": lambda: (
        [in_layout(t, "offset") for t in inputs(1, 2, 9, D=16, dtype=BF16)],
        {},
    ),
    "a row does not begin at a multiple of 16 bytes": lambda: (
        [torch.cat([t, t[..., :1]], -1)[..., :-1] for t in inputs(1, 2, 9, D=16, dtype=BF16)],
        {},
    ),
}


@pytest.mark.parametrize("reason", PATHS)
def test_choose_path_says_which_and_why(reason: str) -> None:
    arguments, options = PATHS[reason]()
    o = attention(*arguments, **options)
    assert kernels.last_path() == ("decode" if reason == "few queries" else "generic", reason)
    if not options:
        exact = naive(*(t.double() for t in arguments))
        assert_within_rule(o, naive(*arguments), exact, reason)


@pytest.mark.parametrize("Tq", [2, 20])
def test_paths_agree_and_strides_are_taken_as_they_are(Tq: int) -> None:
    """Views of one packed projection, of a longer cache, tokens and heads in another order, stride 0 of expand()."""
    q, k, v = inputs(2, Tq, 20, 4, 2, 16, F32)
    expected = outputs_and_gradients(attention, [q, k, v])
    forward = "decode" if Tq < 9 else "generic"
    if Tq == 20:
        packed = torch.cat([q, k, v], 2)
        views = list(packed.split([4, 2, 2], 2))
        assert views[1].data_ptr() == packed.data_ptr() + 4 * 16 * 4
        assert kernels.same(outputs_and_gradients(attention, views), expected)
        for layout in ("transposed", "strided", "offset"):
            assert kernels.same(outputs_and_gradients(attention, [in_layout(t, layout) for t in (q, k, v)]), expected)
    for views in (
        [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)],
        [t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for t in (q, k, v)],
    ):
        assert kernels.same(outputs_and_gradients(attention, views), expected)
        with torch.no_grad():
            attention(*views)
        assert kernels.last_path()[0] == forward
    shared = [t[:1].expand(t.shape) for t in (k, v)]
    assert kernels.same(
        outputs_and_gradients(attention, [q, *shared]),
        outputs_and_gradients(attention, [q, *(t.clone() for t in shared)]),
    )
    with torch.no_grad():
        shifted = attention(*(in_layout(t, "offset") for t in (q, k, v)))
        assert kernels.last_path()[0] == "generic"
        torch.testing.assert_close(shifted, expected[0])


# ---- dispatch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
def test_the_kernels_run_and_no_reference(grad: bool) -> None:
    arguments = [t.requires_grad_(grad) for t in inputs(1, 20, 20, dtype=BF16)]
    with kernels.no_reference(page), kernels.Spy() as spy:
        o = attention(*arguments, softcap=5.0, window=3)
        if grad:
            torch.autograd.grad(o, arguments, o.detach())
    assert spy.kernels == (["attention_forward", "attention_backward"] if grad else ["attention_forward"])
    assert not {name for name in spy.names if re.search("mm|softmax|scaled_dot", name)}


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_opcheck(dtype: torch.dtype) -> None:
    """Schemas and fakes say what the entries do."""
    entries = torch.ops.fastgpt_emulated
    q, k, v = inputs(2, 9, 9, D=16, dtype=dtype)
    start, end = document_bounds(torch.tensor([0, 4]), 2, 9)
    for options in (
        (False, 3, 0.3, 2.0, None, None, torch.tensor([3, 9])),
        (True, None, 0.3, 0.0, start, end, None),
    ):
        torch.library.opcheck(entries.attention_forward.default, (q, k, v, *options))
    o, *stats = entries.attention_forward(q, k, v, *options)
    for d_lse, needs in ((None, (True, True, True)), (stats[0].clone(), (False, True, False))):
        given = (o.clone(), d_lse, q, k, v, o, *stats, *options, *needs)
        torch.library.opcheck(entries.attention_backward.default, given)


@pytest.mark.parametrize("Tq", [2, 20])
def test_compiled(Tq: int) -> None:
    checks.check_compiled(attention, naive, inputs(1, Tq, 20, D=16, dtype=BF16), "attention")


def test_entries_refuse_what_would_leave_their_memory() -> None:
    q, k, v = inputs(2, 4, 4, D=16, dtype=F32)
    entries = torch.ops.fastgpt_emulated
    bound = torch.zeros(2, 4, dtype=torch.int32)

    def forward(q: Tensor = q, k: Tensor = k, v: Tensor = v, window: int | None = None, *rest: Any) -> None:
        entries.attention_forward(q, k, v, True, window, 0.3, 0.0, *(rest or (None, None, None)))

    def backward(d_o: Tensor, o: Tensor, lse: Tensor, d_lse: Tensor | None = None) -> None:
        options = (True, None, 0.3, 0.0, None, None, None)
        entries.attention_backward(d_o, d_lse, q, k, v, o, lse, *options, True, True, True)

    lse = torch.zeros(2, 4, 4)
    refused: list[tuple[str, Callable[[], None]]] = [
        ("k must be", lambda: forward(k=k[0])),
        ("v must be", lambda: forward(v=v.double())),
        ("q must be", lambda: forward(q=q[:1])),
        ("q must be", lambda: forward(q=q[:, :, :3])),
        ("q must be", lambda: forward(v=v[:, :3])),
        ("window must", lambda: forward(q, k, v, -1)),
        ("given together", lambda: forward(q, k, v, None, bound, None, None)),
        ("documents need", lambda: forward(q[:, :3], k, v, None, bound, bound, None)),
        ("doc_start must", lambda: forward(q, k, v, None, bound.long(), bound, None)),
        ("doc_end must", lambda: forward(q, k, v, None, bound, bound[:1], None)),
        ("kv_lengths must", lambda: forward(q, k, v, None, None, None, bound)),
        ("kv_lengths must", lambda: forward(q, k, v, None, None, None, torch.zeros(2))),
        ("d_o must", lambda: backward(q[:1], q, lse)),
        ("o must", lambda: backward(q, q.double(), lse)),
        ("lse must", lambda: backward(q, q, lse[:, :2])),
        ("lse must", lambda: backward(q, q, lse.mT)),
        ("d_lse must", lambda: backward(q, q, lse, lse.double())),
    ]
    for message, call in refused:
        with pytest.raises(RuntimeError, match=message):
            call()


# ---- the same every time ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F64])
def test_bitwise_the_same_over_schedules(dtype: torch.dtype) -> None:
    """Fixed orders and no atomics."""
    arguments = inputs(1, 70, 70, 4, 2, 16, dtype)
    runs = []
    for seed in (1, 2, 3):
        with native.emulated(chip="sm_75", seed=seed):
            runs.append(outputs_and_gradients(lambda *t: attention(*t, return_lse=True), arguments))
    assert kernels.same(runs[0], runs[1]) and kernels.same(runs[1], runs[2])
    assert not native.findings()


@pytest.mark.parametrize(("D", "dtype"), [(64, F32), (128, BF16), (30, F64)], ids=str)
def test_no_bank_conflicts(D: int, dtype: torch.dtype) -> None:
    for arguments in (inputs(1, 70, 70, 2, 1, D, dtype), inputs(1, 1, 600, 4, 1, D, dtype)):
        with kernels.counted() as counts:
            outputs_and_gradients(attention, arguments)
        assert kernels.total(counts, "conflicts") == 0, counts


def test_a_head_may_lie_beyond_two_billion_elements() -> None:
    """Its place is counted in 64 bits. Nothing between the tokens is touched, so it takes no memory."""
    for Tq in (2, 9):
        arguments = inputs(1, Tq, Tq, 1, 1, 8, BF16)
        far = [
            torch.empty(Tq * 2**30 + 64, dtype=BF16).as_strided(t.shape, (1, 2**30, 8, 1)).copy_(t) for t in arguments
        ]
        with native.emulated(chip="sm_75", checked=False):  # the checks keep a byte for each element between
            assert kernels.same(outputs_and_gradients(attention, far), outputs_and_gradients(attention, arguments))


# ---- a model ---------------------------------------------------------------------------------------------


def test_a_model_generates_over_its_cache_by_decoding() -> None:
    """Cached generation equals uncached, a step of it is decoded, and it learns the lengths on the device."""
    config = ModelConfig.preset(
        "tiny", vocab_size=16, block_size=16, n_layer=2, n_embd=32, n_head=4, n_kv_head=2, positions="rope", window=6
    )
    model = GPT(config, torch.Generator().manual_seed(0))
    prompts, lengths = torch.arange(6).view(2, 3), torch.tensor([3, 1])
    with native.emulated(only=("attention",), chip="sm_75"):
        cached, uncached = (
            model.generate(prompts, 12, lengths=lengths, temperature=0.0, use_cache=use_cache)
            for use_cache in (True, False)
        )
        assert torch.equal(cached, uncached)
        cache = KVCache(model.config, 2, 8)
        with torch.inference_mode():
            model(prompts, cache=cache)
            assert kernels.last_path()[0] == "decode"
            model(prompts[:, :1], cache=cache)
            assert kernels.last_path() == ("decode", "few queries")
    with native.emulated(only=()):
        assert torch.equal(model.generate(prompts, 12, lengths=lengths, temperature=0.0), cached)


# ---- how many --------------------------------------------------------------------------------------------

# Forward, keys' and queries' backward in three tiles; delta in two; decoding one row or many, and the merge, in three.
KERNELS = 3 * 3 + 2 + 3 * 3


def test_instantiations_are_few() -> None:
    """Each one costs everybody's build time, for every architecture."""
    found = kernels.instantiations(r"attention_\w*(?:generic|delta|decode|merge)_kernel")
    assert len(found) == KERNELS, sorted(found)

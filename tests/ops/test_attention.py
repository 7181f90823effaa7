"""Attention against the equations written out naively, on the edge cases that break kernels."""

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import attention, document_bounds
from fastgpt.ops.attention import reference
from tests.ops import kernels
from tests.ops.checks import check_error, values
from tests.rule import (
    DEVICES,
    RULE_DTYPES,
    assert_within_rule,
    check_by_rule,
    in_layout,
    outputs_and_gradients,
    poison,
    randn,
    upstream,
)

# (Tq, Tk): one, one off a tile either way, more queries than keys and fewer.
LENGTHS = ((1, 1), (1, 3), (2, 1), (239, 1), (113, 203), (108, 256), (64, 64), (65, 65), (63, 129))
LONG = ((799, 3), (3, 799), (1023, 1024), (1024, 1023))
MASKS = (
    dict(),
    dict(causal=False),
    dict(window=0),
    dict(window=5),
    dict(window=10_000),
    dict(causal=False, window=3),
)
HEADS = ((2, 2), (4, 2), (3, 1))

# On the emulated kernels too.
everywhere = pytest.mark.parametrize("device", kernels.WHERE, indirect=True)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.at(request.param) as device:
        yield device


def naive(q: Tensor, k: Tensor, v: Tensor, *, causal=True, window=None, scale=None, softcap=None) -> Tensor:
    """softmax(q k^T) v in torch, keys and values repeated, for masks that do not depend on data."""
    Tq, Tk, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(t.transpose(1, 2).repeat_interleave(G, 1) for t in (k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = s if softcap is None else torch.tanh(s / softcap) * softcap
    position, key = torch.arange(Tq, device=q.device)[:, None] + Tk - Tq, torch.arange(Tk, device=q.device)
    hidden = torch.zeros(Tq, Tk, dtype=torch.bool, device=q.device)
    hidden |= (key > position) if causal else False
    hidden |= (key < position - window) if window is not None else False
    blind = hidden.all(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(hidden & ~blind, -math.inf), -1)
    return (p @ v).masked_fill(blind, 0.0).transpose(1, 2)


def naive_apart(bounds: tuple[Tensor, Tensor], **masks: Any) -> Callable[..., Tensor]:
    """`naive` of each document by itself, as a function of q, k, v: (1, T, ...), with (doc_start, doc_end)."""
    firsts = sorted(set(bounds[0][0].tolist()))
    ranges = list(itertools.pairwise([*firsts, bounds[0].shape[1]]))
    return lambda *qkv: torch.cat([naive(*(t[:, i:j] for t in qkv), **masks) for i, j in ranges], 1)


def naive_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`naive` under the causal mask, and LSE (B, H, T) in the dtype of `attention`; as many queries as keys."""
    s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)) / math.sqrt(q.shape[-1])
    lse = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -math.inf).logsumexp(-1)
    return naive(q, k, v), lse if q.dtype == torch.float64 else lse.float()


def check_that_other_documents_do_not_matter(
    clean: list[Tensor], bounds: tuple[Tensor, Tensor], changed: slice, **masks: Any
) -> None:
    """To the bit: other values in the document `changed` of the first sequence change nothing of any other document."""
    dirty = [t.clone() for t in clean]
    for t in dirty:
        t[0, changed] = 3 * t[0, changed] + 1
    options = dict(doc_start=bounds[0], doc_end=bounds[1], **masks)
    pairs = [outputs_and_gradients(lambda *t: attention(*t, **options), given) for given in (clean, dirty)]
    for a, b in zip(*pairs, strict=True):
        assert not torch.equal(a[0, changed], b[0, changed])
        for untouched in (slice(0, changed.start), slice(changed.stop, None)):
            assert torch.equal(a[0, untouched], b[0, untouched])
        assert torch.equal(a[1:], b[1:])


def check_that_only_who_sees_it_knows_of_what_is_not_finite() -> None:
    """NaN in one query, inf in one key: on the path that serves 150 bf16 queries of width 64."""
    q, k, v = inputs(1, 150, 150, 1, 1, 64, torch.bfloat16)
    clean = attention(q, k, v)
    q[0, 40, 0, 3] = math.nan
    assert torch.equal(attention(q, k, v)[0, 39], clean[0, 39])
    assert attention(q, k, v)[0, 40].isnan().all()
    q, k, v = inputs(1, 150, 150, 1, 1, 64, torch.bfloat16)
    k[0, 100] = math.inf  # scores of inf and -inf
    o = attention(q, k, v)
    assert torch.equal(o[:, :100], clean[:, :100])
    assert torch.equal(o.isnan(), naive(q, k, v).isnan())


def inputs(B=2, Tq=7, Tk=7, H=4, KV=2, D=8, dtype=torch.float64, device="cpu", seed=0) -> list[Tensor]:
    shapes = ((B, Tq, H, D), (B, Tk, KV, D), (B, Tk, KV, D))
    return [randn(*s, dtype=dtype, seed=3 * seed + i, device=device) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("dtype", RULE_DTYPES)
@pytest.mark.parametrize("masks", MASKS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_edge_lengths_and_masks_by_the_rule(device, lengths, masks, dtype):
    Tq, Tk = lengths
    check_by_rule(
        lambda *t: attention(*t, **masks),
        lambda *t: naive(*t, **masks),
        inputs(2, Tq, Tk, dtype=dtype, device=device),
        f"attention {lengths} {masks}",
    )


@pytest.mark.parametrize("dtype", (torch.float64, *RULE_DTYPES))
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("lengths", LONG, ids=str)
def test_long_lengths_by_the_rule(device, lengths, causal, dtype):
    check_by_rule(
        lambda *t: attention(*t, causal=causal),
        lambda *t: naive(*t, causal=causal),
        inputs(2, *lengths, H=2, KV=2, D=16, dtype=dtype, device=device),
        f"attention {lengths} causal={causal}",
    )


@pytest.mark.parametrize("dtype", RULE_DTYPES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("D", (8, 40))
def test_grouped_heads_by_the_rule(device, heads, D, dtype):
    check_by_rule(attention, naive, inputs(2, 70, 70, *heads, D, dtype, device), f"attention {heads} D={D}")


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("D", (1, 3))
def test_odd_widths(device, heads, D):  # in fp64: the largest of so few rounding errors says nothing
    check_by_rule(attention, naive, inputs(2, 70, 70, *heads, D, device=device), f"attention {heads} D={D}")


@pytest.mark.parametrize("dtype", RULE_DTYPES)
@pytest.mark.parametrize(
    "options", (dict(softcap=2.0), dict(scale=0.3), dict(scale=0.5, softcap=5.0, window=4)), ids=str
)
def test_scale_and_softcap_by_the_rule(device, options, dtype):
    check_by_rule(
        lambda *t: attention(*t, **options),
        lambda *t: naive(*t, **options),
        inputs(2, 20, 20, dtype=dtype, device=device),
        f"attention {options}",
    )


@pytest.mark.parametrize("dtype", RULE_DTYPES)
def test_against_torchs_own(device, dtype):
    def torchs(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    ours = attention(*inputs(2, 130, 130, device=device))
    torch.testing.assert_close(ours, torchs(*inputs(2, 130, 130, device=device)))
    # in low precision torch's fused kernel keeps scores in fp32, so hold ours to the naive product, and be near it
    q, k, v = inputs(2, 130, 130, dtype=dtype, device=device)
    check_by_rule(attention, naive, [q, k, v], "attention")


def test_probabilities_computed_again_give_the_same_gradients(device, monkeypatch):
    arguments = inputs(2, 150, 150, dtype=torch.bfloat16, device=device)
    kept = outputs_and_gradients(attention, arguments)
    monkeypatch.setattr(sys.modules["fastgpt.ops.attention"], "KEPT_PROBABILITIES_BYTES", 0)
    for a, b in zip(kept, outputs_and_gradients(attention, arguments), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("causal", (False, True))
def test_long_fp32_by_the_rule(device, causal, monkeypatch):
    monkeypatch.setattr(sys.modules["fastgpt.ops.attention"], "KEPT_PROBABILITIES_BYTES", 0)
    arguments = inputs(2, 150, 150, dtype=torch.float32, device=device)
    check_by_rule(
        lambda *t: attention(*t, causal=causal), lambda *t: naive(*t, causal=causal), arguments, f"causal={causal}"
    )
    assert attention(*arguments, causal=causal).is_contiguous()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_gradients_stay_accurate_over_many_blocks(device, dtype):
    # every key collects gradients from all blocks of queries: were dK and dV rounded after each, the error would grow
    check_by_rule(
        lambda *t: attention(*t, causal=False),
        lambda *t: naive(*t, causal=False),
        inputs(1, 8192, 16, 1, 1, 16, dtype, device),
        "attention over many blocks",
    )


# ---- documents, lengths, rows that see nothing ----------------------------------------------


def packed(device: str) -> tuple[Tensor, Tensor]:
    bounds = torch.tensor([0, 5, 5, 5, 40, 83, 100, 166, 166], device=device)  # empty ones, one across the rows
    return document_bounds(bounds, 2, 83)


@pytest.mark.parametrize("dtype", (torch.float64, *RULE_DTYPES))
@pytest.mark.parametrize("masks", (dict(), dict(window=7), dict(causal=False)), ids=str)
def test_documents_equal_attention_within_each(device, masks, dtype):
    start, end = packed(device)

    def ours(q, k, v):
        return attention(q, k, v, doc_start=start, doc_end=end, **masks)

    def apart(q, k, v):
        rows = []
        for b in range(2):
            firsts = sorted(set(start[b].tolist()))
            ranges = zip(firsts, [*firsts[1:], 83], strict=True)
            rows.append(torch.cat([naive(*(t[b : b + 1, i:j] for t in (q, k, v)), **masks) for i, j in ranges], 1))
        return torch.cat(rows)

    check_by_rule(ours, apart, inputs(2, 83, 83, dtype=dtype, device=device), f"documents {masks}")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_other_documents_do_not_matter_to_the_bit(device, dtype):
    clean = inputs(2, 83, 83, dtype=dtype, device=device)
    check_that_other_documents_do_not_matter(clean, packed(device), slice(5, 40))


@everywhere
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_future_tokens_do_not_matter_to_the_bit(device, dtype):
    q, k, v = inputs(1, 100, 100, dtype=dtype, device=device)
    before = attention(q, k, v)
    k[:, 60:], v[:, 60:] = 9.0, -9.0
    after = attention(q, k, v)
    assert torch.equal(before[:, :60], after[:, :60])
    assert not torch.equal(before[:, 60:], after[:, 60:])


@everywhere
@pytest.mark.parametrize("lse", (False, True))
@pytest.mark.parametrize("causal", (False, True))
def test_rows_that_see_nothing(device, causal, lse):
    start = torch.zeros(1, 6, dtype=torch.int32, device=device)
    end = torch.full_like(start, 6)
    end[0, 2] = 0  # token 2 belongs to no document: it sees nothing, and is seen by the rest
    arguments = [t.requires_grad_() for t in inputs(1, 6, 6, device=device)]
    out = attention(*arguments, causal=causal, doc_start=start, doc_end=end, return_lse=lse)
    o = out[0] if lse else out
    assert (o[:, 2] == 0).all()
    if lse:
        assert (out[1][:, :, 2] == -math.inf).all()
        assert out[1][:, :, [0, 1, 3, 4, 5]].isfinite().all()
    d_q, d_k, d_v = torch.autograd.grad(o.sum(), arguments)
    assert (d_q[:, 2] == 0).all()
    assert all(t.isfinite().all() for t in (d_q, d_k, d_v))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("Tq", (1, 3))
def test_lengths_equal_shorter_keys_and_ignore_the_rest(device, Tq, dtype):
    q, k, v = inputs(3, Tq, 9, dtype=dtype, device=device)
    lengths = torch.tensor([9, 4, 0], device=device)

    def existing(q, k, v):
        return torch.cat([naive(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n]) for b, n in enumerate((9, 4))])

    torchs, exact = existing(q, k, v), existing(q.double(), k.double(), v.double())
    for b, n in enumerate((9, 4, 0)):
        k[b, n:], v[b, n:] = math.nan, math.nan  # memory that was never written
    got = attention(q, k, v, kv_lengths=lengths)
    assert_within_rule(got[:2], torchs, exact, "the keys that exist")
    assert (got[2] == 0).all()


@everywhere
def test_cached_steps_equal_one_pass(device):
    q, k, v = inputs(2, 12, 12, device=device)
    whole = attention(q, k, v, window=4)
    for t in range(12):
        lengths = torch.full((2,), t + 1, dtype=torch.int32, device=device)
        step = attention(q[:, t : t + 1], k, v, window=4, kv_lengths=lengths)
        torch.testing.assert_close(step, whole[:, t : t + 1])


# ---- layouts, empties, LSE ------------------------------------------------------------------


@pytest.mark.parametrize("layout", ("transposed", "strided", "offset", "expanded"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_layouts_do_not_matter_to_the_bit(device, layout, dtype):
    views = [in_layout(t, layout) for t in inputs(2, 70, 70, dtype=dtype, device=device)]
    for a, b in zip(
        outputs_and_gradients(attention, views),
        outputs_and_gradients(attention, [t.contiguous() for t in views]),
        strict=True,
    ):
        assert torch.equal(a, b)


@everywhere
def test_views_of_a_packed_projection(device):
    qkv = randn(2, 70, 8, 16, device=device, dtype=torch.float32)

    def ours(x):
        return attention(*x.split([4, 2, 2], 2))

    def torchs(x):
        return naive(*x.split([4, 2, 2], 2))

    check_by_rule(ours, torchs, [qkv], "packed")
    assert attention(*qkv.split([4, 2, 2], 2)).is_contiguous()


@everywhere
@pytest.mark.parametrize("options", (dict(), dict(window=3), dict(softcap=3.0), dict(return_lse=True)), ids=str)
@pytest.mark.parametrize("shape", ((0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 0, 0)), ids=str)
def test_empty(device, shape, options):
    B, Tq, Tk = shape
    arguments = [t.requires_grad_() for t in inputs(B, Tq, Tk, device=device)]
    out = attention(*arguments, **options)
    o = out[0] if isinstance(out, tuple) else out
    assert o.shape == (B, Tq, 4, 8)
    assert (o == 0).all()
    if isinstance(out, tuple):
        assert out[1].shape == (B, 4, Tq)
        assert (out[1] == -math.inf).all()
    assert all((g == 0).all() for g in torch.autograd.grad(o.sum(), arguments))


@everywhere
def test_lse(device):
    q, k, v = inputs(2, 20, 20, device=device)
    o, lse = attention(q, k, v, return_lse=True)
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(20, 20, dtype=torch.bool, device=device).triu(1), -math.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(o, attention(q, k, v))
    assert attention(*(t.bfloat16() for t in (q, k, v)), return_lse=True)[1].dtype == torch.float32


@everywhere
def test_uninitialised_memory_is_not_read(device):
    arguments = inputs(2, 70, 70, dtype=torch.bfloat16, device=device)
    clean = outputs_and_gradients(attention, arguments)
    with poison():
        poisoned = outputs_and_gradients(attention, arguments)
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a, b)


@everywhere
@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_nan_and_inf_propagate(device, value):
    q, k, v = inputs(1, 6, 6, device=device)
    v[0, 3, 0, 0] = value
    o = attention(q, k, v)
    assert not o[0, 3:, :2, 0].isfinite().any()  # before it, 0 * NaN is whatever the formulation makes of it
    assert o[0, :, :, 1:].isfinite().all() and o[0, :, 2:].isfinite().all()
    q[0, 4, 0, 0] = value
    assert not attention(q, k, v)[0, 4, 0].isfinite().any()


# ---- derivatives ----------------------------------------------------------------------------

DERIVATIVES = (dict(), dict(window=2), dict(causal=False), dict(softcap=2.0))


@pytest.mark.parametrize("options", DERIVATIVES, ids=str)
@pytest.mark.parametrize("lengths", ((5, 5), (2, 4), (4, 2)), ids=str)
def test_first_and_second_derivatives(device, lengths, options):
    arguments = [t.requires_grad_() for t in inputs(1, *lengths, 2, 1, 2, device=device)]
    assert torch.autograd.gradcheck(lambda *t: attention(*t, **options), arguments)
    assert torch.autograd.gradgradcheck(lambda *t: attention(*t, **options), arguments)


def test_derivatives_with_documents_and_lse(device):
    start, end = document_bounds(torch.tensor([0, 2], device=device), 1, 5)
    arguments = [t.requires_grad_() for t in inputs(1, 5, 5, 2, 1, 2, device=device)]
    assert torch.autograd.gradcheck(lambda *t: attention(*t, doc_start=start, doc_end=end), arguments)
    assert torch.autograd.gradgradcheck(lambda *t: attention(*t, doc_start=start, doc_end=end), arguments)
    assert torch.autograd.gradcheck(lambda *t: attention(*t, return_lse=True), arguments)
    o, lse = attention(*arguments, return_lse=True)
    grads = [torch.autograd.grad(x.sum(), arguments[:2], retain_graph=True) for x in (o, lse)]  # one output alone
    assert all(g.isfinite().all() for pair in grads for g in pair)


@pytest.mark.parametrize("wanted", ((0,), (1,), (2,), (0, 2)), ids=str)
def test_each_subset_of_gradients(device, wanted):
    arguments = inputs(2, 70, 70, device=device)
    everything = outputs_and_gradients(attention, arguments)[1:]
    some = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(arguments)]
    o = attention(*some)
    got = torch.autograd.grad(o, [some[i] for i in wanted], upstream([o]))
    for i, g in zip(wanted, got, strict=True):
        torch.testing.assert_close(g, everything[i])


def test_vmap_and_reference_agree():
    q, k, v = (torch.stack([t, 2 * t]) for t in inputs())
    batched = torch.func.vmap(attention)(q, k, v)
    for i in range(2):
        torch.testing.assert_close(batched[i], reference(q[i], k[i], v[i]))


# ---- contract, compile, autocast ------------------------------------------------------------


def _bounds(device: str) -> Tensor:
    return torch.zeros(2, 4, dtype=torch.int32, device=device)


BAD = {
    "q must be (B, T, heads, D)": lambda d: dict(q=values(4, 4, 8, device=d)),
    "q must be float64": lambda d: dict(q=values(2, 4, 4, 8, device=d).int()),
    "k must have the dtype of q": lambda d: dict(k=values(2, 4, 2, 8, dtype=torch.float32, device=d)),
    "k and v must have one shape": lambda d: dict(v=values(2, 3, 2, 8, device=d)),
    "the same B and D": lambda d: dict(q=values(1, 4, 4, 8, device=d)),
    "multiple of the number of key heads": lambda d: dict(q=values(2, 4, 3, 8, device=d)),
    "window must be": lambda d: dict(window=-1),
    "softcap must be": lambda d: dict(softcap=0.0),
    "scale must be": lambda d: dict(scale=math.inf),
    "given together": lambda d: dict(doc_start=_bounds(d)),
    "doc_end must be (B, T)": lambda d: dict(doc_start=_bounds(d), doc_end=_bounds(d).long()),
    "as many queries as keys": lambda d: dict(q=values(2, 3, 4, 8, device=d), doc_start=_bounds(d), doc_end=_bounds(d)),
    "cannot be combined": lambda d: dict(doc_start=_bounds(d), doc_end=_bounds(d), kv_lengths=_bounds(d)[:, 0]),
    "kv_lengths must be": lambda d: dict(kv_lengths=_bounds(d)),
}


@pytest.mark.parametrize("message", BAD)
def test_the_same_error_everywhere(message):
    def make(device):
        given = dict(zip("qkv", (values(2, 4, heads, 8, device=device) for heads in (4, 2, 2)), strict=True))
        return (), {**given, **BAD[message](device)}

    check_error(attention, message, make)


@everywhere
def test_meta_agrees(device):
    out = attention(*inputs(device=device))
    meta = attention(*inputs(device="meta"))
    assert (meta.shape, meta.dtype, meta.stride()) == (out.shape, out.dtype, out.stride())


@everywhere
@pytest.mark.parametrize("options", (dict(), dict(window=3), dict(softcap=4.0), dict(doc=True)), ids=str)
def test_compiles_whole(device, options):
    if options.pop("doc", False):
        options["doc_start"], options["doc_end"] = document_bounds(torch.tensor([0, 3], device=device), 2, 7)

    def ours(q, k, v):
        return attention(q, k, v, **options)

    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    arguments = inputs(device=device)
    for a, b in zip(outputs_and_gradients(ours, arguments), outputs_and_gradients(compiled, arguments), strict=True):
        torch.testing.assert_close(a, b)


@everywhere
def test_autocast(device):
    arguments = inputs(2, 20, 20, dtype=torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        got = outputs_and_gradients(attention, arguments)
    low = outputs_and_gradients(attention, arguments, dtype=torch.bfloat16)
    assert got[0].dtype == torch.bfloat16
    assert torch.equal(got[0], low[0])
    for a, b in zip(got[1:], low[1:], strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())

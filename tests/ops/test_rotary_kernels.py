"""The kernels behind rotary: which serve a call, in place or not, that they are the same every time, what they move.

That they are right is shown by test_rotary.py, all of whose tests run on them too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import native, ops
from fastgpt.config import ModelConfig
from fastgpt.model import GPT
from tests.ops import kernels
from tests.ops.checks import check_compiled
from tests.rule import check_by_rule, in_layout, outputs_and_gradients, randn, upstream

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
NORM = pytest.mark.parametrize("norm", [False, True])
page = import_module("fastgpt.ops.rotary")
reference = page.reference


@pytest.fixture(autouse=True)
def emulated():
    with kernels.at(kernels.EMULATED):
        yield


class Shape:
    """A call's, with what goes with it."""

    def __init__(self, B: int, T: int, H: int, KV: int, D: int, R: int, dtype: torch.dtype, norm: bool = False):
        self.dtype, self.norm, self.heads = dtype, norm, dict(n_head=H, n_kv_head=KV)
        self.qkv = randn(B, T, H + 2 * KV, D, dtype=dtype)
        self.tables = ops.rotary_tables(T + 2, R, 100.0)
        self.weights = [1 + randn(D, dtype=dtype, seed=seed) / 4 for seed in (1, 2)] if norm else []

    @property
    def args(self) -> list[Tensor]:
        return [self.qkv, *self.weights]

    def call(self, function: Callable, **options: Any) -> Callable:
        def called(qkv: Tensor, *weights: Tensor) -> Tensor:
            q, k = weights or (None, None)
            return function(qkv, *self.tables, **self.heads, q_weight=q, k_weight=k, **options)

        return called

    def check(self, what: str, **options: Any) -> None:
        check_by_rule(self.call(ops.rotary, **options), self.call(reference, **options), self.args, what)


# ---- sizes --------------------------------------------------------------------------------------------------


@NORM
@pytest.mark.parametrize(("D", "R"), [(2, 2), (3, 2), (16, 16), (17, 16), (24, 16), (40, 32), (80, 32), (96, 96),
                                      (128, 64), (256, 256), (272, 16), (514, 512)], ids=str)  # fmt: skip
def test_widths(D: int, R: int, norm: bool) -> None:
    """One vector, parts of a head that are not rotated of an odd and an even number of vectors, lanes without a slot,
    more slots than lanes, and odd ones."""
    Shape(1, 2, 2, 1, D, R, BF16, norm).check(f"D={D} R={R}")
    vector = D % 8 == 0 and R % 16 == 0 and (D <= 256 or not norm)
    assert kernels.last_path()[0] == ("vector" if vector else "generic")


@NORM
@DTYPES
@pytest.mark.parametrize("D", [32, 30])
def test_dtypes(dtype: torch.dtype, D: int, norm: bool) -> None:
    """More heads than a warp takes at a time, and than have their loads on the way at a time."""
    Shape(2, 9, 12, 6, D, D, dtype, norm).check(f"{dtype}, D={D}")
    assert kernels.last_path()[0] == ("vector" if D == 32 else "generic")


@NORM
@pytest.mark.parametrize("D", [16, 6])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (0, 3), (3, 0), (1, 67)])
def test_tokens(B: int, T: int, D: int, norm: bool) -> None:
    """None, one, and more than the blocks that stay have warps: two multiprocessors' 32."""
    shape = Shape(B, T, 2, 1, D, D, F32, norm)
    shape.check(f"{B} rows of {T} tokens")
    if norm and B * T == 0:
        _, _, d_q, d_k = outputs_and_gradients(shape.call(ops.rotary), shape.args)
        assert not d_q.any() and not d_k.any()


@NORM
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize("D", [16, 6])
def test_a_position_that_is_not_there(integer: torch.dtype, D: int, norm: bool) -> None:
    """Nothing is read, and what is rotated of that token alone is NaN, in the gradient too."""
    shape = Shape(1, 5, 2, 1, D, D, F32, norm)
    good = torch.tensor([0, 6, 2, 3, 1], dtype=integer)
    far = 2**40 if integer == torch.int64 else 2**31 - 1
    bad = good.clone()
    bad[1], bad[2], bad[4] = -1, 7, far
    clean = outputs_and_gradients(shape.call(ops.rotary, positions=good), shape.args)
    found = outputs_and_gradients(shape.call(ops.rotary, positions=bad), shape.args)
    for a, b in zip(clean[:2], found[:2], strict=True):
        assert torch.equal(a[:, [0, 3]], b[:, [0, 3]]) and torch.equal(a[:, :, 3:], b[:, :, 3:])
        assert b[:, [1, 2, 4], :3].isnan().all()


def test_a_head_may_lie_beyond_two_billion_elements() -> None:
    """Its place is counted in 64 bits. Nothing between the tokens is touched, so it takes no memory."""
    for norm in (False, True):
        shape = Shape(1, 2, 2, 1, 16, 16, BF16, norm)
        far = torch.empty(2**31 + 64, dtype=BF16).as_strided(shape.qkv.shape, (1, 2**31, 16, 1)).copy_(shape.qkv)
        with native.emulated(checked=False):  # the checks keep a byte for each element between
            run = shape.call(ops.rotary)
            assert torch.equal(run(far, *shape.weights), run(*shape.args))
    text = (kernels.CSRC / "rotary/rotary.cu").read_text()
    assert re.findall(r"[^(]\bblockIdx\.x \* (?!2)", text) == [] and "int64_t(blockIdx.x) * kWarps" in text


# ---- which path ---------------------------------------------------------------------------------------------

PATHS = {
    "16-byte accesses": lambda s: None,
    "the width is no multiple of 16 bytes": lambda s: s.__init__(1, 3, 2, 1, 34, 32, s.dtype, s.norm),
    "half of what is rotated is no multiple of 16 bytes": lambda s: s.__init__(1, 3, 2, 1, 32, 2, s.dtype, s.norm),
    "a table does not begin at a multiple of 16 bytes": lambda s: setattr(
        s, "tables", tuple(in_layout(t, "offset") for t in s.tables)
    ),
    "a tensor does not begin at a multiple of 16 bytes": lambda s: setattr(s, "qkv", in_layout(s.qkv, "offset")),
    "a row does not begin at a multiple of 16 bytes": lambda s: setattr(
        s, "qkv", torch.cat([s.qkv, s.qkv[..., :1]], -1)[..., :-1]
    ),
    "a head is too wide for the norm's registers": lambda s: s.__init__(1, 3, 2, 1, 272, 16, s.dtype, s.norm),
}


@NORM
@pytest.mark.parametrize("reason", PATHS)
def test_choose_path_says_which_and_why(reason: str, norm: bool) -> None:
    shape = Shape(1, 3, 2, 1, 32, 32, BF16, norm)
    PATHS[reason](shape)
    if "too wide" in reason and not norm:
        return
    shape.check(reason)
    shape.call(ops.rotary)(*shape.args)
    assert kernels.last_path() == ("vector" if reason == "16-byte accesses" else "generic", reason)


@NORM
def test_paths_agree_and_strides_are_taken_as_they_are(norm: bool) -> None:
    shape = Shape(2, 3, 3, 1, 32, 16, F32, norm)
    run = shape.call(ops.rotary)
    expected = run(*shape.args)
    assert kernels.last_path()[0] == "vector"
    apart = torch.zeros(2, 5, 7, 48)[:, 1:4, 1:6, 4:36].copy_(shape.qkv)
    assert torch.equal(run(apart, *shape.weights), expected) and kernels.last_path()[0] == "vector"
    swapped = shape.qkv.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(run(swapped, *shape.weights), expected) and kernels.last_path()[0] == "vector"
    one_off = in_layout(shape.qkv, "offset")
    torch.testing.assert_close(run(one_off, *shape.weights), expected)
    assert kernels.last_path()[0] == "generic"


# ---- in place -----------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("D", [32, 30])
def test_in_place(dtype: torch.dtype, D: int) -> None:
    """Bitwise as out of place, values and gradients; for a tensor of its own and for a view of a layer's output."""
    shape = Shape(2, 3, 10, 2, D, D - 16, dtype)
    (d_y,) = upstream([shape.qkv])
    expected = outputs_and_gradients(shape.call(ops.rotary), shape.args)[0]
    x = shape.qkv.clone().requires_grad_()
    (d_x,) = torch.autograd.grad(shape.call(ops.rotary)(x), x, d_y)
    for flat in (False, True):
        x = shape.qkv.clone().requires_grad_()
        qkv = ((x * 1).flatten(2) * 1).view(x.shape) if flat else x * 1
        address = qkv.data_ptr()
        with kernels.Spy() as spy:
            y = shape.call(ops.rotary, may_overwrite=True)(qkv)
            found = torch.autograd.grad(y, x, d_y)[0]
        assert spy.kernels == ["rotary_forward_", "rotary_backward"]
        assert "aten::copy_" not in spy.names, "autograd copies the gradient"
        assert y.data_ptr() == address and torch.equal(y, expected) and torch.equal(qkv, expected)
        assert torch.equal(found, d_x)


def test_in_place_what_others_hold_of_it() -> None:
    """Who uses qkv afterwards has the rotated values, and the gradient through the rotation; what was saved before is
    refused; the gradient from upstream keeps its values."""
    shape = Shape(1, 3, 2, 1, 16, 16, F32)
    run = shape.call(ops.rotary, may_overwrite=True)
    (d_y,) = upstream([shape.qkv])
    x = shape.qkv.clone().requires_grad_()
    (expected,) = torch.autograd.grad(shape.call(ops.rotary)(x), x, d_y)

    for qkv, whole in ((x * 1, lambda t: t), ((x * 1).flatten(0, 2), lambda t: t.view(x.shape))):
        run(whole(qkv))
        before = d_y.clone()
        assert torch.equal(torch.autograd.grad(whole(qkv), x, d_y)[0], expected)
        assert torch.equal(d_y, before)

    qkv = x * 1
    saved = qkv.square()
    run(qkv)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_in_place_only_where_it_may_be() -> None:
    """A leaf that needs its gradient, memory of which qkv is a part, strides, and the norm's input are left alone;
    without a gradient the memory is used all the same, and its version counted."""
    shape = Shape(2, 3, 2, 1, 16, 16, F32)
    run = shape.call(ops.rotary, may_overwrite=True)
    expected = shape.call(ops.rotary)(shape.qkv)
    wider = torch.zeros(2, 4, 4, 16)
    wider[:, 1:] = shape.qkv
    one_row = torch.cat([shape.qkv[:1], shape.qkv[:1]])
    for given in (shape.qkv.clone().requires_grad_(), wider[:, 1:], one_row[:1], shape.qkv[:1].expand(2, -1, -1, -1)):
        before = given.detach().clone()
        y = run(given)
        assert torch.equal(given, before) and y.data_ptr() != given.data_ptr()
        assert torch.equal(y[0], expected[0])
    normed = Shape(2, 3, 2, 1, 16, 16, F32, norm=True)
    y = normed.call(ops.rotary, may_overwrite=True)(*normed.args)
    assert y.data_ptr() != normed.qkv.data_ptr()
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            given = shape.qkv.clone()
            y = run(given)
            assert torch.equal(given, expected) and y.data_ptr() == given.data_ptr() and given._version == 1
    with torch.inference_mode():
        assert torch.equal(run(shape.qkv.clone()), expected)


# ---- dispatch -----------------------------------------------------------------------------------------------


@NORM
@pytest.mark.parametrize("grad", [True, False])
def test_the_kernels_run_and_no_reference(norm: bool, grad: bool) -> None:
    shape = Shape(2, 3, 2, 1, 16, 16, BF16, norm)
    args = [a.requires_grad_(grad) for a in shape.args]
    with kernels.no_reference(page), kernels.Spy() as spy:
        y = shape.call(ops.rotary)(*args)
        if grad:
            torch.autograd.grad(y, args, y.detach())
    entry = "rotary_norm" if norm else "rotary"
    assert spy.kernels == ([f"{entry}_forward", f"{entry}_backward"] if grad else [f"{entry}_forward"])
    assert not {name for name in spy.names if re.search("norm|mul|cat", name) and "fastgpt" not in name}


@NORM
def test_a_second_derivative_is_refused(norm: bool) -> None:
    shape = Shape(1, 3, 2, 1, 8, 8, F64, norm)
    args = [a.requires_grad_() for a in shape.args]
    for overwrite in (False, True):
        y = shape.call(ops.rotary, may_overwrite=overwrite)(args[0] * 1, *args[1:])
        with pytest.raises(RuntimeError, match="rotary: the kernels have no second derivative"):
            torch.autograd.grad(y.sum(), args, create_graph=True)


@pytest.mark.parametrize(("D", "dtype"), [(64, F64), (64, F32), (64, BF16), (96, BF16), (128, F16), (256, BF16)])
def test_the_norm_meets_no_bank_of_shared_memory_twice(D: int, dtype: torch.dtype) -> None:
    """Where its weights are kept, and where the sums for their gradients come together; the last D is the widest."""
    shape = Shape(1, 9, 6, 2, D, D, dtype, norm=True)
    with kernels.counted() as counts:
        outputs_and_gradients(shape.call(ops.rotary), shape.args)
    assert kernels.last_path()[0] == "vector" and len(counts) == 3, counts.keys()
    assert kernels.total(counts, "conflicts") == 0


@pytest.mark.parametrize("D", [16, 6])
def test_only_what_is_needed_is_computed(D: int) -> None:
    shape = Shape(1, 3, 2, 1, D, D, F32, norm=True)
    (d_y,) = upstream([shape.qkv])
    given = (d_y, shape.qkv, *shape.tables, None, *shape.weights, 2, 1, 1e-6)
    entry = torch.ops.fastgpt_emulated.rotary_norm_backward
    everything = entry(*given, True, True)
    for need_qkv, need_weights in ((True, False), (False, True)):
        with kernels.counted() as counts:
            found = entry(*given, need_qkv, need_weights)
        assert bool([name for name in counts if "sum" in name]) == need_weights
        for tensor, whole, needed in zip(found, everything, (need_qkv, need_weights, need_weights), strict=True):
            assert torch.equal(tensor, whole) if needed else tensor.numel() == 0


@pytest.mark.parametrize(("D", "dtype"), [(16, BF16), (6, F64)])
def test_opcheck(D: int, dtype: torch.dtype) -> None:
    """Schemas and fakes say what the entries do."""
    shape, entries = Shape(2, 3, 2, 1, D, 2, dtype, norm=True), torch.ops.fastgpt_emulated
    tables = [t.to(torch.promote_types(dtype, F32)) for t in shape.tables]
    at = (*tables, torch.tensor([0, 1, 0], dtype=torch.int32) if D == 16 else torch.ones(2, 3, dtype=torch.int64))
    torch.library.opcheck(entries.rotary_forward.default, (shape.qkv, *tables, None, 2, 1))
    torch.library.opcheck(entries.rotary_backward.default, (shape.qkv, *at, 2, 1))
    torch.library.opcheck(entries.rotary_forward_.default, (shape.qkv.clone(), *at, 2, 1))
    weighted = (*at, *shape.weights, 2, 1, 1e-6)
    torch.library.opcheck(entries.rotary_norm_forward.default, (shape.qkv, *weighted))
    for needs in ((True, True), (D == 16, D != 16)):
        torch.library.opcheck(entries.rotary_norm_backward.default, (shape.qkv, shape.qkv, *weighted, *needs))


def test_entries_refuse_what_would_leave_their_memory() -> None:
    entries, qkv, table = torch.ops.fastgpt_emulated, torch.ones(2, 3, 4, 8), torch.ones(5, 4)
    refused: list[tuple[str, Callable]] = [
        ("qkv must be", lambda: entries.rotary_forward(qkv, table, table, None, 3, 1)),
        ("qkv must be", lambda: entries.rotary_forward(qkv[0], table, table, None, 2, 1)),
        ("cos and sin", lambda: entries.rotary_forward(qkv, table, table[:4], None, 2, 1)),
        ("cos and sin", lambda: entries.rotary_forward(qkv, table.double(), table.double(), None, 2, 1)),
        ("cos and sin", lambda: entries.rotary_forward(qkv[..., :6], table, table, None, 2, 1)),
        ("positions must", lambda: entries.rotary_forward(qkv, table, table, torch.ones(2).long(), 2, 1)),
        ("positions must", lambda: entries.rotary_forward(qkv, table, table, torch.ones(3), 2, 1)),
        ("contiguous", lambda: entries.rotary_forward_(qkv.mT.contiguous().mT, table, table, None, 2, 1)),
        ("q_weight must have shape", lambda: entries.rotary_norm_forward(
            qkv, table, table, None, torch.ones(7), torch.ones(8), 2, 1, 1e-6)),
        ("d_y must have", lambda: entries.rotary_norm_backward(
            qkv[:1], qkv, table, table, None, torch.ones(8), torch.ones(8), 2, 1, 1e-6, True, True)),
    ]  # fmt: skip
    for message, call in refused:
        with pytest.raises(RuntimeError, match=message):
            call()


@NORM
def test_compiled_it_may_be_told_to_overwrite(norm: bool) -> None:
    """A compiler plans memory by itself: the op is functional then."""
    shape = Shape(3, 7, 2, 1, 16, 16, BF16, norm)
    ours, torchs = shape.call(ops.rotary, may_overwrite=True), shape.call(reference)
    check_compiled(lambda x, *w: ours(x * 2, *w), lambda x, *w: torchs(x * 2, *w), shape.args, "may_overwrite")


@NORM
def test_autocast(norm: bool) -> None:
    """As on the reference: the dtype of qkv stays, and weights may have another."""
    shape = Shape(1, 3, 2, 1, 16, 16, BF16, norm)
    weights = [w.half() for w in shape.weights]
    with torch.autocast("cpu", dtype=BF16):
        y, wanted = (shape.call(f)(shape.qkv, *weights) for f in (ops.rotary, reference))
    assert y.dtype == wanted.dtype == BF16
    torch.testing.assert_close(y, wanted)


# ---- the same every time ------------------------------------------------------------------------------------


@NORM
@pytest.mark.parametrize("D", [32, 6])
def test_bitwise_the_same_over_schedules(D: int, norm: bool) -> None:
    shape = Shape(2, 19, 3, 1, D, D, BF16, norm)
    runs = []
    for seed in (1, 2, 3):
        with native.emulated(seed=seed):
            runs.append(outputs_and_gradients(shape.call(ops.rotary), shape.args))
            runs[-1].append(shape.call(ops.rotary, may_overwrite=True)(shape.qkv.clone(), *shape.weights))
    assert kernels.same(runs[0], runs[1]) and kernels.same(runs[1], runs[2])
    assert not native.findings()


# ---- a model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_model_turns_its_projection_in_place(qk_norm: bool, bias: bool) -> None:
    """And autograd makes no copy of the gradient for it."""
    config = ModelConfig.preset(
        "tiny", vocab_size=16, block_size=8, n_layer=1, n_embd=32, n_head=2, n_kv_head=1, positions="rope",
        qk_norm=qk_norm, qkv_bias=bias,
    )  # fmt: skip
    model = GPT(config, torch.Generator().manual_seed(0))
    tokens = torch.arange(8)[None]
    with native.emulated(only=("rotary", "embedding")), kernels.Spy() as spy:
        model(tokens, tokens).backward()
    entry = "rotary_norm" if qk_norm else "rotary"
    forward = "rotary_norm_forward" if qk_norm else "rotary_forward_"
    assert spy.kernels == ["embedding_forward", forward, f"{entry}_backward", "embedding_backward"]
    with native.emulated(only=("rotary",)):
        found = gradients(model, tokens)
    with native.emulated(only=()):
        expected = gradients(model, tokens)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def gradients(model: GPT, tokens: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(tokens, tokens).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


# ---- how many --------------------------------------------------------------------------------------------------

KERNELS = 3 * 4 * 2 + 4 + 2  # three kernels, four dtypes, vectors and not; generic partial sums; their sums


def test_instantiations_are_few() -> None:
    """Each one costs everybody's build time, for every architecture."""
    found = kernels.instantiations(r"rotary_\w*kernel")
    assert len(found) == KERNELS, sorted(found)

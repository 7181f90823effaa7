"""The kernels behind swiglu and gelu: which serve a call, that they are the same every time, how many there are.

That they are right is shown by test_swiglu.py and test_gelu.py, all of whose tests run on them too.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import native, ops
from tests.ops import kernels
from tests.rule import LAYOUTS, LOW_PRECISION, check_by_rule, in_layout, outputs_and_gradients, randn

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])


@pytest.fixture(autouse=True)
def emulated():
    with kernels.at(kernels.EMULATED):
        yield


def torch_swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    if up is None:
        gate, up = gate.chunk(2, -1)
    return F.silu(gate) * up


# What is called, torch's own, the op, and how many times its input is as wide as what comes out.
FORMS: dict[str, tuple[Callable, Callable, str, int]] = {
    "packed": (ops.swiglu, torch_swiglu, "swiglu", 2),
    "separate": (ops.swiglu, torch_swiglu, "swiglu", 1),
    "gelu": (ops.gelu, F.gelu, "gelu", 1),
    "tanh": (partial(ops.gelu, approximate="tanh"), partial(F.gelu, approximate="tanh"), "gelu", 1),
}
ALL = pytest.mark.parametrize("form", FORMS)


def inputs(form: str, *shape: int, dtype: torch.dtype) -> list[Tensor]:
    """For an output of this shape."""
    shape = (*shape[:-1], shape[-1] * FORMS[form][3])
    count = 2 if form == "separate" else 1
    return [2 * randn(*shape, dtype=dtype, seed=seed) for seed in range(1, 1 + count)]


def check(form: str, args: list[Tensor], what: str) -> None:
    check_by_rule(FORMS[form][0], FORMS[form][1], args, f"{form}, {what}")


# ---- sizes --------------------------------------------------------------------------------------------------


@ALL
@DTYPES
def test_widths_at_the_edges_of_vectors_and_blocks(form: str, dtype: torch.dtype) -> None:
    """A vector and one element more or less; all that a block of 256 threads has, and a vector or an element more or
    less; the same where the elements are single."""
    vector = 16 // dtype.itemsize
    block = 256 * vector
    for width in (1, vector - 1, vector, vector + 1, 255, 257, block - vector, block, block + 1, block + vector):
        check(form, inputs(form, 1, width, dtype=dtype), f"width {width}")
        whole = width % vector == 0
        assert kernels.last_path()[0] == ("vector" if whole else "generic"), width


@ALL
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (3, 8), (300, 24), (300, 25), (7, 2056), (2**16 + 3, 8)])
def test_rows_shared_and_split_by_blocks(form: str, rows: int, width: int) -> None:
    check(form, inputs(form, rows, width, dtype=BF16), f"{rows} rows of {width}")


@ALL
def test_a_row_may_lie_beyond_two_billion_elements(form: str) -> None:
    """Its place is counted in 64 bits. Nothing between the two rows is touched, so it takes no memory."""
    near = inputs(form, 2, 64, dtype=BF16)
    far = [torch.empty(2**31 + x.shape[1], dtype=BF16).as_strided(x.shape, (2**31, 1)).copy_(x) for x in near]
    d_y = torch.ones(2, 64, dtype=BF16)
    far_d_y = torch.empty(2**31 + 64, dtype=BF16).as_strided((2, 64), (2**31, 1)).copy_(d_y)
    with native.emulated(checked=False):  # the checks keep a byte for each element between
        got, expected = ([FORMS[form][0](*args)] for args in (far, near))
        got += gradients(form, far, far_d_y)
        expected += gradients(form, near, d_y)
    assert kernels.same(got, expected)


def gradients(form: str, args: list[Tensor], d_y: Tensor) -> list[Tensor]:
    if FORMS[form][2] == "gelu":
        return [torch.ops.fastgpt_emulated.gelu_backward(d_y, *args, form == "tanh")]
    gate, up = args if len(args) == 2 else (args[0], None)
    found = torch.ops.fastgpt_emulated.swiglu_backward(d_y, gate, up, True, up is not None)
    return [g for g in found if g.numel()]


def test_places_are_counted_in_64_bits() -> None:
    """A tensor of so many elements without gaps is more than a test can hold, so what counts them is read."""
    text = (kernels.CSRC / "device/elementwise.cuh").read_text()
    assert re.findall(r"[^(]\bblockIdx", text) == [] and "int64_t(blockIdx.x) * blockDim.x" in text


# ---- which path ---------------------------------------------------------------------------------------------


def one_off(x: Tensor) -> Tensor:
    return in_layout(x, "offset")


def gap(x: Tensor) -> Tensor:
    """The same in rows that are one element too far from each other."""
    return torch.cat([x, x[:, :1]], 1)[:, :-1]


PATHS = {
    "16-byte accesses": lambda x: x,
    "the width is no multiple of 16 bytes": lambda x: x[:, :-2],
    "a tensor does not begin at a multiple of 16 bytes": one_off,
    "a row does not begin at a multiple of 16 bytes": gap,
}


@ALL
@DTYPES
@pytest.mark.parametrize("reason", PATHS)
def test_choose_path_says_which_and_why(form: str, reason: str, dtype: torch.dtype) -> None:
    if dtype == F64 and reason == "the width is no multiple of 16 bytes" and form != "packed":
        return  # two elements less are a vector less
    args = inputs(form, 4, 32, dtype=dtype)
    # Of two tensors it is enough that one is so.
    args[-1] = PATHS[reason](args[-1])
    args = [a[:, : args[-1].shape[1]] for a in args]
    path = "vector" if reason == "16-byte accesses" else "generic"
    check(form, args, reason)  # the gradient from upstream has gaps, and is made contiguous
    FORMS[form][0](*args)
    assert kernels.last_path() == (path, reason)
    d_y = torch.ones(4, args[0].shape[1] // FORMS[form][3], dtype=dtype)
    gradients(form, args, d_y)
    assert kernels.last_path() == (path, reason)


@ALL
@pytest.mark.parametrize("reason", ["a tensor does not begin at a multiple of 16 bytes",
                                    "a row does not begin at a multiple of 16 bytes"])  # fmt: skip
def test_the_gradient_from_upstream_decides_too(form: str, reason: str) -> None:
    args, d_y = inputs(form, 4, 32, dtype=BF16), randn(4, 32, dtype=BF16)
    expected = gradients(form, args, d_y)
    got = gradients(form, args, PATHS[reason](d_y))
    assert kernels.last_path() == ("generic", reason)
    assert kernels.same(got, expected), "both paths do the same to an element"


def test_contiguous_rows_are_one() -> None:
    """So widths that are no multiple of a vector keep the vectors where all of a tensor's elements are neighbours."""
    x = randn(8, 25, dtype=BF16)
    for y, wanted in ((ops.gelu(x), F.gelu(x)), (ops.swiglu(x, x), torch_swiglu(x, x))):
        torch.testing.assert_close(y, wanted)
        assert kernels.last_path()[0] == "vector"
    ops.swiglu(x, gap(x))
    assert kernels.last_path()[0] == "generic"


def laid_out_as(x: Tensor, layout: str) -> Tensor:
    if layout == "packed":  # like the keys in (B, T, Q + K + V, D)
        return torch.cat([x[:, :, None] + 1, x[:, :, None], x[:, :, None] - 1], 2)[:, :, 1]
    return in_layout(x, layout)


@ALL
@DTYPES
@pytest.mark.parametrize("width", [40, 41])
def test_layouts(form: str, dtype: torch.dtype, width: int) -> None:
    """Bitwise the same, whatever path a layout leads to."""
    args = inputs(form, 2, 3, width, dtype=dtype)
    for i in range(len(args)):
        for layout in (*LAYOUTS, "packed"):
            laid_out = [laid_out_as(a, layout) if j == i else a for j, a in enumerate(args)]
            got = outputs_and_gradients(FORMS[form][0], laid_out)
            expected = outputs_and_gradients(FORMS[form][0], [a.contiguous() for a in laid_out])
            assert kernels.same(got, expected), f"input {i} {layout}"


def test_one_tensor_may_be_given_twice() -> None:
    x = randn(5, 16, dtype=F32).requires_grad_()
    y = ops.swiglu(x, x)
    y.backward(torch.ones_like(y))
    twin = x.detach().clone().requires_grad_()
    y2 = torch_swiglu(twin, twin)
    y2.backward(torch.ones_like(y))
    torch.testing.assert_close(y, y2)
    torch.testing.assert_close(x.grad, twin.grad)


# ---- values -------------------------------------------------------------------------------------------------


@ALL
@DTYPES
def test_every_kind_of_value(form: str, dtype: torch.dtype) -> None:
    """Zeros of both signs, subnormal, saturating, the largest and not finite: gradients come out as torch's, too."""
    info = torch.finfo(dtype)
    values = [0.0, -0.0, info.tiny / 2, -info.tiny, 1e-3, -1e-3, 1.0, -1.0, 20.0, -20.0, 150.0, -150.0]
    if FORMS[form][2] == "swiglu":
        values += [info.max / 2, -info.max / 2]
    values += [float("inf"), float("-inf"), float("nan")]
    for size in (24, 17):  # vectors, and single elements
        gate = torch.tensor(values + [1.0] * (size - len(values)), dtype=dtype)
        up = torch.full_like(gate, 0.75)
        args = {"packed": [torch.cat([gate, up])], "separate": [gate, up]}.get(form, [gate])
        ours = outputs_and_gradients(FORMS[form][0], args)
        theirs = outputs_and_gradients(FORMS[form][1], [x.double() for x in args])  # float32: NaN at +inf with AVX-512
        for a, b in zip(ours, (x.to(dtype) for x in theirs), strict=True):
            assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf()), (args, a, b)
        check(form, [a[..., :12] if form != "packed" else torch.cat([gate[:12], up[:12]]) for a in args], "finite")


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("form", ["packed", "gelu", "tanh"])
def test_every_16_bit_number(form: str, dtype: torch.dtype) -> None:
    """By the rule in each range of values alone, so that none hides behind larger ones."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[every.isfinite()].sort().values
    for low, high in ((-20, -4), (-4, -2), (-2, -0.5), (-0.5, -1e-2), (-1e-2, 1e-2), (1e-2, 1), (1, 4), (4, 1e4)):
        x = every[(every > low) & (every <= high)]
        x = x[:: max(1, len(x) // 2000)]
        check(form, [torch.cat([x, torch.ones_like(x)]) if form == "packed" else x], f"{low} to {high}")


# ---- dispatch -----------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("grad", [True, False])
def test_the_kernels_run_and_no_reference(form: str, grad: bool) -> None:
    function, _, op, _ = FORMS[form]
    args = [a.requires_grad_(grad) for a in inputs(form, 5, 48, dtype=BF16)]
    with kernels.no_reference(importlib.import_module(f"fastgpt.ops.{op}")), kernels.Spy() as spy:
        y = function(*args)
        if grad:
            torch.autograd.grad(y, args, y.detach())
    assert spy.kernels == ([f"{op}_forward", f"{op}_backward"] if grad else [f"{op}_forward"])
    assert not {name for name in spy.names if re.search(r"silu|gelu|sigmoid|mul", name) and "fastgpt" not in name}


@ALL
def test_a_second_derivative_is_refused(form: str) -> None:
    args = [a.requires_grad_() for a in inputs(form, 3, 8, dtype=F64)]
    with pytest.raises(RuntimeError, match=f"{FORMS[form][2]}: the kernels have no second derivative"):
        torch.autograd.grad(FORMS[form][0](*args).sum(), args, create_graph=True)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("width", [24, 25])
def test_only_the_gradient_that_is_needed(dtype: torch.dtype, width: int) -> None:
    """Neither computed nor written otherwise; and up is not read where only its own gradient is wanted."""
    gate, up = inputs("separate", 5, width, dtype=dtype)
    d_y = randn(5, width, dtype=dtype)
    both = torch.ops.fastgpt_emulated.swiglu_backward(d_y, gate, up, True, True)
    for needed, tensors in ((True, True), 5), ((True, False), 4), ((False, True), 3):
        args = [a.detach().requires_grad_(n) for a, n in zip((gate, up), needed, strict=True)]
        y = ops.swiglu(*args)
        with kernels.counted() as counts:
            y.backward(d_y)
        assert kernels.total(counts, "bytes") == tensors * d_y.nbytes
        for a, n, gradient in zip(args, needed, both, strict=True):
            assert a.grad is None if not n else torch.equal(a.grad, gradient)


CASES = {
    "vectors": lambda dtype: randn(2, 3, 16, dtype=dtype),
    "single elements": lambda dtype: randn(3, 10, dtype=dtype),
    "strided": lambda dtype: randn(3, 32, dtype=dtype)[:, ::2],
    "none": lambda dtype: randn(0, 8, dtype=dtype),
}


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str) -> None:
    """Schemas and fakes say what the entries do."""
    x, entries = CASES[case](F64 if case == "single elements" else BF16), torch.ops.fastgpt_emulated
    torch.library.opcheck(entries.gelu_forward.default, (x, True))
    torch.library.opcheck(entries.gelu_backward.default, (x, x, False))
    torch.library.opcheck(entries.swiglu_forward.default, (x, None))
    torch.library.opcheck(entries.swiglu_forward.default, (x, x))
    torch.library.opcheck(entries.swiglu_backward.default, (x[..., ::2], x, None, True, False))
    for needs in ((True, False), (False, True)):
        torch.library.opcheck(entries.swiglu_backward.default, (x, x, x, *needs))


def test_entries_refuse_what_would_leave_their_memory() -> None:
    entries = torch.ops.fastgpt_emulated
    x = torch.ones(3, 8)
    with pytest.raises(RuntimeError, match="up must have the rows, dtype and device of gate, and 8 columns"):
        entries.swiglu_forward(x, torch.ones(2, 8))
    with pytest.raises(RuntimeError, match="up must have the rows"):
        entries.swiglu_forward(x, torch.ones(3, 7))
    with pytest.raises(RuntimeError, match="d_y must have the rows, dtype and device of gate, and 4 columns"):
        entries.swiglu_backward(x, x, None, True, False)
    with pytest.raises(RuntimeError, match="even last dimension"):
        entries.swiglu_forward(torch.ones(3, 7), None)
    with pytest.raises(RuntimeError, match="d_y must have the shape, dtype and device of x"):
        entries.gelu_backward(torch.ones(24), x, True)
    with pytest.raises(RuntimeError, match="at least one dimension"):
        entries.gelu_forward(torch.ones(()), True)
    for call in (lambda: entries.gelu_forward(x.int(), True), lambda: entries.swiglu_forward(x.int(), None)):
        with pytest.raises(RuntimeError, match="float64, float32, bfloat16 or float16"):
            call()


@ALL
def test_compiled_once_for_three_batch_sizes(form: str) -> None:
    torch._dynamo.reset()
    compilations = []

    def aot_eager(graph: Any, example: Any) -> Any:
        compilations.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    function, torchs, op, _ = FORMS[form]
    compiled = torch.compile(function, fullgraph=True, backend=aot_eager, dynamic=True)
    with kernels.counted() as counts:
        for rows in (3, 5, 8):
            check_by_rule(compiled, torchs, inputs(form, rows, 4, 32, dtype=BF16), f"compiled, {rows} rows")
    assert len(compilations) == 1
    assert all([name for name in counts if f"{op}_{way}_kernel" in name] for way in ("forward", "backward"))


@ALL
@pytest.mark.slow
def test_compiled_by_inductor(form: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(FORMS[form][0], fullgraph=True)
    check_by_rule(compiled, FORMS[form][1], inputs(form, 4, 32, dtype=BF16), "inductor")


@ALL
def test_autocast(form: str) -> None:
    """As on the reference: dtypes stay, and two that differ are promoted."""
    function, _, op, _ = FORMS[form]
    reference = importlib.import_module(f"fastgpt.ops.{op}").reference
    args = inputs(form, 6, 32, dtype=BF16)
    if form == "separate":
        args[1] = args[1].float()
    with torch.autocast("cpu", dtype=BF16):
        y, wanted = function(*args), reference(*args)
    assert y.dtype == wanted.dtype == (F32 if form == "separate" else BF16)


# ---- the same every time ------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("width", [40, 41])
def test_bitwise_the_same_over_schedules(form: str, width: int) -> None:
    runs = []
    for seed in (1, 2, 3):
        with native.emulated(seed=seed):
            runs.append(outputs_and_gradients(FORMS[form][0], inputs(form, 300, width, dtype=BF16)))
    assert kernels.same(runs[0], runs[1]) and kernels.same(runs[1], runs[2])
    assert not native.findings()


# ---- how many ------------------------------------------------------------------------------------------------

KERNELS = 2 * 2 * 4 * 2  # two ops, forward and backward, four dtypes, vectors and single elements


def test_instantiations_are_few() -> None:
    """Each one costs everybody's build time, for every architecture."""
    found = kernels.instantiations(r"(?:swiglu|gelu)_\w+_kernel")
    assert len(found) == KERNELS, sorted(found)

"""The kernels behind layer_norm and rms_norm: which serve a call, that they are the same every time, how many there
are.

That they are right is shown by test_layer_norm.py and test_rms_norm.py, all of whose tests run on them too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import native, ops
from fastgpt.config import ModelConfig
from fastgpt.model import GPT
from tests.ops import kernels
from tests.rule import (
    LAYOUTS,
    LOW_PRECISION,
    check_by_rule,
    in_layout,
    outputs_and_gradients,
    randn,
)

LN, RMS = "layer_norm", "rms_norm"
BOTH = pytest.mark.parametrize("op", [LN, RMS])
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def emulated():
    with kernels.at(kernels.EMULATED):
        yield


def function(op: str) -> Callable:
    """x, weight, residual -> outputs; layer_norm with the weight, reversed, for its bias too."""
    if op == RMS:
        return lambda x, weight, residual=None: ops.rms_norm(x, weight, residual=residual)
    return lambda x, weight, residual=None: ops.layer_norm(x, weight, weight.flip(0), residual=residual)


def torchs(op: str) -> Callable:
    def norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
        r = x if residual is None else x + residual
        wide = r.float() if r.dtype in LOW_PRECISION else r  # statistics in 16 bits are no bar to be held to
        weight = weight.to(wide.dtype)
        if op == RMS:
            y = torch.nn.functional.rms_norm(wide, weight.shape, weight, 1e-6)
        else:
            y = torch.nn.functional.layer_norm(wide, weight.shape, weight, weight.flip(0), 1e-5)
        return y.to(r.dtype) if residual is None else (y.to(r.dtype), r)

    return norm


def inputs(*shape: int, dtype: torch.dtype) -> list[Tensor]:
    """x, weight, residual."""
    return [
        randn(*shape, dtype=dtype, seed=1) + 0.5,
        randn(shape[-1], dtype=dtype, seed=2),
        randn(*shape, dtype=dtype, seed=3),
    ]


# ---- every tile, and its edges --------------------------------------------------------------------------

# The last width of each tile, and a vector less and more: norm.cu says which they are. The last one is generic.
EDGES = {F32: (384, 1024, 4096), BF16: (768, 2048, 8192)}
WIDTHS = [
    (dtype, edge + step * 16 // dtype.itemsize)
    for dtype, edges in EDGES.items()
    for edge in edges
    for step in (-1, 0, 1)
]


@BOTH
@pytest.mark.parametrize(("dtype", "C"), WIDTHS)
def test_widths_at_the_edges_of_tiles(op: str, dtype: torch.dtype, C: int) -> None:
    check_by_rule(function(op), torchs(op), inputs(3, C, dtype=dtype), f"C={C}")
    assert kernels.last_path()[0] == ("generic" if EDGES[dtype][-1] < C else "vector")


@BOTH
@pytest.mark.parametrize(("rows", "C"), [(1, 24), (0, 24), (300, 24), (300, 37), (40, 1032), (20, 1041), (9, 2064)])
def test_every_block_has_several_rows_or_none(op: str, rows: int, C: int) -> None:
    """Of each tile, and of the generic path; the emulated device has two multiprocessors."""
    check_by_rule(function(op), torchs(op), inputs(rows, C, dtype=BF16), f"{rows} rows of {C}")


@pytest.mark.parametrize("C", [48, 51])
def test_a_parameter_in_another_dtype_than_the_other(C: int) -> None:
    x, weight, _ = inputs(9, C, dtype=BF16)
    mixed = [x, weight.float(), weight]
    check_by_rule(
        lambda x, w, b: ops.layer_norm(x, w, b),
        lambda x, w, b: torch.nn.functional.layer_norm(x.to(wide(x)), (C,), w.to(wide(x)), b.to(wide(x))).to(x.dtype),
        mixed,
        "float32 weight, bfloat16 bias",
    )
    assert [g.dtype for g in outputs_and_gradients(ops.layer_norm, mixed)] == [BF16, BF16, F32, BF16]


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else F32


def test_a_row_may_lie_beyond_two_billion_elements() -> None:
    """Its place is counted in 64 bits. Nothing between the two rows is touched, so it takes no memory."""
    far = torch.empty(2**31 + 64, dtype=BF16).as_strided((2, 64), (2**31, 1))
    near = inputs(2, 64, dtype=BF16)[0]
    far.copy_(near)
    weight = torch.ones(64, dtype=BF16)
    with native.emulated(checked=False):  # the checks keep a byte for each element between
        assert kernels.same([ops.rms_norm(far, weight)], [ops.rms_norm(near, weight)])


# ---- which path ---------------------------------------------------------------------------------------


def offset(x: Tensor) -> Tensor:
    return in_layout(x, "offset")


PATHS = {
    "16-byte accesses": lambda x, w: (x, w),
    "float64": lambda x, w: (x.double(), w.double()),
    "the width is no multiple of 16 bytes": lambda x, w: (x[:, :-1].contiguous(), w[:-1].contiguous()),
    "a row is too wide for registers": lambda x, w: (x.repeat(1, 512), w.repeat(512)),
    "a tensor does not begin at a multiple of 16 bytes": lambda x, w: (offset(x), w),
    "a row does not begin at a multiple of 16 bytes": lambda x, w: (torch.cat([x, x[:, :1]], 1)[:, :-1], w),
    "weight or bias does not begin at a multiple of 16 bytes": lambda x, w: (x, offset(w)),
}


@BOTH
@pytest.mark.parametrize("reason", PATHS)
def test_choose_path_says_which_and_why(op: str, reason: str) -> None:
    x, weight = PATHS[reason](*inputs(4, 32, dtype=BF16)[:2])
    path = "vector" if reason == "16-byte accesses" else "generic"
    run = ops.rms_norm if op == RMS else ops.layer_norm
    y = run(x.requires_grad_(), weight)
    assert kernels.last_path() == (path, reason)
    y.sum().backward()
    # The gradient from upstream is an expanded scalar, whose rows begin anywhere; the backward's path may differ.
    assert x.grad is not None and kernels.last_path()[0] in ("vector", "generic")


def laid_out_as(x: Tensor, layout: str) -> Tensor:
    if layout == "packed":  # like the keys in (B, T, Q + K + V, D)
        return torch.cat([x[:, :, None] + 1, x[:, :, None], x[:, :, None] - 1], 2)[:, :, 1]
    return in_layout(x, layout)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, F32, BF16])
@pytest.mark.parametrize("C", [40, 41])
def test_layouts(op: str, dtype: torch.dtype, C: int) -> None:
    """Bitwise the same on one path; across paths, which an offset leads to, within the rule."""
    args = inputs(2, 3, C, dtype=dtype)
    for i in range(3):
        for layout in (*LAYOUTS, "packed"):
            if args[i].dim() == 1 and layout in ("packed", "expanded"):
                continue
            laid_out = [laid_out_as(a, layout) if j == i else a for j, a in enumerate(args)]
            if layout == "offset" and C == 40 and dtype != torch.float64:
                check_by_rule(function(op), torchs(op), laid_out, f"input {i}, one element off")
                continue
            got = outputs_and_gradients(function(op), laid_out)
            expected = outputs_and_gradients(function(op), [a.contiguous() for a in laid_out])
            assert kernels.same(got, expected), f"input {i} {layout}"


def test_a_weight_of_fewer_bits_than_the_rows() -> None:
    """The page refuses it, the entry takes it: 16 bytes of weights would then be those of more columns than of rows."""
    x, weight, _ = inputs(5, 12, dtype=F32)
    y, _, rstd = torch.ops.fastgpt_emulated.rms_norm_forward(x, None, weight.bfloat16(), 1e-6)
    assert kernels.last_path() == ("generic", "weight or bias has fewer bits than the rows")
    torch.testing.assert_close(y, torchs(RMS)(x, weight.bfloat16().float()))
    torch.ops.fastgpt_emulated.rms_norm_backward(x, None, x, weight.bfloat16(), rstd, True, True)
    assert kernels.last_path()[0] == "generic"


@BOTH
def test_one_tensor_may_be_given_twice(op: str) -> None:
    x, weight, _ = inputs(5, 16, dtype=F32)
    x.requires_grad_()
    y, total = function(op)(x, weight, x)
    torch.autograd.backward([y, total], [torch.ones_like(y), torch.ones_like(y)])
    doubled = x.detach().clone().requires_grad_()
    y2, total2 = function(op)(doubled, weight, doubled.detach().clone())
    torch.autograd.backward([y2, total2], [torch.ones_like(y), torch.ones_like(y)])
    assert torch.equal(y, y2) and torch.equal(total, total2) and torch.equal(x.grad, 2 * doubled.grad)


# ---- dispatch -------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("grad", [True, False])
def test_the_kernels_run_and_no_reference(op: str, grad: bool) -> None:
    x, weight, residual = (a.requires_grad_(grad) for a in inputs(5, 48, dtype=BF16))
    with kernels.no_reference(importlib.import_module(f"fastgpt.ops.{op}")), kernels.Spy() as spy:
        y, total = ops.rms_norm(x, weight, residual=residual) if op == RMS else ops.layer_norm(
            x, weight, weight, residual=residual
        )  # fmt: skip
        if grad:
            torch.autograd.grad([y, total], [x, weight, residual], [y.detach(), total.detach()])
    assert spy.kernels == ([f"{op}_forward", f"{op}_backward"] if grad else [f"{op}_forward"])
    assert not {name for name in spy.names if "norm" in name and not name.startswith("fastgpt")}


@BOTH
def test_a_second_derivative_is_refused(op: str) -> None:
    x, weight, _ = inputs(3, 8, dtype=torch.float64)
    x.requires_grad_()
    y = function(op)(x, weight)
    with pytest.raises(RuntimeError, match=f"{op}: the kernels have no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@BOTH
def test_only_what_is_needed_is_computed(op: str) -> None:
    """And where only x + residual was used, no kernel runs."""
    x, weight, residual = inputs(5, 48, dtype=F32)
    x.requires_grad_()
    with kernels.Spy() as spy:
        y, total = function(op)(x, weight, residual)
        (gradient,) = torch.autograd.grad(total.sum(), x, retain_graph=True)
        assert torch.equal(gradient, torch.ones_like(x)) and spy.kernels == [f"{op}_forward"]
        with kernels.counted() as counts:
            torch.autograd.grad(y.sum(), x)
    assert [name for name in counts if "backward" in name] and not [name for name in counts if "partials" in name]


CASES = {
    "plain": lambda dtype: (randn(3, 5, dtype=dtype), None, randn(5, dtype=dtype)),
    "residual": lambda dtype: (randn(2, 3, 8, dtype=dtype), randn(2, 3, 8, dtype=dtype, seed=1), randn(8, dtype=dtype)),
    "none": lambda dtype: (randn(0, 8, dtype=dtype), None, randn(8, dtype=F32)),
}


@pytest.mark.parametrize("dtype", [torch.float64, BF16])
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str, dtype: torch.dtype) -> None:
    """Schemas and fakes say what the entries do."""
    if case == "none" and dtype == torch.float64:
        dtype = F32
    x, residual, weight = CASES[case](dtype)
    entries = torch.ops.fastgpt_emulated
    bias = None if case == "plain" else weight
    args = (x, residual, weight, bias, 1e-5)
    torch.library.opcheck(entries.layer_norm_forward.default, args)
    _, new_residual, mean, rstd = entries.layer_norm_forward(*args)
    r = x if residual is None else new_residual
    needs = (True, case != "plain", True)
    torch.library.opcheck(entries.layer_norm_backward.default, (x, residual, r, weight, bias, mean, rstd, *needs))
    torch.library.opcheck(entries.rms_norm_forward.default, (x, residual, weight, 1e-5))
    torch.library.opcheck(entries.rms_norm_forward.default, (x, residual, None, 1e-5))
    torch.library.opcheck(entries.rms_norm_backward.default, (x, residual, r, weight, rstd, True, False))
    torch.library.opcheck(entries.rms_norm_backward.default, (x, residual, r, None, rstd, True, False))


def test_entries_refuse_what_would_leave_their_memory() -> None:
    entries = torch.ops.fastgpt_emulated
    x, weight = torch.ones(3, 8), torch.ones(8)
    with pytest.raises(RuntimeError, match="residual must have the shape"):
        entries.rms_norm_forward(x, torch.ones(2, 8), weight, 1e-6)
    with pytest.raises(RuntimeError, match=r"weight must have shape \(8,\)"):
        entries.rms_norm_forward(x, None, torch.ones(7), 1e-6)
    with pytest.raises(RuntimeError, match="rstd must be what the forward returned"):
        entries.rms_norm_backward(x, None, x, weight, torch.ones(2), True, True)
    with pytest.raises(RuntimeError, match="float64, float32, bfloat16 or float16"):
        entries.rms_norm_forward(x.int(), None, None, 1e-6)


@BOTH
def test_compiled_once_for_three_batch_sizes(op: str) -> None:
    torch._dynamo.reset()
    compilations = []

    def aot_eager(graph: Any, example: Any) -> Any:
        compilations.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    compiled = torch.compile(function(op), fullgraph=True, backend=aot_eager, dynamic=True)
    with kernels.counted() as counts:
        check_by_rule(compiled, torchs(op), inputs(3, 4, 32, dtype=BF16), "compiled")
        first = len(compilations)
        for rows in (5, 8):
            check_by_rule(compiled, torchs(op), inputs(rows, 4, 32, dtype=BF16), f"compiled, {rows} rows")
    assert 0 < first == len(compilations)
    assert all([name for name in counts if f"norm_{direction}_kernel" in name] for direction in ("forward", "backward"))


@BOTH
@pytest.mark.slow
def test_compiled_by_inductor(op: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function(op), fullgraph=True)
    check_by_rule(compiled, torchs(op), inputs(4, 32, dtype=BF16), "inductor")


@BOTH
def test_autocast(op: str) -> None:
    """As on the reference: x and residual are promoted; a parameter may be in any dtype."""
    x, weight, residual = inputs(6, 32, dtype=BF16)
    with torch.autocast("cpu", dtype=BF16):
        y, total = function(op)(x, weight.half(), residual.float())
        plain = function(op)(x, weight.half())
    assert y.dtype == total.dtype == F32 and plain.dtype == BF16
    assert torch.equal(total, x.float() + residual.float())


# ---- the same every time ---------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("rows", "C"), [(70, 40), (70, 41), (20, 1032)])
def test_bitwise_the_same_over_schedules(op: str, rows: int, C: int) -> None:
    args = inputs(rows, C, dtype=BF16)
    runs = []
    for seed in (1, 2, 3):
        with native.emulated(seed=seed):
            runs.append(outputs_and_gradients(function(op), args))
    assert kernels.same(runs[0], runs[1]) and kernels.same(runs[1], runs[2])
    assert not native.findings()


# ---- a model --------------------------------------------------------------------------------------------------


# The norm and the activation of GPT-2, and of Llama.
MODELS = {
    "gpt2": ({"norm": "layernorm", "activation": "gelu_tanh"}, LN, "gelu"),
    "llama": ({"norm": "rmsnorm", "activation": "swiglu"}, RMS, "swiglu"),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_twenty_steps_of_a_tiny_gpt(model: str, dtype: torch.dtype) -> None:
    """By the rule for loss curves: its largest deviation from the float64 run is at most twice the reference's own."""
    form, norm, activation = MODELS[model]
    exact = losses(form, torch.float64, only=())
    reference = losses(form, dtype, only=())
    with kernels.Spy() as spy:
        found = losses(form, dtype, only=(norm, activation))
    calls = {norm: STEPS * (2 * LAYERS + 1), activation: STEPS * LAYERS}
    for op, count in calls.items():
        assert spy.kernels.count(f"{op}_forward") == spy.kernels.count(f"{op}_backward") == count
    assert len(spy.kernels) == 2 * sum(calls.values())
    assert exact[-1] < exact[0] - 0.5, "it learns"
    largest = {name: (run - exact).abs().max().item() for name, run in (("ours", found), ("torch", reference))}
    assert largest["ours"] <= 2 * largest["torch"], largest


STEPS, LAYERS = 20, 2


def losses(form: dict[str, Any], dtype: torch.dtype, only: tuple[str, ...]) -> Tensor:
    config = ModelConfig.preset(
        "tiny", **form, vocab_size=64, block_size=32, n_layer=LAYERS, n_embd=48, n_head=4, n_kv_head=4
    )
    model = GPT(config, torch.Generator().manual_seed(0)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-6)
    tokens = torch.randint(0, 64, (STEPS, 4, 33), generator=torch.Generator().manual_seed(1)).sort(-1).values
    curve = []
    with native.emulated(only=only, checked=False):
        for batch in tokens:
            loss = model(batch[:, :-1], batch[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.detach().double())
    return torch.stack(curve)


# ---- how many ------------------------------------------------------------------------------------------------

VECTOR_KERNELS = 2 * 3 * 3  # forward and backward, three dtypes, three tiles
GENERIC_KERNELS = 2 * 2 * 2 + 2  # forward and backward, two types to compute in, two widths; and the partial sums
SUMS = 2


def test_instantiations_are_few() -> None:
    """Each one costs everybody's build time, for every architecture."""
    found = kernels.instantiations(r"\bnorm_\w+_kernel")
    assert len(found) == VECTOR_KERNELS + GENERIC_KERNELS + SUMS, sorted(found)

"""What only a GPU can show of the kernels behind layer_norm and rms_norm; test_layer_norm.py and test_rms_norm.py run
on one too. Each takes seconds at most."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fastgpt import native
from tests.ops import kernels
from tests.ops.test_norm_kernels import BF16, BOTH, EDGES, F32, PATHS, WIDTHS, function, inputs, torchs
from tests.rule import LAYOUTS, assert_within_rule, check_by_rule, in_layout, outputs_and_gradients, poison

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
SHAPES = [(300, 768), (300, 771), (129, 2048), (65, 8192), (33, 8200)]  # a tile each, and both generic ones


@pytest.fixture(autouse=True)
def kernels_of_the_gpu() -> Iterator[None]:
    """No reference may stand in for them."""
    assert native.cuda_ops() >= {"layer_norm", "rms_norm"}, native.libraries()
    pages = [importlib.import_module(f"fastgpt.ops.{op}") for op in ("layer_norm", "rms_norm")]
    with kernels.no_reference(*pages):
        yield
    torch.cuda.empty_cache()


def on_gpu(*shape: int, dtype: torch.dtype, device: str = "cuda") -> list[Tensor]:
    return [x.to(device) for x in inputs(*shape, dtype=dtype)]


def both_ways(op: str, args: list[Tensor]) -> list[Tensor]:
    return outputs_and_gradients(function(op), args)


def prepared(op: str, args: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Outputs and gradients, for gradients from upstream that are there already: nothing is copied to the GPU."""
    for a in args:
        a.requires_grad_()
    upstream = [torch.randn_like(args[0]) for _ in range(2)]

    def step() -> list[Tensor]:
        outputs = function(op)(*args)
        return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, args, upstream)]

    return step


# ---- right ----------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("dtype", "C"), WIDTHS)
def test_widths_at_the_edges_of_tiles(op: str, dtype: torch.dtype, C: int) -> None:
    check_by_rule(function(op), torchs(op), on_gpu(3, C, dtype=dtype), f"C={C}")
    function(op)(*on_gpu(3, C, dtype=dtype))
    assert kernels.last_path("cuda")[0] == ("generic" if EDGES[dtype][-1] < C else "vector")


@BOTH
@pytest.mark.parametrize("rows", [0, 1, 131, 5000, 2**16 + 3])
def test_few_rows_and_many(op: str, rows: int) -> None:
    """More than the blocks that stay, and fewer."""
    for C in (8, 37, 768) if rows > 1000 else (8, 37, 768, 1032, 4096):
        check_by_rule(function(op), torchs(op), on_gpu(rows, C, dtype=F32), f"{rows} rows of {C}")


@BOTH
@pytest.mark.parametrize("reason", PATHS)
def test_choose_path_says_which_and_why(op: str, reason: str) -> None:
    x, weight = PATHS[reason](*on_gpu(4, 32, dtype=BF16)[:2])
    check_by_rule(function(op), torchs(op), [x, weight], reason)
    function(op)(x, weight)
    assert kernels.last_path("cuda") == ("vector" if reason == "16-byte accesses" else "generic", reason)


@BOTH
@pytest.mark.parametrize("C", [40, 41])
def test_layouts(op: str, C: int) -> None:
    args = on_gpu(2, 3, C, dtype=F32)
    for i, layout in ((i, layout) for i in (0, 2) for layout in LAYOUTS):
        laid_out = [in_layout(a, layout) if j == i else a for j, a in enumerate(args)]
        if layout == "offset" and C == 40:  # another path
            check_by_rule(function(op), torchs(op), laid_out, f"input {i}, one element off")
        else:
            expected = both_ways(op, [a.contiguous() for a in laid_out])
            assert kernels.same(both_ways(op, laid_out), expected), f"input {i} {layout}"


@BOTH
def test_dispatch_and_opcheck(op: str) -> None:
    args = on_gpu(5, 48, dtype=BF16)
    with kernels.Spy() as spy:
        both_ways(op, args)
    assert spy.kernels == [f"{op}_forward", f"{op}_backward"]
    assert {name.split("::")[0] for name in spy.names if "norm" in name} == {"fastgpt"}
    x, weight, residual = args
    parameters = (weight, weight) if op == "layer_norm" else (weight,)
    entry = getattr(torch.ops.fastgpt, f"{op}_forward").default
    torch.library.opcheck(entry, (x, residual, *parameters, 1e-5))


# ---- the same every time ----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("rows", "C"), SHAPES)
def test_bitwise_the_same_250_times(op: str, rows: int, C: int) -> None:
    step = prepared(op, on_gpu(rows, C, dtype=BF16))
    first = step()
    different = torch.zeros((), dtype=torch.int64, device="cuda")  # looked at once, so that the GPU is kept busy
    for _ in range(250):
        for a, b in zip(step(), first, strict=True):
            different += (a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)).sum()
    assert different.item() == 0


@BOTH
@pytest.mark.parametrize(("rows", "C"), SHAPES)
def test_memory_full_of_nan(op: str, rows: int, C: int) -> None:
    args = on_gpu(rows, C, dtype=BF16)
    expected = both_ways(op, args)
    torch.cuda.empty_cache()
    blocks = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]  # that the allocator hands out
    del blocks
    with poison():
        got = both_ways(op, args)
    assert kernels.same(got, expected) and all(x.isfinite().all() for x in got)


# ---- streams, graphs, devices ------------------------------------------------------------------------------


@BOTH
def test_another_stream(op: str) -> None:
    """Its inputs are written there, late: kernels on any other stream would read what was there before."""
    args = on_gpu(512, 768, dtype=BF16)
    expected = prepared(op, args)()  # which loads the kernels, too
    late = [torch.zeros_like(a).requires_grad_() for a in args]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles, some 30 ms
        with torch.no_grad():
            for to, a in zip(late, args, strict=True):
                to.copy_(a)
        y, total = function(op)(*late)
        assert not stream.query(), "it was waited for"
        d_x, *_ = torch.autograd.grad([y, total], late, [y.detach(), total.detach()])
    torch.cuda.synchronize()
    assert kernels.same([y.detach(), total.detach()], expected[:2])
    y, total = function(op)(*args)
    again, *_ = torch.autograd.grad([y, total], args, [y.detach(), total.detach()])
    assert kernels.same([d_x], [again])


@BOTH
@pytest.mark.parametrize("C", [768, 771])
def test_replay_of_a_graph(op: str, C: int) -> None:
    static = on_gpu(300, C, dtype=BF16)
    other = [a * 2 - 1 for a in static]
    step = prepared(op, static)
    graph, captured = kernels.captured(step)
    with torch.no_grad():
        for to, a in zip(static, other, strict=True):
            to.copy_(a)
    graph.replay()
    torch.cuda.synchronize()
    assert kernels.same([x.clone() for x in captured], step())


@BOTH
def test_a_device_that_is_not_the_current_one(op: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    assert torch.cuda.current_device() == 0
    args = on_gpu(300, 768, dtype=BF16)
    there = [a.to("cuda:1") for a in args]
    got = both_ways(op, there)
    assert torch.cuda.current_device() == 0 and all(x.device.index == 1 for x in got)
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert kernels.same([x.to("cuda:0") for x in got], both_ways(op, args))


# ---- more than 2^31 elements ---------------------------------------------------------------------------------


@pytest.mark.xdist_group("the GPU's memory")
@BOTH
@pytest.mark.parametrize("C", [4096, 4100 * 8 + 1])
def test_more_than_two_billion_elements(op: str, C: int) -> None:
    """The last rows are what they are alone, d_weight is a sum over all rows: of a gradient that is zero but there."""
    kernels.needs_memory(36)
    rows, last = 2**31 // C + 9, 5
    x = torch.empty(rows, C, dtype=BF16, device="cuda").normal_()
    weight = torch.ones(C, dtype=BF16, device="cuda")
    d_y = torch.zeros(rows, C, dtype=BF16, device="cuda")
    d_y[-last:] = torch.randn(last, C, device="cuda").to(BF16)

    def run(x: Tensor, d_y: Tensor) -> list[Tensor]:
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        y = function(op)(*leaves)
        d_x, d_weight = torch.autograd.grad(y, leaves, d_y)
        return [y.detach()[-last:].clone(), d_x[-last:].clone(), d_weight]

    assert x.numel() > 2**31
    whole = run(x, d_y)
    alone = run(x.detach()[-last:].clone(), d_y[-last:].clone())
    assert kernels.same(whole[:2], alone[:2])
    x, d_y = x.detach()[-last:], d_y[-last:]

    def of_torch(dtype: torch.dtype) -> Tensor:
        w = weight.detach().to(dtype).requires_grad_()
        return torch.autograd.grad(torchs(op)(x.to(dtype), w), w, d_y.to(dtype))[0]

    assert_within_rule(whole[2], of_torch(BF16), of_torch(torch.float64), "d_weight")


# ---- together with torch.compile -------------------------------------------------------------------------------


@BOTH
def test_compiled_by_inductor(op: str) -> None:
    compiled = kernels.by_inductor(function(op), on_gpu(4, 32, dtype=BF16))
    check_by_rule(compiled, torchs(op), on_gpu(4, 32, dtype=BF16), "inductor")

"""swiglu against F.silu, by the rule: the formulation that serves on a CPU, the plain reference, the kernels on the
emulator."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import native, ops
from fastgpt.ops.swiglu import reference
from tests.ops import checks, kernels
from tests.rule import RULE_DTYPES, check_by_rule, outputs_and_gradients, poison, randn

# F on either side of a 16-byte vector, odd, and wide.
WIDTHS = (1, 7, 8, 9, 769, 32768)


@pytest.fixture(params=[*((where, "public") for where in kernels.WHERE), ("cpu", "reference")], ids="-".join)
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    where, function = request.param
    with kernels.at(where) as device:
        yield device, function


@pytest.fixture
def device(served: tuple[str, str]) -> str:
    return served[0]


@pytest.fixture
def ours(served: tuple[str, str]) -> Callable:
    return {"public": ops.swiglu, "reference": reference}[served[1]]


def torchs(gate: Tensor, up: Tensor | None = None) -> Tensor:
    if up is None:
        gate, up = gate.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", RULE_DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rule(ours: Callable, width: int, dtype: torch.dtype, device: str) -> None:
    check_by_rule(ours, torchs, [3 * randn(5, 2 * width, dtype=dtype, device=device)], f"packed F={width}")


@pytest.mark.parametrize("dtype", RULE_DTYPES)
def test_rule_for_other_shapes(ours: Callable, dtype: torch.dtype, device: str) -> None:
    gate, up = (randn(4, 6, 33, dtype=dtype, device=device, seed=s) for s in (1, 2))
    check_by_rule(ours, torchs, [gate, up], "two tensors")
    check_by_rule(ours, torchs, [gate[0, 0, :32]], "one row")
    check_by_rule(ours, torchs, [randn(2**16 + 3, 4, dtype=dtype, device=device)], "many rows")


def test_packed_is_gate_then_up(ours: Callable, device: str) -> None:
    gate, up = (randn(3, 16, dtype=torch.float32, device=device, seed=s) for s in (1, 2))
    assert torch.equal(ours(torch.cat([gate, up], -1)), ours(gate, up))


def test_gradients(ours: Callable, device: str) -> None:
    twice = native.select(torch.ones(1, device=device), "swiglu") is None  # the kernels have no second derivative
    checks.check_gradients(ours, [randn(3, 6, device=device)], twice)
    checks.check_gradients(ours, [randn(2, 3, 1, device=device, seed=1), randn(2, 3, 1, device=device, seed=2)], twice)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(ours: Callable, dtype: torch.dtype, device: str) -> None:
    x = randn(6, 5, 38, dtype=dtype, device=device)
    checks.check_layouts(ours, [x])
    checks.check_layouts(ours, [x, x.flip(0)])
    checks.check_fake(ours, [x])


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty(ours: Callable, shape: tuple[int, ...], device: str) -> None:
    y, d_x = outputs_and_gradients(ours, [randn(*shape, dtype=torch.float32, device=device)])
    assert y.shape == (*shape[:-1], 4) and d_x.shape == shape


def test_non_finite(ours: Callable, device: str) -> None:
    checks.check_poisoned_rows(ours, torchs, randn(5, 24, dtype=torch.float32, device=device))
    big = torch.tensor([[-1e30, 1e30, 2.0, 3.0]], device=device)
    check_by_rule(ours, torchs, [big], "saturated")


def test_poisoned_memory(ours: Callable, device: str) -> None:
    args = [randn(7, 34, dtype=torch.bfloat16, device=device)]
    expected = outputs_and_gradients(ours, args)
    with poison():
        got = outputs_and_gradients(ours, args)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_backward_of_its_own_serves_on_a_cpu() -> None:
    x = torch.ones(2, 4, requires_grad=True)
    assert type(ops.swiglu(x).grad_fn).__name__ == "_PackedOnCpuBackward"
    assert type(reference(x).grad_fn).__name__ != "_PackedOnCpuBackward"


def test_torch_func() -> None:
    x = randn(3, 6)
    torch.testing.assert_close(torch.func.vmap(ops.swiglu)(x), ops.swiglu(x))


def test_compiled(device: str) -> None:
    checks.check_compiled(ops.swiglu, torchs, [randn(8, 32, dtype=torch.bfloat16, device=device)], "swiglu")


V = checks.values
ERRORS = {
    "swiglu: gate_up must be a tensor, got NoneType": lambda d: ((None,), {}),
    "swiglu: gate_up must be float64, float32, bfloat16 or float16, got int64": lambda d: (
        (V(2, 4, device=d).long(),), {}),
    "swiglu: gate_up must have an even last dimension, [gate | up], got (2, 5)": lambda d: ((V(2, 5, device=d),), {}),
    "swiglu: gate_up must have a shape (..., C) with C >= 1, got (2, 0)": lambda d: ((V(2, 0, device=d),), {}),
    "swiglu: gate must have a shape (..., C) with C >= 1, got ()": lambda d: ((V(device=d), V(device=d)), {}),
    "swiglu: up must have the shape of gate (2, 5), got (2, 6)": lambda d: ((V(2, 5, device=d), V(2, 6, device=d)), {}),
    "swiglu: up must have the dtype of gate (float64), got float32": lambda d: (
        (V(2, 5, device=d), V(2, 5, device=d).float()), {}),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    checks.check_error(ops.swiglu, message, ERRORS[message])


def test_devices_must_agree() -> None:
    with pytest.raises(ValueError, match=r"up must be on the device of gate \(cpu\), got meta"):
        ops.swiglu(torch.ones(2, 4), torch.ones(2, 4, device="meta"))

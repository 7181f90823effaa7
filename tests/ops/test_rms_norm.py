"""rms_norm against F.rms_norm, by the rule: the formulation that serves on a CPU, the plain reference, the kernels on
the emulator."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import native, ops
from fastgpt.ops.rms_norm import reference
from tests.ops import checks, kernels
from tests.rule import RULE_DTYPES, WIDTHS, check_by_rule, outputs_and_gradients, poison, randn

EPS = 1e-6


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
    function = {"public": ops.rms_norm, "reference": reference}[served[1]]

    def rms_norm(x: Tensor, weight: Tensor | None = None, residual: Tensor | None = None):
        return function(x, weight, eps=EPS, residual=residual)

    return rms_norm


def torchs(x: Tensor, weight: Tensor | None = None, residual: Tensor | None = None):
    total = x if residual is None else x + residual
    y = F.rms_norm(total, total.shape[-1:], None if weight is None else weight.to(x.dtype), EPS)
    return y if residual is None else (y, total)


def inputs(*shape: int, dtype: torch.dtype, device: str = "cpu", residual: bool = True) -> list[Tensor]:
    x, more = randn(*shape, dtype=dtype, device=device, seed=1), randn(*shape, dtype=dtype, device=device, seed=2)
    weight = randn(shape[-1], dtype=dtype, device=device, seed=3)
    return [x + 0.5, weight, more] if residual else [x + 0.5, weight]


@pytest.mark.parametrize("dtype", RULE_DTYPES)
@pytest.mark.parametrize("C", WIDTHS)
def test_rule(ours: Callable, C: int, dtype: torch.dtype, device: str) -> None:
    check_by_rule(ours, torchs, inputs(5, C, dtype=dtype, device=device), f"C={C}")


@pytest.mark.parametrize("dtype", RULE_DTYPES)
def test_rule_for_other_shapes(ours: Callable, dtype: torch.dtype, device: str) -> None:
    check_by_rule(ours, torchs, inputs(32, dtype=dtype, device=device), "one row")
    check_by_rule(ours, torchs, inputs(2, 3, 5, 48, dtype=dtype, device=device, residual=False), "four dimensions")
    check_by_rule(ours, torchs, inputs(64, 32, dtype=dtype, device=device)[:1], "no weight")


def test_many_rows(ours: Callable, device: str) -> None:
    check_by_rule(ours, torchs, inputs(2**16 + 3, 4, dtype=torch.float32, device=device, residual=False), "many rows")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_weights_with_16_bit_x(ours: Callable, dtype: torch.dtype, device: str) -> None:
    x, weight = inputs(64, 96, dtype=dtype, device=device, residual=False)
    check_by_rule(ours, torchs, [x, weight.float()], "float32 weights")
    assert ours(x, weight.float()).dtype == dtype


def test_gradient_along_the_weight(ours: Callable, device: str) -> None:
    """Where d_y * weight has a mean far from zero (a sum's gradient: stride 0, too), nothing of it may be lost."""
    x, weight = inputs(64, 96, dtype=torch.bfloat16, device=device, residual=False)
    args = [x, weight.abs() + 1]
    check_by_rule(lambda *a: ours(*a).sum(-1), lambda *a: torchs(*a).sum(-1), args, "gradient of a sum")


def test_residual_is_rounded_before_it_is_normalised(ours: Callable, device: str) -> None:
    x, weight, residual = inputs(64, 48, dtype=torch.bfloat16, device=device)
    y, total = ours(x, weight, residual)
    assert torch.equal(total, x + residual) and total.dtype == torch.bfloat16
    assert torch.equal(y, ours(total, weight))


def test_gradients(ours: Callable, device: str) -> None:
    twice = native.select(torch.ones(1, device=device), "rms_norm") is None  # the kernels have no second derivative
    checks.check_gradients(ours, inputs(3, 5, dtype=torch.float64, device=device), twice)
    checks.check_gradients(ours, inputs(2, 2, 4, dtype=torch.float64, device=device)[:1], twice)
    checks.check_gradients(ours, inputs(4, 1, dtype=torch.float64, device=device, residual=False), twice)


def test_rows_of_zeros(ours: Callable, device: str) -> None:
    """The root of the sum has no derivative there, but the norm has."""
    x, weight = inputs(16, 96, dtype=torch.float32, device=device, residual=False)
    x[1] = 0
    found = outputs_and_gradients(ours, [x, weight])
    assert all(t.isfinite().all() for t in found) and not found[0][1].any()
    check_by_rule(ours, torchs, [x, weight], "a row of zeros")


def test_a_backward_of_its_own_serves_on_a_cpu() -> None:
    """So that the tests here are known to try both formulations."""
    x = torch.ones(2, 4, requires_grad=True)
    assert type(ops.rms_norm(x).grad_fn).__name__ == "_OnCpuBackward"
    assert type(reference(x).grad_fn).__name__ != "_OnCpuBackward"


def test_torch_func() -> None:
    x, weight = inputs(3, 5, dtype=torch.float64, residual=False)
    by_rows = torch.func.vmap(lambda row: ops.rms_norm(row, weight))(x)
    torch.testing.assert_close(by_rows, ops.rms_norm(x, weight))
    _, tangent = torch.func.jvp(lambda a: ops.rms_norm(a, weight), (x,), (torch.ones_like(x),))
    jacobian = torch.autograd.functional.jacobian(lambda a: ops.rms_norm(a, weight), x)
    torch.testing.assert_close(tangent, jacobian.sum((-1, -2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(ours: Callable, dtype: torch.dtype, device: str) -> None:
    # An odd width, which one kernel path serves whatever the layout; for the other one see test_norm_kernels.py.
    checks.check_layouts(ours, inputs(6, 41, dtype=dtype, device=device))
    checks.check_fake(ours, inputs(6, 40, dtype=dtype, device=device))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty(ours: Callable, shape: tuple[int, ...], device: str) -> None:
    y, total, d_x, d_weight, d_residual = outputs_and_gradients(
        ours, inputs(*shape, dtype=torch.float32, device=device)
    )
    assert y.shape == total.shape == d_x.shape == d_residual.shape == shape
    assert torch.equal(d_weight, torch.zeros_like(d_weight))


def test_non_finite(ours: Callable, device: str) -> None:
    checks.check_poisoned_rows(ours, torchs, *inputs(5, 24, dtype=torch.float32, device=device, residual=False))


def test_poisoned_memory(ours: Callable, device: str) -> None:
    args = inputs(7, 33, dtype=torch.bfloat16, device=device)
    expected = outputs_and_gradients(ours, args)
    with poison():
        got = outputs_and_gradients(ours, args)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_compiled(device: str) -> None:
    args = inputs(8, 32, dtype=torch.bfloat16, device=device)
    checks.check_compiled(lambda x, w, r: ops.rms_norm(x, w, eps=EPS, residual=r), torchs, args, "rms_norm")


def test_autocast(ours: Callable, device: str) -> None:
    x, weight, residual = inputs(8, 32, dtype=torch.bfloat16, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y, total = ours(x, weight.float(), residual.float())
        assert ours(x, weight.float()).dtype == torch.bfloat16
    assert y.dtype == total.dtype == torch.float32


V = checks.values
ERRORS = {
    "rms_norm: x must be a tensor, got float": lambda d: ((1.0,), {}),
    "rms_norm: x must be float64, float32, bfloat16 or float16, got int32": lambda d: ((V(2, 4, device=d).int(),), {}),
    "rms_norm: x must have a shape (..., C) with C >= 1, got ()": lambda d: ((V(device=d),), {}),
    "rms_norm: x must have a shape (..., C) with C >= 1, got (3, 0)": lambda d: ((V(3, 0, device=d),), {}),
    "rms_norm: weight must have shape (4,) for x (2, 4), got (3,)": lambda d: ((V(2, 4, device=d), V(3, device=d)), {}),
    "rms_norm: weight must be in the dtype of x (bfloat16) or float32, got float16": lambda d: (
        (V(2, 4, device=d).bfloat16(), V(4, device=d).half()), {}),
    "rms_norm: residual must have the shape of x (2, 4), got (4,)": lambda d: (
        (V(2, 4, device=d), V(4, device=d)), {"residual": V(4, device=d)}),
    "rms_norm: residual must have the dtype of x (float64), got float32": lambda d: (
        (V(2, 4, device=d), V(4, device=d)), {"residual": V(2, 4, device=d).float()}),
    "rms_norm: eps must be a finite number >= 0, got nan": lambda d: ((V(2, 4, device=d),), {"eps": float("nan")}),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    checks.check_error(ops.rms_norm, message, ERRORS[message])


def test_devices_must_agree() -> None:
    with pytest.raises(ValueError, match=r"residual must be on the device of x \(cpu\), got meta"):
        ops.rms_norm(torch.ones(2, 4), residual=torch.ones(2, 4, device="meta"))

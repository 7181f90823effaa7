"""layer_norm against F.layer_norm, by the rule: the reference, and the kernels on the emulator."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import native, ops
from tests.ops import checks, kernels
from tests.rule import LOW_PRECISION, RULE_DTYPES, WIDTHS, check_by_rule, outputs_and_gradients, poison, randn

EPS = 1e-5


@pytest.fixture(params=kernels.WHERE)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.at(request.param) as device:
        yield device


def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None):
    return ops.layer_norm(x, weight, bias, eps=EPS, residual=residual)


def torchs(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None):
    total = x if residual is None else x + residual
    y = F.layer_norm(total, weight.shape, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), EPS)
    return y if residual is None else (y, total)


def inputs(*shape: int, dtype: torch.dtype, device: str = "cpu", residual: bool = True) -> list[Tensor]:
    C = shape[-1]
    x, more = randn(*shape, dtype=dtype, device=device, seed=1), randn(*shape, dtype=dtype, device=device, seed=2)
    weight, bias = (randn(C, dtype=dtype, device=device, seed=s) for s in (3, 4))
    return [x + 0.5, weight, bias, more] if residual else [x + 0.5, weight, bias]


# One channel in 16 bits is left out: a mean saved in 16 bits is exact then, so torch has no error to compare with.
CASES = [(C, dtype) for C in WIDTHS for dtype in RULE_DTYPES if C > 1 or dtype not in LOW_PRECISION]


@pytest.mark.parametrize(("C", "dtype"), CASES)
def test_rule(C: int, dtype: torch.dtype, device: str) -> None:
    check_by_rule(ours, torchs, inputs(5, C, dtype=dtype, device=device), f"C={C}")


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_one_channel_in_16_bits_is_float32_rounded(dtype: torch.dtype, device: str) -> None:
    args = inputs(5, 1, dtype=dtype, device=device, residual=False)
    found, wide = outputs_and_gradients(ours, args), outputs_and_gradients(ours, args, dtype=torch.float32)
    assert torch.equal(found[0], args[2].expand(5, 1)) and torch.equal(found[0], wide[0].to(dtype))
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("dtype", RULE_DTYPES)
def test_rule_for_other_shapes(dtype: torch.dtype, device: str) -> None:
    check_by_rule(ours, torchs, inputs(32, dtype=dtype, device=device), "one row")
    check_by_rule(ours, torchs, inputs(2, 3, 5, 48, dtype=dtype, device=device, residual=False), "four dimensions")
    x, weight, _bias = inputs(64, 32, dtype=dtype, device=device, residual=False)
    check_by_rule(ours, torchs, [x, weight], "no bias")


def test_many_rows(device: str) -> None:
    check_by_rule(ours, torchs, inputs(2**16 + 3, 4, dtype=torch.float32, device=device, residual=False), "many rows")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_weights_with_16_bit_x(dtype: torch.dtype, device: str) -> None:
    x, weight, bias = inputs(64, 96, dtype=dtype, device=device, residual=False)
    wide = [x, weight.float(), bias.float()]
    check_by_rule(ours, torchs, wide, "float32 weights")
    assert ours(x, weight.float()).dtype == dtype


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_statistics_of_16_bit_x_are_kept_in_float32(dtype: torch.dtype, device: str) -> None:
    """So the bar is torch in float32, rounded; its own 16-bit LayerNorm on a CPU saves them in 16 bits."""

    def wide(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torchs(*(t if t.dtype == torch.float64 else t.float() for t in (x, weight, bias))).to(x.dtype)

    x, weight, bias = inputs(64, 96, dtype=dtype, device=device, residual=False)
    check_by_rule(ours, wide, [x + 3, weight, bias], "against float32")


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_gradients_of_the_parameters_keep_growing(dtype: torch.dtype, device: str) -> None:
    """Ones, added up in 16 bits, stop at 256 in bfloat16 and at 2048 in float16."""
    x = randn(4096, 2, dtype=dtype, device=device)
    weight, bias = (t.to(device, dtype).requires_grad_() for t in (torch.ones(2), torch.zeros(2)))
    ours(x, weight, bias).sum().backward()
    assert bias.grad.tolist() == [4096, 4096]


def test_mean_far_from_zero(device: str) -> None:
    """Statistics in one pass over squares would lose everything here."""
    x, weight, bias = inputs(16, 256, dtype=torch.float32, device=device, residual=False)
    check_by_rule(ours, torchs, [x + 1000, weight, bias], "mean of 1000")


def test_residual_is_rounded_before_it_is_normalised(device: str) -> None:
    x, weight, bias, residual = inputs(64, 48, dtype=torch.bfloat16, device=device)
    y, total = ours(x, weight, bias, residual)
    assert torch.equal(total, x + residual) and total.dtype == torch.bfloat16
    assert torch.equal(y, ours(total, weight, bias))


def test_gradients(device: str) -> None:
    twice = native.select(torch.ones(1, device=device), "layer_norm") is None  # the kernels have no second derivative
    checks.check_gradients(ours, inputs(3, 5, dtype=torch.float64, device=device), twice)
    checks.check_gradients(ours, inputs(2, 2, 4, dtype=torch.float64, device=device, residual=False)[:2], twice)
    checks.check_gradients(ours, inputs(4, 1, dtype=torch.float64, device=device, residual=False), twice)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(dtype: torch.dtype, device: str) -> None:
    # An odd width, which one kernel path serves whatever the layout; for the other one see test_norm_kernels.py.
    checks.check_layouts(ours, inputs(6, 41, dtype=dtype, device=device))
    checks.check_fake(ours, inputs(6, 40, dtype=dtype, device=device))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty(shape: tuple[int, ...], device: str) -> None:
    y, total, d_x, d_weight, d_bias, d_residual = outputs_and_gradients(
        ours, inputs(*shape, dtype=torch.float32, device=device)
    )
    assert y.shape == total.shape == d_x.shape == d_residual.shape == shape
    assert torch.equal(d_weight, torch.zeros_like(d_weight)) and torch.equal(d_bias, torch.zeros_like(d_bias))


def test_non_finite(device: str) -> None:
    checks.check_poisoned_rows(ours, torchs, *inputs(5, 24, dtype=torch.float32, device=device, residual=False))


def test_poisoned_memory(device: str) -> None:
    args = inputs(7, 33, dtype=torch.bfloat16, device=device)
    expected = outputs_and_gradients(ours, args)
    with poison():
        got = outputs_and_gradients(ours, args)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_compiled(device: str) -> None:
    checks.check_compiled(ours, torchs, inputs(8, 32, dtype=torch.bfloat16, device=device), "layer_norm")


def test_autocast(device: str) -> None:
    x, weight, bias, residual = inputs(8, 32, dtype=torch.bfloat16, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y, total = ours(x, weight.float(), bias.float(), residual.float())
        assert ours(x, weight.float(), bias.float()).dtype == torch.bfloat16
    assert y.dtype == total.dtype == torch.float32


V = checks.values
ERRORS = {
    "layer_norm: x must be a tensor, got list": lambda d: (([1.0], V(1, device=d)), {}),
    "layer_norm: x must be float64, float32, bfloat16 or float16, got int64": lambda d: (
        (V(2, 4, device=d).long(), V(4, device=d)), {}),
    "layer_norm: x must have a shape (..., C) with C >= 1, got ()": lambda d: ((V(device=d), V(1, device=d)), {}),
    "layer_norm: x must have a shape (..., C) with C >= 1, got (3, 0)": lambda d: (
        (V(3, 0, device=d), V(0, device=d)), {}),
    "layer_norm: weight must have shape (4,) for x (2, 4), got (3,)": lambda d: (
        (V(2, 4, device=d), V(3, device=d)), {}),
    "layer_norm: weight must be in the dtype of x (float32) or float32, got float64": lambda d: (
        (V(2, 4, device=d).float(), V(4, device=d)), {}),
    "layer_norm: bias must have shape (4,) for x (2, 4), got (1, 4)": lambda d: (
        (V(2, 4, device=d), V(4, device=d), V(1, 4, device=d)), {}),
    "layer_norm: residual must have the shape of x (2, 4), got (1, 4)": lambda d: (
        (V(2, 4, device=d), V(4, device=d)), {"residual": V(1, 4, device=d)}),
    "layer_norm: residual must have the dtype of x (float64), got float32": lambda d: (
        (V(2, 4, device=d), V(4, device=d)), {"residual": V(2, 4, device=d).float()}),
    "layer_norm: eps must be a finite number >= 0, got -1.0": lambda d: (
        (V(2, 4, device=d), V(4, device=d)), {"eps": -1.0}),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    checks.check_error(ops.layer_norm, message, ERRORS[message])


def test_devices_must_agree() -> None:
    with pytest.raises(ValueError, match=r"weight must be on the device of x \(cpu\), got meta"):
        ops.layer_norm(torch.ones(2, 4), torch.ones(4, device="meta"))

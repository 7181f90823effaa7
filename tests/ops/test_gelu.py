"""gelu against its formulas in float64, and F.gelu in the other dtypes, by the rule: the reference, and the kernels on
the emulator."""

import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import native, ops
from tests.ops import checks, kernels
from tests.rule import RULE_DTYPES, WIDTHS, check_by_rule, outputs_and_gradients, poison, randn


@pytest.fixture(params=kernels.WHERE)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.at(request.param) as device:
        yield device


@pytest.fixture(params=["none", "tanh"])
def approximate(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("dtype", RULE_DTYPES)
def test_rule(approximate: str, dtype: torch.dtype, device: str) -> None:
    ours, torchs = partial(ops.gelu, approximate=approximate), partial(F.gelu, approximate=approximate)
    for width in WIDTHS:
        check_by_rule(ours, torchs, [3 * randn(5, width, dtype=dtype, device=device)], f"width {width}")
    check_by_rule(ours, torchs, [3 * randn(33, dtype=dtype, device=device)], "one dimension")


def test_formulas(device: str) -> None:
    x = 3 * randn(1000, device=device)
    torch.testing.assert_close(ops.gelu(x), x / 2 * (1 + torch.erf(x / math.sqrt(2))))
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    torch.testing.assert_close(ops.gelu(x, approximate="tanh"), x / 2 * (1 + torch.tanh(inner)))


def test_gradients(approximate: str, device: str) -> None:
    twice = native.select(torch.ones(1, device=device), "gelu") is None  # the kernels have no second derivative
    checks.check_gradients(partial(ops.gelu, approximate=approximate), [randn(3, 5, device=device)], twice)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(approximate: str, dtype: torch.dtype, device: str) -> None:
    ours, x = partial(ops.gelu, approximate=approximate), randn(6, 5, 19, dtype=dtype, device=device)
    checks.check_layouts(ours, [x])
    checks.check_fake(ours, [x])


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0)])
def test_empty(shape: tuple[int, ...], device: str) -> None:
    y, d_x = outputs_and_gradients(ops.gelu, [randn(*shape, dtype=torch.float32, device=device)])
    assert y.shape == d_x.shape == shape


def test_non_finite(approximate: str, device: str) -> None:
    def torchs(x: Tensor) -> Tensor:
        if native.select(x, "gelu") is not None:  # the kernels: with AVX-512 torch's float32 is NaN at +inf
            return F.gelu(x.double(), approximate=approximate).to(x.dtype)
        return F.gelu(x, approximate=approximate)

    checks.check_poisoned_rows(
        partial(ops.gelu, approximate=approximate), torchs, randn(5, 24, dtype=torch.float32, device=device)
    )


def test_poisoned_memory(device: str) -> None:
    args = [randn(7, 33, dtype=torch.bfloat16, device=device)]
    expected = outputs_and_gradients(ops.gelu, args)
    with poison():
        got = outputs_and_gradients(ops.gelu, args)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_compiled(device: str) -> None:
    checks.check_compiled(ops.gelu, F.gelu, [randn(8, 32, dtype=torch.float32, device=device)], "gelu")


V = checks.values
ERRORS = {
    "gelu: x must be a tensor, got int": lambda d: ((1,), {}),
    "gelu: x must be float64, float32, bfloat16 or float16, got bool": lambda d: ((V(2, 4, device=d).bool(),), {}),
    "gelu: x must have at least one dimension, got ()": lambda d: ((V(device=d),), {}),
    "gelu: approximate must be one of none, tanh, got 'erf'": lambda d: ((V(2, device=d),), {"approximate": "erf"}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    checks.check_error(ops.gelu, message, ERRORS[message])

"""grad_norm against torch's sum of squares, by the rule; its order does not depend on threads or strides."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastgpt import native, ops
from tests.ops import checks, kernels
from tests.rule import LAYOUTS, RULE_DTYPES, assert_within_rule, in_layout, randn

SIZES = (1, 7, 8, 9, 769, 4095, 4096, 4097, 65536, 100_001)


@pytest.fixture(params=kernels.WHERE)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.at(request.param) as device:
        yield device


def torchs(grads: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack([g.to(dtype).square().sum() for g in grads]).sum()


@pytest.mark.parametrize("dtype", RULE_DTYPES)
def test_rule(dtype: torch.dtype, device: str) -> None:
    """One number may be right by luck, so many are held to the rule together."""
    lists = [
        [randn(n, dtype=dtype, seed=s, device=device), randn(3, 5, seed=s + 1, dtype=torch.float32, device=device)]
        for n in SIZES
        for s in range(4)
    ]
    ours = torch.stack([ops.grad_norm(grads) for grads in lists])
    theirs = torch.stack([torchs(grads, torch.float32) for grads in lists])
    exact = torch.stack([torchs(grads, torch.float64) for grads in lists])
    # Relative, so that the long lists do not hide the short ones.
    assert_within_rule((ours.double() / exact).float(), (theirs.double() / exact).float(), exact / exact, "squares")


def test_long_sums_stay_exact(device: str) -> None:
    """A single running float32 sum is off by more than 1e-4 here: equal terms err all in the same direction."""
    emulated = device == "cpu" and native.select(torch.empty(0), "grad_norm") is not None
    n = 1_000_000 if emulated else 20_000_000  # of which the emulator's sums of 16,384 know nothing
    long = [torch.full((n,), x, device=device) for x in (0.1, 0.3, 0.7)]
    ours, theirs = (
        torch.stack([f([g]).double() for g in long]) for f in (ops.grad_norm, lambda g: torchs(g, torch.float32))
    )
    exact = torch.stack([g.numel() * g[0].double().square() for g in long])
    assert_within_rule((ours / exact).float(), (theirs / exact).float(), exact / exact, "squares of equal terms")


def test_dtypes(device: str) -> None:
    grads = [randn(50, dtype=d, seed=i, device=device) for i, d in enumerate((torch.float32, *RULE_DTYPES))]
    assert ops.grad_norm(grads).dtype == torch.float32 and ops.grad_norm(grads).shape == ()
    wide = [*grads, randn(5000, device=device)]
    assert_within_rule(ops.grad_norm(wide), torchs(wide, torch.float64), torchs(wide, torch.float64), "with float64")


def test_empty(device: str) -> None:
    assert ops.grad_norm([]).item() == 0 and ops.grad_norm([]).dtype == torch.float32
    nothing = torch.empty(0, 3, device=device)
    assert ops.grad_norm([nothing]).item() == 0
    assert ops.grad_norm([nothing.double()]).dtype == torch.float64
    assert ops.grad_norm([nothing, torch.full((), 3.0, device=device)]).item() == 9


def test_threads_do_not_matter() -> None:
    lists = [[randn(n, dtype=torch.float32, seed=s) for n in (300_003, 70_000)] for s in range(8)]
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append([ops.grad_norm(grads).item() for grads in lists])
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, device: str) -> None:
    g = in_layout(randn(70, 130, dtype=torch.bfloat16, device=device), layout)
    assert ops.grad_norm([g]) == ops.grad_norm([g.contiguous()])


@pytest.mark.parametrize("size", [5, 5000])
def test_non_finite(size: int, device: str) -> None:
    good, bad = torch.ones(3, device=device), randn(size, dtype=torch.float32, device=device)
    bad[size // 2] = float("-inf")
    assert ops.grad_norm([good, bad]).item() == float("inf")
    bad[-1] = float("nan")
    assert ops.grad_norm([bad, good]).isnan()


def test_gradients_are_left_alone(device: str) -> None:
    g = randn(5000, dtype=torch.float32, device=device).requires_grad_()
    before, version = g.detach().clone(), g._version
    assert not ops.grad_norm([g]).requires_grad
    assert torch.equal(g, before) and g._version == version


def test_compiled(device: str) -> None:
    torch._dynamo.reset()
    grads = [randn(5000, dtype=torch.float32, device=device), randn(3, 3, dtype=torch.bfloat16, device=device)]
    compiled = torch.compile(ops.grad_norm, fullgraph=True, backend="aot_eager")
    assert compiled(grads) == ops.grad_norm(grads)


V = checks.values
ERRORS = {
    "grad_norm: grads[1] must be a tensor, got NoneType": lambda d: (([V(2, device=d), None],), {}),
    "grad_norm: grads[0] must be float64, float32, bfloat16 or float16, got int64": lambda d: (
        ([V(2, device=d).long()],), {}),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    checks.check_error(ops.grad_norm, message, ERRORS[message])


def test_devices_must_agree() -> None:
    with pytest.raises(ValueError, match=r"grads\[1\] must be on the device of grads\[0\] \(cpu\), got meta"):
        ops.grad_norm([torch.ones(2), torch.ones(2, device="meta")])

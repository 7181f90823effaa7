"""embedding against F.embedding, by the rule, on the reference and on the kernels; its gradient summed in float32."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import native, ops
from tests.ops import checks, kernels
from tests.rule import LOW_PRECISION, RULE_DTYPES, check_by_rule, outputs_and_gradients, poison, randn


@pytest.fixture(params=kernels.WHERE)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.at(request.param) as device:
        yield device


def ids_below(rows: int, *shape: int, device: str = "cpu", dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(rows, shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


@pytest.mark.parametrize("dtype", RULE_DTYPES)
@pytest.mark.parametrize("C", [1, 7, 8, 9, 769])
def test_rule(C: int, dtype: torch.dtype, device: str) -> None:
    ids, weight = ids_below(50, 4, 33, device=device), randn(50, C, dtype=dtype, device=device)
    check_by_rule(lambda w: ops.embedding(ids, w), lambda w: F.embedding(ids, w), [weight], f"C={C}")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0, 3), (2, 3, 4)])
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    ids, weight = ids_below(7, *shape, device=device, dtype=dtype), randn(7, 3, dtype=torch.bfloat16, device=device)
    y, d_weight = outputs_and_gradients(ops.embedding, [ids, weight])
    assert torch.equal(y, weight[ids.long()]) and d_weight.shape == weight.shape
    assert not d_weight[[i for i in range(7) if i not in ids.flatten().tolist()]].any()


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_gradient_of_a_frequent_token_keeps_growing(dtype: torch.dtype, device: str) -> None:
    """Ones, summed in 16 bits, stop at 256 in bfloat16 and at 2048 in float16."""
    weight = torch.zeros(3, 2, dtype=dtype, device=device, requires_grad=True)
    ops.embedding(torch.ones(4096, dtype=torch.int64, device=device), weight).sum().backward()
    assert weight.grad.tolist() == [[0, 0], [4096, 4096], [0, 0]]


def test_gradients(device: str) -> None:
    ids = ids_below(4, 2, 5, device=device)
    twice = native.select(ids, "embedding") is None
    checks.check_gradients(lambda w: ops.embedding(ids, w), [randn(4, 3, device=device)], twice)


def test_second_derivative_in_16_bits() -> None:
    ids, weight = ids_below(4, 6), randn(4, 3, dtype=torch.bfloat16).requires_grad_()
    y = ops.embedding(ids, weight)
    upstream = torch.ones_like(y, requires_grad=True)
    (d_weight,) = torch.autograd.grad(y, weight, upstream, create_graph=True)
    (second,) = torch.autograd.grad(d_weight, upstream, weight.detach())
    assert torch.equal(second, weight[ids])  # the derivative of a sum by row is the row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(dtype: torch.dtype, device: str) -> None:
    ids = ids_below(6, 5, 7, device=device)
    checks.check_layouts(lambda w: ops.embedding(ids, w), [randn(6, 9, dtype=dtype, device=device)])
    assert torch.equal(*(ops.embedding(i, randn(6, 9, device=device)) for i in (ids.t(), ids.t().contiguous())))
    checks.check_fake(ops.embedding, [ids, randn(6, 9, dtype=dtype, device=device)])


def test_non_finite(device: str) -> None:
    weight = randn(4, 3, dtype=torch.float32, device=device)
    weight[1], weight[2] = float("nan"), float("inf")
    y = ops.embedding(torch.tensor([0, 1, 2], device=device), weight)
    assert y[0].isfinite().all() and y[1].isnan().all() and y[2].isinf().all()


def test_poisoned_memory(device: str) -> None:
    args = [ids_below(40, 9, device=device), randn(40, 3, dtype=torch.bfloat16, device=device)]
    expected = outputs_and_gradients(ops.embedding, args)
    with poison():
        got = outputs_and_gradients(ops.embedding, args)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("bad", [-1, 4])
def test_id_out_of_range(bad: int) -> None:
    with pytest.raises(IndexError):
        ops.embedding(torch.tensor([bad]), torch.ones(4, 2))
    with pytest.raises(IndexError):
        ops.embedding(torch.tensor([bad]), torch.ones(4, 2, dtype=torch.bfloat16))


def test_compiled(device: str) -> None:
    ids, weight = ids_below(9, 2, 8, device=device), randn(9, 4, dtype=torch.bfloat16, device=device)
    checks.check_compiled(lambda w: ops.embedding(ids, w), lambda w: F.embedding(ids, w), [weight], "embedding")


V = checks.values
ERRORS = {
    "embedding: ids must be a tensor, got list": lambda d: (([0], V(4, 2, device=d)), {}),
    "embedding: weight must be float64, float32, bfloat16 or float16, got int64": lambda d: (
        (V(3, device=d).long(), V(4, 2, device=d).long()), {}),
    "embedding: ids must be int64 or int32, got float64": lambda d: ((V(3, device=d), V(4, 2, device=d)), {}),
    "embedding: weight must have a shape (V, C) with V, C >= 1, got (4,)": lambda d: (
        (V(3, device=d).long(), V(4, device=d)), {}),
    "embedding: weight must have a shape (V, C) with V, C >= 1, got (4, 0)": lambda d: (
        (V(3, device=d).long(), V(4, 0, device=d)), {}),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    checks.check_error(ops.embedding, message, ERRORS[message])


def test_devices_must_agree() -> None:
    with pytest.raises(ValueError, match=r"ids must be on the device of weight \(cpu\), got meta"):
        ops.embedding(torch.ones(2, dtype=torch.int64, device="meta"), torch.ones(4, 2))

"""What every op is put through, whatever serves it: gradients, layouts, errors, compilation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.rule import DEVICES, LAYOUTS, as_tuple, check_by_rule, in_layout, outputs_and_gradients, randn, upstream


def floating(inputs: Sequence[Any]) -> list[int]:
    return [i for i, a in enumerate(inputs) if isinstance(a, Tensor) and a.is_floating_point()]


def check_gradients(op: Callable, inputs: Sequence[Any], twice: bool = True) -> None:
    """gradcheck of float64 `inputs` (and gradgradcheck: `twice`), upstream gradients of any strides, every subset of
    inputs that need one, and only one output used."""
    places = floating(inputs)

    def fresh(needed: Sequence[int]) -> list[Any]:
        return [a.detach().clone().requires_grad_(i in needed) if i in places else a for i, a in enumerate(inputs)]

    assert torch.autograd.gradcheck(op, fresh(places))
    if twice:
        assert torch.autograd.gradgradcheck(op, fresh(places), gen_non_contig_grad_outputs=True)

    # upstream() is full of gaps that hold NaN, so a backward that reads past its strides shows.
    args = fresh(places)
    outputs = as_tuple(op(*args))
    scattered = upstream(outputs)
    full = torch.autograd.grad(outputs, [args[i] for i in places], scattered)
    args = fresh(places)
    same = torch.autograd.grad(as_tuple(op(*args)), [args[i] for i in places], [g.contiguous() for g in scattered])
    for a, b in zip(full, same, strict=True):
        if twice:  # a reference: kernels of torch's own take scattered elements one at a time, and round otherwise
            torch.testing.assert_close(a, b, msg="strides of the upstream gradient matter")
        else:
            assert torch.equal(a, b), "strides of the upstream gradient matter"

    for size in range(1, len(places)):
        for needed in itertools.combinations(places, size):
            args = fresh(needed)
            reached = [(y, g) for y, g in zip(as_tuple(op(*args)), scattered, strict=True) if y.requires_grad]
            found = torch.autograd.grad([y for y, _ in reached], [args[i] for i in needed], [g for _, g in reached])
            for i, gradient in zip(needed, found, strict=True):
                torch.testing.assert_close(gradient, full[places.index(i)], msg=f"needs_input_grad for {needed} only")

    if len(outputs) > 1:
        zeros = [torch.zeros_like(g) for g in scattered]
        for used in range(len(outputs)):
            alone = outputs_and_gradients(op, inputs, use=[used])[len(outputs) :]
            args = fresh(places)
            mixed = [scattered[i] if i == used else zeros[i] for i in range(len(outputs))]
            padded = torch.autograd.grad(as_tuple(op(*args)), [args[i] for i in places], mixed)
            for a, b in zip(alone, padded, strict=True):
                torch.testing.assert_close(a, b, msg=f"only output {used} used")


def check_layouts(op: Callable, inputs: Sequence[Any]) -> None:
    """Bitwise the same outputs (contiguous) and gradients, whatever the strides and storage offset of each input."""
    for i in floating(inputs):
        for layout in LAYOUTS:
            laid_out = [in_layout(a, layout) if j == i else a for j, a in enumerate(inputs)]
            plain = [a.contiguous() if isinstance(a, Tensor) else a for a in laid_out]
            assert all(y.is_contiguous() for y in as_tuple(op(*laid_out))), f"input {i} {layout}: output strides"
            got, expected = outputs_and_gradients(op, laid_out), outputs_and_gradients(op, plain)
            for k, (a, b) in enumerate(zip(got, expected, strict=True)):
                assert torch.equal(a, b), f"input {i} {layout}: output or gradient {k} differs"


def check_error(op: Callable, message: str, make: Callable[[str], tuple[Sequence[Any], dict[str, Any]]]) -> None:
    """`op` refuses what `make(device)` gives with a ValueError that contains `message`, the same on every device."""
    said = set()
    for device in ("meta", *DEVICES):
        args, options = make(device)
        with pytest.raises(ValueError) as refusal:
            op(*args, **options)
        said.add(str(refusal.value))
    with FakeTensorMode():
        args, options = make("cpu")
        with pytest.raises(ValueError) as refusal:
            op(*args, **options)
    said.add(str(refusal.value))
    assert len(said) == 1, said
    assert message in said.pop()


def check_fake(op: Callable, inputs: Sequence[Any]) -> None:
    """Meta tensors come out with the dtype, shape and strides of the real ones."""
    real = as_tuple(op(*inputs))
    meta = as_tuple(op(*(a.to("meta") if isinstance(a, Tensor) else a for a in inputs)))
    for a, b in zip(real, meta, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())


def check_compiled(op: Callable, torchs: Callable, inputs: Sequence[Any], what: str) -> None:
    """One graph under torch.compile, forward and backward, within the rule."""
    torch._dynamo.reset()
    check_by_rule(torch.compile(op, fullgraph=True, backend="aot_eager"), torchs, inputs, f"compiled {what}")


def check_poisoned_rows(op: Callable, torchs: Callable, x: Tensor, *rest: Any) -> None:
    """NaN and inf come out where torch's counterpart has them, and other rows of x (N >= 4, ...) do not change."""
    clean = as_tuple(op(x, *rest))[0]
    for row, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        x = x.clone()
        x[row, ..., x.shape[-1] // 2] = value
    ours, theirs = as_tuple(op(x, *rest))[0], as_tuple(torchs(x, *rest))[0]
    assert torch.equal(ours[3:], clean[3:])
    assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())
    assert not ours[:3].isfinite().all()


def values(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu") -> Tensor:
    """Like `randn`, but on "meta" too."""
    return torch.empty(shape, dtype=dtype, device="meta") if device == "meta" else randn(
        *shape, dtype=dtype, seed=seed, device=device
    )  # fmt: skip

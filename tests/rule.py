"""The correctness rule that every op, every path and every dtype is held to, and what its tests share.

The rule, on the largest and on the mean error, for outputs and for every gradient:

    err(ours, ref64)  <=  2 * err(torch in the same dtype, ref64)  +  rounding(ref64 in that dtype)

where `ref64` is computed in float64 from the same (already rounded) inputs, and the last term is
half a unit in the last place of each reference value: what storing the exact answer may cost.
No tolerance is ever set by hand. float64 itself is held to `torch.testing.assert_close`'s defaults.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

LOW_PRECISION = (torch.float16, torch.bfloat16)
RULE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (torch.float64, *RULE_DTYPES)

# Where the op tests run. A kernel inherits every test in tests/ops by one more entry here (see conftest.py there).
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

# Widths that break vectorised code: one element, a 16-byte vector of bf16 and one off it either way,
# an odd width past a tile, and one too wide for registers.
WIDTHS = (1, 7, 8, 9, 769, 65536)


def half_ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours of each finite value of `x` in `dtype`, as float64."""
    info = torch.finfo(dtype)
    magnitude = x.double().abs().clamp(min=info.tiny)  # below it the spacing no longer shrinks
    exponent = torch.frexp(magnitude).exponent  # magnitude = m * 2**exponent with 0.5 <= m < 1
    return torch.ldexp(torch.full_like(magnitude, info.eps / 4), exponent)


def assert_within_rule(ours: Tensor, torch_same_dtype: Tensor, ref64: Tensor, what: str) -> None:
    """Hold `ours` to the rule, printing both errors and both bounds where it fails.

    ours, torch_same_dtype: of one shape and dtype. ref64: the same in float64. Where the reference, rounded to
    the dtype, is inf or NaN, ours must be the same inf or NaN, and the rule is applied to the rest.
    """
    assert ours.dtype == torch_same_dtype.dtype, f"{what}: dtype {ours.dtype}, expected {torch_same_dtype.dtype}"
    assert ours.shape == ref64.shape == torch_same_dtype.shape, (
        f"{what}: shape {tuple(ours.shape)}, expected {tuple(ref64.shape)} (torch: {tuple(torch_same_dtype.shape)})"
    )
    assert ref64.dtype == torch.float64, f"{what}: the reference must be float64, not {ref64.dtype}"
    ours, same, ref64 = (t.detach().cpu() for t in (ours, torch_same_dtype, ref64))
    if ours.dtype == torch.float64:
        torch.testing.assert_close(ours, ref64, equal_nan=True, msg=lambda m: f"{what}: {m}")
        return
    rounded = ref64.to(ours.dtype)
    finite = rounded.isfinite()
    torch.testing.assert_close(
        ours[~finite], rounded[~finite], rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )
    exact = ref64[finite]
    if exact.numel() == 0:
        return
    err_ours = (ours[finite].double() - exact).abs()
    err_torch = (same[finite].double() - exact).abs()
    rounding = half_ulp(exact, ours.dtype)
    for name, reduce in (("largest", torch.max), ("mean", torch.mean)):
        error, torchs, atol = reduce(err_ours).item(), reduce(err_torch).item(), reduce(rounding).item()
        bound = 2 * torchs + atol
        assert error <= bound, (  # a NaN in ours makes this false too
            f"{what}: {name} error {error:.3e} > {bound:.3e} = 2 * {torchs:.3e} (torch in {ours.dtype}) + {atol:.3e}"
        )


# ---- running a function with all its gradients ------------------------------------------------


def as_tuple(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu") -> Tensor:
    """Normal values drawn in float64 on the CPU, then rounded: the same on every device and, up to rounding, dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


def upstream(outputs: Sequence[Tensor], seed: int = 1234) -> list[Tensor]:
    """Random gradients for `outputs`, none of them contiguous."""
    return [
        in_layout(randn(*y.shape, dtype=y.dtype, seed=seed + i, device=str(y.device)), "strided")
        for i, y in enumerate(outputs)
    ]


def outputs_and_gradients(
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Any],
    dtype: torch.dtype | None = None,
    use: Sequence[int] | None = None,
) -> list[Tensor]:
    """Outputs of `function(*inputs)`, then the gradient of every floating input.

    inputs: as given, or their floating tensors cast to `dtype`; layouts are kept. use: backpropagate through these
    outputs alone (all by default). A gradient that does not exist is zeros.
    """
    args: list[Any] = []
    for a in inputs:
        if isinstance(a, Tensor) and a.is_floating_point():
            a = a.detach() if dtype is None else a.detach().to(dtype)
            a = a.requires_grad_()
        args.append(a)
    outputs = as_tuple(function(*args))
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    chosen = list(range(len(outputs))) if use is None else list(use)
    gradients = upstream(outputs)
    found = torch.autograd.grad(
        [outputs[i] for i in chosen], leaves, [gradients[i] for i in chosen], allow_unused=True, materialize_grads=True
    )
    return [*(y.detach() for y in outputs), *found]


def check_by_rule(
    ours: Callable[..., Tensor | Sequence[Tensor]],
    torchs: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Any],
    what: str,
    use: Sequence[int] | None = None,
) -> None:
    """Hold outputs and all gradients of `ours` to the rule, against torch's counterpart in the same dtype.

    `torchs` run in float64 on the same inputs is the reference; gradients from upstream are the same rounded values
    in all three.
    """
    a = outputs_and_gradients(ours, inputs, use=use)
    b = outputs_and_gradients(torchs, inputs, use=use)
    # The float64 run must see the gradients from upstream as the low-precision runs saw them: rounded.
    n = len(a) - sum(isinstance(x, Tensor) and x.is_floating_point() for x in inputs)
    dtypes = [y.dtype for y in a[:n]]

    def reference(*args: Any) -> list[Tensor]:
        return [_RoundGradient.apply(y, d) for y, d in zip(as_tuple(torchs(*args)), dtypes, strict=True)]

    c = outputs_and_gradients(reference, inputs, dtype=torch.float64, use=use)
    assert len(a) == len(b) == len(c), f"{what}: {len(a)} outputs and gradients, torch has {len(b)}"
    for i, (x, y, z) in enumerate(zip(a, b, c, strict=True)):
        assert_within_rule(x, y, z, f"{what}: " + (f"output {i}" if i < n else f"gradient of input {i - n}"))


class _RoundGradient(torch.autograd.Function):
    """Identity whose gradient is rounded to a dtype and back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype).to(gradient.dtype), None


# ---- layouts, poison --------------------------------------------------------------------------

LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")


def in_layout(x: Tensor, layout: str) -> Tensor:
    """`x` as a view that is laid out otherwise; compare an op on it with the op on `.contiguous()` of it.

    contiguous; transposed: the last two dimensions swapped in memory; strided: every second element of the last
    dimension; offset: contiguous, but one element off the start of its storage, so not 16-byte aligned; expanded:
    stride 0 over the first dimension, so every entry along it has the values of the first.
    """
    if layout == "contiguous":
        return x.contiguous()
    if layout == "transposed":
        return x.mT.contiguous().mT if x.dim() > 1 else x.contiguous()
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, float("nan") if x.is_floating_point() else 0)], -1)[..., 0]
    if layout == "offset":
        storage = x.new_zeros(x.numel() + 1)
        return storage[1:].view(x.shape).copy_(x)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    raise ValueError(f"no layout {layout!r}; there are {', '.join(LAYOUTS)}")


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Every uninitialised floating tensor that torch hands out in here (outputs, workspaces) is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled

"""adamw_ against torch.optim.AdamW by the rule, and its own promises: skip, masters, stochastic rounding; on the
reference and on the kernels."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.ops import adamw_
from fastgpt.ops.adamw import philox, random_bits, round_stochastically
from tests.ops import checks, kernels
from tests.rule import LAYOUTS, assert_within_rule, in_layout, randn

SHAPES = [(), (7, 3), (2, 0, 3), (769,), (40, 33)]
HYPER: dict[str, Any] = dict(lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


@pytest.fixture(params=kernels.WHERE)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.at(request.param) as device:
        yield device


def tensors(dtype: torch.dtype, seed: int, device: str = "cpu", shapes: list = SHAPES) -> list[Tensor]:
    return [randn(*shape, dtype=dtype, seed=seed + i, device=device) for i, shape in enumerate(shapes)]


def gradients(dtype: torch.dtype, device: str) -> Callable[[int], list[Tensor]]:
    """Gradients of a step: the same for every caller, different for every step, small, large and of either sign."""
    one, two = tensors(dtype, 100, device), tensors(dtype, 200, device)

    def of_step(step: int) -> list[Tensor]:
        return [a * math.sin(step) + b * math.cos(0.7 * step) ** 5 for a, b in zip(one, two, strict=True)]

    return of_step


def zeros(like: list[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.zeros(t.shape, dtype=dtype, device=t.device) for t in like]


def torchs(
    params: list[Tensor], steps: int, gradient: Callable[[int], list[Tensor]], clip: float = 1.0
) -> list[Tensor]:
    """Parameters after `steps` of torch.optim.AdamW in their dtype, with its plainest implementation."""
    params = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(
        params, HYPER["lr"], (HYPER["beta1"], HYPER["beta2"]), HYPER["eps"], HYPER["weight_decay"], foreach=False
    )
    for step in range(1, steps + 1):
        for p, g in zip(params, gradient(step), strict=True):
            p.grad = g.to(p.dtype) * clip
        optimizer.step()
    return [p.detach() for p in params]


def joined(ts: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in ts])


@pytest.mark.parametrize("clip", [None, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch_over_100_steps(dtype: torch.dtype, clip: float | None, device: str) -> None:
    params = tensors(dtype, 1, device)
    gradient = gradients(dtype, device)
    ours, m, v = [p.clone() for p in params], zeros(params, dtype), zeros(params, dtype)
    for step in range(1, 101):
        adamw_(ours, gradient(step), m, v, **HYPER, step=step, clip=clip)
    theirs = torchs(params, 100, gradient, 1.0 if clip is None else clip)
    exact = torchs([p.double() for p in params], 100, gradient, 1.0 if clip is None else clip)
    assert_within_rule(joined(ours), joined(theirs), joined(exact), "parameters after 100 steps")


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("clip", [None, 0.25])
def test_masters(clip: float | None, grad_dtype: torch.dtype, device: str) -> None:
    params = tensors(torch.bfloat16, 1, device)
    gradient = gradients(grad_dtype, device)
    ours, masters, m, v = [p.clone() for p in params], [p.float() for p in params], zeros(params), zeros(params)
    for step in range(1, 21):
        adamw_(ours, gradient(step), m, v, **HYPER, step=step, clip=clip, masters=masters)
        assert all(torch.equal(p, master.bfloat16()) for p, master in zip(ours, masters, strict=True))
    theirs = torchs([p.float() for p in params], 20, gradient, 1.0 if clip is None else clip)
    exact = torchs([p.double() for p in params], 20, gradient, 1.0 if clip is None else clip)
    assert_within_rule(joined(masters), joined(theirs), joined(exact), "masters after 20 steps")


def test_dtypes_may_be_mixed(device: str) -> None:
    kinds = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.bfloat16]
    params = [randn(5, 3, dtype=d, seed=i, device=device) for i, d in enumerate(kinds)]
    wide = [torch.float64 if d == torch.float64 else torch.float32 for d in kinds]
    masters = [None, params[1].float(), None, params[3].float(), None]  # the last is rounded stochastically
    m, v = ([torch.zeros(5, 3, dtype=d, device=device) for d in wide] for _ in range(2))
    grads = [randn(5, 3, dtype=d, seed=9 + i, device=device) for i, d in enumerate(kinds)]
    alone = []
    for i, p in enumerate(params):
        one = [p.clone()], [grads[i]], [m[i].clone()], [v[i].clone()]
        master = [None if masters[i] is None else masters[i].clone()]
        adamw_(*one, **HYPER, step=1, masters=master, seed=3, tensor_ids=[i])
        alone.append(one[0][0])
    adamw_(params, grads, m, v, **HYPER, step=1, masters=masters, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(params, alone, strict=True))


def state(seed: int = 0, device: str = "cpu") -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], dict]:
    """Every kind of parameter: float32, bfloat16 with a master, bfloat16 rounded stochastically, empty."""
    params = [randn(9, 5, dtype=torch.float32, seed=seed, device=device)]
    params += [randn(33, dtype=torch.bfloat16, seed=seed + i, device=device) for i in (1, 2)]
    params += [torch.empty(0, 4, device=device)]
    grads = [randn(*p.shape, dtype=p.dtype, seed=seed + 7, device=device) for p in params]
    m, v = zeros(params), [t + 1 for t in zeros(params)]
    return params, grads, m, v, dict(**HYPER, masters=[None, params[1].float() + 1e-4, None, None], seed=5)


def everything(lists: tuple) -> list[Tensor]:
    *four, options = lists
    return [t for ts in (*four, options["masters"]) for t in ts if t is not None]


@pytest.mark.parametrize("skip", [True, torch.tensor(True), torch.tensor(2.0), torch.tensor(float("nan"))])
@pytest.mark.parametrize("clip", [None, float("nan")])
def test_skip_leaves_everything(skip: Any, clip: float | None, device: str) -> None:
    lists = state(device=device)
    lists[1][0][0] = float("nan")
    before = [t.clone() for t in everything(lists)]
    skip = skip.to(device) if isinstance(skip, Tensor) else skip
    adamw_(*lists[:4], **lists[4], step=torch.tensor(0.0, device=device), clip=clip, skip=skip)
    for a, b in zip(everything(lists), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("skip", [False, torch.tensor(False), torch.tensor(0.0)])
def test_skip_of_zero_changes_nothing(skip: Any, device: str) -> None:
    one, two = state(device=device), state(device=device)
    adamw_(*one[:4], **one[4], step=3, clip=0.5)
    skip = skip.to(device) if isinstance(skip, Tensor) else skip
    adamw_(*two[:4], **two[4], step=3, clip=0.5, skip=skip)
    assert all(torch.equal(a, b) for a, b in zip(everything(one), everything(two), strict=True))


def test_numbers_may_be_tensors(device: str) -> None:
    one, two = state(device=device), state(device=device)
    adamw_(*one[:4], **one[4], step=3, clip=0.5)
    scalars = dict(lr=HYPER["lr"], step=3, clip=0.5)
    given = {k: torch.tensor(x, dtype=torch.float64, device=device) for k, x in scalars.items()}
    adamw_(*two[:4], **{**two[4], **given})
    assert all(torch.equal(a, b) for a, b in zip(everything(one), everything(two), strict=True))


@pytest.mark.parametrize("clip", [None, 0.5])
def test_what_is_written_says_so_and_gradients_are_not(clip: float | None, device: str) -> None:
    lists = state(device=device)
    lists[0][0].requires_grad_()
    loss = (lists[0][0] * lists[0][0]).sum()
    grads = [g.clone() for g in lists[1]]
    versions = [t._version for t in everything(lists)]
    gradient_versions = [g._version for g in lists[1]]
    adamw_(*lists[:4], **lists[4], step=1, clip=clip)
    assert all(torch.equal(a, b) for a, b in zip(grads, lists[1], strict=True))
    assert [g._version for g in lists[1]] == gradient_versions
    written = [t._version > old for t, old in zip(everything(lists), versions, strict=True)]
    n = len(lists[0])
    assert written == [True] * n + [False] * n + [True] * (2 * n + 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x != "contiguous"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_gradients_of_any_strides(clip: float | None, layout: str, device: str) -> None:
    one, two = state(device=device), state(device=device)
    strided = [in_layout(g, layout) for g in one[1]]
    one[1][:], two[1][:] = strided, [g.contiguous() for g in strided]
    adamw_(*one[:4], **one[4], step=1, clip=clip)
    adamw_(*two[:4], **two[4], step=1, clip=clip)
    assert all(torch.equal(a, b) for a, b in zip(everything(one), everything(two), strict=True))


def test_state_off_the_start_of_its_storage(device: str) -> None:
    one, two = state(device=device), state(device=device)
    for ts in two[:4]:
        ts[:] = [in_layout(t, "offset") for t in ts]
    adamw_(*one[:4], **one[4], step=1)
    adamw_(*two[:4], **two[4], step=1)
    assert all(torch.equal(a, b) for a, b in zip(everything(one), everything(two), strict=True))


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    one, two = state(device=device), state(device=device)
    adamw_(*one[:4], **one[4], step=1, clip=0.5)
    monkeypatch.setattr("fastgpt.ops.adamw.CHUNK", 16)
    adamw_(*two[:4], **two[4], step=1, clip=0.5)
    assert all(torch.equal(a, b) for a, b in zip(everything(one), everything(two), strict=True))


def test_no_parameters() -> None:
    adamw_([], [], [], [], **HYPER, step=1)


def test_non_finite_gradients_propagate(device: str) -> None:
    params, grads, m, v, options = state(device=device)
    grads[0][0, 0], grads[2][4] = float("nan"), float("inf")
    adamw_(params, grads, m, v, **options, step=1)
    assert params[0].isnan().sum() == 1 and params[0][0, 0].isnan()
    assert params[2].isnan().sum() == 1 and params[2][4].isnan()


# ---- stochastic rounding ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "result"),
    [  # the known answers of Random123, the authors' library
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox(counter: tuple, key: tuple, result: tuple, device: str) -> None:
    assert philox(counter, key) == result
    words = philox(tuple(torch.tensor([c], device=device) for c in counter), key)
    assert tuple(int(w) for w in words) == result


def test_rounding_is_exactly_unbiased(device: str) -> None:
    """Over all 65536 values of the bits, the mean of the rounded values is the value itself, to the bit.

    Each has 8 significant bits, so float64 holds the sum of all 2^16 exactly.
    """
    bits = torch.arange(65536, dtype=torch.int32, device=device)
    for value in (1.0, 1.001, -3.14159, 1e-20, -1e30, 0.0, 65280.1):
        x = torch.full((65536,), value, dtype=torch.float32, device=device)
        rounded = round_stochastically(x, bits).double()
        assert len(rounded.unique()) <= 2
        assert rounded.mean() == x[0].double()


def test_rounding_keeps_what_bfloat16_holds(device: str) -> None:
    x = torch.cat([randn(1000, dtype=torch.bfloat16, device=device).float(), torch.tensor([0.0, 1e-40], device=device)])
    x[1001] = x[1001].bfloat16()
    patterns = [0x7F800001, 0x7FFFFFFF, -1, 0x7F800000, -0x800000]  # the narrowest NaN, the widest of either sign, infs
    special = torch.tensor(patterns, dtype=torch.int32, device=device).view(torch.float32)
    for bits in (0, 1, 65535):
        assert torch.equal(round_stochastically(x, torch.full((1002,), bits, device=device).int()).float(), x)
        kept = round_stochastically(special, torch.full((5,), bits, device=device).int())
        assert kept[:3].isnan().all() and kept[3:].tolist() == [float("inf"), float("-inf")]


def test_bits_look_random(device: str) -> None:
    """Each bit is set half of the time, and neighbours in element, step, tensor and seed are independent: 6 sigma."""
    n, where = 1 << 16, torch.device(device)
    base = random_bits(7, 1, 0, 0, n, where)
    assert base.min() >= 0 and base.max() < 65536
    others = [
        random_bits(7, 1, 0, 1, n, where),
        random_bits(7, 2, 0, 0, n, where),
        random_bits(7, 1, 1, 0, n, where),
        random_bits(8, 1, 0, 0, n, where),
        random_bits(7 + 2**32, 1, 0, 0, n, where),
        random_bits(7, 1, 0, 2**35, n, where),
    ]
    limit = 6 * math.sqrt(n) / 2
    for bit in range(16):
        assert abs((base >> bit & 1).sum().item() - n / 2) < limit
        for other in others:
            assert abs(((base ^ other) >> bit & 1).sum().item() - n / 2) < limit


def rounded_step(p: Tensor, g: Tensor, **options: Any) -> Tensor:
    p = p.clone()
    adamw_([p], [g], [torch.zeros_like(g).float()], [torch.zeros_like(g).float()], **HYPER, **options)
    return p


@pytest.mark.parametrize("cuts", [(0, 501), (0, 0, 8, 16, 501), (0, 3, 250, 251, 501), (0, 500, 501, 501)])
def test_sharding_does_not_matter(cuts: tuple[int, ...], device: str) -> None:
    p, g = (randn(501, dtype=torch.bfloat16, seed=s, device=device) for s in (1, 2))
    whole = rounded_step(p, g, step=4, seed=11)
    shards = [rounded_step(p[a:b], g[a:b], step=4, seed=11, offsets=[a]) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(shards), whole)


def test_rounding_depends_on_seed_step_and_tensor(device: str) -> None:
    p, g = (randn(501, dtype=torch.bfloat16, seed=s, device=device) for s in (1, 2))
    base = rounded_step(p, g, step=1, seed=11)
    assert torch.equal(base, rounded_step(p, g, step=torch.tensor(1.0, device=device), seed=11))
    assert not torch.equal(base, rounded_step(p, g, step=1, seed=12))
    assert not torch.equal(base, rounded_step(p, g, step=1, seed=11, tensor_ids=[1]))
    assert not torch.equal(base, rounded_step(p, g, step=1, seed=11, offsets=[8]))


def test_small_updates_add_up(device: str) -> None:
    """200 steps of 1e-4 from 1: rounded to nearest, bfloat16 would never leave 1."""
    n, steps, lr = 4000, 200, 1e-4
    p, g = torch.ones(n, dtype=torch.bfloat16, device=device), torch.ones(n, dtype=torch.bfloat16, device=device)
    m, v = torch.ones(n, device=device), torch.ones(n, device=device)
    for step in range(1, steps + 1):  # moments of 1 without bias correction, which a large step turns off
        adamw_([p], [g], [m], [v], lr=lr, beta1=0.9, beta2=0.95, eps=0.0, weight_decay=0.0, step=10**6 + step, seed=2)
    # A step moves one element by its spacing below 1 (2^-8) with a probability of lr / 2^-8.
    spread = 2**-8 * math.sqrt(steps * lr * 2**8)
    assert abs(p.double().mean().item() - (1 - steps * lr)) < 5 * spread / math.sqrt(n)
    assert len(p.unique()) > 5


# ---- contract ---------------------------------------------------------------------------------

V = checks.values


def call(device: str, **changes: Any) -> tuple[list, dict]:
    p = changes.pop("p", V(4, 3, device=device).float())
    lists = [
        changes.pop("params", [p]),
        changes.pop("grads", [p]),
        changes.pop("m", [torch.zeros_like(p, dtype=torch.float32)]),
        changes.pop("v", [torch.zeros_like(p, dtype=torch.float32)]),
    ]
    return lists, {**HYPER, "step": 1, **changes}


def bf16(device: str) -> Tensor:
    return V(4, 3, device=device).bfloat16()


ERRORS = {
    "grads must have one entry per parameter (1), got 0": lambda d: call(d, grads=[]),
    "masters must have one entry per parameter (1), got 2": lambda d: call(d, masters=[None, None]),
    "grads[0] must be a tensor, got NoneType": lambda d: call(d, grads=[None]),
    "params[0] must be float64, float32, bfloat16 or float16, got int64": lambda d: call(
        d, p=V(4, 3, device=d).long()),
    "grads[0] must be float32 for a float32 parameter, got bfloat16": lambda d: call(d, grads=[bf16(d)]),
    "grads[0] must be bfloat16 or float32 for a bfloat16 parameter, got float16": lambda d: call(
        d, p=bf16(d), grads=[bf16(d).half()], seed=1),
    "grads[0] must have the shape of its parameter (4, 3), got (3, 4)": lambda d: call(
        d, grads=[V(3, 4, device=d).float()]),
    "exp_avgs[0] must be float32 for a bfloat16 parameter, got bfloat16": lambda d: call(
        d, p=bf16(d), m=[bf16(d)], seed=1),
    "exp_avg_sqs[0] must be contiguous, got strides (1, 4) for shape (4, 3)": lambda d: call(
        d, v=[V(3, 4, device=d).float().t()]),
    "params[0] must be contiguous": lambda d: call(d, params=[V(3, 4, device=d).float().t()]),
    "masters[0] must be None for a float32 parameter": lambda d: call(d, masters=[V(4, 3, device=d).float()]),
    "params[0] is bfloat16 and needs a float32 master or a seed, got neither": lambda d: call(d, p=bf16(d)),
    "params[0] is float16 and needs a float32 master, got neither": lambda d: call(d, p=bf16(d).half(), seed=1),
    "seed must be a whole number in 0 .. 2^64 - 1, got -1": lambda d: call(d, seed=-1),
    "offsets[0] must be a whole number from 0, got -8": lambda d: call(d, offsets=[-8]),
    "tensor_ids[0] must be a whole number from 0, got 0.5": lambda d: call(d, tensor_ids=[0.5]),
    "lr must be a finite number >= 0, got nan": lambda d: call(d, lr=float("nan")),
    "lr must be a number or a real 0-dim tensor, got (1,)": lambda d: call(d, lr=V(1, device=d)),
    "beta2 must be at least 0 and less than 1, got 1.0": lambda d: call(d, beta2=1.0),
    "beta1 must be a number, got a tensor": lambda d: call(d, beta1=V(device=d)),
    "eps must be a finite number >= 0, got -1e-08": lambda d: call(d, eps=-1e-8),
    "weight_decay must be a number, got None": lambda d: call(d, weight_decay=None),
    "step must be 1 or more, got 0": lambda d: call(d, step=0),
    "clip must be a number, got str": lambda d: call(d, clip="1"),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    checks.check_error(ops.adamw_, f"adamw_: {message}", ERRORS[message])


def test_nothing_is_written_before_an_error() -> None:
    lists = state()
    before = [t.clone() for t in everything(lists)]
    lists[3][-1] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"exp_avg_sqs\[3\] must have the shape"):
        adamw_(*lists[:4], **lists[4], step=1)
    lists[3][-1] = torch.zeros(0, 4)
    assert all(torch.equal(a, b) for a, b in zip(everything(lists), before, strict=True))


def test_devices_must_agree() -> None:
    p = torch.ones(2)
    with pytest.raises(ValueError, match=r"params\[1\] must be on the device of params\[0\] \(cpu\), got meta"):
        adamw_([p, p.to("meta")], [p, p], [p, p], [p, p], **HYPER, step=1)
    with pytest.raises(ValueError, match=r"step must be on the device of the parameters \(cpu\), got meta"):
        adamw_([p], [p], [p.clone()], [p.clone()], **HYPER, step=torch.ones((), device="meta"))


def test_compiled(device: str) -> None:
    torch._dynamo.reset()
    one, two = state(device=device), state(device=device)
    scalars = [torch.tensor(x, device=device) for x in (3.0, 0.5, 0.0)]

    def step(lists: tuple, step: Tensor, clip: Tensor, skip: Tensor) -> None:
        adamw_(*lists[:4], **lists[4], step=step, clip=clip, skip=skip)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for skip in (scalars[2], scalars[0]):  # the second call is skipped
        step(one, *scalars[:2], skip)
        compiled(two, *scalars[:2], skip)
        torch.testing.assert_close(everything(two), everything(one))

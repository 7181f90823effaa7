"""The kernels behind adamw_: which serve a call, tables of many tensors, random bits, and numbers on the device.

That they are right is shown by test_adamw.py, all of whose tests run on them too.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fastgpt import native
from fastgpt.native import emulate
from fastgpt.ops import adamw_
from fastgpt.ops.adamw import random_bits, round_stochastically
from fastgpt.optim import AdamW, Muon
from tests.ops import kernels
from tests.rule import assert_within_rule, in_layout, randn

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
HYPER: dict[str, Any] = dict(lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
page = import_module("fastgpt.ops.adamw")


@pytest.fixture(autouse=True)
def emulated():
    with kernels.at(kernels.EMULATED):
        yield


class Kind(NamedTuple):
    """Of a tensor: what a kernel is compiled for, and the gradient's dtype."""

    param: torch.dtype
    grad: torch.dtype
    master: bool = False

    @property
    def vector(self) -> int:
        return 2 if self.param == F64 else 4

    @property
    def chunk(self) -> int:
        """Elements that a block takes: kThreads * kVectors * adamw_vector in adamw.cu."""
        return 256 * 2 * self.vector


KINDS = {
    "fp64": Kind(F64, F64),
    "fp32": Kind(F32, F32),
    "bf16, master": Kind(BF16, BF16, True),
    "bf16, master, fp32 gradients": Kind(BF16, F32, True),
    "fp16, master": Kind(F16, F16, True),
    "fp16, master, fp32 gradients": Kind(F16, F32, True),
    "bf16, stochastic": Kind(BF16, BF16),
    "bf16, stochastic, fp32 gradients": Kind(BF16, F32),
}
KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


class State(NamedTuple):
    p: Tensor
    g: Tensor
    m: Tensor
    v: Tensor
    master: Tensor | None

    @classmethod
    def of(cls, kind: Kind, n: int, seed: int = 0) -> State:
        wide = F64 if kind.param == F64 else F32
        p, g, m, v = (randn(n, dtype=F64, seed=seed + i) for i in range(4))
        master = p.to(wide) if kind.master else None
        return cls(p.to(kind.param), g.to(kind.grad), m.to(wide), (v * v).to(wide), master)

    def clone(self) -> State:
        return State(*(None if t is None else t.clone() for t in self))

    def double(self) -> State:
        p, g, m, v, master = self
        return State((p if master is None else master).double(), g.double(), m.double(), v.double(), None)

    @property
    def canonical(self) -> Tensor:
        return self.p if self.master is None else self.master

    @property
    def written(self) -> list[Tensor]:
        return [t for t in (self.p, self.m, self.v, self.master) if t is not None]


def step(*states: State, **options: Any) -> None:
    p, g, m, v, masters = (list(column) for column in zip(*states, strict=True))
    adamw_(p, g, m, v, masters=masters, **{**HYPER, "step": 3, "seed": 7, **options})


def by_reference(state: State, **options: Any) -> State:
    made = state.clone()
    with native.emulated(only=()):
        step(made, **options)
    return made


# ---- sizes --------------------------------------------------------------------------------------------------


@KIND
def test_sizes_at_the_edges_of_vectors_and_chunks(kind: Kind) -> None:
    chunk, vector = kind.chunk, kind.vector
    for n in (1, vector - 1, vector, vector + 1, chunk - vector, chunk, chunk + vector, 2 * chunk + 1):
        before = State.of(kind, n)
        ours, theirs, exact = before.clone(), by_reference(before, clip=0.7), by_reference(before.double(), clip=0.7)
        step(ours, clip=0.7)
        path = "vector" if n % vector == 0 else "generic" if n < vector else "vector and generic"
        assert kernels.last_path()[0] == path, n
        for name in ("m", "v"):
            assert_within_rule(*(getattr(s, name) for s in (ours, theirs, exact)), f"{name} of {n}")
        if kind.master or kind.param != BF16:  # else it is rounded at random: below
            assert_within_rule(ours.canonical, theirs.canonical, exact.p, f"parameters of {n}")
        if kind.master:
            assert torch.equal(ours.p, ours.master.to(kind.param))


def test_the_length_of_a_chunk_is_what_these_tests_think() -> None:
    text = (kernels.CSRC / "adamw/adamw.cu").read_text()
    assert "kThreads = 256;" in text and "kVectors = 2;" in text and "kElements = 8;" in text


@KIND
def test_both_paths_give_the_same_bits(kind: Kind) -> None:
    """Whatever is not aligned, and whatever the strides of the gradient."""
    before = State.of(kind, 48)
    expected = before.clone()
    step(expected)
    assert kernels.last_path() == ("vector", "16-byte accesses")
    for name in State._fields if kind.master else State._fields[:4]:
        laid_out = before.clone()._replace(**{name: in_layout(getattr(before, name), "offset")})
        step(laid_out)
        assert kernels.last_path() == ("generic", "a tensor does not begin at a multiple of its vectors"), name
        assert kernels.same(laid_out.written, expected.written), name
    wide = torch.stack([before.g, before.g * torch.nan], 1)
    for gradient in (wide[:, 0], before.g[:1].expand(48)):
        one, two = before.clone()._replace(g=gradient), before.clone()._replace(g=gradient.contiguous())
        kept = gradient.clone()
        step(one), step(two)
        assert kernels.same(one.written, two.written) and kernels.same([gradient], [kept])


def test_strides_of_matrices() -> None:
    p, m, v = randn(6, 8, dtype=F32), torch.zeros(6, 8), torch.zeros(6, 8)
    transposed = randn(8, 6, dtype=F32, seed=1).t()
    both = []
    for gradient in (transposed, transposed.contiguous()):
        state = [p.clone()], [gradient], [m.clone()], [v.clone()]
        adamw_(*state, **HYPER, step=1)
        both.append([state[0][0], state[2][0], state[3][0]])
    assert kernels.same(*both)


FAR = """
#include "adamw/adamw.cu"
using namespace fastgpt;

// A tensor of `before` elements that are not there, and those that are. The grid begins with the latter.
__device__ Table table(float* p, const float* g, float* m, float* v, int64_t before, int64_t count, int64_t chunk) {
  AdamWOptions options;
  options.lr.value = 0.01;
  options.step.value = options.clip.value = 1;
  options.beta1 = options.beta2 = 0.5;
  options.log_beta1 = options.log_beta2 = -0.6931471805599453;
  AdamWTensor t;
  t.param = p - before;
  t.grad = g - before;
  t.exp_avg = m - before;
  t.exp_avg_sq = v - before;
  t.count = before + count;
  Table made(options);
  made.add(t, 0);
  made.tensors[0].first_chunk = int32_t(-before / chunk);
  return made;
}
__global__ void vectors(float* p, const float* g, float* m, float* v, int64_t before, int64_t count) {
  adamw_kernel<float, false>(table(p, g, m, v, before, count, kThreads * kVectors * 4));
}
__global__ void elements(float* p, const float* g, float* m, float* v, int64_t before, int64_t count) {
  adamw_generic_kernel<float>(table(p, g, m, v, before, count, kThreads * kElements));
}
"""


def test_an_element_may_lie_beyond_two_billion_others() -> None:
    """Its place is counted in 64 bits. What lies before is no memory at all."""
    compiled, found = emulate.compile(FAR), []
    for before in (0, 2**31, 2**33):
        for kernel in ("vectors", "elements"):
            state = State.of(KINDS["fp32"], 2048 + 8)
            compiled.launch(kernel, 2, 256, *state[:4], before, 2048 + 8, in_place=["p", "m", "v"])
            found.append([state.p, state.m, state.v])
    assert all(kernels.same(found[0], other) for other in found)
    assert not torch.equal(found[0][0], State.of(KINDS["fp32"], 2048 + 8).p)


# ---- many tensors -------------------------------------------------------------------------------------------


def test_more_tensors_than_a_launch_takes() -> None:
    """Of all kinds, some of them empty, in turns: each is updated as if it were alone."""
    states = [State.of(kind, n, seed=n) for n in range(9, 29) for kind in KINDS.values()]
    states[5:5] = [State.of(kind, 0) for kind in KINDS.values()]
    alone = [s.clone() for s in states]
    for i, s in enumerate(alone):
        step(s, tensor_ids=[i])
    with native.emulated(profile=True, checked=False):
        native.launches()
        step(*states)
        launches = {launch["kernel"]: launch["launches"] for launch in native.launches()}
    assert all(kernels.same(a.written, b.written) for a, b in zip(states, alone, strict=True))
    # 40 tensors of each 16-bit kernel, 20 of the others; of the elements that fill no vector, 15 or 10 for each 20
    assert sum(launches.values()) < 12
    assert {"adamw_kernel", "adamw_generic_kernel"} == {name.split("<")[0].split("::")[-1] for name in launches}


def test_a_launch_is_filled_before_the_next_one_begins() -> None:
    states = [State.of(KINDS["fp32"], 4, seed=i) for i in range(130)]
    with native.emulated(profile=True, checked=False):
        native.launches()
        step(*states)
        (launch,) = native.launches()
    assert (launch["launches"], launch["blocks"]) == (3, 130)


def test_nothing_but_empty_tensors() -> None:
    with kernels.Spy() as spy:
        step(*(State.of(kind, 0) for kind in KINDS.values()))
    assert spy.kernels == ["adamw_"] * 2 and kernels.last_path() == ("vector", "16-byte accesses")


# ---- random bits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "offset"])
@pytest.mark.parametrize("seed", [0, 7, 2**63, 2**64 - 1])
@pytest.mark.parametrize("offset", [0, 1, 4, 5, 7, 2**35 + 3, 2**62])
def test_random_bits_are_the_references(offset: int, seed: int, layout: str) -> None:
    """Bit for bit: the new value is one subtraction, so both round the same float32."""
    n, tensor_id, at = 100, 2**32 - 1 if seed else 0, 2**32 - 5 if seed > 7 else 3
    p = in_layout(randn(n, dtype=BF16), layout)
    g = in_layout(randn(n, dtype=BF16, seed=1).sign(), layout)
    old = p.clone()
    plain = dict(lr=0.01, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0)
    adamw_([p], [g], [torch.zeros(n)], [torch.zeros(n)], **plain, step=at, seed=seed, offsets=[offset],
           tensor_ids=[tensor_id])  # fmt: skip
    new = old.float() - torch.tensor(0.01) * g.float()
    bits = random_bits(seed, at, tensor_id, offset, n, torch.device("cpu"))
    assert torch.equal(p, round_stochastically(new, bits))
    assert not torch.equal(p, new.bfloat16())


# ---- numbers on the device ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32, BF16, torch.int64, torch.int32, torch.bool, torch.uint8])
def test_numbers_of_any_dtype_are_read_on_the_device(dtype: torch.dtype) -> None:
    one = torch.ones((), dtype=dtype)
    expected, found = State.of(KINDS["fp32"], 9), State.of(KINDS["fp32"], 9)
    step(expected, lr=1.0, step=1, clip=1.0)
    step(found, lr=one, step=one, clip=one, skip=torch.zeros((), dtype=dtype))
    assert kernels.same(found.written, expected.written)
    before = [t.clone() for t in found.written]
    step(found, lr=one, step=one, clip=one, skip=one)
    assert kernels.same(found.written, before)


@KIND
@pytest.mark.parametrize("n", [40, 9])
def test_skip_leaves_everything_bitwise(n: int, kind: Kind) -> None:
    state = State.of(kind, n)
    state.g[0], state.p[1], state.m[2] = (float("nan"),) * 3
    before = [t.clone() for t in state.written]
    step(state, skip=torch.tensor(float("nan")), clip=torch.tensor(float("nan")), step=torch.tensor(0.0))
    assert kernels.same(state.written, before)


def test_the_bias_correction_keeps_its_digits() -> None:
    """1 - beta2^step of a beta next to 1, at the first steps, and at one so late that nothing is left of beta^step."""
    for at in (1, 2, 10, 1000, 10**6):
        options = dict(beta2=0.99999, step=torch.tensor(float(at)))
        before = State.of(KINDS["fp32"], 64)
        ours = before.clone()
        step(ours, **options)
        theirs, exact = by_reference(before, **options), by_reference(before.double(), **options)
        assert_within_rule(ours.p, theirs.p, exact.p, f"step {at}")


# ---- the optimizers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AdamW, Muon])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_optimizers_reach_the_kernels(kind: type[AdamW], dtype: torch.dtype) -> None:
    params = [nn.Parameter(randn(*shape, dtype=dtype)) for shape in ((16, 8), (8,), (5, 3))]
    groups = [dict(params=params[:1], muon=kind is Muon), dict(params=params[1:])]
    optimizer = kind(groups if kind is Muon else params, lr=0.01)
    versions = [p._version for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    with kernels.no_reference(page), kernels.Spy() as spy:
        optimizer.step(clip=torch.tensor(0.5), skip=torch.tensor(False))
    assert spy.kernels == ["adamw_"] and "aten::_fused_adamw_" not in spy.names
    assert all(p._version > version for p, version in zip(params, versions, strict=True))


@pytest.mark.parametrize("dtype", [F64, F32])
def test_the_optimizer_equals_torchs_over_100_steps(dtype: torch.dtype) -> None:
    def after(kind: type, dtype: torch.dtype) -> list[Tensor]:
        params = [nn.Parameter(randn(*shape, seed=i).to(dtype)) for i, shape in enumerate(((7, 5), (3,), (16, 16)))]
        optimizer = kind(params, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
        for at in range(100):
            for i, p in enumerate(params):
                p.grad = (p.detach().double() * 0.3 + randn(*p.shape, seed=1000 * at + i)).to(dtype)
            optimizer.step()
        return [p.detach() for p in params]

    with native.emulated(checked=False):
        ours = after(AdamW, dtype)
    with native.emulated(only=()):
        theirs, exact = (after(torch.optim.AdamW, kind) for kind in (dtype, F64))
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert_within_rule(a, b, c, f"parameter {i}")


# ---- dispatch -----------------------------------------------------------------------------------------------


def test_the_kernels_run_and_nothing_else() -> None:
    states = [State.of(KINDS["fp32"], 9), State.of(KINDS["bf16, master"], 8)]
    numbers = dict(lr=torch.tensor(0.1), step=torch.tensor(2.0), clip=torch.tensor(0.5), skip=torch.tensor(False))
    with kernels.no_reference(page), kernels.Spy() as spy:
        step(*states, **numbers)
    assert set(spy.names) == {"fastgpt_emulated::adamw_"} and len(spy.names) == 2


def arguments(*states: State, **changes: Any) -> tuple[Any, ...]:
    """Of the entry."""
    p, g, m, v, masters = (list(column) for column in zip(*states, strict=True))
    n = len(states)
    found = dict(
        params=p, grads=g, exp_avgs=m, exp_avg_sqs=v, masters=[t for t in masters if t is not None],
        lr=0.0, lr_tensor=torch.tensor(0.01), beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=3.0,
        step_tensor=None, clip=1.0, clip_tensor=None, skip=None, seed=5, offsets=[0] * n, tensor_ids=list(range(n)),
    )  # fmt: skip
    return tuple({**found, **changes}.values())


@pytest.mark.parametrize("kind", ["fp32", "bf16, master"])
def test_opcheck(kind: str) -> None:
    states = [State.of(KINDS[kind], n) for n in (8, 3)]
    torch.library.opcheck(torch.ops.fastgpt_emulated.adamw_.default, arguments(*states))


def test_entries_refuse_what_would_leave_their_memory() -> None:
    state, entry = State.of(KINDS["fp32"], 8), torch.ops.fastgpt_emulated.adamw_
    half = State.of(KINDS["fp16, master"], 8)
    for message, call in (
        ("there must be parameters", dict(params=[])),
        ("one entry per parameter", dict(offsets=[0, 0])),
        ("one per parameter", dict(masters=[state.m] * 2)),
        (r"grads\[0\] must have the dtype, size and device", dict(grads=[state.g[:7]])),
        (r"grads\[0\] must have the dtype", dict(grads=[state.g.double()])),
        (r"exp_avgs\[0\] must have the dtype", dict(exp_avgs=[state.m.double()])),
        (r"exp_avg_sqs\[0\] must have the dtype", dict(exp_avg_sqs=[state.v[:4]])),
        (r"exp_avgs\[0\] must be contiguous", dict(exp_avgs=[torch.zeros(8, 2)[:, 0]])),
        (r"masters\[0\] must have the dtype", dict(masters=[state.m])),
        ("float64, float32, bfloat16 or float16", dict(params=[state.p.int()], grads=[state.p.int()])),
        ("lr must be 0-dim", dict(lr_tensor=torch.ones(1))),
        ("skip must be float64, float32, int64 or bool", dict(skip=torch.tensor(1, dtype=torch.int32))),
    ):
        with pytest.raises(RuntimeError, match=message):
            entry(*arguments(state, **call))
    with pytest.raises(RuntimeError, match=r"params\[0\] is float16 and needs a master"):
        entry(*arguments(half, masters=[]))


def test_compiled() -> None:
    torch._dynamo.reset()

    def run(state: State, lr: Tensor) -> None:
        step(state, lr=lr, clip=0.5)

    for kind in ("fp32", "bf16, master"):
        one, two = State.of(KINDS[kind], 9), State.of(KINDS[kind], 9)
        run(one, torch.tensor(0.01))
        with kernels.no_reference(page):
            torch.compile(run, fullgraph=True, backend="aot_eager")(two, torch.tensor(0.01))
        assert kernels.same(one.written, two.written)


# ---- the same every time ------------------------------------------------------------------------------------


def test_bitwise_the_same_over_schedules() -> None:
    runs = []
    for seed in (1, 2, 3):
        states = [State.of(kind, kind.chunk + 5) for kind in KINDS.values()]
        with native.emulated(seed=seed):
            step(*states)
        runs.append([t for s in states for t in s.written])
    assert kernels.same(runs[0], runs[1]) and kernels.same(runs[1], runs[2])
    assert not native.findings()


# ---- how many -----------------------------------------------------------------------------------------------

KERNELS = 5 + 2  # by parameter and master; single elements in float and double


def test_instantiations_are_few() -> None:
    """Each one costs everybody's build time, for every architecture."""
    found = kernels.instantiations(r"adamw_\w*kernel")
    assert len(found) == KERNELS, sorted(found)


def test_clipping_and_the_norm_are_no_pass_of_their_own() -> None:
    """With all numbers on the device a step reads and writes 28 bytes for a parameter, clipped or not."""
    state = State.of(KINDS["fp32"], 1 << 14)
    with kernels.counted() as counts:
        step(state, clip=torch.tensor(0.5), skip=torch.tensor(False))
    assert 28 << 14 <= kernels.total(counts, "bytes") < 28.5 * (1 << 14)

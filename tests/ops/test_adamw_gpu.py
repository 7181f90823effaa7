"""What only a GPU can show of the kernels behind adamw_ and grad_norm; test_adamw.py and test_grad_norm.py run on one
too. Each takes seconds at most."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastgpt import native, ops
from fastgpt.ops.adamw import random_bits, round_stochastically
from tests.ops import kernels
from tests.ops.test_adamw_kernels import BF16, F32, KIND, KINDS, Kind, State, step
from tests.rule import in_layout, randn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.fixture(autouse=True)
def kernels_of_the_gpu() -> Iterator[None]:
    """No reference may stand in for them."""
    assert native.cuda_ops() >= {"adamw", "grad_norm"}, native.libraries()
    with kernels.no_reference(*(importlib.import_module(f"fastgpt.ops.{op}") for op in ("adamw", "grad_norm"))):
        yield
    torch.cuda.empty_cache()


def on_gpu(kind: Kind, n: int, seed: int = 0) -> State:
    return State(*(None if t is None else t.cuda() for t in State.of(kind, n, seed)))


@KIND
def test_both_paths_give_the_same_bits(kind: Kind) -> None:
    """What nvcc contracts on one path and not on the other would show."""
    n = 4 * kind.chunk + 8
    before = on_gpu(kind, n)
    vectors, elements = before.clone(), before.clone()._replace(p=in_layout(before.p, "offset"))
    step(vectors, clip=0.7)
    assert kernels.last_path("cuda")[0] == "vector"
    step(elements, clip=0.7)
    assert kernels.last_path("cuda")[0] == "generic"
    assert kernels.same(vectors.written, elements.written)


@pytest.mark.parametrize("offset", [0, 5, 2**35 + 3])
def test_random_bits_are_the_references(offset: int) -> None:
    n, plain = 5000, dict(lr=0.01, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0)
    p, g = (randn(n, dtype=BF16, seed=seed).cuda() for seed in (1, 2))
    g, old = g.sign(), p.clone()
    ops.adamw_([p], [g], [torch.zeros(n, device="cuda")], [torch.zeros(n, device="cuda")], **plain, step=3,
               seed=2**63 + 7, offsets=[offset], tensor_ids=[2**32 - 1])  # fmt: skip
    new = old.float() - torch.tensor(0.01, device="cuda") * g.float()
    bits = random_bits(2**63 + 7, 3, 2**32 - 1, offset, n, p.device)
    assert torch.equal(p, round_stochastically(new, bits))


def test_replay_of_a_graph() -> None:
    """A norm, a clip and an update, in several launches; numbers and gradients change between replays."""
    states = [on_gpu(kind, 9 + i, seed=i) for i in range(20) for kind in KINDS.values()]
    plain = [s.clone() for s in states]
    lr, at, limit = (torch.tensor(x, device="cuda") for x in (0.01, 1.0, 3.0))
    skip = torch.tensor(False, device="cuda")

    def whole(members: list[State]) -> Tensor:
        norm = ops.grad_norm([s.g for s in members if s.g.dtype != torch.float64]).sqrt()
        step(*members, lr=lr, step=at, clip=(limit / norm).clamp(max=1.0), skip=skip)
        return norm

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        whole([s.clone() for s in states])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = whole(states)
    for number in range(1, 5):
        lr.fill_(0.01 / number), at.fill_(number), skip.fill_(number == 3)
        for s, t in zip(states, plain, strict=True):
            s.g.mul_(-1.5)
            t.g.copy_(s.g)
        graph.replay()
        norm = whole(plain)
        assert torch.equal(captured, norm)
        assert all(kernels.same(s.written, t.written) for s, t in zip(states, plain, strict=True)), number


def test_another_stream() -> None:
    """Its gradients are written there, late: kernels on any other stream would read what was there before."""
    late, expected = on_gpu(KINDS["fp32"], 100_000), on_gpu(KINDS["fp32"], 100_000)
    g = late.g.clone()
    late.g.zero_()
    step(expected), ops.grad_norm([g])  # which loads the kernels, too
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles, some 30 ms
        late.g.copy_(g)
        step(late)
        total = ops.grad_norm([late.g])
        assert not stream.query(), "it was waited for"
    torch.cuda.synchronize()
    assert kernels.same(late.written, expected.written) and torch.equal(total, ops.grad_norm([g]))


def test_the_norm_is_bitwise_the_same_250_times() -> None:
    grads = [randn(n, dtype=dtype, seed=n).cuda() for n in (1, 4099, 300_000) for dtype in (F32, BF16)]
    first = ops.grad_norm(grads)
    different = torch.zeros((), dtype=torch.int64, device="cuda")  # looked at once, so that the GPU is kept busy
    for _ in range(250):
        different += ops.grad_norm(grads) != first
    assert different.item() == 0


@pytest.mark.xdist_group("the GPU's memory")
def test_more_than_two_billion_elements() -> None:
    """The last elements are what they are alone."""
    kernels.needs_memory(40)
    n, last = 2**31 + 4096, 4096
    p, g = (torch.zeros(n, dtype=BF16, device="cuda") for _ in range(2))
    m, v = (torch.zeros(n, device="cuda") for _ in range(2))
    whole = State(p, g, m, v, None)
    end = on_gpu(KINDS["bf16, stochastic"], last)
    for to, a in zip(whole[:4], end[:4], strict=True):
        to[-last:].copy_(a)
    step(whole)
    step(end, offsets=[n - last])
    assert kernels.same([t[-last:].clone() for t in (p, m, v)], end.written)
    assert torch.equal(ops.grad_norm([g]), ops.grad_norm([g[-last:].clone()]))

"""What only a GPU can show of the kernels behind attention, at every edge that the emulated tests have, and at real
sizes; test_attention.py runs on one too. Each takes seconds at most."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import native
from fastgpt.ops import attention, document_bounds
from tests.ops import kernels, test_attention_kernels, test_attention_sm80, test_attention_sm90
from tests.ops.test_attention import check_that_other_documents_do_not_matter, inputs, naive, naive_apart
from tests.rule import assert_within_rule, check_by_rule, outputs_and_gradients, poison

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
TENSOR_CORES = pytest.mark.skipif(CAPABILITY < (8, 0), reason="the tensor cores of this GPU are not used")
BEST = "sm90" if CAPABILITY == (9, 0) else "sm80"

# (B, T, H, KV, D): heads of models, at a length that every part of a schedule takes part in.
SHAPES = [(4, 1024, 12, 12, 64), (2, 777, 8, 2, 96), (1, 2048, 8, 2, 128)]


@pytest.fixture(autouse=True)
def kernels_of_the_gpu() -> Iterator[None]:
    """No reference may stand in for them."""
    assert "attention" in native.cuda_ops(), native.libraries()
    with kernels.no_reference(importlib.import_module("fastgpt.ops.attention")):
        yield
    torch.cuda.empty_cache()


def by_rule(arguments: list[Tensor], path: str, torchs: Callable[..., Any] | None = None, **options: Any) -> None:
    """Outputs and gradients; `path` is the forward's."""
    with torch.autograd.set_multithreading_enabled(False):  # each thread remembers the path of its own last call
        check_by_rule(
            lambda *t: attention(*t, **options),
            torchs or (lambda *t: naive(*t, **options)),
            arguments,
            f"{[tuple(t.shape) for t in arguments[:2]]} {arguments[0].dtype} {options}",
        )
    after_decoding = BEST if arguments[0].dtype in (BF16, F16) else "generic"
    assert kernels.last_path("cuda")[0] == (after_decoding if path == "decode" else path)  # of the backward
    with torch.no_grad():
        attention(*arguments, **options)
    assert kernels.last_path("cuda")[0] == path


def path_of(Tq: int, fallback: str = BEST) -> str:
    return "decode" if Tq < 9 else fallback


# ---- by the rule, at every edge ----------------------------------------------------------------------------


@TENSOR_CORES
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("masks", test_attention_sm80.MASKS, ids=str)
def test_edge_lengths_and_masks(masks: dict[str, Any], dtype: torch.dtype) -> None:
    for lengths in [*test_attention_sm90.LENGTHS, (1, 1), (1, 3), (2, 1), (255, 257), (300, 300)]:
        by_rule(inputs(2, *lengths, 4, 2, 64, dtype, "cuda"), path_of(lengths[0]), **masks)


@pytest.mark.parametrize("masks", test_attention_kernels.MASKS, ids=str)
def test_edge_lengths_and_masks_in_float32(masks: dict[str, Any]) -> None:
    for lengths in test_attention_kernels.LENGTHS:
        by_rule(inputs(2, *lengths, 4, 2, 8, F32, "cuda"), path_of(lengths[0], "generic"), **masks)


@TENSOR_CORES
@pytest.mark.parametrize(
    "lengths", [(239, 1), (799, 3), (3, 799), (113, 203), (108, 256), (1023, 1024), (1024, 1023)], ids=str
)
@pytest.mark.parametrize("masks", [dict(causal=False), dict(window=80), dict(window=700)], ids=str)
def test_long_lengths(lengths: tuple[int, int], masks: dict[str, Any]) -> None:
    by_rule(inputs(2, *lengths, 2, 2, 64, BF16, "cuda"), path_of(lengths[0]), **masks)


@TENSOR_CORES
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("D", [8, 40, 64, 72, 80, 96, 104, 120, 128])
def test_widths(D: int, dtype: torch.dtype) -> None:
    for causal in (True, False):
        by_rule(inputs(2, 300, 300, 4, 2, D, dtype, "cuda"), BEST, causal=causal)


@TENSOR_CORES
@pytest.mark.parametrize(
    "options", [dict(softcap=2.0), dict(scale=0.3), dict(scale=0.5, softcap=5.0, window=40)], ids=str
)
def test_scale_and_softcap(options: dict[str, Any]) -> None:
    for D in (64, 128):
        by_rule(inputs(2, 200, 200, 4, 2, D, BF16, "cuda"), BEST, **options)


@pytest.mark.parametrize(("D", "dtype"), [(1, F32), (63, BF16), (130, F32), (256, BF16), (260, F32)], ids=str)
def test_widths_of_the_generic_path(D: int, dtype: torch.dtype) -> None:
    by_rule(inputs(2, 70, 70, 2, 1, D, dtype, "cuda"), "generic")


@TENSOR_CORES
@pytest.mark.parametrize("masks", [dict(), dict(window=7), dict(causal=False)], ids=str)
def test_documents(masks: dict[str, Any]) -> None:
    """By the rule; and what others hold does not matter to the bit."""
    start, end = (bound.cuda() for bound in test_attention_sm80.packed())
    options = dict(doc_start=start, doc_end=end, **masks)
    clean = inputs(1, 330, 330, 2, 1, 64, BF16, "cuda")
    by_rule(clean, BEST, naive_apart((start, end), **masks), **options)
    check_that_other_documents_do_not_matter(clean, (start, end), slice(64, 128), **masks)


@TENSOR_CORES
def test_lengths_of_keys() -> None:
    """Which the sm_80 path serves, on newer GPUs too."""
    real = (140, 40, 0, 140)
    lengths = torch.tensor([140, 40, 0, 199], dtype=torch.int32, device="cuda")

    def existing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [
            naive(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n]) if n else q[b : b + 1] * 0
            for b, n in enumerate(real)
        ]
        return torch.cat(rows)

    for D in (64, 96, 128):
        q, k, v = inputs(4, 12, 140, 2, 1, D, BF16, "cuda")
        by_rule([q, k, v], "sm80", existing, kv_lengths=lengths)
        clean = outputs_and_gradients(lambda *t: attention(*t, kv_lengths=lengths), [q, k, v])
        for b, n in enumerate(real):
            k[b, n:], v[b, n:] = math.nan, math.nan  # memory that was never written
        assert kernels.same(outputs_and_gradients(lambda *t: attention(*t, kv_lengths=lengths), [q, k, v]), clean)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("room", [1, 70, 1200, 33_000])
def test_decoding(room: int, dtype: torch.dtype) -> None:
    for Tq, H, KV, D, masks in (
        (1, 12, 12, 64, {}),
        (1, 32, 8, 128, {}),
        (5, 4, 1, 40, {}),
        (1, 8, 2, 64, dict(window=300)),
    ):
        q, k, v = inputs(3, Tq, room, H, KV, D, dtype, "cuda")
        lengths = [room, room // 2 + 1, min(room, Tq)]
        o, lse = attention(
            q, k, v, kv_lengths=torch.tensor(lengths, dtype=torch.int32, device="cuda"), return_lse=True, **masks
        )
        assert kernels.last_path("cuda")[0] == "decode"
        assert lse.shape == (3, H, Tq)
        for b, n in enumerate(lengths):
            given = [q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n]]
            exact = naive(*(t.double() for t in given), **masks)
            assert_within_rule(o[b : b + 1], naive(*given, **masks), exact, f"{n} of {room} keys, {H} heads of {D}")


@TENSOR_CORES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_real_sizes(shape: tuple[int, ...]) -> None:
    B, T, H, KV, D = shape
    for masks in (dict(), dict(causal=False), dict(window=256)):
        by_rule(inputs(B, T, T, H, KV, D, BF16, "cuda"), BEST, **masks)


# ---- the same every time -----------------------------------------------------------------------------------


def prepared(arguments: list[Tensor], **options: Any) -> Callable[[], list[Tensor]]:
    """O, LSE and gradients, for gradients from upstream that are there already."""
    leaves = [a.detach().requires_grad_() for a in arguments]
    upstream: list[Tensor] = []

    def step() -> list[Tensor]:
        outputs = attention(*leaves, return_lse=True, **options)
        if not upstream:
            upstream.extend(torch.randn_like(y) for y in outputs)
        return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, upstream)]

    return step


@TENSOR_CORES
@pytest.mark.parametrize("masks", [dict(), dict(window=200)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bitwise_the_same_250_times(shape: tuple[int, ...], masks: dict[str, Any]) -> None:
    B, T, H, KV, D = shape
    step = prepared(inputs(B, T, T, H, KV, D, BF16, "cuda"), **masks)
    first = step()
    different = torch.zeros((), dtype=torch.int64, device="cuda")  # looked at once, so that the GPU is kept busy
    for _ in range(250):
        for a, b in zip(step(), first, strict=True):
            different += (a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)).sum()
    assert different.item() == 0


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_memory_full_of_nan(dtype: torch.dtype) -> None:
    step = prepared(inputs(2, 777, 777, 4, 2, 64, dtype, "cuda"))
    expected = step()
    torch.cuda.empty_cache()
    blocks = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]  # that the allocator hands out
    del blocks
    with poison():
        got = step()
    assert kernels.same(got, expected) and all(x.isfinite().all() for x in got)


# ---- streams, graphs, sizes ----------------------------------------------------------------------------------


def test_another_stream() -> None:
    """Its inputs are written there, late: kernels on any other stream would read what was there before."""
    arguments = inputs(2, 512, 512, 4, 2, 64, BF16, "cuda")
    expected = attention(*arguments)
    late = [torch.zeros_like(a) for a in arguments]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles, some 30 ms
        for to, a in zip(late, arguments, strict=True):
            to.copy_(a)
        o = attention(*late)
        assert not stream.query(), "it was waited for"
    torch.cuda.synchronize()
    assert torch.equal(o, expected)


@pytest.mark.parametrize("D", [64, 65, 128])
def test_replay_of_a_graph(D: int) -> None:
    static = inputs(2, 300, 300, 4, 2, D, BF16, "cuda")
    start, end = document_bounds(torch.tensor([0, 100, 300, 600], dtype=torch.int32, device="cuda"), 2, 300)
    step = prepared(static, doc_start=start, doc_end=end)
    graph, captured = kernels.captured(step)
    with torch.no_grad():
        for a in static:
            a.mul_(0.5)
        for to, bound in zip(
            (start, end), document_bounds(torch.tensor([0, 50, 600], device="cuda"), 2, 300), strict=True
        ):
            to.copy_(bound)
    graph.replay()
    torch.cuda.synchronize()
    assert kernels.same([x.clone() for x in captured], step())


@pytest.mark.xdist_group("the GPU's memory")
@TENSOR_CORES
def test_more_than_two_billion_elements() -> None:
    """Of Q, K and V; the last sequence is what it is alone."""
    kernels.needs_memory(45)
    B, T, H, D = 2**31 // (512 * 16 * 64) + 1, 512, 16, 64
    q, k, v = (torch.randn(B, T, H, D, dtype=BF16, device="cuda").requires_grad_() for _ in range(3))
    assert q.numel() > 2**31
    o = attention(q, k, v)
    d_o = torch.ones((), dtype=BF16, device="cuda").expand_as(o)
    gradients = torch.autograd.grad(o, [q, k, v], d_o)
    alone = [t.detach()[-1:].clone().requires_grad_() for t in (q, k, v)]
    assert torch.equal(o[-1:], attention(*alone))
    # How a head's keys are shared out over blocks depends on the number of heads: not to the bit.
    same, exact = (gradients_of_ones(alone, dtype) for dtype in (BF16, torch.float64))
    for a, b, c in zip(gradients, same, exact, strict=True):
        assert_within_rule(a[-1:], b, c, "the last sequence")


def gradients_of_ones(arguments: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The gradients that the equations give in a dtype for ones from upstream."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in arguments]
    o = naive(*leaves)
    return torch.autograd.grad(o, leaves, torch.ones_like(o))


@TENSOR_CORES
def test_compiled_by_inductor() -> None:
    arguments = inputs(2, 130, 130, 4, 2, 64, BF16, "cuda")
    check_by_rule(kernels.by_inductor(attention, arguments), naive, arguments, "inductor")

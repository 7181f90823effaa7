"""The kernels behind embedding: which serve a call, that they are the same every time, and how gradients are added up.

That they are right is shown by test_embedding.py, all of whose tests run on them too.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import native, ops
from fastgpt.config import ModelConfig
from fastgpt.model import GPT
from fastgpt.precision import apply_precision
from tests.ops import kernels
from tests.rule import assert_within_rule, check_by_rule, in_layout, outputs_and_gradients, randn

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
RUN = 64  # sorted places that are added up beforehand: kRun in embedding.cu


@pytest.fixture(autouse=True)
def emulated():
    with kernels.at(kernels.EMULATED):
        yield


def check(ids: Tensor, weight: Tensor, what: str) -> None:
    check_by_rule(lambda w: ops.embedding(ids, w), lambda w: F.embedding(ids.long(), w), [weight], what)


def ids_of(*counts: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Row v `counts[v]` times, in a random order."""
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(dtype)
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]


# ---- sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_widths_at_the_edges_of_vectors_and_warps(dtype: torch.dtype) -> None:
    vector = 16 // dtype.itemsize
    for C in (1, vector - 1, vector, vector + 1, 31, 33, 32 * vector, 33 * vector):
        check(ids_of(2, 0, 1, dtype=torch.int32), randn(3, C, dtype=dtype), f"C={C}")
        assert kernels.last_path()[0] == ("vector" if C % vector == 0 else "generic"), C


@pytest.mark.parametrize("C", [8, 5])
@pytest.mark.parametrize(
    "counts",
    [
        (RUN - 1,), (RUN,), (RUN + 1,), (3 * RUN,), (1, RUN), (1, 2 * RUN), (RUN, RUN),
        (0, RUN + 40, 1, 2 * RUN + 3, 0), (31, 32, 33), (10, RUN + RUN - 11, 5),
    ],
    ids=str,
)  # fmt: skip
def test_runs_of_one_id(counts: tuple[int, ...], C: int) -> None:
    """None, one and several whole runs, with and without places before and behind them; and the 32 that lanes share."""
    check(ids_of(*counts), randn(len(counts), C, dtype=BF16), str(counts))


def test_the_length_of_a_run_is_what_these_tests_think() -> None:
    assert f"kRun = {RUN};" in (kernels.CSRC / "embedding/embedding.cu").read_text()


@pytest.mark.parametrize("C", [8, 5])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_an_id_that_is_not_there(integer: torch.dtype, C: int) -> None:
    """Nothing is read, its row is NaN, and it adds to no gradient; the same for rows past the vocabulary."""
    far = 2**40 if integer == torch.int64 else 2**31 - 1
    ids = torch.tensor([0, -1, 3, 4, far, -far, 1, 5], dtype=integer)
    weight = randn(6, C, dtype=F32).requires_grad_()
    y = ops.embedding(ids, weight, vocab_size=5)
    d_y = randn(8, C, dtype=F32)
    (found,) = torch.autograd.grad(y, weight, d_y)
    there = [0, 2, 3, 6]
    assert y[[1, 4, 5, 7]].isnan().all() and torch.equal(y[there], weight[ids[there].long()])
    expected = torch.zeros_like(weight).index_add(0, ids[there].long(), d_y[there])
    torch.testing.assert_close(found, expected)


def test_vocab_size_is_checked_and_is_the_table() -> None:
    weight = randn(6, 8, dtype=F32)
    for bad in (0, 7):
        with pytest.raises(ValueError, match=r"vocab_size must be in 1 .. 6"):
            ops.embedding(torch.tensor([0]), weight, vocab_size=bad)
    ids = torch.tensor([1, 4, 1])
    check_by_rule(
        lambda w: ops.embedding(ids, w, vocab_size=5), lambda w: F.embedding(ids, w[:5]), [weight], "5 of 6 rows"
    )
    page = import_module("fastgpt.ops.embedding")
    for dtype in (F32, BF16):
        with pytest.raises(IndexError):
            page.reference(torch.tensor([5]), weight.to(dtype), vocab_size=5)


def test_a_row_may_lie_beyond_two_billion_elements() -> None:
    """Its place is counted in 64 bits. Nothing between the rows is touched, so it takes no memory."""
    ids, near = torch.tensor([1, 0, 1]), randn(2, 16, dtype=BF16)
    far = torch.empty(2**31 + 16, dtype=BF16).as_strided((2, 16), (2**31, 1)).copy_(near)
    sorted_ids, order = ids[:2].sort()
    begins = torch.tensor([0, 1, 2])
    entries = torch.ops.fastgpt_emulated
    with native.emulated(checked=False):  # the checks keep a byte for each element between
        assert torch.equal(ops.embedding(ids, far), near[ids])
        found = (entries.embedding_backward(d_y, sorted_ids, order, begins, False) for d_y in (far, near))
        assert torch.equal(*found)


# ---- which path ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "lay_out"),
    [
        ("16-byte accesses", lambda w: w),
        ("the width is no multiple of 16 bytes", lambda w: w[:, :-1].contiguous()),
        ("a tensor does not begin at a multiple of 16 bytes", lambda w: in_layout(w, "offset")),
        ("a row does not begin at a multiple of 16 bytes", lambda w: torch.cat([w, w[:, :1]], 1)[:, :-1]),
    ],
)
def test_choose_path_says_which_and_why(reason: str, lay_out: Any) -> None:
    weight = lay_out(randn(5, 16, dtype=BF16))
    ids = torch.tensor([3, 0, 3])
    y = ops.embedding(ids, weight.requires_grad_())
    path = "vector" if reason == "16-byte accesses" else "generic"
    assert kernels.last_path() == (path, reason) and torch.equal(y, weight[ids])
    d_y = lay_out(randn(5, 16, dtype=BF16))[:3]
    expected = torch.autograd.grad(y, weight, d_y.clone(), retain_graph=True)
    found = torch.autograd.grad(y, weight, d_y)
    assert kernels.last_path() == (path, reason) and torch.equal(*expected, *found)


# ---- dispatch -----------------------------------------------------------------------------------------------


def test_the_kernels_run_and_no_reference() -> None:
    weight = randn(5, 16, dtype=BF16).requires_grad_()
    with kernels.no_reference(import_module("fastgpt.ops.embedding")), kernels.Spy() as spy:
        y = ops.embedding(torch.tensor([[3, 0], [3, 1]]), weight)
        torch.autograd.grad(y, weight, y.detach())
    assert spy.kernels == ["embedding_forward", "embedding_backward"]
    assert not {name for name in spy.names if "embedding" in name and "fastgpt" not in name}
    with kernels.Spy() as spy, torch.no_grad():
        ops.embedding(torch.tensor([3]), weight)
    assert spy.kernels == ["embedding_forward"]


def test_a_second_derivative_is_refused() -> None:
    weight = randn(5, 16).requires_grad_()
    with pytest.raises(RuntimeError, match="embedding: the kernels have no second derivative"):
        torch.autograd.grad(ops.embedding(torch.tensor([3]), weight).sum(), weight, create_graph=True)


@pytest.mark.parametrize(("C", "dtype"), [(16, BF16), (3, F64)])
def test_opcheck(C: int, dtype: torch.dtype) -> None:
    entries, ids = torch.ops.fastgpt_emulated, torch.tensor([[3, 0], [3, 1]], dtype=torch.int32)
    sorted_ids, order = ids.flatten().sort(stable=True)
    begins = torch.searchsorted(sorted_ids, torch.arange(6, dtype=torch.int32))
    torch.library.opcheck(entries.embedding_forward.default, (ids, randn(5, C, dtype=dtype), 4))
    for wide in (False, True):
        d_y = randn(2, 2, C, dtype=dtype)
        torch.library.opcheck(entries.embedding_backward.default, (d_y, sorted_ids, order, begins, wide))


def test_entries_refuse_what_would_leave_their_memory() -> None:
    entries, ids, weight = torch.ops.fastgpt_emulated, torch.tensor([1, 0]), torch.ones(3, 8)
    begins = torch.tensor([0, 1, 2, 2])
    for message, call in (
        ("weight must be", lambda: entries.embedding_forward(ids, weight, 4)),
        ("ids must be int64 or int32", lambda: entries.embedding_forward(ids.short(), weight, 3)),
        ("float64, float32, bfloat16 or float16", lambda: entries.embedding_forward(ids, weight.int(), 3)),
        ("a row for each id", lambda: entries.embedding_backward(weight, ids, ids, begins, False)),
        ("must be int64", lambda: entries.embedding_backward(weight[:2], ids, ids.int(), begins, False)),
        ("must be contiguous", lambda: entries.embedding_backward(weight[:2], ids, ids, begins[::2], False)),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_compiled_once_for_three_batch_sizes() -> None:
    torch._dynamo.reset()
    compilations = []

    def aot_eager(graph: Any, example: Any) -> Any:
        compilations.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    run = torch.compile(ops.embedding, fullgraph=True, backend=aot_eager, dynamic=True)
    for rows in (3, 5, 8):
        ids, weight = torch.arange(rows * 4).view(rows, 4) % 7, randn(7, 16, dtype=BF16)
        check_by_rule(lambda w, ids=ids: run(ids, w), lambda w, ids=ids: F.embedding(ids, w), [weight], "compiled")
    assert len(compilations) == 1


# ---- the same every time ------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [16, 5])
def test_bitwise_the_same_over_schedules(C: int) -> None:
    ids, weight = ids_of(3, 2 * RUN + 9, 0, 20), randn(4, C, dtype=BF16)
    runs = []
    for seed in (1, 2, 3):
        with native.emulated(seed=seed):
            runs.append(outputs_and_gradients(lambda w: ops.embedding(ids, w), [weight]))
    assert kernels.same(runs[0], runs[1]) and kernels.same(runs[1], runs[2])
    assert not native.findings()


# ---- gradients that are gathered in float32 -------------------------------------------------------------------


@pytest.mark.parametrize("where", ["kernels", "reference"])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_gradient_that_is_wanted_in_float32_is_not_rounded(dtype: torch.dtype, where: str) -> None:
    ids, d_y = ids_of(1, 3, 0), randn(4, 8, dtype=dtype)
    weight = torch.nn.Parameter(randn(3, 8, dtype=dtype))
    weight.grad_dtype = F32
    with native.emulated(only=() if where == "reference" else None):
        ops.embedding(ids, weight).backward(d_y)
    expected = torch.zeros(3, 8, dtype=F64).index_add(0, ids, d_y.double())
    assert weight.grad.dtype == F32
    torchs = torch.zeros(3, 8).index_add(0, ids, d_y.float())
    assert_within_rule(weight.grad, torchs, expected, "the gradient in float32")
    assert not torch.equal(weight.grad, weight.grad.to(dtype).float()), "it was rounded"


@pytest.mark.parametrize("where", ["kernels", "reference"])
def test_tied_weights_sum_both_gradients_in_float32(where: str) -> None:
    """The embedding's and the head's, each as it was summed."""
    config = ModelConfig.preset("tiny", vocab_size=50, block_size=8, n_layer=1, n_embd=16, n_head=2, n_kv_head=2)
    model = apply_precision(GPT(config, torch.Generator().manual_seed(0)), "bfloat16")
    weight = model.token_embedding.weight
    tokens = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(1))
    arrived = []
    page = import_module("fastgpt.ops.embedding")
    kind = page._Kernels if where == "kernels" else page._SummedInFloat32
    backward = kind.backward

    def watched(ctx: Any, d_y: Tensor) -> Any:
        found = backward(ctx, d_y)
        arrived.extend(t.clone() for t in found if isinstance(t, Tensor))
        return found

    with pytest.MonkeyPatch.context() as patch, native.emulated(only=() if where == "reference" else ("embedding",)):
        patch.setattr(kind, "backward", staticmethod(watched))
        model(tokens, tokens).backward()
    (embeddings,) = arrived
    assert embeddings.dtype == weight.grad.dtype == F32 and embeddings.shape == weight.shape
    assert not torch.equal(embeddings, embeddings.bfloat16().float())
    assert not weight.grad[50:].any()

    class Frozen(torch.autograd.Function):  # the head's gradient alone
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> None:
            return None

    both = weight.grad.clone()
    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch, native.emulated(only=()):
        embed = ops.embedding
        patch.setattr(ops, "embedding", lambda ids, w, **options: Frozen.apply(embed(ids, w, **options)))
        model(tokens, tokens).backward()
    assert torch.equal(both, weight.grad + embeddings)


# ---- how many --------------------------------------------------------------------------------------------------

KERNELS = 3 * 4 * 2  # forward, runs and rows of the backward; four dtypes, vectors and not


def test_instantiations_are_few() -> None:
    """Each one costs everybody's build time, for every architecture."""
    found = kernels.instantiations(r"embedding_\w+_kernel")
    assert len(found) == KERNELS, sorted(found)

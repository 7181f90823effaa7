"""The kernels behind grad_norm: the order in which they add up, tables of many tensors, and what they refuse.

That they are right is shown by test_grad_norm.py, all of whose tests run on them too.
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

from fastgpt import native, ops
from fastgpt.native import emulate
from tests.ops import kernels
from tests.rule import assert_within_rule, in_layout, randn

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
CHUNK = 16384  # elements of a partial sum: kChunk in grad_norm.cu


@pytest.fixture(autouse=True)
def emulated():
    with kernels.at(kernels.EMULATED):
        yield


def squares(grads: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack([g.to(dtype).square().sum() for g in grads]).sum()


def test_the_length_of_a_chunk_is_what_these_tests_think() -> None:
    assert f"kChunk = {CHUNK};" in (kernels.CSRC / "grad_norm/grad_norm.cu").read_text()


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_sizes_at_the_edges_of_vectors_and_chunks(dtype: torch.dtype) -> None:
    """Relative, and of several seeds: one number may be right by luck."""
    vector, sums = 16 // dtype.itemsize, torch.promote_types(dtype, F32)
    sizes = (1, vector - 1, vector, vector + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + vector)
    lists = [[randn(max(n, 1), dtype=dtype, seed=seed)] for n in sizes for seed in range(3)]
    exact = torch.stack([squares(grads, F64) for grads in lists])
    ours, theirs = (
        (torch.stack(found).double() / exact).to(sums)
        for found in ([ops.grad_norm(grads) for grads in lists], [squares(grads, sums) for grads in lists])
    )
    assert_within_rule(ours, theirs, exact / exact, f"squares in {dtype}")


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_the_same_bits_wherever_a_tensor_begins(dtype: torch.dtype) -> None:
    g = randn(CHUNK + 77, dtype=dtype)
    aligned = ops.grad_norm([g])
    assert kernels.last_path() == ("vector", "16-byte accesses")
    assert torch.equal(ops.grad_norm([in_layout(g, "offset")]), aligned)
    assert kernels.last_path() == ("generic", "a tensor does not begin at a multiple of 16 bytes")


def test_more_tensors_than_a_launch_takes() -> None:
    """Their sums are those of each alone, to the bit, in whichever launch they are: 2^-n and nothing else is added."""
    grads = [torch.full((1,), 2.0**-i) for i in range(12)] + [torch.zeros(0), *torch.zeros(400, 3)]
    grads += [torch.full((2,), 2.0**-i) for i in range(12, 20)]
    with native.emulated(profile=True, checked=False):
        native.launches()
        found = ops.grad_norm(grads)
        launches = sorted((launch["launches"], launch["blocks"]) for launch in native.launches())
    assert found == squares(grads, F64).float()
    assert launches == [(1, 1), (3, 420)]


def test_partial_sums_are_added_in_float64() -> None:
    """In float32 each of the small ones would be lost beside the large one."""
    large, small = torch.full((1,), 4096.0), [torch.full((1,), 0.5) for _ in range(200)]
    assert ops.grad_norm([large, *small]).item() == 4096.0**2 + 50


FAR = """
#include "grad_norm/grad_norm.cu"
using namespace fastgpt;

// A tensor of `before` elements that are not there, and those that are. The grid begins with the latter.
__global__ void partials(const float* g, double* sums, int64_t before, int64_t count) {
  Table table(sums);
  GradNormTensor t;
  t.data = g - before;
  t.count = before + count;
  table.add(t, 0);
  table.tensors[0].first_chunk = int32_t(-before / kChunk);
  grad_norm_partials_kernel<float>(table);
}
"""


def test_an_element_may_lie_beyond_two_billion_others() -> None:
    """Its place is counted in 64 bits. What lies before is no memory at all."""
    compiled, g, found = emulate.compile(FAR), randn(CHUNK + 3, dtype=F32), []
    for before in (0, 2**31, 2**33):
        sums = torch.empty(2, dtype=F64)
        compiled.launch("partials", 2, 256, g, sums, before, CHUNK + 3)
        found.append(sums)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert_within_rule(found[0].sum().float(), squares([g], F32), squares([g], F64), "partial sums")


def test_bitwise_the_same_over_schedules() -> None:
    grads = [randn(2 * CHUNK + 5, dtype=BF16), randn(70, dtype=F32)]
    found = []
    for seed in (1, 2, 3):
        with native.emulated(seed=seed):
            found.append(ops.grad_norm(grads))
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
    assert not native.findings()


def test_the_kernels_run_and_nothing_else() -> None:
    grads = [randn(5, dtype=F32)]
    with kernels.no_reference(import_module("fastgpt.ops.grad_norm")), kernels.Spy() as spy:
        ops.grad_norm(grads)
    assert spy.names == ["fastgpt_emulated::grad_norm"]


@pytest.mark.parametrize("dtype", [F32, F64])
def test_opcheck(dtype: torch.dtype) -> None:
    grads = [randn(9, dtype=dtype), randn(3, 3, dtype=BF16)]
    torch.library.opcheck(torch.ops.fastgpt_emulated.grad_norm.default, (grads,))


def test_entries_refuse_what_would_leave_their_memory() -> None:
    with pytest.raises(RuntimeError, match="float64, float32, bfloat16 or float16"):
        torch.ops.fastgpt_emulated.grad_norm([torch.ones(3), torch.ones(3).int()])


KERNELS = 2 * 2  # partial sums and the sum of these, in float and double


def test_instantiations_are_few() -> None:
    found = kernels.instantiations(r"grad_norm_\w*kernel")
    assert len(found) == KERNELS, sorted(found)

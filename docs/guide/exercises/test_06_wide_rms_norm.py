"""Exercise 6: python -m pytest docs/guide/exercises/test_06_wide_rms_norm.py"""

import functools

import pytest
import torch
import torch.nn.functional as F

from fastgpt.native import emulate, toolchain
from tests.rule import assert_within_rule, randn

EPS = 1e-5


@pytest.fixture
def kernels(answer):
    """Called in a test, compiles what is written."""

    @functools.cache
    def compiled():
        source = answer("06_wide_rms_norm", "wide_rms_norm")()
        try:
            return emulate.compile(source)
        except toolchain.Missing as missing:
            pytest.skip(str(missing))

    return compiled


def run(kernels, N, C, blocks, **options):
    """y and the counters; whatever the emulator finds, a race above all, is an error."""
    x, weight = randn(N, C, dtype=torch.bfloat16), randn(C, dtype=torch.bfloat16, seed=1)
    y = torch.empty_like(x)
    counts = kernels().launch("rms_norm", blocks, 128, x, weight, y, N, C, EPS, **options)
    exact = F.rms_norm(x.double(), (C,), weight.double(), EPS)
    assert_within_rule(y, F.rms_norm(x, (C,), weight, EPS), exact, f"N {N}, C {C}")
    return y, counts


@pytest.mark.parametrize("C", [8, 1016, 1024, 1032, 4096])
def test_it_is_rms_norm(kernels, C):
    run(kernels, 3, C, blocks=1)


def test_rows_in_any_number(kernels):
    run(kernels, 1, 1024, blocks=1)
    run(kernels, 5, 1024, blocks=2)
    run(kernels, 5, 1024, blocks=5)


def test_in_any_order_of_threads_it_gives_the_same(kernels):
    results = [run(kernels, 5, 2048, blocks=2, seed=seed)[0] for seed in range(4)]
    assert all(torch.equal(results[0], y) for y in results)


def test_it_moves_no_byte_too_many(kernels):
    N, C, blocks = 6, 4096, 2
    _, counts = run(kernels, N, C, blocks)
    row, vector = 2 * C, 16 * 32  # bytes of a row; of a request
    assert counts.total("bytes", access="store", space="global") == N * row, "each element of y is written once"
    read = counts.total("bytes", access="load", space="global")
    assert read <= (N + blocks) * row, "each element of x is read once, the weights once for each block"
    assert counts.total("requests", space="global") == (2 * N + blocks) * row // vector, "16 bytes for each thread"
    assert counts.total("sectors") == counts.total("ideal_sectors")
    assert counts.total("bank_conflicts") == 0


def test_every_barrier_is_needed(kernels):
    run(kernels, 3, 1024, blocks=1)
    barriers = [site for site in kernels().sites() if site.kind == "__syncthreads"]
    assert barriers, "four warps must wait for each other"
    for barrier in barriers:
        with pytest.raises(emulate.KernelFault):  # else it is there for nothing
            run(kernels, 3, 1024, blocks=1, disabled_site=barrier.id)

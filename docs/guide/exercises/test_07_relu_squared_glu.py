"""Exercise 7: python -m pytest docs/guide/exercises/test_07_relu_squared_glu.py"""

import functools

import pytest
import torch

from fastgpt.native import emulate, toolchain
from tests.rule import assert_within_rule, randn

THREADS = 128


@pytest.fixture
def kernels(answer):
    """Called in a test, compiles what is written."""

    @functools.cache
    def compiled():
        source = answer("07_relu_squared_glu", "relu_squared_glu")()
        try:
            return emulate.compile(source)
        except toolchain.Missing as missing:
            pytest.skip(str(missing))

    return compiled


def torchs(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return gate.relu().square() * up


def forward(kernels, N, F):
    """The counters, once y is right."""
    gate_up = randn(N, 2 * F, dtype=torch.bfloat16)
    y = torch.empty(N, F, dtype=torch.bfloat16)
    counts = kernels().launch("forward", -(-N * F // 8 // THREADS), THREADS, gate_up, y, N, F)
    assert_within_rule(y, torchs(gate_up), torchs(gate_up.double()), f"y of {N} x {F}")
    return counts


def backward(kernels, N, F):
    """The counters, once the gradient is right."""
    gate_up = randn(N, 2 * F, dtype=torch.bfloat16)
    gate_up[:, ::5] = 0  # where max(gate, 0) has its corner, the gradient is 0
    d_y = randn(N, F, dtype=torch.bfloat16, seed=1)
    d_gate_up = torch.empty_like(gate_up)

    def gradient(x, d):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(torchs(x), x, d)[0]

    counts = kernels().launch("backward", -(-N * F // 8 // THREADS), THREADS, d_y, gate_up, d_gate_up, N, F)
    exact = gradient(gate_up.double(), d_y.double())
    assert_within_rule(d_gate_up, gradient(gate_up, d_y), exact, f"the gradient of {N} x {F}")
    return counts


@pytest.mark.parametrize("N, F", [(1, 8), (3, 40), (5, 1024), (7, 1032)])
def test_forward_and_backward_are_right(kernels, N, F):
    forward(kernels, N, F)
    backward(kernels, N, F)


@pytest.mark.parametrize("run, tensors_read, tensors_written", [(forward, 2, 1), (backward, 3, 2)])
def test_no_byte_is_moved_twice_and_sixteen_go_at_a_time(kernels, run, tensors_read, tensors_written):
    N, F = 4, 1024
    counts = run(kernels, N, F)
    tensor = N * F * 2  # bytes of y
    assert counts.total("bytes", access="load", space="global") == tensors_read * tensor
    assert counts.total("bytes", access="store", space="global") == tensors_written * tensor
    requests = (tensors_read + tensors_written) * tensor // (16 * 32)
    assert counts.total("requests", space="global") == requests, "16 bytes for each thread"
    assert counts.total("sectors") == counts.total("ideal_sectors")

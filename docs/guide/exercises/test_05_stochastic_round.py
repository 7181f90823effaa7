"""Exercise 5: python -m pytest docs/guide/exercises/test_05_stochastic_round.py"""

import math

import pytest
import torch


@pytest.fixture
def stochastic_round(answer):
    written, generator = answer("05_stochastic_round", "stochastic_round"), torch.Generator().manual_seed(0)
    return lambda x: written(x, generator)


def test_shape_and_dtype(stochastic_round):
    x = torch.randn(3, 5)
    before = x.clone()
    y = stochastic_round(x)
    assert y.shape == x.shape
    assert y.dtype == torch.bfloat16
    assert torch.equal(x, before), "x was changed"


def test_what_is_a_bf16_number_already_stays(stochastic_round):
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(stochastic_round(exact.float()), exact)


@pytest.mark.parametrize("value", [1.003, -1.003, 0.1, 3e-30, -1234.5])
def test_only_the_two_neighbours_come(stochastic_round, value):
    x = torch.full((4000,), value)
    near = (x[:1].view(torch.int32) & -(2**16)).view(torch.float32)
    far = ((x[:1].view(torch.int32) & -(2**16)) + 2**16).view(torch.float32)
    assert sorted(set(stochastic_round(x).float().tolist())) == sorted([near.item(), far.item()])


@pytest.mark.parametrize("value", [1.003, -1.003, 0.1, 1.0001])
def test_it_is_right_on_average(stochastic_round, value):
    n = 100_000
    x = torch.full((n,), value)
    near = (x[:1].view(torch.int32) & -(2**16)).view(torch.float32).item()
    far = ((x[:1].view(torch.int32) & -(2**16)) + 2**16).view(torch.float32).item()
    p = (x[0].item() - near) / (far - near)
    share = (stochastic_round(x).float() == far).double().mean().item()
    # the share of n coins has this standard deviation; five of them leave one false alarm in millions
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_small_updates_are_not_lost(stochastic_round):
    weights = torch.ones(20_000).bfloat16()
    for _ in range(100):
        weights = stochastic_round(weights.float() - 0.0001)
    mean = weights.double().mean().item()
    assert mean < 0.995, "the updates were lost"
    assert mean > 0.985, "there were more updates than were made"

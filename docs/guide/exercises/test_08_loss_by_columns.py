"""Exercise 8: python -m pytest docs/guide/exercises/test_08_loss_by_columns.py"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.rule import assert_within_rule, randn

N, V, C = 6, 50, 4
TARGETS = torch.tensor([0, V - 1, 17, 18, 17, 34])


@pytest.fixture
def losses(answer):
    def call(x, weight, columns, targets=TARGETS):
        return answer("08_loss_by_columns", "loss_by_columns")(x, weight, targets, columns)

    return call


def by_torch(x, weight):
    return F.cross_entropy(x @ weight.T, TARGETS, reduction="none")


@pytest.mark.parametrize("columns", [1, 17, 25, 49, 50, 51])
def test_it_is_the_loss(losses, columns):
    x, weight = randn(N, C), randn(V, C, seed=1)
    torch.testing.assert_close(losses(x, weight, columns), by_torch(x, weight))


def test_large_logits_do_not_overflow(losses):
    x, weight = 50 * randn(N, C, dtype=torch.float32), 50 * randn(V, C, dtype=torch.float32, seed=1)
    exact = by_torch(x.double(), weight.double())
    assert (x @ weight.T).abs().max() > 5000
    for columns in (1, 17):
        assert_within_rule(losses(x, weight, columns), by_torch(x, weight), exact, f"{columns} columns")


def test_a_chunk_of_nothing_but_minus_infinity_adds_nothing(losses):
    x, weight = randn(N, C).abs(), randn(V, C, seed=1)
    for rows in (slice(10), slice(-10, V)):  # the first chunk, and the last
        banned = weight.clone()
        banned[rows] = -float("inf")
        targets = torch.full((N,), 20)
        expected = F.cross_entropy(x @ banned.T, targets, reduction="none")
        torch.testing.assert_close(losses(x, banned, 5, targets), expected)


class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        views = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in views:
                self.elements = max(self.elements, t.numel())
        return result


def test_no_more_columns_are_there_than_allowed(losses):
    x, weight = randn(N, C), randn(V, C, seed=1)
    with Largest() as largest:
        losses(x, weight, 7)
    assert largest.elements <= N * 7

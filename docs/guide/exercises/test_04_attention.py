"""Exercise 4: python -m pytest docs/guide/exercises/test_04_attention.py"""

import pytest
import torch

from fastgpt import ops


@pytest.fixture
def attend(answer):
    return answer("04_attention", "attend")


def draw(B, T, H, KV, D):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, T, heads, D, dtype=torch.float64, generator=generator) for heads in (H, KV, KV)]


@pytest.mark.parametrize(
    "H, KV, window",
    [
        pytest.param(1, 1, 100, id="one head"),
        pytest.param(4, 4, 100, id="four heads"),
        pytest.param(4, 2, 100, id="grouped heads"),
        pytest.param(6, 1, 100, id="one key and value head for all"),
        pytest.param(1, 1, 3, id="window"),
        pytest.param(2, 2, 0, id="a window of itself alone"),
        pytest.param(6, 3, 4, id="grouped heads and window"),
    ],
)
def test_it_is_the_attention_of_the_package(attend, H, KV, window):
    q, k, v = draw(2, 9, H, KV, 8)
    torch.testing.assert_close(attend(q, k, v, window), ops.attention(q, k, v, window=window))


def test_a_query_that_sees_itself_alone_gets_its_own_value(attend):
    q, k, v = draw(1, 5, 2, 2, 4)
    torch.testing.assert_close(attend(q, k, v, 0), v)


def test_nothing_later_matters(attend):
    q, k, v = draw(1, 6, 2, 1, 4)
    before = attend(q, k, v, 10)
    k[:, 4:], v[:, 4:] = 1e3, -1e3
    torch.testing.assert_close(attend(q, k, v, 10)[:, :4], before[:, :4])


def test_gradients_reach_everything_that_was_seen(attend):
    q, k, v = (x.requires_grad_() for x in draw(1, 6, 2, 1, 4))
    attend(q, k, v, 2)[:, 4].sum().backward()
    assert v.grad.abs().sum((0, 2, 3)).gt(0).tolist() == [False, False, True, True, True, False]

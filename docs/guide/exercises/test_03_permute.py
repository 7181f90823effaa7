"""Exercise 3: python -m pytest docs/guide/exercises/test_03_permute.py"""

import itertools

import pytest


@pytest.fixture
def permute(answer):
    return answer("03_permute", "permute")


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 100, 257, 1000])
@pytest.mark.parametrize("key", [0, 7])
def test_every_number_comes_once(permute, n, key):
    assert sorted(permute(i, n, key) for i in range(n)) == list(range(n))


def test_it_has_no_state(permute):
    assert [permute(i, 50, 3) for i in range(50)] == [permute(i, 50, 3) for i in reversed(range(50))][::-1]


def test_keys_give_orders_of_their_own(permute):
    assert len({tuple(permute(i, 30, key) for i in range(30)) for key in range(20)}) == 20


def test_it_shuffles(permute):
    n = 1000
    order = [permute(i, n, 5) for i in range(n)]
    steps = [abs(a - b) for a, b in itertools.pairwise(order)]
    # two random places of n are n / 3 apart on average
    assert n / 4 < sum(steps) / len(steps) < n / 2, "neighbours stay near each other"


def test_a_number_too_large_for_a_list(permute):
    n = 10**15 + 37
    places = {permute(i, n, 1) for i in range(1000)}
    assert len(places) == 1000
    assert all(0 <= place < n for place in places)

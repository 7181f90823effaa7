"""Exercise 9: python -m pytest docs/guide/exercises/test_09_lion.py"""

import functools

import pytest
import torch

from fastgpt.native import emulate, toolchain
from tests.rule import assert_within_rule, randn

LR, BETA1, BETA2, DECAY = 0.01, 0.9, 0.99, 0.1


@pytest.fixture
def kernels(answer):
    """Called in a test, compiles what is written."""

    @functools.cache
    def compiled():
        source = answer("09_lion", "lion")()
        try:
            return emulate.compile(source)
        except toolchain.Missing as missing:
            pytest.skip(str(missing))

    return compiled


def state(n):
    return [randn(n, dtype=torch.float32, seed=seed) for seed in (1, 2, 3)]


def by_hand(w, g, m, clip):
    h = g * clip
    sign = (BETA1 * m + (1 - BETA1) * h).sign()
    return w * (1 - LR * DECAY) - LR * sign, BETA2 * m + (1 - BETA2) * h


def run(kernels, w, g, m, blocks, clip=0.5, skip=0.0):
    numbers = [torch.tensor([x]) for x in (clip, skip)]
    return kernels().launch("lion", blocks, 128, w, g, m, *numbers, len(w), LR, BETA1, BETA2, DECAY,
                            in_place=["w", "m"])  # fmt: skip


@pytest.mark.parametrize(("n", "blocks"), [(4, 1), (508, 1), (512, 1), (516, 2), (2052, 2), (2052, 9)])
def test_it_is_lion(kernels, n, blocks):
    w, g, m = state(n)
    exact, theirs = by_hand(*(x.double() for x in (w, g, m)), 0.5), by_hand(w, g, m, 0.5)
    kept = g.clone()
    run(kernels, w, g, m, blocks)
    assert_within_rule(w, theirs[0], exact[0], "w")
    assert_within_rule(m, theirs[1], exact[1], "m")
    assert torch.equal(g, kept)


def test_the_sign_of_0_is_0(kernels):
    w, zeros = torch.ones(8), torch.zeros(8)
    run(kernels, w, zeros, zeros.clone(), 1)
    assert torch.equal(w, torch.full((8,), 1 - torch.tensor(LR) * torch.tensor(DECAY)))


@pytest.mark.parametrize("skip", [1.0, -2.0, float("nan")])
def test_a_step_that_is_skipped_changes_nothing(kernels, skip):
    w, g, m = state(512)
    g[5] = float("nan")
    before = w.clone(), m.clone()
    run(kernels, w, g, m, 2, clip=float("nan"), skip=skip)
    assert torch.equal(w, before[0]) and torch.equal(m, before[1])


def test_it_moves_no_byte_too_many(kernels):
    w, g, m = state(4096)
    counts = run(kernels, w, g, m, 4)
    assert counts.total("bytes", access="store", space="global") == 8 * 4096, "w and m are written once"
    numbers = 4 * 4 * 2 * 4  # clip and skip, at most once for each warp of four blocks
    assert counts.total("bytes", access="load", space="global") <= 12 * 4096 + numbers, "each number is read once"
    assert counts.total("requests", access="store", space="global") == 2 * 4096 // 128, "16 bytes for each thread"
    assert counts.total("sectors", access="store") == counts.total("ideal_sectors", access="store")

"""The order of the samples, the batches made of them, and evaluation that predicts every token once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data import Batches, evaluation_batches
from fastgpt.data.batches import permute
from fastgpt.errors import UserError

from .data_cases import stream

SEED = 2**63 - 1


def keys(value, n):
    return np.full(n, value, dtype=np.uint64)


def rows(batches, samples):
    """The windows of samples, block_size + 1 ids each, one by one."""
    single = Batches(batches.stream, batches.block_size, 1, batches.seed)
    found = [single.batch(i) for i in samples]
    return torch.stack([torch.cat([b.idx[0], b.targets[0, -1:]]) for b in found])


# ---- the permutation -------------------------------------------------------------------------


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1000, 4095, 4097, 65537])
def test_the_permutation_is_a_bijection(n):
    for key in (0, 1, 2**64 - 1):
        places = permute(np.arange(n), n, keys(key, n))
        np.testing.assert_array_equal(np.sort(places), np.arange(n))


def test_keys_give_permutations_of_their_own():
    n = 1000
    found = [tuple(permute(np.arange(n), n, keys(key, n))) for key in range(20)]
    assert len(set(found)) == 20
    # a fixed point is as frequent as in permutations drawn at random: one on average, with a variance of one
    fixed = sum(place == i for places in found for i, place in enumerate(places))
    assert abs(fixed - 20) < 5 * math.sqrt(20)
    # neighbours are not kept together, as a weak network keeps them
    steps = np.abs(np.diff(np.array(found), axis=1))
    # the distance of two uniform places has mean n / 3 and variance n^2 / 18, and 1 / 10 of it is shared by neighbours
    standard_error = n * math.sqrt((1 + 2 / 10) / 18 / steps.size)
    assert abs(steps.mean() - n / 3) < 5 * standard_error


def test_places_that_share_half_their_bits_part():
    """Two rounds of a Feistel network keep the difference of two indices that agree in the lower half."""
    places = permute(np.arange(4096), 4096, keys(5, 4096))
    differences = (places[:-64] ^ places[64:]) >> 6
    assert len(np.unique(differences)) == 64


def test_a_permutation_of_more_than_32_bits():
    n = 10**12 + 39
    places = permute(np.arange(5000), n, keys(7, 5000))
    assert places.min() >= 0 and places.max() < n and len(set(places.tolist())) == 5000


# ---- training batches ------------------------------------------------------------------------


def test_an_epoch_reads_each_window_once():
    tokens = stream(301, 17, 400)
    batches = Batches(tokens, 9, 4, SEED)
    n = batches.samples_per_epoch
    assert n == 718 // 9
    offsets = set()
    for epoch in range(4):
        starts = np.sort(batches.starts(np.arange(epoch * n, (epoch + 1) * n)))
        covered = (starts[:, None] + np.arange(9)) % 718
        assert len(np.unique(covered)) == n * 9
        offsets.add(int(starts[0]) % 9)
    assert len(offsets) > 1, "the borders of the windows move"


def test_windows_are_contiguous_over_shards_and_round_the_end():
    tokens = stream(50, 3, 1, 60)
    whole = np.concatenate(tokens.shards)
    batches = Batches(tokens, 20, 8, 3)
    kinds = set()
    for first in range(0, 400, 8):
        batch = batches.batch(first)
        for row, start in enumerate(batches.starts(np.arange(first, first + 8))):
            expected = np.take(whole, np.arange(start, start + 21), mode="wrap")
            np.testing.assert_array_equal(batch.idx[row], expected[:-1])
            np.testing.assert_array_equal(batch.targets[row], expected[1:])
            kinds.add("end" if start + 21 > 114 else "shards" if start < 50 < start + 21 else "one")
    assert kinds == {"end", "shards", "one"}
    assert batch.idx.dtype == batch.targets.dtype == torch.int64
    assert batch.idx.is_contiguous() and batch.targets.is_contiguous()
    assert batch.n_targets == 160 and batch.cu_seqlens is None


@pytest.mark.parametrize("lengths", [(9,), (4, 5), (1,) * 9])
def test_a_split_of_one_window_is_enough(lengths):
    tokens = stream(*lengths)
    batches = Batches(tokens, 8, 5, 0)
    assert batches.samples_per_epoch == 1
    whole = np.concatenate(tokens.shards)
    for row in batches.batch(0).idx.numpy():
        assert any(np.array_equal(row, np.roll(whole, -shift)[:8]) for shift in range(9))
    with pytest.raises(UserError, match="has 9 tokens; a block_size of 9 needs at least 10"):
        Batches(tokens, 9, 1, 0)


@settings(max_examples=40, deadline=None)
@given(first=st.integers(0, 10_000), batch_size=st.integers(1, 70), seed=st.integers(0, SEED))
def test_a_sample_depends_on_the_seed_and_its_number_alone(first, batch_size, seed):
    tokens = stream(90, 40)
    batches = Batches(tokens, 6, batch_size, seed)
    if first % 2:
        batches.batch(first + 5000)  # what was asked before changes nothing
    batch = batches.batch(first)
    expected = rows(batches, range(first, first + batch_size))
    assert torch.equal(batch.idx, expected[:, :-1]) and torch.equal(batch.targets, expected[:, 1:])


def test_batches_over_the_border_of_what_is_computed_ahead():
    batches = Batches(stream(700), 6, 7, 1)
    for first in (2040, 2045, 2048, 4093, 0):
        batch = batches.batch(first)
        assert torch.equal(batch.idx, rows(batches, range(first, first + 7))[:, :-1])


def test_seeds_give_orders_of_their_own():
    tokens = stream(5000)
    orders = {tuple(Batches(tokens, 8, 1, seed).starts(np.arange(50)).tolist()) for seed in range(30)}
    assert len(orders) == 30


def test_documents_begin_at_the_end_of_text_before_them():
    tokens = stream(200, 100, vocab=6)
    plain, apart = Batches(tokens, 16, 5, 2).batch(0), Batches(tokens, 16, 5, 2, documents=True).batch(0)
    flat = plain.idx.reshape(-1)
    assert (flat == tokens.eot_id).any()
    assert torch.equal(apart.idx, plain.idx)
    # nothing is ignored: a model that never learned a document's first token could not begin one
    assert torch.equal(apart.targets, plain.targets)
    assert apart.n_targets == plain.n_targets == 80
    expected = [i for i in range(80) if i % 16 == 0 or flat[i] == tokens.eot_id]
    assert apart.cu_seqlens.tolist() == [*expected, 80]
    assert apart.cu_seqlens.dtype == torch.int32
    other = Batches(tokens, 16, 5, 2, documents=True, eot_id=3).batch(0)
    assert other.cu_seqlens.tolist() == [*(i for i in range(80) if i % 16 == 0 or flat[i] == 3), 80]


def test_training_and_evaluation_begin_documents_alike():
    tokens = stream(160, vocab=6)
    batches = Batches(tokens, 16, 1, 3, documents=True)
    evaluated = next(evaluation_batches(tokens, 16, 10, documents=True))
    inputs = [tokens.eot_id, *np.concatenate(tokens.shards).tolist()]
    begins = set(evaluated.cu_seqlens.tolist())
    for sample in range(batches.samples_per_epoch):
        start = int(batches.starts(np.array([sample]))[0])
        inside = [i for i in batches.batch(sample).cu_seqlens.tolist() if 0 < i < 16 and start + i < 160]
        # the same token of the split begins a document in both, except where a row of either begins
        assert inside == [i for i in range(1, 16) if start + i < 160 and inputs[start + i + 1] == tokens.eot_id]
        assert all(start + i + 1 in begins for i in inside if start + i + 1 < 160)


# ---- evaluation ------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 8, 9, 24, 25, 47, 48, 49, 101])
@pytest.mark.parametrize("documents", [False, True])
def test_every_token_is_a_target_once(length, documents):
    tokens = stream(length, vocab=5) if length < 30 else stream(20, length - 20, vocab=5)
    whole = np.concatenate(tokens.shards).tolist()
    found, inputs = [], []
    for batch in evaluation_batches(tokens, 8, 3, documents=documents):
        assert batch.idx.shape == batch.targets.shape and batch.idx.shape[1] == 8 and len(batch.idx) <= 3
        real = batch.targets != -100
        assert batch.n_targets == int(real.sum())
        found += batch.targets[real].tolist()
        inputs += batch.idx[real].tolist()
        if documents:
            flat = batch.idx.reshape(-1)
            expected = [i for i in range(batch.n_targets) if i % 8 == 0 or flat[i] == tokens.eot_id]
            assert batch.cu_seqlens.tolist() == [*expected, len(flat)]
            assert batch.cu_seqlens.dtype == torch.int32
        else:
            assert batch.cu_seqlens is None
    assert found == whole
    assert inputs == [tokens.eot_id, *whole[:-1]]


def test_the_first_evaluation_batches_alone():
    tokens = stream(100)
    whole = list(evaluation_batches(tokens, 8, 3))
    first = list(evaluation_batches(tokens, 8, 3, batches=2))
    assert len(whole) == 5 and len(first) == 2
    assert all(torch.equal(a.targets, b.targets) for a, b in zip(first, whole, strict=False))


def test_an_empty_split_cannot_be_evaluated():
    from fastgpt.data.dataset import TokenStream

    with pytest.raises(UserError, match="is empty"):
        next(evaluation_batches(TokenStream([], 0), 8, 3))

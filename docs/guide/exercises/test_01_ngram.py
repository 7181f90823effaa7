"""Exercise 1: python -m pytest docs/guide/exercises/test_01_ngram.py"""

import math
import random

import pytest


@pytest.fixture
def probabilities(answer):
    return answer("01_ngram", "probabilities")


def test_nothing_read_is_uniform(probabilities):
    assert probabilities(b"", b"", 0.5) == pytest.approx([1 / 256] * 256)


@pytest.mark.parametrize("context", [b"", b"a", b"an", b"ban", b"xyz", b"banana"])
def test_probabilities_sum_to_one(probabilities, context):
    p = probabilities(b"banana", context, 0.3)
    assert len(p) == 256
    assert min(p) > 0, "no byte may be impossible"
    assert math.fsum(p) == pytest.approx(1.0)


def test_counts_by_hand(probabilities):
    # banana: a three times in six bytes; after n, which occurs twice, a both times
    unigram = (3 + 2 / 256) / (6 + 2)
    assert probabilities(b"banana", b"", 2.0)[ord("a")] == pytest.approx(unigram)
    assert probabilities(b"banana", b"n", 2.0)[ord("a")] == pytest.approx((2 + 2 * unigram) / (2 + 2))


def test_overlapping_occurrences_count(probabilities):
    # in aaab, aa is followed once by a and once by b
    p = probabilities(b"aaab", b"aa", 1e-9)
    assert p[ord("a")] == pytest.approx(0.5)
    assert p[ord("b")] == pytest.approx(0.5)


def test_an_unseen_context_asks_the_shorter_one(probabilities):
    assert probabilities(b"banana", b"zzn", 0.3) == pytest.approx(probabilities(b"banana", b"n", 0.3))


def test_it_predicts_better_than_any_one_order(probabilities):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(12)]
    text = " ".join(rng.choices(words, k=300)).encode()
    train, test = text[:-200], text[-200:]

    def bits(order, predict):
        return -sum(math.log2(predict(test[i - order : i])[test[i]]) for i in range(8, len(test))) / (len(test) - 8)

    def one_order(context):
        places = range(len(context), len(train))
        after = [train[i] for i in places if train[i - len(context) : i] == context]
        return [(after.count(b) + 0.01) / (len(after) + 2.56) for b in range(256)]

    blended = bits(6, lambda context: probabilities(train, context, 1.0))
    assert blended < min(bits(order, one_order) for order in range(7))

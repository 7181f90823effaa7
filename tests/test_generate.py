"""Generation: the cache changes nothing, stops stop, ragged prompts equal single ones, sampling is what it says."""

from __future__ import annotations

import pytest
import torch

from fastgpt.generate import generate, sampling_probabilities
from tests.test_model import SHAPES, make, tokens


@pytest.mark.parametrize("name", SHAPES)
def test_cached_generation_equals_uncached(name):
    """Also past block_size, where the older half of the context is dropped."""
    model = make(name)
    idx = tokens(2, 5)
    for options in (dict(temperature=0.0), dict(temperature=1.0, top_k=20)):
        cached, uncached = (
            generate(model, idx, 40, use_cache=c, generator=torch.Generator().manual_seed(3), **options)
            for c in (True, False)
        )
        assert cached.shape == (2, 45)
        assert torch.equal(cached[:, :5], idx)
        assert torch.equal(cached, uncached)


@pytest.mark.parametrize("use_cache", [True, False])
def test_ragged_prompts_equal_each_prompt_alone(use_cache):
    model = make("llama")
    prompts = [tokens(1, n, seed=n) for n in (9, 3, 1)]
    padded = torch.zeros(3, 9, dtype=torch.int64)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: prompt.shape[1]] = prompt[0]
    lengths = torch.tensor([p.shape[1] for p in prompts])
    together = generate(model, padded, 12, lengths=lengths, temperature=0.0, use_cache=use_cache)
    for row, prompt in zip(together, prompts, strict=True):
        alone = generate(model, prompt, 12, temperature=0.0, use_cache=use_cache)[0]
        assert torch.equal(row[: len(alone)], alone)
        assert row[len(alone) :].eq(alone[-1]).all(), "padded with its last token"


def test_stop_ids_end_a_row_and_all_of_it():
    model = make("gpt2")
    idx = tokens(2, 4)
    free = generate(model, idx, 16, temperature=0.0)
    stop = int(free[0, 6])
    stopped = generate(model, idx, 16, temperature=0.0, stop_ids=[stop])
    first = int((free[0, 4:] == stop).nonzero()[0]) + 4
    assert torch.equal(stopped[0, : first + 1], free[0, : first + 1])
    assert stopped[0, first:].eq(stop).all()
    one = generate(model, idx[:1], 16, temperature=0.0, stop_ids=[stop])
    assert one.shape == (1, first + 1)


def test_the_prompt_is_not_written_to_and_the_mode_is_left():
    model = make("gpt2", dropout=0.3).train()
    idx = tokens(1, 4)
    kept = idx.clone()
    seen = []
    out = model.generate(idx, 3, on_token=lambda t: seen.append(int(t)), temperature=0.0)
    assert torch.equal(idx, kept) and model.training and seen == out[0, 4:].tolist()


def test_top_k_and_top_p_keep_what_they_say():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]]))

    def kept(**options):
        return sampling_probabilities(logits, **options)[0].gt(0).tolist()

    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.5) == [True, False, False, False]
    assert kept(top_p=0.6) == [True, True, False, False]
    assert kept(top_p=1.0) == [True] * 4
    assert kept(temperature=0.0) == [True, False, False, False]
    torch.testing.assert_close(sampling_probabilities(logits), torch.tensor([[0.5, 0.25, 0.15, 0.1]]))
    assert sampling_probabilities(logits, top_p=0.6).sum() == pytest.approx(1.0)


def test_sampling_follows_the_probabilities():
    model = make("gpt2")
    idx = tokens(1, 4).expand(4000, 4)
    drawn = generate(model, idx, 1, top_k=5, generator=torch.Generator().manual_seed(0))[:, -1]
    p = sampling_probabilities(model(idx[:1])[:, -1], top_k=5)[0]
    share = torch.bincount(drawn, minlength=61) / 4000
    standard_error = (p * (1 - p) / 4000).sqrt()
    assert ((share - p).abs() <= 5 * standard_error).all()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=-1.0), "temperature must be at least 0, got -1.0"),
        (dict(top_k=0), "top_k must be at least 1, got 0"),
        (dict(top_p=0.0), "top_p must be more than 0 and at most 1, got 0.0"),
        (dict(max_new_tokens=-1), "max_new_tokens must be at least 0, got -1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        generate(make("gpt2"), tokens(1, 4), **{"max_new_tokens": 1, **options})


@pytest.mark.parametrize("shape", [(1, 0), (0, 3)])
def test_an_empty_prompt_is_refused(shape):
    with pytest.raises(ValueError, match="at least one row and one token"):
        generate(make("gpt2"), torch.zeros(shape, dtype=torch.int64), 1)


@pytest.mark.parametrize("lengths", [[0, 3], [3, 5], [3]])
def test_lengths_outside_the_prompt_are_refused(lengths):
    with pytest.raises(ValueError, match="numbers from 1 to 4"):
        generate(make("gpt2"), tokens(2, 4), 1, lengths=torch.tensor(lengths))

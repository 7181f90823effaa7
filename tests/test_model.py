"""The model: parameter count, causality, initialisation, documents, the cache, and independence from padding."""

from __future__ import annotations

import math

import pytest
import torch

from fastgpt import GPT, ModelConfig
from fastgpt.config import RopeScaling

GPT2_LIKE = dict(vocab_size=61, block_size=32, n_layer=2, n_head=4, n_embd=32)
LLAMA_LIKE = dict(
    GPT2_LIKE,
    n_kv_head=2,
    norm="rmsnorm",
    activation="swiglu",
    positions="rope",
    linear_bias=False,
    tied_embeddings=False,
)
SHAPES = {
    "gpt2": GPT2_LIKE,
    "llama": LLAMA_LIKE,
    "qwen": dict(LLAMA_LIKE, qkv_bias=True, qk_norm=True, head_dim=16),
    "stablelm": dict(LLAMA_LIKE, norm="layernorm", rope_fraction=0.5),
    "window": dict(LLAMA_LIKE, window=5, n_kv_head=1),
    "gelu": dict(GPT2_LIKE, activation="gelu", norm_bias=False),
    "relu": dict(GPT2_LIKE, activation="relu", positions="rope"),
    "stretched": dict(LLAMA_LIKE, rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_block_size=16)),
    "learned positions, normed heads": dict(GPT2_LIKE, qk_norm=True),
}


def make(name: str, seed: int = 0, dtype=torch.float64, **changes) -> GPT:
    model = GPT(ModelConfig(**{**SHAPES[name], **changes}), torch.Generator().manual_seed(seed)).to(dtype)
    with torch.no_grad():  # norms and biases off their initial ones and zeros, so that they matter
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    return model


def tokens(*shape: int, seed: int = 1, high: int = 61) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=SHAPES)
def model(request) -> GPT:
    return make(request.param)


def test_gpt2_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = GPT(ModelConfig.preset("gpt2"))
    assert model.num_parameters() == 124_439_808
    assert model.num_parameters(embeddings=False) == 124_439_808 - 50257 * 768 - 1024 * 768


@pytest.mark.parametrize(
    "name, millions",
    [("gpt2-medium", 354.823), ("gpt2-large", 774.030), ("gpt2-xl", 1557.611), ("llama-1b", 1235.814)],
)
def test_presets_have_the_published_sizes(name, millions):
    with torch.device("meta"):
        assert round(GPT(ModelConfig.preset(name)).num_parameters() / 1e6, 3) == millions


def test_a_future_token_changes_nothing_before_it(model):
    idx = tokens(2, 32)
    before = model(idx)
    for t in (1, 13, 31):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 61
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


def test_window_limits_what_a_token_sees():
    model = make("window", n_layer=1)
    idx = tokens(1, 32)
    changed = idx.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 61
    difference = (model(idx) - model(changed)).abs().amax(-1)[0]
    assert difference[10:16].gt(0).all(), "token 10 is seen by itself and the five after it"
    assert difference[16:].eq(0).all()


def test_cached_logits_equal_uncached(model):
    from fastgpt.model import KVCache

    idx = tokens(2, 20)
    whole = model(idx)
    cache = KVCache(model.config, 2, 20, dtype=torch.float64)
    parts = [model(idx[:, a:b], cache=cache) for a, b in ((0, 7), (7, 8), (8, 19), (19, 20))]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_initialisation_is_the_stated_normal():
    config = ModelConfig(vocab_size=1000, block_size=64, n_layer=8, n_head=4, n_embd=128, tied_embeddings=False)
    model = GPT(config, torch.Generator().manual_seed(0))
    residual = 0.02 / math.sqrt(2 * 8)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.ones_like(p) if "norm" in name and "bias" not in name else torch.zeros_like(p))
            continue
        values = p[:1000] if name in model.logical_rows() else p
        expected = residual if name.endswith(("out.weight", "down.weight")) else 0.02
        n = values.numel()
        # the sample's mean and standard deviation have standard errors std/sqrt(n) and std/sqrt(2n)
        assert abs(values.mean()) < 5 * expected / math.sqrt(n), name
        assert abs(values.std() - expected) < 5 * expected / math.sqrt(2 * n), name


def test_padding_rows_are_zero_unsaved_uncounted_and_draw_nothing(monkeypatch):
    import fastgpt.config

    padded = make("llama", vocab_size=61)
    assert padded.token_embedding.weight.shape == (128, 32)
    assert padded.token_embedding.weight[61:].eq(0).all() and padded.head.weight[61:].eq(0).all()
    monkeypatch.setattr(fastgpt.config, "VOCAB_MULTIPLE", 1)
    exact = make("llama", vocab_size=61)
    assert exact.token_embedding.weight.shape == (61, 32)
    assert padded.num_parameters() == exact.num_parameters()
    for key, value in padded.state_dict().items():
        assert torch.equal(value, exact.state_dict()[key]), key  # saved alike, drawn alike
    idx = tokens(2, 9)
    assert padded(idx).shape == (2, 9, 61)
    torch.testing.assert_close(padded(idx), exact(idx))
    loss, exact_loss = padded(idx, idx), exact(idx, idx)
    torch.testing.assert_close(loss, exact_loss)
    loss.backward()
    assert padded.token_embedding.weight.grad[61:].eq(0).all() and padded.head.weight.grad[61:].eq(0).all()
    padded.load_state_dict(exact.state_dict())


def test_loss_is_the_cross_entropy_of_the_logits(model):
    idx, targets = tokens(3, 17), tokens(3, 17, seed=2)
    targets[0, :5] = -100
    logits = model(idx)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(idx, targets), expected)
    summed = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(model(idx, targets, loss_divisor=7), summed / 7)


def test_gradients_are_those_of_the_plain_formula(model):
    idx, targets = tokens(2, 11), tokens(2, 11, seed=2)
    model(idx, targets).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(idx).flatten(0, 1), targets.flatten()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_documents_do_not_see_each_other(model):
    """Two documents in one row give the logits that each gives by itself, and perturbing one leaves the other."""
    idx = tokens(1, 24)
    cu_seqlens = torch.tensor([0, 10, 24], dtype=torch.int32)
    together = model(idx, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(together[:, :10], model(idx[:, :10]))
    torch.testing.assert_close(together[:, 10:], model(idx[:, 10:]))
    changed = idx.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 61
    assert torch.equal(model(changed, cu_seqlens=cu_seqlens)[:, 10:], together[:, 10:])


def test_the_ops_of_a_step_are_known_before_it(monkeypatch):
    """Those that ask for an implementation: each is refused at the start where its kernel is required and missing."""
    from fastgpt import native, ops
    from fastgpt.config import OptimConfig
    from fastgpt.model import ops_of
    from fastgpt.optim import build_optimizer

    asked: set[str] = set()
    monkeypatch.setattr(native, "select", lambda x, op="": asked.add(op))
    for kind in SHAPES:
        asked.clear()
        model = make(kind)
        model(tokens(2, 8), tokens(2, 8)).backward()
        ops.grad_norm([p.grad for p in model.parameters()])
        build_optimizer(model, OptimConfig()).step()
        assert asked == set(ops_of(model.config)), kind


def test_accumulated_micro_batches_equal_one_batch(model):
    """Unequal numbers of targets, one divisor for all."""
    idx, targets = tokens(6, 16), tokens(6, 16, seed=2)
    targets[0, 2:] = -100
    targets[3, :7] = -100
    n = int((targets != -100).sum())
    model(idx, targets).backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for i in range(0, 6, 2):
        model(idx[i : i + 2], targets[i : i + 2], loss_divisor=n).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], msg=lambda m, name=name: f"{name}: {m}")


def test_rotary_tables_stay_fp32_when_the_model_is_cast():
    model = make("llama", dtype=torch.bfloat16)
    assert all(table.dtype == torch.float32 for table in model.rotary_tables())


def test_dropout_is_off_in_evaluation_and_random_in_training():
    model = make("gpt2", dropout=0.5)
    idx = tokens(1, 8)
    model.eval()
    assert torch.equal(model(idx), model(idx))
    model.train()
    assert not torch.equal(model(idx), model(idx))


def test_an_id_past_the_vocabulary_is_refused_though_padding_is_there():
    with pytest.raises(IndexError, match="index out of range"):
        make("gpt2")(torch.tensor([[61]]))


def test_a_full_cache_is_refused():
    from fastgpt.model import KVCache

    model = make("gpt2")
    cache = KVCache(model.config, 1, 4, dtype=torch.float64)
    model(tokens(1, 3), cache=cache)
    with pytest.raises(ValueError, match="got 2 tokens after 3 cached, but the cache has room for 4"):
        model(tokens(1, 2), cache=cache)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(idx=torch.zeros(4, dtype=torch.int64)), "idx must be (B, T)"),
        (dict(idx=torch.zeros(1, 4)), "idx must be (B, T) int64 or int32, got (1, 4) torch.float32"),
        (dict(idx=torch.zeros(1, 33, dtype=torch.int64)), "got 33 tokens, but block_size is 32"),
        (
            dict(idx=torch.zeros(1, 4, dtype=torch.int64), targets=torch.zeros(1, 5, dtype=torch.int64)),
            "targets must have the shape of idx (1, 4), got (1, 5)",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        make("gpt2")(**arguments)
    assert message in str(error.value)

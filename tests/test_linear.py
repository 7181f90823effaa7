"""The linear layer whose weight gradient has several formulations, and how the trainer chooses one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastgpt.train
from fastgpt import ModelConfig, TrainConfig, Trainer, precision
from fastgpt.config import DataConfig
from fastgpt.linear import FORMULATIONS, PLAIN, Linear
from fastgpt.model import GPT
from fastgpt.progress import ConsoleProgress
from tests.rule import DEVICES, RULE_DTYPES, check_by_rule, outputs_and_gradients, randn
from tests.synthetic import VOCAB, text_ids, write_dataset

BF16 = torch.bfloat16
OTHERS = [name for name in FORMULATIONS if name != PLAIN]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def layer(formulation: str, weight: Tensor, bias: Tensor | None = None) -> Linear:
    made = Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    made.weight_gradient = formulation
    return made


def function(formulation: str) -> Any:
    """The layer as a function of input, weight and bias."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        made = layer(formulation, weight, bias)
        return torch.func.functional_call(
            made, {"weight": weight, "bias": bias} if bias is not None else {"weight": weight}, (x,)
        )

    return linear


@pytest.mark.parametrize("formulation", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float64, *RULE_DTYPES])
def test_rule(formulation: str, dtype: torch.dtype, device: str) -> None:
    """Rows that the parts of a split share out, and rows that they do not; with a bias and without."""
    for rows in ((4, 16), (3, 7), (0, 8)):
        x, weight, bias = (
            randn(*s, dtype=dtype, seed=i, device=device) for i, s in enumerate([(*rows, 24), (40, 24), (40,)])
        )
        check_by_rule(function(formulation), F.linear, [x, weight, bias], f"{rows} rows with a bias")
        check_by_rule(function(formulation), F.linear, [x, weight], f"{rows} rows")


@pytest.mark.parametrize("formulation", OTHERS)
def test_the_formulation_is_used_and_is_the_same_every_time(formulation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    used = FORMULATIONS[formulation]
    monkeypatch.setitem(
        FORMULATIONS, formulation, lambda *rows: (calls.append([t.shape for t in rows]), used(*rows))[1]
    )
    given = [randn(2, 16, 24, dtype=BF16), randn(40, 24, dtype=BF16, seed=1)]
    first, again = (outputs_and_gradients(function(formulation), given) for _ in range(2))
    assert calls == [[(32, 40), (32, 24)]] * 2
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("formulation", OTHERS)
def test_derivatives(formulation: str) -> None:
    given = [t.requires_grad_() for t in (randn(2, 4, 3), randn(5, 3, seed=1), randn(5, seed=2))]
    assert torch.autograd.gradcheck(function(formulation), given)
    assert torch.autograd.gradgradcheck(function(formulation), given)
    pairs = [
        torch.autograd.grad(linear(*(t * 1 for t in given[:2])).square().sum(), given[:2])  # no leaves, no bias
        for linear in (function(formulation), F.linear)
    ]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)
    for wanted in range(3):
        some = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(given)]
        (found,) = torch.autograd.grad(function(formulation)(*some).square().sum(), some[wanted])
        (expected,) = torch.autograd.grad(F.linear(*some).square().sum(), some[wanted])
        torch.testing.assert_close(found, expected)


def test_gradients_come_in_the_dtype_that_they_are_summed_in(device: str) -> None:
    made = layer("split in 2", randn(40, 24, dtype=BF16, device=device), randn(40, dtype=BF16, device=device))
    for p in made.parameters():
        p.grad_dtype = torch.float32
    x = randn(16, 24, dtype=BF16, device=device)
    d_y = randn(16, 40, dtype=BF16, seed=1, device=device)
    for _ in range(2):
        made(x).backward(d_y)
    exact = 2 * d_y.double().t() @ x.double()
    assert made.weight.grad.dtype == made.bias.grad.dtype == torch.float32
    if device == "cuda":  # products that keep what they summed
        torch.testing.assert_close(made.weight.grad, exact.float())
    torch.testing.assert_close(made.bias.grad, 2 * d_y.float().sum(0))


def test_torchs_own_where_someone_looks_inside() -> None:
    made = layer("transposed", randn(5, 3, dtype=torch.float32))
    x = randn(4, 3, dtype=torch.float32).requires_grad_()
    assert made(x).grad_fn.name() == "_LinearBackward"
    with torch.autocast("cpu", BF16):
        assert made(x).dtype == BF16 and "_Linear" not in made(x).grad_fn.name()
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), made(x))
    assert torch.equal(torch.func.vmap(made)(x), made(x))
    made.weight_gradient = PLAIN
    assert made(x).grad_fn.name() != "_LinearBackward"


# ---- the choice ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({PLAIN: 1.0, "transposed": 1.1}, PLAIN),
        ({PLAIN: 1.0, "transposed": 0.99}, PLAIN),  # chance
        ({PLAIN: 1.0, "transposed": 0.9, "wide": 0.8}, "wide"),
    ],
)
def test_the_fastest_is_chosen(seconds: dict[str, float], chosen: str) -> None:
    assert precision.worth_it(seconds) == chosen


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_only_a_cuda_gpu_measures(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GPT, "device", property(lambda self: torch.device(kind)))
    model = GPT(ModelConfig(vocab_size=9, block_size=8, n_layer=1, n_head=1, n_embd=8))
    assert precision.measure_weight_gradients(model, 16) == ({}, {})
    precision.apply_weight_gradients(model, {"8 x 8": "wide"})
    assert {layer.weight_gradient for layer in precision.linear_layers(model)} == {PLAIN}


def test_each_shape_is_measured_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, or a processor in its place."""
    model = GPT(ModelConfig(vocab_size=9, block_size=8, n_layer=2, n_head=1, n_embd=8)).to(device)
    precision.apply_precision(model, "bfloat16")
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(GPT, "device", property(lambda self: torch.device("cuda")))
    turns, quickest = [], precision.quickest
    monkeypatch.setattr(precision, "quickest", lambda *given: (turns.append(given), quickest(*given))[1])
    chosen, seconds = precision.measure_weight_gradients(model, 16, repeats=1)
    assert len(turns) == 4
    assert chosen.keys() == seconds.keys() == {"8 x 24", "8 x 8", "8 x 32", "32 x 8"}
    for shape, each in seconds.items():
        assert each.keys() == FORMULATIONS.keys() and 0 < min(each.values()) < 1
        assert chosen[shape] == precision.worth_it(each)


def test_a_run_keeps_its_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """In its checkpoint: another formulation would give other bits."""
    write_dataset(tmp_path / "data", text_ids(2000), text_ids(100, seed=1))
    config = TrainConfig(
        model=ModelConfig(vocab_size=VOCAB, block_size=16, n_layer=1, n_head=1, n_embd=8),
        data=DataConfig(path=str(tmp_path / "data")),
        out_dir=str(tmp_path / "run"),
        steps=1,
        micro_batch_size=2,
        batch_tokens=32,
        precision="float32",
        device="cpu",
    )
    choice = {"8 x 24": "split in 4", "8 x 8": "wide"}
    asked = []
    monkeypatch.setattr(
        fastgpt.train, "measure_weight_gradients", lambda model, tokens: (asked.append(tokens), (choice, {}))[1]
    )
    Trainer(config).fit()
    monkeypatch.setattr(fastgpt.train, "measure_weight_gradients", lambda *a: pytest.fail("measured again"))
    Trainer(config.replace(steps=2), resume="auto").fit()  # on a CPU, which passes it on
    resumed = Trainer(config.replace(steps=3), resume="auto")
    ConsoleProgress(plain=True).on_start(resumed)
    assert "weight gradients in the fastest formulation here: 8 x 24 split in 4, 8 x 8 wide;" in capsys.readouterr().out
    assert asked == [32] and resumed.weight_gradients == choice
    resumed.abandon()

    def used() -> dict[str, str]:
        return {precision.shape_of(layer): layer.weight_gradient for layer in precision.linear_layers(resumed.model)}

    assert used() == dict.fromkeys(("8 x 24", "8 x 8", "8 x 32", "32 x 8"), PLAIN)
    monkeypatch.setattr(GPT, "device", property(lambda self: torch.device("cuda")))
    precision.apply_weight_gradients(resumed.model, resumed.weight_gradients)
    assert used() == {**choice, "8 x 32": PLAIN, "32 x 8": PLAIN}

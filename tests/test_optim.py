"""The optimizers against torch's own, master weights, and state that survives a round trip."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from fastgpt import ModelConfig, optim
from fastgpt.config import OptimConfig
from fastgpt.model import GPT
from fastgpt.optim import AdamW, Muon, build_optimizer, orthogonalise
from fastgpt.schedule import learning_rate_scale
from tests.rule import assert_within_rule, randn

SHAPES = ((7, 5), (3,), (16, 16), (1,))


def train(
    optimizer_class, dtype=torch.float64, steps=100, params=None, scheduler=None, **options
) -> list[torch.Tensor]:
    """Parameters after `steps` updates with gradients that depend on the parameters and on the step."""
    params = params or [nn.Parameter(randn(*s, seed=i).to(dtype)) for i, s in enumerate(SHAPES)]
    optimizer = optimizer_class(params, **options)
    schedule = scheduler and scheduler(optimizer)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = (p.detach().double() * 0.3 + randn(*p.shape, seed=1000 * step + i)).to(dtype)
        optimizer.step()
        if schedule:
            schedule.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adamw_equals_torchs_over_100_steps(dtype, weight_decay):
    options = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    exact = train(torch.optim.AdamW, **options)
    theirs = train(torch.optim.AdamW, dtype, **options)
    ours = train(AdamW, dtype, **options)
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert_within_rule(a, b, c, f"parameter {i}")


def test_adamw_works_with_groups_and_schedulers():
    def scheduler(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.01, 0.1], total_steps=50)

    def grouped():
        params = [nn.Parameter(randn(*s, seed=i)) for i, s in enumerate(SHAPES)]
        return params, [dict(params=params[:2], lr=0.01), dict(params=params[2:], lr=0.1, weight_decay=0.0)]

    results = []
    for kind in (AdamW, torch.optim.AdamW):
        params, groups = grouped()
        optimizer = kind(groups, weight_decay=0.05)
        schedule = scheduler(optimizer)
        for step in range(50):
            for i, p in enumerate(params):
                p.grad = p.detach() * 0.3 + randn(*p.shape, seed=1000 * step + i)
            optimizer.step()
            schedule.step()
        results.append([p.detach() for p in params])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("begins, ends", [(AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW)])
def test_adamw_and_torchs_load_each_others_state(begins, ends, dtype):
    """Half of the steps by the one, half by the other, equal all of them by torch's; and the first is left alone."""

    def half(optimizer, params, steps):
        for step in steps:
            for i, p in enumerate(params):
                p.grad = (p.detach().double() * 0.3 + randn(*p.shape, seed=1000 * step + i)).to(p.dtype)
            optimizer.step()

    def fresh(dtype):
        return [nn.Parameter(randn(*s, seed=i).to(dtype)) for i, s in enumerate(SHAPES)]

    def groups(params):
        return [dict(params=params[:2]), dict(params=params[2:], lr=1e-2, weight_decay=0.0)]

    options = dict(lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    results = []
    for working in (torch.float64, dtype):
        params = fresh(working)
        half(torch.optim.AdamW(groups(params), **options), params, range(20))
        results.append([p.detach() for p in params])
    ours = fresh(dtype)
    first = begins(groups(ours), **options)
    half(first, ours, range(10))
    before = copy.deepcopy(first.state_dict())
    second = ends(groups(ours))  # hyperparameters come with the state
    second.load_state_dict(first.state_dict())
    half(second, ours, range(10, 20))
    for i, (a, b, c) in enumerate(zip((p.detach() for p in ours), results[1], results[0], strict=True)):
        assert_within_rule(a, b, c, f"parameter {i}")
    steps = [s["step"] for s in first.state_dict()["state"].values()]
    assert all(torch.equal(a, s["step"]) for a, s in zip(steps, before["state"].values(), strict=True))


def test_torchs_state_of_a_bf16_parameter_goes_on_in_fp32():
    params = [nn.Parameter(randn(8, 8, dtype=torch.bfloat16))]
    theirs, ours = torch.optim.AdamW(params), AdamW(params, lr=1e-4)
    params[0].grad = torch.ones_like(params[0])
    theirs.step()
    ours.load_state_dict(theirs.state_dict())
    ours.step()
    state = ours.state[params[0]]
    assert {t.dtype for t in state.values()} == {torch.float32} and state["step"] == 2
    assert torch.equal(params[0].detach(), state["master"].to(torch.bfloat16))


@pytest.mark.parametrize(
    ("kind", "variant", "name"),
    [
        (torch.optim.AdamW, {"amsgrad": True}, "amsgrad"),
        (torch.optim.AdamW, {"maximize": True}, "maximize"),
        (torch.optim.Adam, {}, "weight decay in the gradient"),
    ],
)
def test_state_of_a_variant_is_refused(kind, variant, name):
    params = [nn.Parameter(torch.ones(3))]
    optimizer = AdamW(params, lr=0.5)
    with pytest.raises(ValueError, match=f"an optimizer with {name}.*, which AdamW does not do"):
        optimizer.load_state_dict(kind(params, **variant).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_parameters_of_another_shape_or_number_are_refused():
    saved = AdamW([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]).state_dict()
    with pytest.raises(ValueError, match="doesn't match the size"):
        AdamW([nn.Parameter(torch.ones(3))]).load_state_dict(saved)


def test_a_group_can_be_added_later_and_a_closure_is_called():
    results = []
    for kind in (AdamW, torch.optim.AdamW):
        params = [nn.Parameter(randn(4, 3, seed=i)) for i in range(2)]
        optimizer = kind(params[:1], lr=0.01)

        def closure(params=params, optimizer=optimizer):
            optimizer.zero_grad()
            loss = sum((p**2).sum() for p in params)
            loss.backward()
            return loss

        for step in range(6):
            if step == 3:
                optimizer.add_param_group(dict(params=params[1:], lr=0.1, weight_decay=0.3))
            loss = optimizer.step(closure)
        results.append([*(p.detach() for p in params), loss.detach()])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("without", [range(10), range(3, 5), range(18, 20), (1, 4, 9)])
def test_a_parameter_has_the_bias_correction_of_its_own_steps(without):
    """It may get its first gradient late, or none now and then."""
    results = []
    for kind in (AdamW, torch.optim.AdamW):
        params = [nn.Parameter(randn(4, 4, seed=i)) for i in range(3)]
        optimizer = kind(params, lr=0.01)
        for step in range(20):
            for i, p in enumerate(params):
                p.grad = None if i == 1 and step in without else randn(4, 4, seed=100 * step + i)
            optimizer.step()
        results.append([p.detach() for p in params])
    torch.testing.assert_close(*results)


class MuonInBf16(Muon):
    """In one dtype for parameters of any."""

    working_dtype = torch.bfloat16


@pytest.mark.parametrize("kind", [AdamW, MuonInBf16])
def test_bf16_parameter_is_always_its_rounded_fp32_master(kind):
    params = [nn.Parameter(randn(8, 8, dtype=torch.bfloat16))]
    exact = [nn.Parameter(params[0].detach().float())]
    muon = dict(muon=True) if kind is MuonInBf16 else {}
    low, high = kind([dict(params=params, **muon)], lr=1e-4), kind([dict(params=exact, **muon)], lr=1e-4)
    for step in range(30):
        grad = randn(8, 8, dtype=torch.float32, seed=step)
        params[0].grad_dtype = torch.float32
        params[0].grad, exact[0].grad = grad, grad.clone()
        low.step()
        high.step()
        master = low.state[params[0]]["master"]
        assert torch.equal(params[0].detach(), master.to(torch.bfloat16))
        assert torch.equal(master, exact[0].detach()), "small updates are not lost to rounding"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_orthogonalises_in_the_dtype_that_the_run_chose_on_a_cpu(dtype, monkeypatch):
    seen = []
    monkeypatch.setattr(optim, "orthogonalise", lambda x, dtype: seen.append(dtype) or orthogonalise(x, dtype))
    p = nn.Parameter(randn(8, 4, dtype=torch.float32).to(dtype))
    p.grad = torch.ones_like(p)
    Muon([dict(params=[p], muon=True)]).step()
    assert seen == [dtype]


def test_muon_equals_torchs_within_the_rule():
    """Torch orthogonalises in bf16; the truth is the same iteration in float64."""
    shapes = ((16, 16), (32, 8), (8, 32))

    def run(kind, dtype=torch.float32, **extra):
        params = [nn.Parameter(randn(*s, dtype=torch.float32, seed=i).to(dtype)) for i, s in enumerate(shapes)]
        optimizer = kind([dict(params=params, **extra)], lr=0.02, momentum=0.95, weight_decay=0.1)
        for step in range(5):
            for i, p in enumerate(params):
                p.grad = randn(*p.shape, dtype=torch.float32, seed=100 * step + i).to(dtype)
            optimizer.step()
        return [p.detach() for p in params]

    class ExactMuon(Muon):
        working_dtype = torch.float64

    exact = run(ExactMuon, torch.float64, muon=True)
    for i, (a, b, c) in enumerate(zip(run(Muon, muon=True), run(torch.optim.Muon), exact, strict=True)):
        assert_within_rule(a, b, c, f"matrix {i}")


def test_orthogonalise_gives_singular_values_near_one():
    for shape in ((3, 24, 24), (2, 48, 16), (2, 16, 48)):
        values = torch.linalg.svdvals(orthogonalise(randn(*shape, dtype=torch.float32)).float())
        assert values.min() > 0.3 and values.max() < 1.3, "the quintic maps into about [0.7, 1.2]"


def test_muon_splits_a_packed_matrix():
    whole = nn.Parameter(randn(24, 8, dtype=torch.float32))
    parts = [nn.Parameter(p.clone()) for p in whole.detach().split((12, 6, 6))]
    packed = Muon([dict(params=[whole], muon=True, splits=(12, 6, 6))], lr=0.02)
    apart = Muon([dict(params=parts, muon=True)], lr=0.02)
    grad = randn(24, 8, dtype=torch.float32, seed=5)
    whole.grad = grad
    for p, g in zip(parts, grad.split((12, 6, 6)), strict=True):
        p.grad = g
    packed.step()
    apart.step()
    assert torch.equal(whole.detach(), torch.cat([p.detach() for p in parts]))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_skip_leaves_everything_as_it_was(kind, precision):
    from fastgpt.precision import apply_precision

    model = apply_precision(GPT(TINY, torch.Generator().manual_seed(0)), precision)
    optimizer = build_optimizer(model, OptimConfig(optimizer=kind))
    idx = torch.arange(16).view(2, 8)
    model(idx, idx).backward()
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for p in model.parameters():
        p.grad.fill_(float("nan"))
    optimizer.step(clip=torch.tensor(float("nan")), skip=torch.tensor(True))
    assert_same_tree((model.state_dict(), optimizer.state_dict()), before)
    model.zero_grad()
    model(idx, idx).backward()
    optimizer.step(clip=torch.tensor(0.5), skip=torch.tensor(False))
    assert not torch.equal(model.state_dict()["token_embedding.weight"], before[0]["token_embedding.weight"])


def assert_same_tree(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_tree(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_tree(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


TINY = ModelConfig(vocab_size=50, block_size=8, n_layer=2, n_head=2, n_embd=16, activation="swiglu", positions="rope")


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "bfloat16_stochastic"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_dict_round_trip_continues_bitwise(kind, precision):
    from fastgpt.precision import apply_precision

    def fresh():
        model = apply_precision(GPT(TINY, torch.Generator().manual_seed(0)), precision)
        stochastic = precision == "bfloat16_stochastic"
        return model, build_optimizer(model, OptimConfig(optimizer=kind), stochastic_rounding=stochastic, seed=3)

    def steps(model, optimizer, n):
        for step in range(n):
            idx = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(step))
            model(idx, idx).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = fresh()
    steps(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, 3)
    other, its_optimizer = fresh()
    other.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    steps(other, its_optimizer, 3)
    assert_same_tree((other.state_dict(), its_optimizer.state_dict()), (model.state_dict(), optimizer.state_dict()))


def test_stochastic_rounding_differs_between_groups():
    params = [nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(2)]
    groups = [dict(params=[p], lr=1e-4) for p in params]
    optimizer = AdamW(groups, stochastic_rounding=True, weight_decay=0.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = [p.detach() != 1 for p in params]
    assert moved[0].any() and moved[1].any() and not torch.equal(*moved)


def test_decay_is_on_matrices_only_and_muon_takes_the_hidden_ones():
    model = GPT(TINY)
    names = {p: name for name, p in model.named_parameters()}
    for kind in ("adamw", "muon"):
        optimizer = build_optimizer(model, OptimConfig(optimizer=kind, weight_decay=0.1))
        assert sum(len(g["params"]) for g in optimizer.param_groups) == len(names)
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert group["weight_decay"] == (0.1 if p.dim() == 2 else 0.0), names[p]
                hidden = names[p].startswith("blocks.") and p.dim() == 2
                assert group.get("muon", False) == (kind == "muon" and hidden), names[p]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lr=-1.0), "lr must be at least 0, got -1.0"),
        (dict(betas=(0.9, 1.0)), "betas must be at least 0 and less than 1"),
        (dict(eps=0.0), "eps must be more than 0"),
        (dict(weight_decay=-0.1), "weight_decay must be at least 0"),
    ],
)
def test_bad_hyperparameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        AdamW([nn.Parameter(torch.zeros(1))], **options)
    with pytest.raises(ValueError, match="Muon takes matrices only"):
        Muon([dict(params=[nn.Parameter(torch.zeros(3))], muon=True)])


# ---- the schedule ------------------------------------------------------------------------------


def test_schedules_warm_up_and_end_where_they_say():
    for schedule in ("cosine", "wsd", "constant"):
        config = OptimConfig(schedule=schedule, warmup_steps=10, min_lr_fraction=0.1, decay_fraction=0.25)
        scale = [learning_rate_scale(s, 100, config) for s in range(100)]
        assert scale[0] == pytest.approx(1 / 11) and scale[10] == 1.0
        assert all(a < b for a, b in pairwise(scale[:11]))
        assert all(a >= b for a, b in pairwise(scale[10:]))
        assert scale[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert learning_rate_scale(74, 100, OptimConfig(schedule="wsd", warmup_steps=10, decay_fraction=0.25)) == 1.0
    middle = learning_rate_scale(54, 100, OptimConfig(warmup_steps=9, min_lr_fraction=0.0))
    assert middle == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_schedules_survive_runs_shorter_than_the_warm_up(steps):
    for schedule in ("cosine", "wsd", "constant"):
        for warmup in (0, 1, 5):
            config = OptimConfig(schedule=schedule, warmup_steps=warmup)
            assert all(0.0 < learning_rate_scale(s, steps, config) <= 1.0 for s in range(steps))

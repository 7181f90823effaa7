"""Every op, every tensor that it takes, everything that can be wrong with it: on a CPU and on meta the same outcome.

The tests of each op name its errors one by one; these go through all combinations and know no messages. An op may take
what it is given or refuse it with a ValueError, and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import ops
from tests.rule import LAYOUTS, as_tuple, in_layout, randn

B, T, V, C, H, KV, D = 2, 4, 9, 6, 4, 2, 8


def floats(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, dtype=torch.float32, seed=seed)


def ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)  # in range, however small the other arguments become


def optimizer_state() -> dict[str, Any]:
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    lists = {name: [floats(3, 4, seed=i).abs(), floats(5, seed=i).abs()] for i, name in enumerate(names)}
    scalars = {name: torch.ones(()) for name in ("lr", "step", "clip")}
    return {**lists, **scalars, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


# Each op with every tensor that it can be given at a time.
CALLS: dict[str, tuple[Callable, Callable[[], dict[str, Any]]]] = {
    "layer_norm": (ops.layer_norm, lambda: dict(
        x=floats(B, T, C), weight=floats(C), bias=floats(C), residual=floats(B, T, C))),
    "rms_norm": (ops.rms_norm, lambda: dict(x=floats(B, T, C), weight=floats(C), residual=floats(B, T, C))),
    "swiglu packed": (ops.swiglu, lambda: dict(gate=floats(B, T, C))),
    "swiglu": (ops.swiglu, lambda: dict(gate=floats(B, T, C), up=floats(B, T, C))),
    "gelu": (ops.gelu, lambda: dict(x=floats(B, T, C))),
    "embedding": (ops.embedding, lambda: dict(ids=ids(B, T), weight=floats(V, C))),
    "rotary": (ops.rotary, lambda: dict(
        qkv=floats(B, T, H + 2 * KV, D), cos=floats(T, D // 2), sin=floats(T, D // 2), n_head=H, n_kv_head=KV,
        positions=ids(B, T), q_weight=floats(D), k_weight=floats(D))),
    "attention": (ops.attention, lambda: dict(q=floats(B, T, H, D), k=floats(B, T, KV, D), v=floats(B, T, KV, D))),
    "attention over documents": (ops.attention, lambda: dict(
        q=floats(B, T, H, D), k=floats(B, T, KV, D), v=floats(B, T, KV, D),
        doc_start=torch.zeros(B, T, dtype=torch.int32), doc_end=torch.full((B, T), T, dtype=torch.int32))),
    "attention with a cache": (ops.attention, lambda: dict(
        q=floats(B, 2, H, D), k=floats(B, T, KV, D), v=floats(B, T, KV, D),
        kv_lengths=torch.full((B,), T, dtype=torch.int32))),
    "cross_entropy": (ops.cross_entropy, lambda: dict(logits=floats(B, T, V), targets=ids(B, T))),
    "linear_cross_entropy": (ops.linear_cross_entropy, lambda: dict(
        x=floats(B * T, C), weight=floats(V, C), targets=ids(B * T), bias=floats(V), token_weights=floats(B * T).abs(),
        reduction="sum")),
    "grad_norm": (ops.grad_norm, lambda: dict(grads=[floats(3, 4), floats(5)])),
    "adamw_": (ops.adamw_, optimizer_state),
}  # fmt: skip


def places(call: dict[str, Any]) -> list[tuple[str, int | None]]:
    """Where the tensors of a call are: its argument's name, and the number in a list."""
    found: list[tuple[str, int | None]] = []
    for name, value in call.items():
        if isinstance(value, list):
            found += [(name, i) for i in range(len(value))]
        elif isinstance(value, Tensor):
            found.append((name, None))
    return found


def at(call: dict[str, Any], place: tuple[str, int | None]) -> Tensor:
    name, number = place
    return call[name] if number is None else call[name][number]


def changed(call: dict[str, Any], place: tuple[str, int | None], change: Callable[[Tensor], Any]) -> dict[str, Any]:
    name, number = place
    if number is None:
        return {**call, name: change(call[name])}
    return {**call, name: [change(t) if i == number else t for i, t in enumerate(call[name])]}


def on_meta(value: Any) -> Any:
    if isinstance(value, list):
        return [on_meta(v) for v in value]
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def outcome(op: Callable, call: dict[str, Any]) -> Any:
    """What comes out, as forms; or the words of the refusal. Any other exception is not caught."""
    try:
        made = op(**call)
    except ValueError as refusal:
        return str(refusal)
    return [(y.dtype, y.shape, y.is_contiguous()) for y in as_tuple(made if made is not None else ())]


def wrongs(x: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Any]]]:
    """What a tensor may be instead of what it should be."""
    for dtype in (torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool):
        if dtype != x.dtype:
            yield str(dtype), lambda t, dtype=dtype: t.to(dtype)
    yield "a list", lambda t: t.tolist()
    yield "a dimension more", lambda t: t.unsqueeze(0)
    yield "two dimensions more", lambda t: t[None, ..., None]
    for d in range(x.dim()):
        yield f"dimension {d} gone", lambda t, d=d: t.select(d, 0)
        yield f"dimension {d} longer", lambda t, d=d: torch.cat([t, t.narrow(d, 0, 1)], d)
        yield f"dimension {d} shorter", lambda t, d=d: t.narrow(d, 0, t.shape[d] - 1)
        yield f"dimension {d} empty", lambda t, d=d: t.narrow(d, 0, 0)
        yield f"dimension {d} one", lambda t, d=d: t.narrow(d, 0, 1)
    if x.dim() > 1:
        yield "transposed", lambda t: t.transpose(0, -1)


@pytest.mark.parametrize("name", CALLS)
def test_the_same_outcome_on_meta_and_cpu(name):
    op, make = CALLS[name]
    assert not isinstance(outcome(op, make()), str)
    refused = 0
    for place in places(make()):
        tensor = at(make(), place)
        for what, change in wrongs(tensor):
            real, meta = changed(make(), place, change), changed(make(), place, change)
            meta = {key: on_meta(value) for key, value in meta.items()}
            said = outcome(op, real)
            refused += isinstance(said, str)
            if isinstance(said, str) or op is not ops.adamw_:  # which in fp32 is torch's own, and that has no meta
                assert outcome(op, meta) == said, f"{place}: {what}"
    assert refused > 3


@pytest.mark.parametrize("name", CALLS)
def test_one_tensor_elsewhere_is_refused(name):
    op, make = CALLS[name]
    for place in places(make()):
        if len(places(make())) > 1:
            said = outcome(op, changed(make(), place, lambda t: t.to("meta")))
            assert isinstance(said, str) and "meta" in said, f"{place}: {said}"


@pytest.mark.parametrize("name", CALLS)
def test_strides_do_not_matter_or_are_refused(name):
    """Expanded, transposed, with gaps, off the beginning: what the contiguous call gives, or a refusal."""
    op, make = CALLS[name]

    def everything(call: dict[str, Any]) -> list[Tensor]:
        """What comes out, and what is left in the arguments (an op may work in place)."""
        made = op(**call)
        left = [at(call, place) for place in places(call)]
        return [*as_tuple(made if made is not None else ()), *left]

    for place in places(make()):
        for layout in LAYOUTS:
            tensor = at(make(), place)
            if layout == "expanded" and not tensor.dim():
                continue
            laid_out = changed(make(), place, lambda t, layout=layout: in_layout(t, layout))
            plain = changed(make(), place, lambda t, layout=layout: in_layout(t, layout).contiguous())
            said = outcome(op, changed(make(), place, lambda t, x=layout: in_layout(t, x)))
            if isinstance(said, str):
                assert "contiguous" in said, f"{place} {layout}: {said}"
                continue
            forms = outcome(op, changed(make(), place, lambda t, x=layout: in_layout(t, x).contiguous()))
            assert said == forms, f"{place} {layout}: what comes out is laid out otherwise"
            for a, b in zip(everything(laid_out), everything(plain), strict=True):
                torch.testing.assert_close(a, b, msg=lambda m, where=(place, layout): f"{where}: {m}")


def test_every_op_is_here():
    assert {name.split()[0] for name in CALLS} | {"document_bounds", "rotary_tables"} == set(ops.__all__)


# ---- derivatives of derivatives ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("grad_norm", "adamw_")])
def test_second_derivatives_are_right_or_refused(name):
    """All floating arguments at once, in float64."""
    op, make = CALLS[name]
    call = {key: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for key, v in make().items()}
    if name == "rotary":  # a table, not differentiated
        call |= {"cos": call["cos"].float(), "sin": call["sin"].float()}
    keys = [k for k, v in call.items() if isinstance(v, Tensor) and v.dtype == torch.float64 and k != "token_weights"]

    def function(*values: Tensor) -> Any:
        return op(**{**call, **dict(zip(keys, values, strict=True))})

    inputs = [call[key].requires_grad_() for key in keys]
    if name == "attention with a cache":  # torch's fused attention, which has no second derivative and says so
        with pytest.raises(RuntimeError, match="derivative for .* is not implemented"):
            torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
        return
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True, gen_non_contig_grad_outputs=True)


def test_long_attention_in_fp32_has_no_second_derivative_and_says_so(monkeypatch):
    """There the CPU's fused kernel serves."""
    monkeypatch.setattr(sys.modules["fastgpt.ops.attention"], "KEPT_PROBABILITIES_BYTES", 0)
    inputs = [floats(1, T, 1, D, seed=i).requires_grad_() for i in range(3)]
    first = torch.autograd.grad(ops.attention(*inputs).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for .* is not implemented"):
        torch.autograd.grad(sum(g.sum() for g in first), inputs)

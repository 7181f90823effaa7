"""Where a run computes, in which dtype, and how; the choices that are made by measuring."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from .config import TrainConfig
from .errors import UserError
from .linear import FORMULATIONS, PLAIN, Linear, weight_gradient
from .model import GPT
from .ops.contract import gradient_dtype


def resolve_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one. Raises UserError for a device that torch cannot use here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used here ({reason}); expected cpu, cuda, or auto") from None
    return device


def apply_precision(model: GPT, precision: str) -> GPT:
    """Parameters in the dtype of `precision`. The gradients of bf16 parameters are accumulated in fp32."""
    if precision.startswith("bfloat16"):
        model.to(torch.bfloat16)
        for p in model.parameters():
            p.grad_dtype = torch.float32
    return model


# A few thousand tokens tell the two dtypes apart; a full micro-batch of a large model would take minutes.
MEASURED_TOKENS = 2048


def measure_precision(config: TrainConfig, device: torch.device, repeats: int = 3) -> tuple[str, dict[str, float]]:
    """The faster of float32 and bfloat16 for this model here, and the seconds that each took.

    Forward and backward of a micro-batch of random tokens, or of as many of its rows as hold MEASURED_TOKENS; the
    quickest of `repeats` after a warm-up, the two dtypes in turn. A GPU takes bfloat16 without measuring.
    """
    if device.type != "cpu":
        return "bfloat16", {}
    draw = torch.Generator().manual_seed(0)
    block_size = config.model.block_size
    shape = (min(config.micro_batch_size, max(1, MEASURED_TOKENS // block_size)), block_size)
    idx = torch.randint(config.model.vocab_size, shape, generator=draw)
    models = {name: apply_precision(GPT(config.model, draw), name) for name in ("float32", "bfloat16")}
    seconds = dict.fromkeys(models, float("inf"))
    for turn in range(repeats + 1):
        for name, model in models.items():
            began = time.perf_counter()
            model(idx, idx).backward()
            model.zero_grad()
            if turn:
                seconds[name] = min(seconds[name], time.perf_counter() - began)
    return min(seconds, key=seconds.__getitem__), seconds


# ---- weight gradients ------------------------------------------------------------------------------------

# Another formulation than torch's own has to be this much faster: less could be chance.
WORTH_IT = 1.03
CALLS = 10

Choice = dict[str, str]  # "768 x 3072", inputs and outputs of a layer -> one of FORMULATIONS


def measure_weight_gradients(model: GPT, tokens: int, repeats: int = 3) -> tuple[Choice, dict[str, dict[str, float]]]:
    """For each shape of the model's linear layers the formulation in which the gradient of its weight is computed
    fastest here from `tokens` rows, and the seconds that each one took.

    The quickest of `repeats` after a warm-up, the formulations in turn, to the dtype that gradients are summed up in.
    What is no CUDA GPU takes torch's own without measuring: on a CPU all are alike.
    """
    if model.device.type != "cuda":
        return {}, {}
    found = {}
    for layer in {shape_of(layer): layer for layer in linear_layers(model)}.values():
        weight = layer.weight
        draw = torch.Generator(weight.device).manual_seed(0)
        x, d_y = (
            torch.randn(tokens, width, generator=draw, device=weight.device).to(weight.dtype)
            for width in (layer.in_features, layer.out_features)
        )
        calls = {name: partial(weight_gradient, d_y, x, name, gradient_dtype(weight)) for name in FORMULATIONS}
        found[shape_of(layer)] = quickest(calls, weight.device, repeats)
    return {shape: worth_it(seconds) for shape, seconds in found.items()}, found


def quickest(calls: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """The seconds that each call takes: of CALLS in a row, the least of `repeats` turns."""
    seconds = dict.fromkeys(calls, float("inf"))
    for turn in range(repeats + 1):
        for name, call in calls.items():
            torch.cuda.synchronize(device)
            began = time.perf_counter()
            for _ in range(CALLS):
                call()
            torch.cuda.synchronize(device)
            if turn:
                seconds[name] = min(seconds[name], (time.perf_counter() - began) / CALLS)
    return seconds


def worth_it(seconds: dict[str, float]) -> str:
    """The fastest formulation, or torch's own where it is about as fast."""
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[PLAIN] > WORTH_IT * seconds[best] else PLAIN


def apply_weight_gradients(model: GPT, choice: Choice) -> None:
    """As chosen, on a CUDA GPU, where the choice was made; elsewhere torch's own."""
    if model.device.type != "cuda":
        choice = {}
    for layer in linear_layers(model):
        layer.weight_gradient = choice.get(shape_of(layer), PLAIN)


def linear_layers(model: GPT) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]


def shape_of(layer: Linear) -> str:
    return f"{layer.in_features} x {layer.out_features}"

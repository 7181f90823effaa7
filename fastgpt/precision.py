"""Where a run computes and in which dtype; the choices that are made by measuring."""

from __future__ import annotations

import time

import torch

from .config import TrainConfig
from .errors import UserError
from .model import GPT


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

"""What to do when a training run has run out of memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import machine
from .config import TrainConfig
from .errors import UserError
from .units import size


@contextmanager
def out_of_memory_explained(config: TrainConfig) -> Iterator[None]:
    """Inside, an allocation that fails on a GPU or a CPU is a UserError: what was used, and which micro-batch keeps the
    global batch."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(explanation(config, error)) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not have the memory that it asked for."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def explanation(config: TrainConfig, error: RuntimeError) -> str:
    """One line: where, how much was in use at most, and the remedy."""
    where, used = _use(error)
    shape = f"micro-batches of {config.micro_batch_size} x {config.model.block_size:,} tokens"
    smaller = smaller_micro_batch(config)
    if smaller is not None:
        keeps = f"keeps the global batch of {config.batch_tokens:,} tokens ({_rows(config) // smaller} a step)"
        remedy = f"--micro_batch_size {smaller} {keeps}"
        if any(Path(config.out_dir, "checkpoints").glob("step-*")):
            remedy += ", and --resume auto --allow-changes goes on from the last checkpoint"
    else:
        remedy = "choose a smaller model or a shorter --model.block_size"
        if config.precision != "bfloat16":
            remedy += ", or --precision bfloat16"
    return f"out of memory on {where}: {used}, with {shape}; {remedy}"


def smaller_micro_batch(config: TrainConfig) -> int | None:
    """At most half as many rows as now, and the most with which a step still is a whole number of micro-batches."""
    rows = _rows(config)
    return next((n for n in range(config.micro_batch_size // 2, 0, -1) if rows % n == 0), None)


def _rows(config: TrainConfig) -> int:
    """Sequences in a step."""
    return config.accumulation * config.micro_batch_size


def _use(error: RuntimeError) -> tuple[str, str]:
    """The device in words, and the most that this process had of it."""
    import torch

    if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available():
        peak, total = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
        return torch.cuda.get_device_name(), f"{size(peak)} in use at most, of {size(total)}"
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return "the CPU", f"{size(peak)} in use at most, of {size(machine.memory()[0])}"

"""What a training run would take, before it begins: parameters, memory, disk, time. Used by `--dry-run`."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import machine
from .checkpoint import checkpoint_bytes
from .config import PRESETS, ModelConfig, TrainConfig
from .flops import flops_per_token
from .model import GPT
from .optim import AdamW, build_optimizer
from .precision import apply_precision, measure_precision, resolve_device
from .units import duration, size

# A micro-batch is timed with as many of its rows as take about this long; not at all where one row takes far longer.
TIMED_SECONDS = 1.0
PATIENCE = 4.0  # times TIMED_SECONDS
# Share of the peak that training is assumed to reach where it is not timed: ordinary for transformers.
ASSUMED_UTILISATION = 0.4
# Times that a run may read its data before it is said to read them too often: from about here on another pass adds
# next to nothing (Muennighoff et al., 2023, https://arxiv.org/abs/2305.16264).
MANY_EPOCHS = 16
LONG_SECONDS = 86400.0


@dataclass(frozen=True)
class Estimate:
    """What `estimate` found. Sizes are bytes, times seconds."""

    parameters: int
    precision: str
    device: str
    steps: int
    """Still to be done."""
    tokens: int
    """Read in these steps."""
    dataset_tokens: int | None
    """In the training split; None without a prepared dataset."""
    state_bytes: int
    """Weights, gradients, optimizer state."""
    activation_bytes: int
    """Kept between the forward and the backward of one micro-batch: estimated."""
    available_bytes: int
    """Free memory of the device."""
    checkpoint_bytes: int
    """One checkpoint on the disk."""
    checkpoints: int
    """The most that are kept at a time, the one being written included."""
    disk_bytes: int
    """Free where the run would be written."""
    seconds: float
    """For all steps, without evaluations and saves."""
    timed: bool
    """`seconds` was measured here and now; otherwise estimated."""
    how: str
    """How `seconds` was found, in words."""
    done: int = 0
    """Steps of the run before these: it is resumed."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def epochs(self) -> float | None:
        """Times that these steps read the training split; None without a prepared dataset."""
        return self.tokens / self.dataset_tokens if self.dataset_tokens else None


def _as_trained(model: GPT, config: TrainConfig, precision: str) -> tuple[GPT, AdamW]:
    """The model in its dtype, and its optimizer."""
    model = apply_precision(model, precision)
    return model, build_optimizer(model, config.optim, stochastic_rounding=precision == "bfloat16_stochastic")


def state_bytes(optimizer: AdamW) -> int:
    """Memory of weights, gradients, masters and moments; of the last three every number takes 4 bytes at least."""
    total = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            exact = 1 + int(optimizer.uses_master(p, group)) + len(optimizer.moments(group))
            total += p.numel() * (p.element_size() + max(4, p.element_size()) * exact)
    return total


def _sizes(config: TrainConfig, precision: str) -> tuple[int, int, int]:
    """(parameters, bytes in memory, bytes of a checkpoint); shapes are all that is needed."""
    with torch.device("meta"):
        model, optimizer = _as_trained(GPT(config.model), config, precision)
    return model.num_parameters(), state_bytes(optimizer), checkpoint_bytes(model, optimizer)


def activation_bytes(model: ModelConfig, tokens: int, precision: str) -> int:
    """What the backward needs of `tokens` tokens: per block the inputs of its norms, projections, rotation,
    attention and nonlinearity, and once the embedding and the final norm. The loss works in chunks of its own."""
    c = model.resolved()
    heads = (c.n_head + 2 * c.n_kv_head) * c.head_dim
    ffn = c.ffn_width * (4 if c.activation == "swiglu" else 2)  # gate, up, silu(gate), product; or up, product
    per_token = c.n_layer * (6 * c.n_embd + 2 * heads + c.n_head * c.head_dim + ffn) + 3 * c.n_embd
    return per_token * tokens * (2 if precision.startswith("bfloat16") else 4)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _flops_per_second(device: torch.device, precision: str, size: int = 1024) -> float:
    """The rate of one large matrix multiplication, the quickest of a few."""
    dtype = torch.bfloat16 if precision.startswith("bfloat16") else torch.float32
    a = torch.randn(size, size, device=device).to(dtype)
    best = math.inf
    for _ in range(4):
        began = time.perf_counter()
        a @ a
        _synchronise(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _time_steps(config: TrainConfig, device: torch.device, precision: str, repeats: int = 1) -> tuple[float, float]:
    """Seconds of one micro-batch (forward and backward) and of one optimizer update: the quickest after a warm-up."""
    draw = torch.Generator().manual_seed(0)
    model, optimizer = _as_trained(GPT(config.model, draw).to(device), config, precision)
    shape = (config.micro_batch_size, config.model.block_size)
    idx: Tensor = torch.randint(config.model.vocab_size, shape, generator=draw).to(device)
    forward_backward = update = math.inf
    for turn in range(repeats + 1):
        _synchronise(device)
        began = time.perf_counter()
        model(idx, idx).backward()
        _synchronise(device)
        middle = time.perf_counter()
        optimizer.step()
        _synchronise(device)
        ended = time.perf_counter()
        optimizer.zero_grad()
        if turn:
            forward_backward, update = min(forward_backward, middle - began), min(update, ended - middle)
    return forward_backward, update


def _dataset_tokens(path: str) -> int | None:
    from .data import Dataset

    return Dataset.open(path).split("train").tokens if (Path(path) / "dataset.json").exists() else None


def estimate(config: TrainConfig, resumed: dict[str, Any] | None = None) -> Estimate:
    """Look at a run without starting it: nothing is written. Takes a few seconds where steps can be timed.

    resumed: the state of the checkpoint that it goes on from; then what is left of the run is looked at.

    Raises UserError where the device or the dataset cannot be used.
    """
    device = resolve_device(config.device)
    done = 0
    if resumed is not None:
        done = min(resumed["step"], config.steps)
        if config.precision == "auto":
            config = config.replace(precision=resumed["precision"])
    steps = config.steps - done
    precision = config.precision
    if precision == "auto":  # until it is measured
        precision = "bfloat16" if device.type == "cuda" else "float32"
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else machine.memory()[1]
    parameters, state, checkpoint = _sizes(config, precision)
    block_size = config.model.block_size

    peak = _flops_per_second(device, precision)
    row_seconds = flops_per_token(config.model) * block_size / (peak * ASSUMED_UTILISATION)
    in_time = TIMED_SECONDS / row_seconds
    in_memory = (
        0.8 * (available - state) / activation_bytes(config.model, block_size, precision) if available else math.inf
    )
    rows = int(min(config.micro_batch_size, max(in_time, float(in_time * PATIENCE >= 1)), in_memory))
    micro_batches = steps * config.accumulation
    if rows:
        timed = config.replace(micro_batch_size=rows, batch_tokens=rows * block_size)
        if config.precision == "auto":
            precision, _ = measure_precision(timed, device, repeats=1)
            _, state, checkpoint = _sizes(config, precision)
        micro_batch, update = _time_steps(timed, device, precision)
        seconds = micro_batches * micro_batch * config.micro_batch_size / rows + steps * update
        part = "" if rows == config.micro_batch_size else f", {rows} of their {config.micro_batch_size} rows"
        how = f"measured: micro-batches of random tokens{part}"
    else:
        seconds = micro_batches * config.micro_batch_size * row_seconds
        why = "a step takes too long to be timed" if in_memory >= 1 else "it does not fit into the memory"
        rate = f"{ASSUMED_UTILISATION:.0%} of the {peak / 1e9:,.0f} GFLOP/s that a matrix product reaches here"
        how = f"estimated, since {why}: {rate}"
    return Estimate(
        parameters=parameters,
        precision=precision,
        device=str(device),
        steps=steps,
        tokens=steps * config.batch_tokens,
        dataset_tokens=_dataset_tokens(config.data.path),
        state_bytes=state,
        activation_bytes=activation_bytes(config.model, config.micro_batch_size * block_size, precision),
        available_bytes=available,
        checkpoint_bytes=checkpoint,
        checkpoints=config.checkpoint.keep_last + int(config.checkpoint.keep_best) + 1,
        disk_bytes=machine.disk_free(config.out_dir),
        seconds=seconds,
        timed=rows > 0,
        how=how,
        done=done,
    )


def report(found: Estimate, config: TrainConfig) -> str:
    """`estimate()`'s findings as lines for people."""
    needed = found.state_bytes + found.activation_bytes
    disk = found.checkpoint_bytes * found.checkpoints
    if found.epochs is not None:
        share = f"{found.epochs:,.2f} times the {found.dataset_tokens:,} in {config.data.path}"
    else:
        share = f"no dataset in {config.data.path} yet"
    parts = f"{size(found.state_bytes)} weights, gradients, optimizer; about {size(found.activation_bytes)} activations"
    free = f"; {size(found.available_bytes)} are free" if found.available_bytes else ""
    place = f"{size(found.disk_bytes)} are free at {config.out_dir}"
    assumed = " (assumed: auto measures when the run begins)" if config.precision == "auto" and not found.timed else ""
    each = f"{config.micro_batch_size} x {config.model.block_size} tokens each"
    after = f", after {found.done:,} of {found.done + found.steps:,} that are done" if found.done else ""
    rows = {
        "parameters": f"{found.parameters:,}",
        "precision": f"{found.precision} on {found.device}{assumed}",
        "tokens": f"{found.tokens:,} in {found.steps:,} steps of {config.batch_tokens:,}{after} ({share})",
        "micro-batches": f"{config.accumulation} a step, {each}",
        "memory": f"about {size(needed)} ({parts}){free}",
        "checkpoint": f"{size(found.checkpoint_bytes)}, at most {found.checkpoints} at a time ({size(disk)}); {place}",
        "speed": f"{found.tokens_per_second:,.{0 if found.tokens_per_second >= 10 else 2}f} tokens/s",
        "time": f"{duration(found.seconds)} of training ({found.how})",
    }
    lines = [f"{name:14} {value}" for name, value in rows.items()]
    if found.available_bytes and needed > found.available_bytes:
        lines.append("It does not fit: lower --micro_batch_size (the global batch stays the same) or the model's size.")
    if disk > found.disk_bytes:
        lines.append(
            "The disk is too small for the checkpoints: give another --out_dir or lower --checkpoint.keep_last."
        )
    if found.seconds > LONG_SECONDS:
        tiny = "" if config.model.n_embd <= PRESETS["tiny"]["n_embd"] else "--preset tiny, "
        lines.append(f"It takes longer than a day here: try {tiny}fewer --steps or a smaller --batch_tokens.")
    return "\n".join([*lines, *plan_warnings(config, found.dataset_tokens)])


def plan_warnings(config: TrainConfig, dataset_tokens: int | None) -> list[str]:
    """A line each where the run reads its data very many times, and where the warm-up lasts as long as the run."""
    lines, warm_up = [], config.optim.warmup_steps
    epochs = config.steps * config.batch_tokens / dataset_tokens if dataset_tokens else 0.0
    if epochs > MANY_EPOCHS:
        lines.append(
            f"It reads the {dataset_tokens:,} training tokens {epochs:,.0f} times over, and after some {MANY_EPOCHS} a "
            f"model only learns them by heart: lower --steps or --batch_tokens, or prepare more text."
        )
    if 0 < config.steps <= warm_up:
        lines.append(
            f"The learning rate never reaches its peak: the warm-up takes {warm_up:,} steps, the run {config.steps:,}; "
            f"lower --optim.warmup_steps or raise --steps."
        )
    return lines


def load_warning(device: torch.device, others: float | None) -> list[str]:
    """A line where other programs, which keep `others` cores busy, make the threads of a step wait for each other."""
    if device.type != "cpu" or not machine.crowded(torch.get_num_threads(), others):
        return []
    return [f"{machine.crowd(torch.get_num_threads(), others)}; {machine.CROWD_REMEDY}."]

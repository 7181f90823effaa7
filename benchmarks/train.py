"""How fast fastgpt trains beside plain PyTorch loops: one shape, one run, the loops in turns.

    python benchmarks/train.py [--shape small|demo|gpt2|all] [--compile] [--nanogpt PATH] [--out FILE.json]
    python benchmarks/train.py --profile        where the time of one of fastgpt's steps goes (GEMM: the blocks'
                                                projections; the head's product counts with the loss)
    python benchmarks/train.py --loss-memory    peak memory of the loss, beside all the logits at once

The loops:
    fastgpt    Trainer.fit as `fastgpt train` runs it, in the precision that it chooses by measuring.
    plain      fastgpt/demo/plain_gpt.py, a GPT in eager PyTorch with fused AdamW: in fp32, under bf16 autocast and
               with bf16 parameters; with --compile also the first two compiled.
    nanoGPT    the model.py of a checkout, with its own optimizer: in fp32 and under bf16 autocast, with --compile too.
All have the architecture of the plain loop, so as many parameters, and AdamW with the same settings; --arch llama adds
fastgpt with the demo's architecture. All see the same batches in the same order: ids drawn by Zipf's law.

Each loop is a process of its own (what one tells the allocator, the others do not notice), and only one works at a
time. A turn is a few steps; each round gives every loop a turn, in an order that moves on by one. The first rounds warm
up. A speed is the median over the rounds, a ratio the median of the rounds' ratios: what slows the machine down for a
while slows all of them. On a GPU everything is in bf16, and peak memory is the GPU's. The time to the first step begins
with the loop's process: imports, building and compiling are in it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import math
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import Failed, NoMore, Turns, Worker, machine, memory_of_this_process, show_progress, write_result
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.config import CheckpointConfig, ConfigError, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig
from fastgpt.data import Batches, Dataset, adopt_shards
from fastgpt.demo import settings
from fastgpt.demo.plain_gpt import PlainGPT, PlainLoop
from fastgpt.errors import UserError
from fastgpt.flops import flops_per_token, peak_flops
from fastgpt.precision import resolve_device
from fastgpt.tokenizer import PATTERN, Tokenizer
from fastgpt.train import Callback, Trainer

TOKENS = 1 << 20  # in the dataset, at least
OPTIM = OptimConfig(lr=6e-4, schedule="constant", warmup_steps=0)
PROFILED_STEPS = 3
MODEL_SIZES = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
SIZES = (*MODEL_SIZES, "batch_size")


@dataclass(frozen=True)
class Shape:
    name: str
    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    batch_size: int

    def model(self, arch: str) -> ModelConfig:
        """This shape as a model of ours: `gpt2`, the plain loop's architecture, or `llama`, the demo's."""
        sizes = {name: getattr(self, name) for name in MODEL_SIZES}
        if arch == "gpt2":
            return ModelConfig(activation="gelu", linear_bias=False, **sizes)
        return settings.CPU.train.model.replace(n_kv_head=None, head_dim=None, ffn_width=None, **sizes)


def shapes(device: torch.device) -> dict[str, Shape]:
    demo = (settings.CPU if device.type == "cpu" else settings.GPU).train
    gpt2 = ModelConfig.preset("gpt2", vocab_size=50304)  # padded as everyone pads it

    def of(name: str, model: ModelConfig, batch_size: int) -> Shape:
        return Shape(name, *(getattr(model, size) for size in MODEL_SIZES), batch_size)

    return {
        "small": Shape("small", 8192, block_size=256, n_layer=6, n_head=6, n_embd=384, batch_size=16),
        "demo": of("demo", demo.model, demo.batch_tokens // demo.model.block_size),
        "gpt2": of("gpt2", gpt2, 1),
    }


@dataclass(frozen=True)
class Loop:
    """One contender."""

    program: str
    """fastgpt, plain or nanoGPT."""
    precision: str
    """TrainConfig.precision of fastgpt; float32, autocast or bfloat16 of the others."""
    compiled: bool = False
    arch: str = "gpt2"

    @property
    def name(self) -> str:
        if self.program == "fastgpt":
            return "fastgpt" if self.arch == "gpt2" else f"fastgpt {self.arch}"
        how = {"float32": "fp32", "autocast": "bf16 autocast", "bfloat16": "bf16"}[self.precision]
        return f"{self.program} {how}{' compiled' if self.compiled else ''}"

    @property
    def eager(self) -> bool:
        return self.program != "fastgpt" and not self.compiled


def contenders(device: torch.device, archs: Iterable[str], compiled: bool, nanogpt: bool) -> list[Loop]:
    loops = [Loop("fastgpt", "auto", arch=arch) for arch in archs]
    usual = ["autocast"] if device.type == "cuda" else ["float32", "autocast"]
    for program in ("plain", "nanoGPT") if nanogpt else ("plain",):
        loops += [Loop(program, precision) for precision in usual]
        loops += [Loop(program, "bfloat16")] if program == "plain" else []
        loops += [Loop(program, precision, compiled=True) for precision in usual if compiled]
    return loops


def write_data(folder: Path, shape: Shape) -> None:
    """A prepared folder of ids by Zipf's law, as frequent as words are."""
    size = shape.vocab_size
    if not 257 <= size <= 1 << 16:
        raise UserError(f"--vocab_size {size}: expected 257 to {1 << 16}")
    draw = np.random.default_rng(0)
    weights = 1.0 / np.arange(1, size + 1)
    count = max(TOKENS, 4 * shape.batch_size * shape.block_size)
    ids = draw.choice(size, size=count, p=weights / weights.sum())
    folder.mkdir()
    draw.permutation(size)[ids].astype(np.uint16).tofile(folder / "train.bin")
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {bytes(divmod(i, 256)): i for i in range(256, size - 1)}
    tokenizer = Tokenizer(PATTERN, ranks, {"<|endoftext|>": size - 1}).save(folder / "ids.json")
    adopt_shards(folder, train=["train.bin"], tokenizer=tokenizer, headerless=True)


# ---- in a contender's process ----------------------------------------------------------------------


def train(pipe: Connection, loop: Loop, shape: Shape, device: torch.device, folder: Path, nanogpt: Path | None) -> None:
    """Run the loop, in turns, until nobody asks for more."""
    turns = Turns(pipe, device)
    if loop.program == "fastgpt":
        fit(trainer_config(loop, shape, device, folder), InTurns(turns))
        return
    stepper = plain_loop(loop, shape, device, folder, nanogpt)
    turns.ready(
        precision=loop.precision,
        parameters=sum(p.numel() for p in stepper.model.parameters()),
        threads=torch.get_num_threads(),
    )
    while True:
        turns.step_done(stepper.step())


def trainer_config(loop: Loop, shape: Shape, device: torch.device, folder: Path) -> TrainConfig:
    return TrainConfig(
        model=shape.model(loop.arch),
        data=DataConfig(path=str(folder / "data")),
        optim=OPTIM,
        eval=EvalConfig(every=0),
        checkpoint=CheckpointConfig(every=0),
        out_dir=str(folder / loop.name.replace(" ", "-")),
        steps=10**9,
        batch_tokens=shape.batch_size * shape.block_size,
        micro_batch_size=shape.batch_size,
        precision=loop.precision,
        device=str(device),
    )


def fit(config: TrainConfig, callback: Callback) -> None:
    """Train until the callback raises NoMore."""
    with contextlib.suppress(NoMore):
        Trainer(config, callbacks=[callback]).fit()


class InTurns(Callback):
    def __init__(self, turns: Turns):
        self.turns = turns

    def on_start(self, trainer: Trainer) -> None:
        self.turns.ready(
            precision=trainer.precision,
            measured=trainer.precision_seconds,
            parameters=trainer.model.num_parameters(),
            threads=torch.get_num_threads(),
        )

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self.turns.step_done(metrics["loss"])


class OnOurBatches(PlainLoop):
    """The plain loop on the batches that fastgpt's trainer reads."""

    def __init__(self, model: nn.Module, batches: Batches, autocast: torch.dtype | None):
        nothing = np.empty(0, np.uint16)
        options = dict(lr=OPTIM.lr, weight_decay=OPTIM.weight_decay, beta2=OPTIM.beta2, grad_clip=OPTIM.grad_clip)
        super().__init__(model, nothing, batches.block_size, batches.batch_size, autocast=autocast, **options)
        self.batches, self.first = batches, 0

    def batch(self) -> tuple[Tensor, Tensor]:
        batch = self.batches.batch(self.first)
        self.first += self.batch_size
        return batch.idx.to(self.device), batch.targets.to(self.device)


class LossOnly(nn.Module):
    """nanoGPT's model returns (logits, loss)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        return self.model(idx, targets)[1]


def plain_loop(loop: Loop, shape: Shape, device: torch.device, folder: Path, nanogpt: Path | None) -> PlainLoop:
    torch.manual_seed(1337)
    sizes = {name: getattr(shape, name) for name in MODEL_SIZES}
    theirs = None
    if loop.program == "nanoGPT":
        with contextlib.redirect_stdout(io.StringIO()):
            module = import_file(nanogpt / "model.py")
            theirs = module.GPT(module.GPTConfig(dropout=0.0, bias=False, **sizes)).to(device)
        model = LossOnly(theirs)
    else:
        model = PlainGPT(**sizes).to(device)
    if loop.precision == "bfloat16":
        model.to(torch.bfloat16)
    stream = Dataset.open(folder / "data").split("train")
    batches = Batches(stream, shape.block_size, shape.batch_size, TrainConfig().seed)
    stepper = OnOurBatches(model, batches, torch.bfloat16 if loop.precision == "autocast" else None)
    if hasattr(theirs, "configure_optimizers"):
        with contextlib.redirect_stdout(io.StringIO()):
            stepper.optimizer = theirs.configure_optimizers(
                OPTIM.weight_decay, OPTIM.lr, (OPTIM.beta1, OPTIM.beta2), device.type
            )
    if loop.compiled:
        # Nothing compiled by earlier runs; without a space, for torch puts the name into a command unquoted.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"{loop.name} cache".replace(" ", "-"))
        stepper.model = torch.compile(model)
    return stepper


def import_file(path: Path) -> Any:
    specification = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


# ---- the comparison ----------------------------------------------------------------------------------


def compare(
    loops: list[Loop],
    shape: Shape,
    device: torch.device,
    folder: Path,
    arguments: argparse.Namespace,
    left_out: dict[str, str],
) -> dict[str, dict[str, Any]]:
    """Every loop's facts, and its turns. A compiled loop that fails is left out, and the reason noted in `left_out`;
    any other failure raises Failed."""
    found: dict[str, dict[str, Any]] = {}
    workers: dict[str, Worker] = {}
    with contextlib.ExitStack() as stack:
        for loop in loops:  # one after the other: fastgpt measures the precisions meanwhile
            show_progress(f"{shape.name}: {loop.name} gets ready")
            work = (train, loop, shape, device, folder, arguments.nanogpt)
            began = time.perf_counter()
            workers[loop.name] = stack.enter_context(Worker(loop.name, *work))
            found[loop.name] = {**workers[loop.name].answer(), "turns": []}
            found[loop.name]["ready_seconds"] = time.perf_counter() - began
        rounds = arguments.warm_up + arguments.rounds
        latest: dict[str, str] = {}
        for number in range(rounds):
            shift = number % max(1, len(loops))
            for loop in loops[shift:] + loops[:shift]:
                if loop.name not in found:
                    continue
                speeds = ", ".join(f"{name} {speed}" for name, speed in latest.items())
                show_progress(f"{shape.name}: round {number + 1} of {rounds}, {loop.name}   {speeds}")
                try:
                    turn = workers[loop.name].ask(arguments.steps)
                except Failed as failure:
                    if not loop.compiled:
                        raise
                    leave_out(loop, str(failure).removeprefix(f"{loop.name}: "), left_out)
                    del found[loop.name]
                    continue
                found[loop.name]["turns"].append(turn)
                latest[loop.name] = f"{1e3 * statistics.mean(turn['seconds']):.0f} ms"
    show_progress("")
    return found


def leave_out(loop: Loop, reason: str, left_out: dict[str, str]) -> None:
    show_progress("")
    print(f"left out: {loop.name}: {reason}")
    left_out[loop.name] = reason


def summarise(
    found: dict[str, dict[str, Any]], loops: list[Loop], shape: Shape, warm_up: int, device: torch.device
) -> dict[str, Any]:
    """Adds medians, ratios, MFU, memory and losses to what was found. Returns the names of the loops compared with."""
    times = {
        name: [statistics.mean(turn["seconds"]) for turn in facts["turns"][warm_up:]] for name, facts in found.items()
    }

    def fastest(of: Iterable[Loop]) -> str | None:
        names = [loop.name for loop in of if loop.name in found]
        return min(names, key=lambda name: statistics.median(times[name]), default=None)

    references = {
        "fp32": fastest([Loop("plain", "float32")]),
        "best eager": fastest(loop for loop in loops if loop.eager),
        "best compiled": fastest(loop for loop in loops if loop.compiled),
    }
    peak, archs = peak_flops(device), {loop.name: loop.arch for loop in loops}
    for name, facts in found.items():
        seconds = statistics.median(times[name])
        facts["ms_per_step"] = 1e3 * seconds
        facts["tokens_per_second"] = shape.batch_size * shape.block_size / seconds
        facts["speed_beside"] = {
            label: statistics.median(theirs / own for theirs, own in zip(times[other], times[name], strict=True))
            for label, other in references.items()
            if other is not None
        }
        if peak:
            facts["mfu"] = flops_per_token(shape.model(archs[name])) * facts["tokens_per_second"] / peak
        facts["first_step_seconds"] = facts["turns"][0]["seconds"][0]
        facts["seconds_to_first_step"] = facts["ready_seconds"] + facts["first_step_seconds"]
        facts["peak_mib"] = facts["turns"][-1]["peak_mib"]
        facts["first_loss"] = facts["turns"][0]["losses"][0]
        facts["last_loss"] = facts["turns"][-1]["losses"][-1]
    return references


def print_table(found: dict[str, dict[str, Any]], references: dict[str, Any], shape: Shape) -> None:
    parameters = sorted({facts["parameters"] for facts in found.values()})
    print(
        f"\n{shape.name}: {shape.n_layer} layers, {shape.n_head} heads, width {shape.n_embd}, block "
        f"{shape.block_size}, batch {shape.batch_size}, vocabulary {shape.vocab_size}; "
        f"{' or '.join(f'{count:,}' for count in parameters)} parameters"
    )
    width = max(map(len, found))
    print(
        f"  {'':{width}}  {'precision':>9} {'ms/step':>9} {'tokens/s':>9} {'x fp32':>7} {'x eager':>7} "
        f"{'MFU':>6} {'peak MiB':>9} {'to step 1, s':>12} {'loss':>8}"
    )
    for name, facts in found.items():
        ratios = [facts["speed_beside"].get(label) for label in ("fp32", "best eager")]
        shown = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        peak = "-" if facts["peak_mib"] is None else f"{facts['peak_mib']:.0f}"
        mfu = f"{facts['mfu']:.1%}" if "mfu" in facts else "-"
        print(
            f"  {name:{width}}  {facts['precision']:>9.9} {facts['ms_per_step']:9.1f} "
            f"{facts['tokens_per_second']:9.0f} {shown[0]:>7} {shown[1]:>7} {mfu:>6} {peak:>9} "
            f"{facts['seconds_to_first_step']:12.1f} {facts['last_loss']:8.4f}"
        )
    for name, facts in found.items():
        if name.startswith("fastgpt"):
            ratios = (
                f"{ratio:.3f} times {label if label == 'fp32' else f'the {label} ({references[label]})'}"
                for label, ratio in facts["speed_beside"].items()
            )
            print(f"  {name} is {', '.join(ratios)}")


def losses_in_order(found: dict[str, dict[str, Any]]) -> bool:
    """Whether all losses are finite. Says so where they are not, or lie further apart than they fell."""
    finite = True
    for name, facts in found.items():
        if not all(math.isfinite(loss) for turn in facts["turns"] for loss in turn["losses"]):
            print(f"  {name}: its loss is not finite")
            finite = False
    last = [facts["last_loss"] for facts in found.values()]
    if finite and max(last) - min(last) > max(facts["first_loss"] for facts in found.values()) - max(last):
        print("  the losses lie further apart than they have fallen: too few steps, or one of the loops is wrong")
    return finite


# ---- where a step's time goes --------------------------------------------------------------------------

LABEL = "group: "
GROUPS = {
    "attention": ("attention",),
    "norms": ("layer_norm", "rms_norm"),
    "activation": ("gelu", "swiglu"),
    "rotary, embedding": ("rotary", "embedding"),
    "loss": ("linear_cross_entropy",),
    "optimizer": ("grad_norm", "adamw_"),
}


def label_ops() -> None:
    """Have every call of an op appear in a profile under its group."""

    def labelled(op: Any, group: str) -> Any:
        @functools.wraps(op)
        def call(*arguments: Any, **options: Any) -> Any:
            with torch.profiler.record_function(LABEL + group):
                return op(*arguments, **options)

        return call

    for group, names in GROUPS.items():
        for name in names:
            setattr(ops, name, labelled(getattr(ops, name), group))


def milliseconds_by_group(events: Iterable[Any]) -> Counter[str]:
    """The profiler's events, each by its own time without its children's. A backward counts with its forward."""
    in_backward = "autograd::engine::evaluate_function"
    forwards: dict[int, str] = {}  # by the number that a forward shares with the node of its backward

    def group(event: Any) -> str:
        while event is not None:
            if event.name.startswith(LABEL):
                return event.name.removeprefix(LABEL)
            if event.name.startswith("Optimizer."):
                return "optimizer"
            if event.name == "aten::linear":
                return "GEMM"
            if event.name.startswith(in_backward):
                return forwards.get(event.sequence_nr, "other")
            event = event.cpu_parent
        return "other"

    def of_backward(event: Any) -> bool:
        while event is not None and not event.name.startswith(in_backward):
            event = event.cpu_parent
        return event is not None

    events = sorted(events, key=lambda event: event.time_range.start)
    for event in events:
        if event.sequence_nr >= 0 and not of_backward(event):
            forwards[event.sequence_nr] = group(event)  # of those with one number, the last made the node
    totals: Counter[str] = Counter()
    for event in events:
        totals[group(event)] += event.self_cpu_time_total / 1e3
    return totals


# On a GPU a step is replayed, and all that tells its kernels apart is their names: the first group that fits.
KERNELS = {
    "attention": r"attention|flash|fmha|sdpa",
    "loss": r"cross_entropy",
    "optimizer": r"adamw|grad_norm|multi_tensor",
    "norms": r"norm_",
    "activation": r"gelu|swiglu",
    "rotary, embedding": r"rotary|embedding",
    "GEMM": r"gemm|cutlass|nvjet|xmma|splitk|gemv",
    "other": r"",  # PyTorch's own elementwise kernels, copies
}


def milliseconds_by_kernel(events: Iterable[Any]) -> Counter[str]:
    """What ran on the GPU, by KERNELS; "idle" is the time from the first to the last in which nothing ran."""
    totals: Counter[str] = Counter()
    idle, busy_until = 0.0, None
    for event in sorted(events, key=lambda event: event.time_range.start):
        group = next(group for group, names in KERNELS.items() if re.search(names, event.name.lower()))
        totals[group] += (event.time_range.end - event.time_range.start) / 1e3
        if busy_until is not None:
            idle += max(0.0, event.time_range.start - busy_until) / 1e3
        busy_until = max(busy_until or 0.0, event.time_range.end)
    totals["idle"] = idle
    return totals


def longest_kernels(events: Iterable[Any], how_many: int = 40) -> dict[str, list[float]]:
    """What took longest on the GPU, by name: how often in a step, and the milliseconds of a step."""
    calls: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    for event in events:
        calls[event.name] += 1
        totals[event.name] += (event.time_range.end - event.time_range.start) / 1e3
    return {name: [calls[name] / PROFILED_STEPS, ms / PROFILED_STEPS] for name, ms in totals.most_common(how_many)}


class Profile(Callback):
    """Profiles a few steps after a few others, and says what it found."""

    def __init__(self, pipe: Connection, device: torch.device):
        self.pipe, self.on_gpu = pipe, device.type == "cuda"
        activity = torch.profiler.ProfilerActivity
        self.profiler = torch.profiler.profile(activities=[activity.CUDA if self.on_gpu else activity.CPU])

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        if metrics["step"] == PROFILED_STEPS:
            self.profiler.start()
            self.began = time.perf_counter()
        elif metrics["step"] == 2 * PROFILED_STEPS:
            seconds = time.perf_counter() - self.began
            self.profiler.stop()
            if self.on_gpu:
                of_gpu = torch.autograd.DeviceType.CUDA
                events = [event for event in self.profiler.events() if event.device_type == of_gpu]
                totals, kernels = milliseconds_by_kernel(events), longest_kernels(events)
            else:
                totals, kernels = milliseconds_by_group(self.profiler.events()), {}
                totals["outside torch"] = 1e3 * seconds - totals.total()
            each = {group: total / PROFILED_STEPS for group, total in totals.items()}
            self.pipe.send({"precision": trainer.precision, "milliseconds": each, "kernels": kernels})
            raise NoMore


def profile(pipe: Connection, loop: Loop, shape: Shape, device: torch.device, folder: Path) -> None:
    label_ops()
    fit(trainer_config(loop, shape, device, folder), Profile(pipe, device))


def profile_loops(loops: list[Loop], shape: Shape, device: torch.device, folder: Path) -> dict[str, Any]:
    results = {}
    for loop in (loop for loop in loops if loop.program == "fastgpt"):
        with Worker(loop.name, profile, loop, shape, device, folder) as worker:
            found = results[loop.name] = worker.answer()
        total = sum(found["milliseconds"].values())
        print(f"\n{shape.name}, {loop.name} in {found['precision']}: {total:.1f} ms in a step while profiled")
        for group in ("GEMM", *GROUPS, "other", "idle", "outside torch"):
            if (spent := found["milliseconds"].get(group)) is None:
                continue
            print(f"  {group:18} {spent:9.2f} ms {spent / total:6.1%}")
    return results


# ---- the memory of the loss ------------------------------------------------------------------------------


def loss_memory(pipe: Connection, ours: bool, device: torch.device, tokens: int, width: int, vocab_size: int) -> None:
    """Send the MiB that forward and backward of the loss take at most, over those of their inputs."""

    def run(x: Tensor, weight: Tensor, targets: Tensor) -> None:
        if ours:
            loss = ops.linear_cross_entropy(x, weight, targets)
        else:
            loss = F.cross_entropy((x @ weight.T).float(), targets)
        loss.backward()

    def inputs(tokens: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(tokens, width, device=device).requires_grad_()
        weight = torch.randn(vocab_size, width, device=device).mul_(width**-0.5).requires_grad_()
        return x, weight, torch.randint(vocab_size, (tokens,), device=device)

    run(*inputs(16, 16))  # libraries are loaded and threads started now
    arguments = inputs(tokens, vocab_size)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(*arguments)
        pipe.send((torch.cuda.max_memory_allocated(device) - before) / 2**20)
        return
    before = memory_of_this_process("VmRSS")
    if before is None:
        raise UserError("--loss-memory on a CPU reads /proc/self/status, which only Linux has")
    run(*arguments)
    pipe.send(memory_of_this_process("VmHWM") - before)


def compare_loss_memory(device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    sizes = (arguments.loss_tokens, arguments.n_embd or 768, arguments.vocab_size or 50304)
    peaks = {}
    for name, ours in (("linear_cross_entropy", True), ("F.cross_entropy of all the logits", False)):
        show_progress(name)
        with Worker(name, loss_memory, ours, device, *sizes) as worker:
            peaks[name] = worker.answer()
    show_progress("")
    ours, theirs = peaks.values()
    print("peak memory of forward and backward over that of x and W, both gradients included, fp32:")
    print(f"  {sizes[0]} tokens, width {sizes[1]}, vocabulary {sizes[2]}")
    for name, peak in peaks.items():
        print(f"  {name:33} {peak:9.1f} MiB")
    print(f"  {'the latter / the former':33} {theirs / ours:9.2f}")
    return {"tokens": sizes[0], "n_embd": sizes[1], "vocab_size": sizes[2], "peak_mib": peaks, "ratio": theirs / ours}


# ---- the command line ------------------------------------------------------------------------------------


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape",
        choices=["small", "demo", "gpt2", "all"],
        default="small",
        help="small: 6 layers of width 384, block 256, batch 16; demo: what `make demo` trains; gpt2: GPT-2 small at "
        "block 1024 and batch 1, which takes some 3 GB for each loop, all at the same time",
    )
    for name in SIZES:
        parser.add_argument(f"--{name}", type=positive, help="instead of the shape's own")
    parser.add_argument("--device", default="auto", help="auto takes a GPU where there is one")
    parser.add_argument("--threads", type=positive, help="of each loop; torch's own choice when not given")
    parser.add_argument("--steps", type=positive, default=4, help="in a turn")
    parser.add_argument("--rounds", type=positive, default=5, help="that count")
    parser.add_argument("--warm_up", type=positive, default=1, help="rounds before those")
    parser.add_argument("--arch", nargs="+", choices=["gpt2", "llama"], default=["gpt2"], help="of fastgpt's model")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--nanogpt", type=Path, metavar="PATH", help="a checkout of nanoGPT, to compare with it too")
    parser.add_argument("--only", nargs="+", metavar="LOOP", help="these alone, named as in the table")
    parser.add_argument("--profile", action="store_true", help="instead, where the time of fastgpt's step goes")
    parser.add_argument("--loss-memory", action="store_true", help="instead, the peak memory of the loss")
    parser.add_argument("--loss-tokens", type=positive, default=4096, help="B * T of --loss-memory")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    return parser.parse_args(argv)


def check_writable(file: Path) -> None:
    """Raises UserError, before the work, where the results could not be written after it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir() or not os.access(file.parent, os.W_OK):
            raise UserError(f"--out {file}: expected a file in a folder that can be written to")
    except OSError as error:
        raise UserError(f"--out {file}: {error.strerror}; give another file") from None


def chosen_shapes(device: torch.device, arguments: argparse.Namespace) -> list[Shape]:
    """Those of --shape, with the sizes that were given. Raises ConfigError for a shape that cannot be."""
    given = {name: getattr(arguments, name) for name in SIZES if getattr(arguments, name) is not None}
    known = shapes(device)
    chosen = [replace(known[name], **given) for name in (known if arguments.shape == "all" else [arguments.shape])]
    for shape in chosen:
        for arch in arguments.arch:
            shape.model(arch)
    return chosen


def chosen_loops(device: torch.device, arguments: argparse.Namespace) -> tuple[list[Loop], dict[str, str]]:
    """All that there are, or those of --only; and the reasons of those that cannot run here. Raises UserError for a
    name that is none of theirs."""
    loops = contenders(device, dict.fromkeys(arguments.arch), arguments.compile, bool(arguments.nanogpt))
    names = [loop.name for loop in loops]
    for name in arguments.only or ():
        if name not in names:
            raise UserError(f"--only {name!r}: no such loop here; there are {', '.join(map(repr, names))}")
    loops = [loop for loop in loops if not arguments.only or loop.name in arguments.only]
    left_out: dict[str, str] = {}
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch.compile takes it
    if not shutil.which(compiler):
        for loop in loops:
            if loop.compiled:
                leave_out(loop, f"there is no C++ compiler {compiler}; install one or set CXX", left_out)
    return [loop for loop in loops if loop.name not in left_out], left_out


def measure(arguments: argparse.Namespace) -> int:
    """Do what the command line says. Returns the exit code: 1 where a loss is not finite."""
    device = resolve_device(arguments.device)
    if arguments.nanogpt and not (arguments.nanogpt / "model.py").is_file():
        raise UserError(f"--nanogpt {arguments.nanogpt}: no model.py there; expected a checkout of nanoGPT")
    if arguments.profile and device.type not in ("cpu", "cuda"):
        raise UserError(f"--profile measures a CPU or a CUDA GPU, not {device}; give --device cpu")
    chosen = [] if arguments.loss_memory else chosen_shapes(device, arguments)
    loops, impossible = chosen_loops(device, arguments)
    if arguments.out:
        check_writable(arguments.out)
    facts = machine(device)
    print(f"{facts['device']}: {facts['cpu']}, {facts['cores']} cores, AMX {'yes' if facts['amx'] else 'no'}")
    asked = {k: v for k, v in vars(arguments).items() if v and k != "out"} | {"nanogpt": bool(arguments.nanogpt)}
    result: dict[str, Any] = {"machine": facts, "arguments": asked}
    in_order = True
    if arguments.loss_memory:
        result["loss_memory"] = compare_loss_memory(device, arguments)
    for shape in chosen:
        with tempfile.TemporaryDirectory() as folder:
            write_data(Path(folder) / "data", shape)
            if arguments.profile:
                found = profile_loops(loops, shape, device, Path(folder))
                result.setdefault("profile", {})[shape.name] = found
                continue
            left_out = dict(impossible)
            found = compare(loops, shape, device, Path(folder), arguments, left_out)
        if not found:
            raise UserError("no loop is left to compare")
        references = summarise(found, loops, shape, arguments.warm_up, device)
        print_table(found, references, shape)
        in_order &= losses_in_order(found)
        result.setdefault("shapes", {})[shape.name] = {
            **vars(shape),
            "compared_with": references,
            "loops": found,
            "left_out": left_out,
        }
    if arguments.out:
        write_result(arguments.out, result)
    return 0 if in_order else 1


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # of the loops' processes
    try:
        return measure(arguments)
    except (UserError, ConfigError, Failed) as error:
        show_progress("")
        print(f"train: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

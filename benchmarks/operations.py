"""What the benchmarks of ops share: times on a GPU beside what else there is, counted bytes on a CPU.

An op's file, bench_<op>.py, lists its cases: for each a shape, the fewest bytes that have to move, and contenders,
each of which makes a function without arguments. On a GPU a case is timed:

    python benchmarks/bench_norm.py [--seconds 120] [--out FILE.json] [--only TEXT]

The copy bandwidth comes first, by the same clock: copies of several sizes, the fastest of which is what 100 % means.
A time is the median over calls between two events on the stream. Before each call a buffer larger than every L2 cache
is read: so no input is in the cache, nothing is left in it that must be written back during the call, and the
processor is far enough ahead that no launch is waited for. Values are normally distributed, for zeros run faster.

On a CPU the kernels run on the emulator and no time is taken: what is shown is counted, bytes and 32-byte sectors
over the fewest possible, and bank conflicts, for few rows of the same shapes.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import torch
from cases import Case as Entry
from torch import Tensor

from fastgpt import native
from fastgpt.errors import UserError

Make = Callable[[str, int], Callable[[], Any]]  # (device, rows) -> what is timed

FLUSH_BYTES = 1 << 30  # 0.3 ms to read on an H100, whose L2 holds 50 MB; longer than it takes to launch any backward
COPY_BYTES = (1 << 26, 1 << 28, 1 << 30)
RUNS = (10, 100)  # of a contender, as many as fit
RUN_SECONDS = 0.1
ROWS = 32768  # 32 sequences of 1,024 tokens
EMULATED_ROWS = 128
OURS = "fastgpt"
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Case:
    """One op in one direction, shape and dtype."""

    op: str
    direction: str
    """forward, backward, or what else an op's file explains."""
    columns: int
    dtype: torch.dtype
    least_bytes: Callable[[int], int]
    """For a number of rows: every input read once, every output written once."""
    contenders: dict[str, Make] = field(repr=False)
    """fastgpt's first."""
    what: str = ""
    """In the place of `columns` in names and tables: a shape with more to it."""
    flops: Callable[[int], int] | None = None
    """Of the matrix products, where these take the time and not the bytes."""

    @property
    def name(self) -> str:
        return f"{self.op} {self.direction} {self.what or self.columns} {NAMES[self.dtype]}"


# ---- contenders ------------------------------------------------------------------------------------------


def normal(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Normally distributed values."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def forward(function: Callable[..., Any], inputs: list[Tensor]) -> Callable[[], Any]:
    """The function without a graph."""

    def call() -> Any:
        with torch.no_grad():
            return function(*inputs)

    return call


def backward(function: Callable[..., Any], inputs: list[Tensor]) -> Callable[[], Any]:
    """The gradients of all inputs, for given gradients of all outputs. The forward is run once, here."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    given = [normal(*y.shape, dtype=y.dtype, device=str(y.device), seed=9 + i) for i, y in enumerate(outputs)]
    return lambda: torch.autograd.grad(outputs, leaves, given, retain_graph=True)


DIRECTIONS = {"forward": forward, "backward": backward}

Functions = dict[str, Callable[[], Callable[..., Any]]]
Inputs = Callable[[str, int], tuple[list[Tensor], list[Tensor]]]


def contenders(functions: Functions, direction: str, inputs: Inputs) -> dict[str, Make]:
    """Each function, made when its turn comes, in a direction on the same inputs.

    inputs: for a device and a number of rows, the tensors that have gradients, and those that have none. A function
    takes the former, then the latter.
    """

    def contender(function: Callable[[], Callable[..., Any]]) -> Make:
        def make(device: str, rows: int) -> Callable[[], Any]:
            leaves, constants = inputs(device, rows)
            made = function()
            return DIRECTIONS[direction](lambda *leaves: made(*leaves, *constants), leaves)

        return make

    return {name: contender(function) for name, function in functions.items()}


def least_of(entries: list[Entry], name: str) -> int:
    """The fewest bytes of one entry among those of an op in one shape (benchmarks/cases)."""
    [entry] = (entry for entry in entries if entry.entry == name)
    return entry.least_bytes


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By torch.compile, for these shapes alone."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def of_liger(function: str) -> Callable[..., Any]:
    """A function of Liger's functional interface. Raises UserError where Liger has none such."""
    try:
        return getattr(importlib.import_module("liger_kernel.transformers.functional"), function)
    except Exception as error:
        raise UserError(f"Liger's {function} is not there: {error}") from None


def missing(contender: str, device: str) -> str:
    """Why a contender cannot take part at all, or nothing."""
    if contender in ("compile", "triton") and device == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if contender == "compile" and not any(map(shutil.which, ("gcc", "cc", "clang"))):
        return "torch.compile needs a C compiler, and there is none"
    if contender == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return ""


# ---- times on a GPU --------------------------------------------------------------------------------------


class Clock:
    """Times calls on the current CUDA device, each with a cold and clean L2 cache."""

    def __init__(self, device: str = "cuda") -> None:
        self.device = device
        self.buffer = torch.zeros(FLUSH_BYTES // 4, device=device)
        self.sum = torch.zeros((), device=device)

    def microseconds(self, call: Callable[[], Any]) -> dict[str, Any]:
        """The median, the quartiles, and of how many calls."""
        for _ in range(3):
            call()
        (first,) = self._times(call, 1)
        low, high = RUNS
        times = self._times(call, max(low, min(high, int(RUN_SECONDS * 1e6 / (first + 500)))))
        quartiles = statistics.quantiles(times, n=4)
        return {"microseconds": statistics.median(times), "quartiles": [quartiles[0], quartiles[2]], "runs": len(times)}

    def _times(self, call: Callable[[], Any], runs: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        torch.cuda.synchronize()
        for begin, end in events:
            torch.sum(self.buffer, dim=0, out=self.sum)
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e3 for begin, end in events]

    def copies(self) -> dict[str, Any]:
        """GB/s that torch's copy reads and writes, by the size of the tensor; the best is the bandwidth."""
        rates = {}
        for size in COPY_BYTES:
            x = normal(size // 4, dtype=torch.float32, device=self.device)
            y = torch.empty_like(x)
            rates[size] = 2 * size / self.microseconds(lambda x=x, y=y: y.copy_(x))["microseconds"] / 1e3
        return {"gb_per_second": max(rates.values()), "by_bytes": rates}


@dataclass
class Report:
    """What is measured so far, in a file that is whole after each row."""

    facts: dict[str, Any]
    out: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    """Ours, with the error."""

    @property
    def result(self) -> dict[str, Any]:
        """All of it."""
        return {**self.facts, "rows": self.rows, "left_out": self.left_out, "failed": self.failed}

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        self.write()

    def leave_out(self, what: str, why: str) -> None:
        self.left_out[what] = why
        self.write()

    def write(self) -> None:
        if self.out:
            harness.write_result(self.out, self.result)


def time_all(cases: list[Case], report: Report, deadline: float, clock: Any, device: str = "cuda") -> None:
    """Ours and eager of every case first, then those that have to be compiled; none is begun after the deadline."""
    names = list(dict.fromkeys(name for case in cases for name in case.contenders))
    quick = [name for name in names if name in (OURS, "eager")]
    for round_ in (quick, *([name] for name in names if name not in quick)):
        for name in round_:
            if why := missing(name, device):
                report.leave_out(name, why)
        present = [name for name in round_ if name not in report.left_out]
        wanted = [(case, name) for case in cases for name in present if name in case.contenders]
        for done, (case, name) in enumerate(wanted):
            if time.monotonic() > deadline:
                report.leave_out(", ".join(present), f"{len(wanted) - done} of {len(wanted)}: out of time")
                break
            _time(case, name, report, clock, device)


def _time(case: Case, name: str, report: Report, clock: Any, device: str) -> None:
    harness.show_progress(f"{case.name}: {name}")
    call = None
    try:
        call = case.contenders[name](device, ROWS)
        found = clock.microseconds(call)
    except torch.OutOfMemoryError:
        report.leave_out(f"{case.name}: {name}", "out of memory")
    except Exception as error:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if name == OURS:
            report.failed[case.name] = why
            report.write()
        else:
            report.leave_out(f"{case.name}: {name}", why)
    else:
        rate = case.least_bytes(ROWS) / found["microseconds"] / 1e3
        bandwidth = report.facts["copy"]["gb_per_second"]
        if case.what:
            found["what"] = case.what
        if case.flops:
            found["tflops_per_second"] = case.flops(ROWS) / found["microseconds"] / 1e6
        report.add(op=case.op, direction=case.direction, rows=ROWS, columns=case.columns, dtype=NAMES[case.dtype],
                   contender=name, least_bytes=case.least_bytes(ROWS), **found, gb_per_second=rate,
                   of_copy=rate / bandwidth)  # fmt: skip
    finally:
        harness.show_progress("")
        del call
        gc.collect()  # a graph keeps its tensors; the next case needs the memory


# ---- counts on a CPU -------------------------------------------------------------------------------------


def count(case: Case) -> dict[str, Any]:
    """What our kernels of a case move in global memory, on the emulator."""
    with native.emulated(profile=True, checked=False):
        call = case.contenders[OURS]("cpu", EMULATED_ROWS)
        native.counters()
        call()
        lines = native.counters()
    moved = [line for line in lines if line["space"] == "global"]
    total = {name: sum(line[name] for line in moved) for name in ("bytes", "sectors", "ideal_sectors")}
    least = case.least_bytes(EMULATED_ROWS)
    return {
        "op": case.op,
        "direction": case.direction,
        "rows": EMULATED_ROWS,
        "columns": case.columns,
        **({"what": case.what} if case.what else {}),
        "dtype": NAMES[case.dtype],
        "least_bytes": least,
        "bytes": total["bytes"],
        "bytes_over_least": total["bytes"] / least,
        "sectors_over_fewest": total["sectors"] / total["ideal_sectors"],
        "bank_conflicts": sum(line.get("bank_conflicts", 0) for line in lines),
    }


# ---- the command -----------------------------------------------------------------------------------------


def main(cases: list[Case], about: str, argv: list[str] | None = None, kernels: bool = True) -> int:
    """What a bench_<op>.py does with its cases. Without kernels of ours in them there is nothing to count on a CPU."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--seconds", type=float, default=150.0, help="nothing is begun after these")
    parser.add_argument("--only", nargs="+", metavar="WORDS", help="cases with one of these in their names")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    arguments = parser.parse_args(argv)
    deadline = time.monotonic() + arguments.seconds
    if arguments.only:
        cases = [case for case in cases if any(words in case.name for words in arguments.only)]
        if not cases:
            print("benchmark: error: no case has such a name", file=sys.stderr)
            return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not kernels:
        print("without a GPU there is nothing to show: no kernels of ours take part in it")
        return 0
    facts = {"machine": harness.machine(device)}
    try:
        if device == "cuda":
            unserved = {case.op for case in cases} - native.cuda_ops() if kernels else set()
            if kernels:
                native.select(torch.empty(1, device=device), cases[0].op)  # says what is wrong with the kernels
            if unserved:
                raise UserError(f"no CUDA kernels of {', '.join(sorted(unserved))}; `fastgpt doctor` says why")
            clock = Clock()
            report = Report({**facts, "copy": clock.copies()}, arguments.out)
            report.write()
            time_all(cases, report, deadline, clock)
            lines = harness.time_table(report.result)
        else:
            report = Report({**facts, "emulated": True}, arguments.out)
            for case in cases:
                if time.monotonic() > deadline:
                    report.leave_out(case.name, "out of time")
                    continue
                report.add(**count(case))
            lines = harness.count_table(report.result)
    except UserError as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 1 if report.failed else 0

"""What benchmarks share: the machine in words, a process for each contender, and how long its steps take.

Imported before fastgpt, which is then that of this repository, installed or not. Without torch until it is needed: the
memory of processes that do without it is measured too.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastgpt.errors import UserError
from fastgpt.files import write_atomically
from fastgpt.machine import cores, cpu_features, cpu_name

if TYPE_CHECKING:
    import torch

SPAWN = multiprocessing.get_context("spawn")  # nothing of this process is in the memory of the others
LAST_WORDS_SECONDS = 2.0


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Where and with what a result was measured."""
    import torch

    device = torch.device(device)
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = ""
    features = cpu_features()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu_name(),
        "cores": cores(),
        "cpu_features": features,
        "amx": "amx_bf16" in features,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit or os.environ.get("FASTGPT_COMMIT"),  # of a copy without its history
        **({"gpu": gpu(device)} if device.type == "cuda" else {}),
    }


GPU_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit",
              "temperature.gpu")  # fmt: skip


def gpu(device: torch.device) -> dict[str, Any]:
    """What is to be known of a GPU beside its name: what torch says, and nvidia-smi where it is there."""
    import torch

    about = torch.cuda.get_device_properties(device)
    facts = {
        "compute_capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "memory_bytes": about.total_memory,
        "l2_bytes": getattr(about, "L2_cache_size", None),
        "cuda": torch.version.cuda,
    }
    packages = {"triton": "triton", "liger_kernel": "liger-kernel"}
    for name, package in packages.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(package)
    index = device.index if device.index is not None else torch.cuda.current_device()
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().split(", ")
        if len(said) == len(GPU_FIELDS):
            facts |= dict(zip(GPU_FIELDS, said, strict=True))
    return facts


def write_result(file: Path, result: dict[str, Any]) -> None:
    """As JSON, its folder made where it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(result, indent=1, default=str) + "\n")


def time_table(result: dict[str, Any]) -> Iterator[str]:
    """Of what operations.py timed: a line for each case, a column for each contender."""
    copy = result["copy"]["gb_per_second"]
    yield f"copy bandwidth {copy:,.0f} GB/s; median µs, and the least bytes over the time as a part of it, or TFLOP/s;"
    yield "last how many times as fast as the best of the others the first is"
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        cases.setdefault(_label(row), {})[row["contender"]] = row
    names = list(dict.fromkeys(row["contender"] for row in result["rows"]))
    width = max(40, *(len(label) + 2 for label in cases), 0)
    yield f"{'':{width}}{'MB':>8}" + "".join(f"{name:>17}" for name in names)
    for label, found in cases.items():
        cells = "".join(_cell(found[name]) if name in found else f"{'-':>17}" for name in names)
        others = [found[name]["microseconds"] for name in names[1:] if name in found]
        if others and names[0] in found:
            cells += f"{min(others) / found[names[0]]['microseconds']:>8.2f}"
        yield f"{label:{width}}{next(iter(found.values()))['least_bytes'] / 1e6:>8.0f}{cells}"
    for what, why in result["left_out"].items():
        yield f"left out: {what}: {why}"
    for what, why in result["failed"].items():
        yield f"FAILED: {what}: {why}"


def _label(row: dict[str, Any]) -> str:
    shape = row["what"] if "what" in row else f"{row['rows']} x {row['columns']}"
    return f"{row['op']} {row['direction']} {shape} {row['dtype']}"


def _cell(row: dict[str, Any]) -> str:
    rate = f"{row['tflops_per_second']:>5.0f}T" if "tflops_per_second" in row else f"{row['of_copy']:>5.0%} "
    return f"{row['microseconds']:>10.1f} {rate}"


def count_table(result: dict[str, Any]) -> Iterator[str]:
    """Of what operations.py counted on the emulator."""
    yield "counted on the emulator; these are no times"
    width = max(40, *(len(_label(row)) + 2 for row in result["rows"]), 0)
    yield f"{'':{width}}{'KB':>8}{'bytes/least':>13}{'sectors/fewest':>16}{'bank conflicts':>16}"
    for row in result["rows"]:
        counts = f"{row['bytes_over_least']:>13.3f}{row['sectors_over_fewest']:>16.3f}{row['bank_conflicts']:>16}"
        yield f"{_label(row):{width}}{row['least_bytes'] / 1e3:>8.0f}{counts}"


def memory_of_this_process(field: str) -> float | None:
    """MiB by a field of /proc/self/status: VmRSS now, VmHWM at most so far. None where there is no such file.

    Not by getrusage: on Linux its peak begins with that of the process which started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":")), None)


def show_progress(text: str) -> None:
    """One line of a terminal, over the last one; an empty text clears it. Nothing where stderr is no terminal."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1])
        sys.stderr.flush()


class Failed(Exception):
    """What went wrong in a worker, in one line."""


class NoMore(Exception):
    """Nobody asks this worker for more."""


class Worker:
    """A process that runs `work(pipe, *arguments)`; `work` is a function of a module. Ends with the `with` block.

    It answers through the pipe, and waits in a read of it, so that an idle worker takes no time of a processor.
    """

    def __init__(self, name: str, work: Callable[..., None], *arguments: Any):
        self.name = name
        self.pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=_run, args=(theirs, work, arguments))
        self.process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.pipe.close()
        self.process.join(LAST_WORDS_SECONDS)
        self.process.kill()
        self.process.join()

    def ask(self, question: Any) -> Any:
        """Send the question and wait for the answer. Raises Failed."""
        with contextlib.suppress(OSError):  # it has ended, which its last answer explains
            self.pipe.send(question)
        return self.answer()

    def answer(self) -> Any:
        """Wait for what the worker says next. Raises Failed."""
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            raise Failed(f"{self.name}: its process ended with code {code} (-9: out of memory, perhaps)") from None
        if isinstance(answer, Failed):
            raise Failed(f"{self.name}: {answer}")
        return answer


def _run(pipe: Connection, work: Callable[..., None], arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks ends this one
    try:
        work(pipe, *arguments)
    except (NoMore, EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except Exception as error:
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        pipe.send(Failed((message.splitlines() or [""])[0]))


class Turns:
    """A training loop's end of the pipe. It is asked for a number of steps, and answers how each of them went."""

    def __init__(self, pipe: Connection, device: torch.device):
        import torch

        self.pipe, self.device = pipe, device
        self.cuda = torch.cuda if device.type == "cuda" else None

    def ready(self, **facts: Any) -> None:
        """Say what there is to know of this loop, and wait for the first turn. Raises NoMore."""
        self.pipe.send(facts)
        self._begin()

    def step_done(self, loss: float) -> None:
        """After every step. At the end of a turn, answers and waits for the next one. Raises NoMore."""
        if self.cuda:
            self.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds.append(now - self.before)
        self.losses.append(loss)
        self.before = now
        if len(self.seconds) == self.steps:
            if self.cuda:
                peak = self.cuda.max_memory_allocated(self.device) / 2**20
            else:
                peak = memory_of_this_process("VmHWM")
            self.pipe.send({"seconds": self.seconds, "losses": self.losses, "peak_mib": peak})
            self._begin()

    def _begin(self) -> None:
        try:
            self.steps = self.pipe.recv()
        except (EOFError, OSError):
            raise NoMore from None
        self.seconds, self.losses = [], []
        self.before = time.perf_counter()

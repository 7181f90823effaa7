"""The time that each area of the tests may take. A whole run in which one takes longer fails, and says which.

It is the time that processors spent, in this process and in those it started and waited for, so a busy machine does
not matter much; and a fixed piece of work tells how slow the machine is, so a slow one does not either. Tests marked
slow do not count. To mend an overrun, make the tests of that area quicker.
"""

from __future__ import annotations

import os
import signal
import time
import timeit
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Shapes here are tiny: a second thread would only wait. Before anything imports torch, and for child processes too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

# A shell starts what runs in the background with SIGINT ignored, and so it would be in every process of a test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Area -> (seconds, the files: their names begin so). Twice what was measured, with two processes beside each other.
BUDGETS: dict[str, tuple[float, tuple[str, ...]]] = {
    "norms": (138, ("ops/test_layer_norm", "ops/test_rms_norm", "ops/test_norm_kernels")),
    "activations": (50, ("ops/test_swiglu", "ops/test_gelu", "ops/test_activation_kernels")),
    "losses": (98, ("ops/test_cross_entropy", "ops/test_linear_cross_entropy")),
    "rotary and embedding": (50, ("ops/test_rotary", "ops/test_embedding")),
    "optimizer": (44, ("ops/test_adamw", "ops/test_grad_norm")),
    "attention": (280, ("ops/test_attention",)),
    "ops": (44, ("ops/", "test_rule")),
    "static": (58, ("test_static",)),
    "kernel minute": (26, ("test_kernel_minute",)),
    "emulator": (136, ("emulator/", "ptx/")),
    "mutation": (98, ("mutation/",)),
    "native": (62, ("test_native", "test_build", "test_module")),
    "steps": (52, ("test_kernel_steps",)),
    "model": (28, ("test_model", "test_linear", "test_generate", "test_optim")),
    "train": (92, ("test_train", "test_checkpoint")),
    "chaos": (114, ("test_chaos",)),
    "data": (128, ("test_data_",)),
    "tokenizer": (38, ("test_tokenizer",)),
    "demo": (156, ("test_demo", "test_plot")),
    "benchmarks": (100, ("test_benchmarks", "test_gpu", "test_triton_twins")),
    "cli": (72, ("test_cli", "test_config", "test_doctor")),
    "guide": (152, ("test_guide",)),
    "others": (54, ("",)),
}

# What `_fixed_work` takes where the budgets were measured, alone: AMD EPYC, Zen 3, Python 3.11.
FIXED_WORK_SECONDS = 0.017


class Budgets:
    """Adds up the time of each area; at the end of a whole run, holds it to its budget.

    Where pytest-xdist shares the tests out, every worker adds up its own and the process they report to the whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds = dict.fromkeys(BUDGETS, 0.0)
        self.files: set[str] = set()  # with a test that was collected, or left out for being slow
        self.collected = self.done = 0
        self.deselected = False
        self.whole = False
        self.slowness = 1.0

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        before = processor_seconds()
        yield
        self.done += 1
        if not _slow(item):
            self.seconds[area(self._file(item))] += processor_seconds() - before

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        if not hasattr(session.config, "workeroutput"):
            self.slowness = slowness()

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.files |= set(map(self._file, items))
        self.deselected |= not all(map(_slow, items))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.files |= set(map(self._file, session.items))
        self.collected = len(session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        said = getattr(node, "workeroutput", {}).get("budgets")
        if said is None:  # it died: pytest says so
            return
        self.files |= set(said["files"])
        self.collected = said["collected"]  # every worker collects all tests
        self.done += said["done"]
        self.deselected |= said["deselected"]
        for name, seconds in said["seconds"].items():
            self.seconds[name] += seconds

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            names = ("seconds", "collected", "done", "deselected")
            said = {name: getattr(self, name) for name in names}
            session.config.workeroutput["budgets"] = {**said, "files": sorted(self.files)}
            return
        every = {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("test_*.py")}
        self.whole = self.files == every and not self.deselected and self.done == self.collected
        if self.whole:
            self.slowness = max(1.0, self.slowness, slowness())  # it may have been slow for a part of the time
        if self.whole and self.overrun() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def overrun(self) -> list[str]:
        return [name for name, (budget, _) in BUDGETS.items() if self.seconds[name] > budget * self.slowness]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.whole:
            return
        used = (f"{name} {self.seconds[name]:.0f}/{b * self.slowness:.0f}" for name, (b, _) in BUDGETS.items())
        terminalreporter.write_line(
            f"processor seconds of budget, on a machine {self.slowness:.1f} times as slow as theirs: {', '.join(used)}"
        )
        for name in self.overrun():
            terminalreporter.write_line(f"FAILED: the tests of {name} overran their budget", red=True)

    def _file(self, item: pytest.Item) -> str:
        return item.path.relative_to(self.folder).as_posix()


def area(file: str) -> str:
    """The area of a test file, named from the tests' folder on."""
    return next(name for name, (_, begins) in BUDGETS.items() if file.startswith(begins))


def processor_seconds() -> float:
    """Time that processors spent for this process and the children it waited for."""
    return sum(os.times()[:4])


def slowness() -> float:
    """How many times as long as where the budgets were measured a fixed piece of work takes on this machine."""
    best = min(timeit.repeat(_fixed_work, number=1, repeat=5, timer=time.process_time))
    return best / FIXED_WORK_SECONDS


def _fixed_work() -> None:
    found: dict[int, str] = {}
    for i in range(100_000):
        found[i * 7919 % 10_007] = str(i)


def _slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Budgets(Path(__file__).parent), "budgets")

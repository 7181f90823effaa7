"""Running an op's kernels in its tests: on the emulator, which every machine with a compiler has, and on a GPU.

A test module with a fixture `device` made of `WHERE` and `at` runs all its tests on the reference and on the kernels.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import native
from fastgpt.native import loading
from tests.native_cases import built
from tests.rule import DEVICES

EMULATED = "emulated"
WHERE = (*DEVICES, EMULATED)
CSRC = Path(__file__).resolve().parents[2] / "csrc"


@contextlib.contextmanager
def at(where: str, **options: Any) -> Iterator[str]:
    """The device for tensors; with `emulated`, what is computed on it runs on the emulated kernels.

    options: those of `native.emulated`.
    """
    if where != EMULATED:
        yield where
        return
    built(EMULATED)
    with native.emulated(**options):
        yield "cpu"


def last_path(kind: str = EMULATED) -> tuple[str, str]:
    """The path that the last call of a library took, on this thread, and why."""
    said = loading.library(kind).json("fastgpt_last_path")
    return said["path"], said["reason"]


class Spy(TorchDispatchMode):
    """The names of everything that torch computes inside, in order: "fastgpt_emulated::rms_norm_forward"."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.name().split(".")[0])
        return function(*args, **(kwargs or {}))

    @property
    def kernels(self) -> list[str]:
        return [name.split("::")[1] for name in self.names if name.startswith("fastgpt")]


@contextlib.contextmanager
def no_reference(*pages: ModuleType) -> Iterator[None]:
    """The references of these pages of `fastgpt.ops` cannot be called inside."""

    def called(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the reference was called")

    with pytest.MonkeyPatch.context() as patch:
        for page in pages:
            patch.setattr(page, "reference", called)
            patch.setattr(page, "_normalise", called, raising=False)
        yield


@contextlib.contextmanager
def counted() -> Iterator[dict[str, dict[str, int]]]:
    """Counts, by kernel, what is read and written in global memory inside: bytes, sectors, and the fewest sectors that
    would do; and bank conflicts. Filled at the end."""
    totals: dict[str, dict[str, int]] = {}
    with native.emulated(profile=True, checked=False):
        native.counters()
        yield totals
        for line in native.counters():
            total = totals.setdefault(
                line["kernel"], dict.fromkeys(("bytes", "sectors", "ideal_sectors", "conflicts"), 0)
            )
            if line["space"] == "global":
                for name in ("bytes", "sectors", "ideal_sectors"):
                    total[name] += line[name]
            total["conflicts"] += line.get("bank_conflicts", 0)


def total(counts: dict[str, dict[str, int]], what: str) -> int:
    """Of all kernels that `counted` counted."""
    return sum(kernel[what] for kernel in counts.values())


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Bitwise, NaN included."""
    return len(a) == len(b) and all(
        (x.dtype, x.shape) == (y.dtype, y.shape) and torch.equal(_bytes(x), _bytes(y))
        for x, y in zip(a, b, strict=True)
    )


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


# ---- on a GPU --------------------------------------------------------------------------------------------


def needs_memory(gigabytes: float) -> None:
    """Skips the test where less of the GPU's memory is free."""
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes:.0f} GB of the GPU's memory, {free / 1e9:.0f} are free")


def captured(step: Callable[[], list[torch.Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """A graph of what `step` computes, after three runs of it, and what it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = step()
    return graph, written


def by_inductor(function: Callable, arguments: list[torch.Tensor]) -> Callable:
    """The function, compiled for such arguments; skips the test where Triton or its C compiler is missing."""
    pytest.importorskip("triton")
    torch._dynamo.reset()
    compiled: Callable = torch.compile(function, fullgraph=True)
    try:
        compiled(*arguments)
    except Exception as error:
        if "compiler" in str(error).lower() and "not find" in str(error).lower():
            pytest.skip("triton needs a C compiler, and there is none")
        raise
    return compiled


# ---- what compilers made of the kernels ------------------------------------------------------------------


def instantiations(pattern: str) -> set[str]:
    """The kernels whose names are like this, one for each set of template arguments."""
    symbols = subprocess.run(
        ["nm", "-C", "--defined-only", built(EMULATED)], capture_output=True, text=True, check=True
    )
    return set(re.findall(rf"({pattern}<.*>)\(.*\)$", symbols.stdout, re.M))

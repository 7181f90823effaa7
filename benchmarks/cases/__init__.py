"""What each op's kernels are measured on: calls of its entries, and the least that each has to move.

One module for each family of ops, named as its folder in csrc, with a function `cases()`. benchmarks/static.py counts
them on the emulator and holds every kernel to be reached by one of them; a benchmark on a GPU times the same calls in
its own shapes.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call of an entry."""

    entry: str
    """As in SCHEMAS of the op's page: layer_norm_forward."""
    what: str
    """Shape, dtype and what else tells it from the other cases of the entry, in words."""
    path: str
    """The kernel path that it must take."""
    arguments: Callable[[str], tuple[Any, ...]]
    """The entry's arguments on a device."""
    least_bytes: int
    """What has to be read and written: every tensor once."""
    most: float | None = None
    """Bytes over `least_bytes` that are held whatever the baseline says. None: too small for the ratio to matter."""
    most_sectors: float | None = None
    """Likewise 32-byte sectors over the fewest that could hold those bytes."""
    least_flops: int = 0
    """Of matrix products."""
    chip: str = "sm_90a"

    @property
    def name(self) -> str:
        """What it is called in tables and in the baseline."""
        return f"{self.entry} {self.what}" + ("" if self.chip == "sm_90a" else f" ({self.chip})")


def every_case() -> list[Case]:
    """Those of all modules here, in a fixed order."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [case for name in modules for case in importlib.import_module(f"{__name__}.{name}").cases()]


def normal(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Normal values: zeros and constants would flatter a GPU's clocks."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


SHORT = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

"""Declares the entries of the compiled ops to torch: their schemas, and what they return for tensors without data.

Every entry exists in two namespaces: `fastgpt`, which the CUDA kernels implement, and `fastgpt_emulated`, which the
same kernels implement on CPU tensors, run by the emulator. C++ only registers implementations, so an entry is known
(to torch.compile, to fake tensors) whether or not a library is built.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NAMESPACES = ("fastgpt", "fastgpt_emulated")

_libraries = {namespace: torch.library.Library(namespace, "FRAGMENT") for namespace in NAMESPACES}


def register(schemas: dict[str, str], fakes: dict[str, Callable]) -> None:
    """Declare the entries of one op's page. An entry's fake takes its arguments and returns empty tensors."""
    for namespace, library in _libraries.items():
        for name, schema in schemas.items():
            library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"{namespace}::{name}", fakes[name], lib=library)


def contiguous_like(x: Tensor) -> Tensor:
    """For fakes: a new tensor of x's shape and dtype."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def nothing_like(x: Tensor) -> Tensor:
    """For fakes: what an entry returns in the place of an output that was not asked for."""
    return x.new_empty(0)

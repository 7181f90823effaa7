"""Which implementation serves an op here, and why.

Ops ask `select`; the doctor asks `status`. Nothing falls back silently: tensors on a CUDA device that meet no
kernels are worth one warning on stderr, and an error where FASTGPT_REQUIRE_KERNELS=1 is set.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# Every op of `fastgpt.ops`, in the order in which the doctor prints them.
OPS = (
    "swiglu",
    "gelu",
    "layer_norm",
    "rms_norm",
    "attention",
    "rotary",
    "cross_entropy",
    "linear_cross_entropy",
    "embedding",
    "adamw_",
    "grad_norm",
)

_REMEDY = "unset FASTGPT_REQUIRE_KERNELS to train on the reference"
_warned = False


class KernelsMissing(UserError, RuntimeError):
    """FASTGPT_REQUIRE_KERNELS=1 is set where there are none."""


def kernels_required() -> bool:
    """Whether FASTGPT_REQUIRE_KERNELS=1 asks for an error in place of the reference on a CUDA device."""
    return os.environ.get("FASTGPT_REQUIRE_KERNELS") == "1"


def select(x: Tensor) -> None:
    """The ops that serve tensors on the device of `x`; None for the reference, which is all there is so far.

    Raises KernelsMissing for a tensor on a CUDA device where kernels are required (see `kernels_required`);
    where they are not, says once on stderr that the reference is used there.
    """
    if x.is_cuda:
        _without_kernels()
    return None


def status() -> list[dict[str, str]]:
    """What serves each op of `OPS` on this machine's default device: {"op", "implementation", "reason"}."""
    import torch

    if torch.cuda.is_available():
        reason = "no CUDA kernels are built; PyTorch's own kernels run on the GPU"
    else:
        reason = "no CUDA device is visible; the reference is the path on a CPU"
    return [{"op": op, "implementation": "reference", "reason": reason} for op in OPS]


def _without_kernels() -> None:
    global _warned
    if kernels_required():
        raise KernelsMissing(f"FASTGPT_REQUIRE_KERNELS=1 is set, but fastgpt has no CUDA kernels built; {_REMEDY}")
    if not _warned:
        _warned = True
        print("fastgpt: no CUDA kernels are built; the PyTorch reference runs on the GPU", file=sys.stderr)

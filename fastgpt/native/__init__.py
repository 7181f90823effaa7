"""Which implementation serves an op here, and why.

Ops ask `select`; the doctor asks `status`; `emulated()` runs the kernels on CPU tensors, under the emulator's checks.
Nothing falls back silently: tensors on a CUDA device that meet no kernels are worth one warning on stderr, and an
error where FASTGPT_REQUIRE_KERNELS=1 is set. Inside `emulated()` a missing kernel is always an error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from . import loading

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Every op of `fastgpt.ops`, named as its page there, in the order in which the doctor prints them.
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
    "adamw",
    "grad_norm",
)

_REMEDY = "unset FASTGPT_REQUIRE_KERNELS to train on the reference"
_cuda_ops: frozenset[str] | None = None  # those that CUDA kernels serve here; None until the first look
_emulation: _Emulation | None = None
_devices_checked = False
_warned = False


class KernelsMissing(UserError, RuntimeError):
    """Kernels are required, by FASTGPT_REQUIRE_KERNELS=1 or inside `emulated()`, and there are none."""


def kernels_required() -> bool:
    """Whether FASTGPT_REQUIRE_KERNELS=1 asks for an error in place of the reference on a CUDA device."""
    return os.environ.get("FASTGPT_REQUIRE_KERNELS") == "1"


# ---- which implementation ----------------------------------------------------------------------------


def select(x: Tensor, op: str = "") -> Any:
    """The ops that serve `op`, named as its page in `fastgpt/ops`, for tensors on the device of `x`.

    torch.ops.fastgpt on a CUDA device with kernels, torch.ops.fastgpt_emulated for CPU tensors inside `emulated()`,
    None for the reference. Raises KernelsMissing where kernels are required and missing; where they are not required,
    says once on stderr that the reference runs on a CUDA device.
    """
    if x.is_cuda:
        import torch

        if not (_devices_checked or torch.compiler.is_compiling()):
            _check_devices()
        if op in cuda_ops():
            return torch.ops.fastgpt
        _without_kernels(op)
    elif _emulation is not None and x.device.type == "cpu":
        if op in _emulation.ops:
            import torch

            return torch.ops.fastgpt_emulated
        if _emulation.strict:
            raise KernelsMissing(
                f"{op or 'an op'} has no kernel for the emulator, which has: {', '.join(sorted(_emulation.ops))}; "
                "emulated(only=...) leaves other ops to the reference"
            )
    return None


def require(device: torch.device, ops: Iterable[str]) -> None:
    """Raises KernelsMissing where kernels are required and one of these ops has none for `device`: what `select` would
    say in the midst of the work."""
    if device.type != "cuda" or not kernels_required():
        return
    _check_devices()
    for op in ops:
        if op not in cuda_ops():
            _without_kernels(op)


def serves(device: torch.device, ops: Iterable[str]) -> bool:
    """Whether there are kernels of all these ops for `device`, which is a CUDA device that can run them."""
    if device.type != "cuda":
        return False
    _check_devices()
    return cuda_ops().issuperset(ops)


def cuda_ops() -> frozenset[str]:
    """The ops that have CUDA kernels here. The first call loads them; `fastgpt.ops` makes it."""
    global _cuda_ops
    if _cuda_ops is None:
        _cuda_ops = loading.library("cuda").ops
    return _cuda_ops


def _check_devices() -> None:
    """Leaves the kernels aside where they are built for other GPUs. Waits for the first CUDA tensor: it wakes CUDA."""
    global _cuda_ops, _devices_checked
    import torch

    _devices_checked = True
    if cuda_ops() and torch.cuda.is_available():
        capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
        _cuda_ops = loading.keep_for_devices(capabilities).ops


def status() -> list[dict[str, str]]:
    """What serves each op of `OPS` on this machine's default device: {"op", "implementation", "reason"}."""
    import torch

    _check_devices()
    library = loading.library("cuda")
    rows = []
    for op in OPS:
        implementation = "reference"
        if not torch.cuda.is_available():
            reason = "no CUDA device is visible; the reference is the path on a CPU"
        elif isinstance(library, loading.Refused):
            reason = f"{library}; PyTorch's own kernels run on the GPU"
        elif op in library.ops:
            implementation, reason = "CUDA kernels", f"built for {', '.join(library.info['archs'])}"
        else:
            reason = "it has no CUDA kernel yet; PyTorch's own kernels run on the GPU"
        rows.append({"op": op, "implementation": implementation, "reason": reason})
    return rows


def libraries() -> list[dict[str, Any]]:
    """The compiled libraries, and `fastgpt._C`: {"library", "state", "reason", "remedy", "built"}.

    state: "loaded", "refused" or, without a file, "not built". built: the build info (archs, archs_from, nvcc,
    compiler, torch_target) of what is loaded, else empty.
    """
    rows: list[dict[str, Any]] = []

    def say(file: str, state: str, reason: str, remedy: str = "", built: dict[str, Any] | None = None) -> None:
        rows.append({"library": file, "state": state, "reason": reason, "remedy": remedy, "built": built or {}})

    for kind, file in loading.FILES.items():
        library = loading.library(kind)
        if isinstance(library, loading.Refused):
            reason, _, remedy = str(library).rpartition("; ")
            if not reason:  # "... is not built: REMEDY"
                reason, _, remedy = remedy.partition(": ")
            say(file, "refused" if (loading.FOLDER / file).exists() else "not built", reason, remedy)
        else:
            ops = ", ".join(sorted(library.ops)) or "none"
            say(file, "loaded", f"kernels of: {ops}", built=library.info)
    if (loading.MODULE_FOLDER / loading.MODULE).exists():
        say(loading.MODULE, "loaded", "fastgpt._C can be imported")
    else:
        why = loading.build_result("python", loading.MODULE_FOLDER).get("reason")
        why = f"{why}; " if why else ""
        say(
            loading.MODULE,
            "not built",
            f"{loading.MODULE} is not built; {why}the kernels do without it",
            loading.remedy(),
        )
    return rows


def _without_kernels(op: str) -> None:
    global _warned
    library = loading.library("cuda")
    if isinstance(library, loading.Refused):
        missing, why = "", f" ({library})"
    else:
        missing, why = ", ".join(name for name in OPS if name not in library.ops), ""
    if kernels_required():
        which = f"for {op} there are" if op else "there are"
        raise KernelsMissing(f"FASTGPT_REQUIRE_KERNELS=1 is set, but {which} no CUDA kernels built; {_REMEDY}{why}")
    if not _warned:
        _warned = True
        which = f" for {missing}" if missing else ""
        print(f"fastgpt: no CUDA kernels are built{which}; the PyTorch reference runs on the GPU{why}", file=sys.stderr)


# ---- the emulator ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Emulation:
    ops: frozenset[str]
    strict: bool
    """An op that is not among `ops` is an error."""
    configuration: str


@dataclass(frozen=True)
class Finding:
    """What the emulator holds against a kernel; docs/emulator.md tells how to read it."""

    kind: str
    kernel: str
    message: str
    thread: tuple[int, int, int] | None
    """None where no single thread is to blame."""
    block: tuple[int, int, int] | None
    file: str
    line: int
    inlined: tuple[str, ...] = ()
    """Through which calls `file:line` got inlined, innermost first."""

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Finding:
        """From the emulator's own form."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()})


@dataclass(frozen=True)
class Site:
    """A synchronisation or a bounds check that a kernel has met.

    `emulated(disabled_site=id)` switches it off, `emulated(altered_site=(id, alteration))` makes it wrong.
    """

    id: int
    kind: str
    file: str
    line: int
    inlined: tuple[str, ...] = ()
    """Through which calls `file:line` got inlined, innermost first. A helper has a site for each such chain."""
    alterations: tuple[str, ...] = ()
    """The ways in which the call can be made wrong: "the other parity", "16 bytes more" ..."""

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Site:
        """From the emulator's own form."""
        names = ("id", "kind", "file", "line")
        lists = ("inlined", "alterations")
        return cls(**{name: entry[name] for name in names}, **{name: tuple(entry[name]) for name in lists})

    @staticmethod
    def all_of(library: loading.Library, met_inside: bool = False) -> list[Site]:
        """Those that kernels of a library have met; `met_inside`: since it was last configured."""
        return [Site.of(site) for site in library.json("fastgpt_emulator_sites") if site["met"] or not met_inside]


@contextmanager
def emulated(
    chip: str = "sm_90a",
    *,
    seed: int = 0,
    checked: bool = True,
    profile: bool = False,
    disabled_site: int | None = None,
    altered_site: tuple[int, str] | None = None,
    only: Iterable[str] | None = None,
) -> Iterator[None]:
    """Inside, ops on CPU tensors run their CUDA kernels under the emulator.

    `chip` chooses among kernels as a GPU of that kind would; another `seed` runs blocks and warps in another order;
    `checked=False` leaves the checks out; `profile` counts bytes, sectors and bank conflicts (see `counters`).
    `disabled_site` or `altered_site`, not both: the call that is left out, or made wrong (see `Site`). An op without a
    kernel is an error, unless `only` names the ops to emulate. Raises UserError where the kernels are not built for the
    emulator.
    """
    global _emulation
    library = _emulated_library()
    unknown = set(only or ()) - library.ops
    if unknown:
        raise UserError(
            f"{', '.join(sorted(unknown))} cannot be emulated: there are kernels of {', '.join(sorted(library.ops))}"
        )
    configuration = {
        "chip": chip,
        "seed": seed,
        "checked": checked,
        "profile": profile,
        "disabled_site": -1 if disabled_site is None else disabled_site,
    }
    if altered_site is not None:
        if disabled_site is not None:
            raise ValueError("disabled_site and altered_site: give one of them")
        configuration |= {"altered_site": altered_site[0], "alteration": altered_site[1]}
    outer = _emulation
    ops = library.ops if only is None else frozenset(only)
    _emulation = _Emulation(ops, only is None, json.dumps(configuration))
    library.configure(_emulation.configuration)
    try:
        yield
    finally:
        _emulation = outer
        if outer is not None:
            library.configure(outer.configuration)


def findings() -> list[Finding]:
    """What the emulator has found since the last call."""
    return [Finding.of(finding) for finding in _emulated_library().json("fastgpt_emulator_findings")]


def counters() -> list[dict[str, Any]]:
    """Bytes, sectors, bank conflicts and MMA FLOPs by kernel and source line; `emulated(profile=True)` counts them."""
    return _emulated_library().json("fastgpt_emulator_counters")


def launches() -> list[dict[str, Any]]:
    """Launches by kernel and shape (threads of a block, dynamic shared memory): how many, and how many blocks in all;
    `emulated(profile=True)` counts them."""
    return _emulated_library().json("fastgpt_emulator_launches")


def sites(*, met_inside: bool = False) -> list[Site]:
    """Every synchronisation and bounds check that kernels have met so far.

    `met_inside`: only those met since the `emulated()` around this call was entered.
    """
    return Site.all_of(_emulated_library(), met_inside)


def _emulated_library() -> loading.Library:
    library = loading.library("emulated")
    if isinstance(library, loading.Refused):
        raise UserError(str(library))
    return library

"""Finds the compiled libraries, refuses those that do not fit, and loads the others, once.

There are two: `_ops.so` with the CUDA kernels, `_ops_emulated.so` with the same kernels compiled for the emulator.
Arguments reach C++ unchecked and a loaded library cannot be unloaded, so everything that can be known from the file
is checked before the system's loader or torch sees it: whether it is whole, for this machine, for the schemas that
the ops have now, for a torch no newer than this one. A refusal is one line with its remedy.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import platform
import re
import struct
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .schemas import read_pages, schema_digest

FOLDER = Path(__file__).resolve().parent
# An op that has no entries of its own, and the one whose entries it is made of: where that has kernels, so has this.
SERVED_BY = {"linear_cross_entropy": "cross_entropy"}

FILES = {"cuda": "_ops.so", "emulated": "_ops_emulated.so"}
NAMESPACES = {"cuda": "fastgpt", "emulated": "fastgpt_emulated"}
DISPATCH_KEYS = {"cuda": "CUDA", "emulated": "CPU"}

MODULE = f"_C{sysconfig.get_config_var('EXT_SUFFIX') or '.so'}"  # for this Python alone; see csrc/python/module.cpp
MODULE_FOLDER = FOLDER.parent

INFO_VERSION = 1
MARKER = b"fastgpt-build-info:"
_ELF_MACHINES = {"x86_64": 62, "aarch64": 183}


class Refused(Exception):
    """A library cannot be used; the message is one line: why, and how to mend it."""

    ops: frozenset[str] = frozenset()  # it serves none, so that it can be asked like a Library


@dataclass(frozen=True)
class Library:
    """A library that is loaded."""

    path: Path
    info: dict[str, Any]
    """What it was built from and for; see docs/building.md."""
    ops: frozenset[str]
    """The ops, by the names of their pages, of which it implements every entry."""
    handle: ctypes.CDLL = field(repr=False)

    def json(self, function: str) -> Any:
        """What an extern "C" function without arguments returns, a JSON text, as Python values."""
        call = getattr(self.handle, function)
        call.restype, call.argtypes = ctypes.c_char_p, ()
        return json.loads(call())

    def configure(self, configuration: str) -> None:
        """Hand the emulator its settings, a JSON text."""
        call = self.handle.fastgpt_emulator_configure
        call.restype, call.argtypes = None, (ctypes.c_char_p,)
        call(configuration.encode())


def remedy(kind: str = "cuda") -> str:
    """How to get a library that fits: in a checkout, or for an installed package, which has the CUDA kernels alone."""
    if (FOLDER.parent.parent / "csrc").is_dir():
        return "build it with `make kernels`"
    return "install fastgpt again from its source" if kind == "cuda" else "`make kernels` builds it, in a checkout"


def build_result(kind: str, folder: Path) -> dict[str, Any]:
    """What the builder wrote beside the library, built or not; empty where it never ran."""
    try:
        return json.loads((folder / result_file(kind)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def result_file(kind: str) -> str:
    """The file in which the builder says what it built, or why not."""
    return f"{file_of(kind).partition('.')[0]}_build_info.json"


def file_of(kind: str) -> str:
    """What the builder makes: a library of FILES, or of the kind "python" the module `fastgpt._C`."""
    return FILES.get(kind, MODULE)


def read_info(path: Path) -> dict[str, Any]:
    """The build info in a library's file, which is not loaded. Raises Refused where the file cannot be one of ours."""
    name = path.name
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            header = file.read(64)
            if header[:4] != b"\x7fELF":
                raise Refused(f"{name} is not a shared library; {remedy()}")
            if len(header) < 64:
                raise Refused(f"{name} is truncated: {size} bytes; {remedy()}")
            machine = platform.machine()
            is_64_bit_little_endian = header[4:6] == b"\x02\x01"
            (for_machine,) = struct.unpack_from("<H", header, 18)
            if not is_64_bit_little_endian or for_machine != _ELF_MACHINES.get(machine):
                raise Refused(f"{name} is built for another kind of machine than this one ({machine}); {remedy()}")
            (sections_at,) = struct.unpack_from("<Q", header, 40)
            section_bytes, sections = struct.unpack_from("<HH", header, 58)
            end = sections_at + section_bytes * sections  # the section headers come last
            if size < end:
                raise Refused(f"{name} is truncated: it should have {end} bytes and has {size}; {remedy()}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                start = content.find(MARKER)
                if start < 0:
                    raise Refused(f"{name} is no library of fastgpt: it has no build info; {remedy()}")
                start += len(MARKER)
                text = content[start : content.find(b"\0", start)]
    except OSError as error:
        raise Refused(f"{name} cannot be read: {error.strerror}; {remedy()}") from None
    try:
        info = json.loads(text)
        info["version"], info["kind"]
    except (ValueError, KeyError, TypeError):
        raise Refused(f"{name} has build info that cannot be read; {remedy()}") from None
    return info


def check_info(name: str, info: dict[str, Any], kind: str, torch_version: str) -> None:
    """Raises Refused where a library with this build info does not fit this package and this torch."""
    if info["version"] != INFO_VERSION:
        raise Refused(f"{name} has build info of version {info['version']}, expected {INFO_VERSION}; {remedy()}")
    if info["kind"] != kind:
        raise Refused(f"{name} holds the {info['kind']} kernels, expected the {kind} ones; {remedy()}")
    expected = schema_digest()
    if info.get("schema_digest") != expected:
        raise Refused(
            f"{name} is stale: it was built for other schemas ({info.get('schema_digest')}) than fastgpt/ops has now "
            f"({expected}); {remedy()}"
        )
    target = str(info.get("torch_target"))
    if _numbers(torch_version) < _numbers(target):
        raise Refused(f"{name} needs torch {target} or newer, and this is torch {torch_version}; upgrade torch")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])


def load(kind: str, folder: Path) -> Library:
    """Load the library of a kind from a folder; raises Refused where there is none that fits."""
    import torch

    path = folder / FILES[kind]
    if not path.exists():
        reason = build_result(kind, folder).get("reason")
        raise Refused(f"{path.name} is not built: {f'{reason}; then ' if reason else ''}{remedy(kind)}")
    info = read_info(path)
    check_info(path.name, info, kind, torch.__version__)
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        raise Refused(f"{path.name} does not load: {str(error).splitlines()[0]}; {remedy()}") from None
    return Library(path, info, _registered_ops(kind), handle)


def _registered_ops(kind: str) -> frozenset[str]:
    """The pages of `fastgpt/ops` of which every entry has an implementation, and the ops that these serve."""
    import torch

    def implemented(entry: str) -> bool:
        name = f"{NAMESPACES[kind]}::{entry}"
        has_kernel_for = torch._C._dispatch_has_kernel_for_dispatch_key  # raises for a name that nothing has used yet
        return torch._C._dispatch_has_kernel(name) and has_kernel_for(name, DISPATCH_KEYS[kind])

    own = {op for op, entries in read_pages().items() if all(map(implemented, entries))}
    return frozenset(own | {op for op, other in SERVED_BY.items() if other in own})


_libraries: dict[str, Library | Refused] = {}


def library(kind: str, folder: Path | None = None) -> Library | Refused:
    """The library of a kind, loaded by the first call, from `folder` if that gives one, or why it is refused."""
    if kind not in _libraries:
        try:
            _libraries[kind] = load(kind, folder or FOLDER)  # looked up now: tests put another in its place
        except Refused as refused:
            _libraries[kind] = refused
    return _libraries[kind]


def keep_for_devices(capabilities: list[tuple[int, int]]) -> Library | Refused:
    """The CUDA library, from now on refused where a device of these compute capabilities cannot run it."""
    found = library("cuda")
    if isinstance(found, Library):
        for capability in capabilities:
            if not any(runs_on(arch, capability) for arch in found.info["archs"]):
                name, archs = ".".join(map(str, capability)), ", ".join(found.info["archs"])
                _libraries["cuda"] = Refused(
                    f"{found.path.name} is built for {archs}, and a GPU here has compute capability {name}; {remedy()}"
                )
    return _libraries["cuda"]


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture, such as 8.0, 8.0+PTX or 9.0a, runs on a device."""
    number, _, ptx = arch.partition("+")
    major, minor = (int(part) for part in re.findall(r"\d+", number)[:2])
    if ptx and capability >= (major, minor):
        return True  # the driver compiles the PTX
    if number[-1] == "a":
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor

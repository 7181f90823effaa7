"""Kernels of your own on a CPU: compiled by g++, run under the emulator's checks, counted. No GPU and no nvcc.

    kernels = emulate.compile(Path("scale.cu"))             # or the source itself, as a str
    counts = kernels.launch("scale", 2, 128, x, y, 2.0, 200)  # scale<<<2, 128>>>(x, y, 2.0f, 200)

The source is plain CUDA: `__global__` functions at file scope, whose parameters are pointers and numbers. It may
include what lies beside it and in `csrc`. docs/emulator.md tells how to read what is found. Needs a checkout, g++ and
CUDA's headers.
"""

from __future__ import annotations

import _ctypes
import contextlib
import ctypes
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import Finding, Site, build, toolchain
from .loading import Library

FOLDER = build.CSRC.parent / "build" / "emulate"
_KEPT = 64  # libraries in FOLDER, of which those that were not used for longest go
_MOST_THREADS = 1024  # of a block
PATIENCE_SECONDS = 2.0  # that a compilation may take before a line says what is being done
_ACCESSES = {"input": 0, "output": 1, "in place": 2}  # emulator::TensorAccess
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_BOUNDS = r"(?:__launch_bounds__\s*\([^()]*\)\s*)?"
_KERNEL = re.compile(rf"(\btemplate\s*<[^;{{]*>\s*)?__global__\s+{_BOUNDS}void\s+{_BOUNDS}(\w+)\s*\(([^)]*)\)")


class KernelFault(RuntimeError):
    """The emulator found something in a launch; the message is its report, `findings` the same as data."""

    def __init__(self, report: str, findings: list[Finding]) -> None:
        super().__init__(report)
        self.findings = findings


@dataclass(frozen=True)
class Counters:
    """What a launch did, by kernel and source line."""

    lines: list[dict[str, Any]]
    """As `native.counters()` gives them."""

    def total(self, what: str, **where: Any) -> int:
        """The sum of a count over the lines of which `where` holds: `total("sectors", access="load")`."""
        lines = (line for line in self.lines if all(line.get(name) == value for name, value in where.items()))
        return sum(line.get(what, 0) for line in lines)


@dataclass(frozen=True)
class Parameter:
    """One of a kernel."""

    name: str
    type: str
    """As numpy and torch call it; a pointer ends in *, and begins with const where nothing is written through it."""


@dataclass(frozen=True)
class Kernels:
    """The kernels of one source, compiled."""

    parameters: dict[str, tuple[Parameter, ...]]
    """Of each kernel."""
    library: Library

    def launch(
        self,
        kernel: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        *arguments: Any,
        shared_bytes: int = 0,
        in_place: Collection[str] = (),
        seed: int = 0,
        chip: str = "sm_90a",
        disabled_site: int | None = None,
    ) -> Counters:
        """Run a kernel on numpy arrays or torch tensors in memory, and say what it did.

        grid, block: blocks, and threads of each, in one to three dimensions. A `const` pointer is an input, which
        nothing may write. Any other is an output, which holds NaN until it is written, unless `in_place` names it.
        seed, chip, disabled_site: as for `native.emulated`. Raises KernelFault for what the emulator finds, ValueError
        for arguments that do not fit the kernel.
        """
        if kernel not in self.parameters:
            raise ValueError(f"there is no kernel {kernel}; there are {', '.join(self.parameters) or 'none'}")
        parameters, handle = self.parameters[kernel], self.library.handle
        if len(arguments) != len(parameters):
            names = ", ".join(parameter.name for parameter in parameters)
            raise ValueError(f"{kernel} takes {len(parameters)} arguments ({names}), not {len(arguments)}")
        unknown = set(in_place) - {parameter.name for parameter in parameters if _is_written(parameter)}
        if unknown:
            raise ValueError(f"{kernel} writes to no {', '.join(sorted(unknown))}, named in in_place")
        shapes = [_three(kernel, name, shape) for name, shape in (("grid", grid), ("block", block))]
        if math.prod(shapes[1]) > _MOST_THREADS:
            raise ValueError(f"{kernel}: a block of {math.prod(shapes[1])} threads; {_MOST_THREADS} are the most")
        values = [_value(kernel, p, a) for p, a in zip(parameters, arguments, strict=True)]  # before any is registered

        settings = {"chip": chip, "seed": seed, "checked": True, "profile": True}
        self.library.configure(json.dumps(settings | {"disabled_site": -1 if disabled_site is None else disabled_site}))
        handle.fastgpt_register_tensor.argtypes = (*[ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t], *_TEXT_AND_INT)
        for parameter, argument in zip(parameters, arguments, strict=True):
            if parameter.type.endswith("*") and argument is not None and argument.nbytes:
                access = "in place" if parameter.name in in_place else "output" if _is_written(parameter) else "input"
                handle.fastgpt_register_tensor(
                    _address(argument), argument.nbytes, argument.itemsize, parameter.name.encode(), _ACCESSES[access]
                )
        report = _call(
            self.library,
            f"fastgpt_launch_{kernel}",
            *((ctypes.c_uint * 3)(*shape) for shape in shapes),
            ctypes.c_size_t(shared_bytes),
            (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values)),
        )
        counted = Counters(self.library.json("fastgpt_emulator_counters"))  # taken, also where something was found
        if report:
            found = self.library.json("fastgpt_emulator_findings")
            raise KernelFault(report, [Finding.of(finding) for finding in found])
        return counted

    def sites(self) -> list[Site]:
        """Every barrier, wait, fence and bounds check that launches have met so far; see `disabled_site`."""
        return Site.all_of(self.library)


_TEXT_AND_INT = (ctypes.c_char_p, ctypes.c_int)
_NUMBERS = {
    "bool": ctypes.c_bool,
    "float32": ctypes.c_float,
    "float64": ctypes.c_double,
    **{f"{u}int{bits}": getattr(ctypes, f"c_{u}int{bits}") for u in ("", "u") for bits in (8, 16, 32, 64)},
}


def _is_written(parameter: Parameter) -> bool:
    return parameter.type.endswith("*") and not parameter.type.startswith("const ")


def _three(kernel: str, name: str, shape: int | Sequence[int]) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        raise ValueError(f"{kernel}: {name} must be one to three numbers of at least 1, got {shape}")
    return (*sizes, 1, 1)[:3]


def _address(array: Any) -> int:
    return array.data_ptr() if hasattr(array, "data_ptr") else array.ctypes.data


def _value(kernel: str, parameter: Parameter, argument: Any) -> Any:
    """An argument as the kernel gets it. Raises ValueError where it does not fit."""
    what = f"{kernel}: {parameter.name}"
    if not parameter.type.endswith("*"):
        number = _NUMBERS[parameter.type]
        if isinstance(argument, float) and number not in (ctypes.c_float, ctypes.c_double):
            raise ValueError(f"{what} is {parameter.type}, got {argument}")
        return number(argument)
    if argument is None:
        return ctypes.c_void_p(None)
    if not hasattr(argument, "data_ptr") and not hasattr(argument, "ctypes"):
        raise ValueError(f"{what} is {parameter.type}: a numpy array, a torch tensor or None, not {argument!r}")
    of_torch = hasattr(argument, "data_ptr")
    dtype = str(argument.dtype).removeprefix("torch.")
    wanted = parameter.type.removeprefix("const ").removesuffix("*")
    if dtype != wanted and wanted != "struct":
        raise ValueError(f"{what} is {parameter.type}, got {dtype}")
    if of_torch and argument.device.type != "cpu":
        raise ValueError(f"{what} is on {argument.device}; the emulator takes tensors on the CPU")
    if not (argument.is_contiguous() if of_torch else argument.flags.c_contiguous):
        raise ValueError(f"{what} is not contiguous")
    if not of_torch and _is_written(parameter) and not argument.flags.writeable:
        raise ValueError(f"{what} is read-only, and {kernel} writes to it")
    return ctypes.c_void_p(_address(argument))


# ---- compiling -----------------------------------------------------------------------------------------


def compile(source: str | Path) -> Kernels:
    """The kernels of a .cu file, or of the text of one; takes about a second, and hardly anything the second time. The
    first of all compiles the emulator too. What lasts is told on stderr, in one line.

    Raises toolchain.Missing where there is no g++ or no CUDA headers, UserError with the compiler's words where it does
    not compile.
    """
    if isinstance(source, Path):
        file, text = source.resolve(), source.read_text(encoding="utf-8")
    else:
        file, text = FOLDER / _digest(source) / "kernel.cu", source
        file.parent.mkdir(parents=True, exist_ok=True)
        build._write(file, text)
    parameters = _parameters(text)
    # The kernels are named after the file, so that its own lines are those of reports.
    exports = "".join(f"FASTGPT_KERNEL({kernel})\n" for kernel in parameters)
    code = f'#include "{file.name}"\n{exports}'
    unit = FOLDER / f"{file.stem}.{_digest(text, code)}.cpp"
    FOLDER.mkdir(parents=True, exist_ok=True)
    build._write(unit, code)
    with _told_if_it_lasts(f"compiling {file.name}, and the emulator where that is not done yet ..."):
        path = build_library([unit], beside=file.parent, options=["-include", str(_precompiled())])
    library = Library(path, {}, frozenset(), ctypes.CDLL(str(path)))
    # A process can hold some dozens: what nobody has any more goes.
    weakref.finalize(library, _ctypes.dlclose, library.handle._handle).atexit = False
    kernels = {}
    for kernel, names in parameters.items():
        types = _call(library, f"fastgpt_parameters_{kernel}").split(", ") if names else []
        kernels[kernel] = tuple(map(Parameter, names, types))
    return Kernels(kernels, library)


@contextlib.contextmanager
def _told_if_it_lasts(text: str) -> Iterator[None]:
    timer = threading.Timer(PATIENCE_SECONDS, print, (f"fastgpt: {text}",), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _call(library: Library, function: str, *arguments: Any) -> str:
    call = getattr(library.handle, function)
    call.restype = ctypes.c_char_p
    return call(*arguments).decode()


def _parameters(text: str) -> dict[str, list[str]]:
    """The names of the parameters of every kernel that is no template."""
    found = {}
    for template, kernel, parameters in _KERNEL.findall(_COMMENT.sub(" ", text)):
        if not template:
            found[kernel] = [re.findall(r"\w+", one)[-1] for one in parameters.split(",") if one.strip()]
    return found


def build_library(sources: Sequence[Path], beside: Path, options: Sequence[str] = ()) -> Path:
    """Compiles sources as the kernels are for the emulator, and links them with it; what is there already stays.

    beside: the folder of the headers that they include, other than those of `csrc`. In reports it is the folder that
    files are named from, unless it lies in the repository. Raises as `compile`.
    """
    command, emulator = _toolchain()
    command = [*command, *options]
    root = build.CSRC.parent
    in_repository = beside.is_relative_to(root) and not beside.is_relative_to(FOLDER)
    named_from = beside.relative_to(root).as_posix() if in_repository else "."
    # The same texts give the same objects, wherever they lie. Of prefixes that fit the last one counts.
    digest_of_all = _digest(*command, named_from, _digest_of_ingredients(beside))
    command += ["-iquote", str(beside), f"-ffile-prefix-map={root}=."]
    if not in_repository:  # ccache may hand the compiler a path from `root` on
        command += [f"-ffile-prefix-map={folder}=." for folder in (os.path.relpath(beside, root), beside)]
    FOLDER.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in sources:
        digest = _digest(digest_of_all, source.name, source.read_text(encoding="utf-8"))
        objects.append(FOLDER / f"{source.stem.split('.')[0]}.{digest}.o")
        if not objects[-1].exists():
            _make(objects[-1], [*command, "-c", str(source)])
    library = FOLDER / f"{objects[0].name.split('.')[0]}.{_digest(*map(str, objects))}.so"
    if not library.exists():
        # The emulator first: of a function that both have, such as one of std::string, it gets its own, without hooks.
        _make(library, [command[0], "-shared", "-Wl,--no-undefined", *map(str, [*emulator, *objects])])
    os.utime(library)
    _prune()
    return library


def _digest_of_ingredients(beside: Path) -> str:
    """Of what a source may include; and of the emulator's own sources, for it is linked with what they compile to."""
    found = [path for name in ("*.h", "*.cuh", "*.cu", "emulator/*.cpp") for path in build.CSRC.rglob(name)]
    found += [path for name in ("*.h", "*.cuh") for path in beside.glob(name)]
    found.append(Path(__file__))  # which says how all that is compiled
    return _digest(*(f"{path.name}\n{path.read_text(encoding='utf-8')}" for path in sorted(found)))


def _precompiled() -> Path:
    """A header to include first: host/export.h, with CUDA's headers already read, which takes longer than a kernel."""
    command, _ = _toolchain()
    folder = FOLDER / f"export.{_digest(*command, _digest_of_ingredients(FOLDER))}"
    header, compiled = folder / "export.h", folder / "export.h.gch"  # g++ looks for the second itself
    if not compiled.exists():
        for old in FOLDER.glob("export.*"):
            shutil.rmtree(old, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        build._write(header, '#include "host/export.h"\n')
        _make(compiled, [*command, f"-ffile-prefix-map={build.CSRC.parent}=.", "-x", "c++-header", "-c", str(header)])
    return header


@cache
def _toolchain() -> tuple[list[str], list[Path]]:
    """The command that compiles a kernel, and the objects of the emulator."""
    if not build.CSRC.is_dir():
        raise UserError("the emulator's sources are not installed; compile kernels in a checkout of fastgpt")
    built = build.build("emulated")  # whose objects of the emulator serve here too
    if built["status"] != "built":
        raise toolchain.Missing(built["reason"])
    gxx = toolchain.find_compiler(toolchain.OLDEST_GXX_FOR_EMULATOR)
    # DWARF 5 numbers files from 0, and addr2line takes the first that is included for the one that includes it.
    command = [str(gxx.path), *build._KERNEL, "-gdwarf-4", *build._EMULATED, f"-I{build.CSRC.name}"]
    command += [f"-DFASTGPT_GXX={toolchain.dotted(gxx.version)}", "-isystem", str(toolchain.find_cuda_headers())]
    names = sorted(source.name for source in (build.CSRC / "emulator").glob("*.cpp"))
    return command, [build.WORK / "emulated" / build.CSRC.name / "emulator" / f"{name}.o" for name in names]


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _make(product: Path, command: list[str]) -> None:
    """Run a compiler; its product is whole as soon as it is there."""
    temporary = product.with_name(f".{product.name}.{os.getpid()}")
    try:
        done = subprocess.run(
            [*command, "-o", str(temporary)], cwd=build.CSRC.parent, capture_output=True, text=True, errors="replace"
        )
        if done.returncode:
            raise UserError(f"{product.name.split('.')[0]} does not compile:\n{done.stderr.strip()}")
        temporary.replace(product)
    finally:
        temporary.unlink(missing_ok=True)


def _prune() -> None:
    """Forgets what was not used for longest. Another process may do so at the same time."""
    for kind in ("*.so", "*.o", "*.cpp", "*/kernel.cu"):
        with contextlib.suppress(FileNotFoundError):
            files = sorted(FOLDER.glob(kind), key=lambda path: path.stat().st_mtime, reverse=True)
            for old in files[_KEPT:]:
                old.unlink()
                if old.parent != FOLDER:
                    old.parent.rmdir()

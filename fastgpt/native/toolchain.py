"""Finds what the kernels are built with: nvcc, g++, ninja, the headers of CUDA and torch; for which GPUs, how wide.

Standard library only; torch is found by its files and never imported, for inside an isolated build it cannot be.
What a product needs and this machine lacks is `Missing`, one line with the remedy. What the user asked for in so many
words and cannot have is a UserError.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from .. import machine
from ..errors import UserError

OLDEST_TORCH = (2, 11)
OLDEST_NVCC = (12, 0)  # the first that compiles for sm_90a
OLDEST_GXX = (11, 0)  # the first whose C++20 is what torch's headers need
OLDEST_GXX_FOR_EMULATOR = (12, 0)  # the first with --param tsan-instrument-func-entry-exit
OLDEST_ARCH = 75
DEFAULT_ARCHS = "8.0+PTX;9.0a"
JOB_BYTES = 1.5 * 2**30  # the most that one compiler may take
MEMORY_SHARE = 0.7
PATIENCE = 60.0  # seconds for a tool to say what it is
USUAL_NVCC = Path("/usr/local/cuda/bin/nvcc")
NVCC_REMEDY = "install the CUDA toolkit or the `.[nvcc]` extra, or set CUDA_HOME, and then install fastgpt once more"
DISASSEMBLER_REMEDY = "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
HEADERS_REMEDY = "pip install 'cuda-toolkit[cudart,cccl,crt]==13.0.*', or install the CUDA toolkit"


class Missing(Exception):
    """A product cannot be built here; the message says what is missing and how to mend it."""


def _output(*command: str | Path) -> str:
    """Standard output and error of a command, or an empty text where it fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr if done.returncode == 0 else ""


def dotted(version: tuple[int, ...]) -> str:
    """(13, 0) -> 13.0"""
    return ".".join(map(str, version))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:3])


def require_platform() -> None:
    """Raises Missing where kernels are not built at all."""
    system, processor = platform.system(), platform.machine()
    if (system, processor) != ("Linux", "x86_64"):
        raise Missing(f"kernels are built on Linux x86_64 only, and this is {system} {processor}")


def package_folders() -> list[Path]:
    """Where packages may be installed. An isolated build hides the environment it is for from sys.path only."""
    names = [*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    names += [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    return [Path(name) for name in dict.fromkeys(names) if name]


# ---- torch, the C++ compiler, ninja --------------------------------------------------------------------


@dataclass(frozen=True)
class Torch:
    """An installed torch: its headers and libraries."""

    folder: Path
    version: tuple[int, ...]


def find_torch() -> Torch:
    """The torch of this environment, seen from inside an isolated build too."""
    for folder in package_folders():
        header = folder / "torch/include/torch/headeronly/version.h"
        if header.is_file():
            numbers = dict(re.findall(r"#define TORCH_VERSION_(MAJOR|MINOR|PATCH) (\d+)", header.read_text("utf-8")))
            torch = Torch(folder / "torch", tuple(int(numbers[part]) for part in ("MAJOR", "MINOR", "PATCH")))
            if torch.version < OLDEST_TORCH:
                break
            return torch
        if (folder / "torch/version.py").is_file():
            break  # one without these headers is older still
    else:
        # uv hides the environment from an isolated build, pip does not
        raise Missing("torch was not found; install torch, then fastgpt again (uv: --no-build-isolation)")
    oldest = dotted(OLDEST_TORCH)
    raise Missing(f"the torch in {folder} is older than {oldest}: pip install --upgrade 'torch>={oldest}'")


@dataclass(frozen=True)
class Compiler:
    """A g++."""

    path: str
    version: tuple[int, ...]


def find_compiler(oldest: tuple[int, ...] = OLDEST_GXX) -> Compiler:
    """$CXX, or g++, or the newest g++-N."""
    named = os.environ.get("CXX")
    names = [named] if named else ["g++", "c++", *(f"g++-{n}" for n in range(20, oldest[0] - 1, -1))]
    seen = []
    for name in names:
        path = shutil.which(name)
        about = _output(path, "--version") if path else ""
        if not about:
            continue
        version = _version(_output(path, "-dumpfullversion", "-dumpversion"))
        if "clang" not in about and version >= oldest:
            return Compiler(path, version)
        seen.append(about.splitlines()[0])
    wanted = f"g++ {oldest[0]} or newer"
    if named:
        raise UserError(f"CXX={named} is {seen[0] if seen else 'no compiler'}; expected {wanted}; unset it to search")
    if seen:
        raise Missing(f"{wanted} is needed, and there is only {seen[0]}; install one (apt install g++-{oldest[0]})")
    raise Missing(f"no {wanted} was found; install one (Debian, Ubuntu: apt install g++)")


def find_ninja() -> str:
    """The ninja of this environment or of the build's own, or one on the PATH."""
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        path = shutil.which("ninja")
    if path is None:
        raise Missing("ninja was not found; pip install ninja")
    return path


# ---- Python ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PythonHeaders:
    """What `fastgpt._C` is compiled with."""

    include: Path
    """The folder of Python.h."""
    pybind11: Path
    """The folder of pybind11/pybind11.h."""
    pybind11_version: str


def find_python_headers() -> PythonHeaders:
    """Python's own headers, and pybind11's, which is found by its files."""
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        version = dotted(sys.version_info[:2])
        raise Missing(f"the headers of Python were not found (Debian, Ubuntu: apt install python{version}-dev)")
    for folder in package_folders():
        header = folder / "pybind11/include/pybind11/detail/common.h"
        if header.is_file():
            numbers = re.findall(
                r"#\s*define PYBIND11_VERSION_(?:MAJOR|MINOR|MICRO|PATCH) (\w+)", header.read_text("utf-8")
            )
            return PythonHeaders(include, folder / "pybind11/include", ".".join(numbers))
    raise Missing("pybind11 was not found; pip install pybind11")


# ---- CUDA -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nvcc:
    """An nvcc and its toolkit."""

    path: Path
    root: Path
    version: tuple[int, ...]

    @property
    def include(self) -> Path:
        """The folder of cuda_runtime.h."""
        return next(folder for folder in self._folders("include") if (folder / "cuda_runtime.h").is_file())

    @property
    def runtime(self) -> Path:
        """The static CUDA runtime."""
        files = (folder / "libcudart_static.a" for folder in self._folders("lib64", "lib"))
        return next(file for file in files if file.is_file())

    def _folders(self, *names: str) -> list[Path]:
        return [base / name for base in (self.root, self.root / "targets/x86_64-linux") for name in names]


def find_nvcc() -> Nvcc:
    """$FASTGPT_NVCC, or that of $CUDA_HOME, the PATH, /usr/local/cuda, or the package index, the first that works."""
    named = os.environ.get("FASTGPT_NVCC")
    if named:
        try:
            return _examine_nvcc(Path(named))
        except Missing as missing:
            raise UserError(f"FASTGPT_NVCC={named} cannot be used: {missing}; unset it to search for one") from None
    homes = [Path(os.environ[name]) / "bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    candidates = [*homes, *([Path(on_path)] if on_path else []), USUAL_NVCC]
    candidates += [folder / "nvidia" / cuda / "bin/nvcc" for folder in package_folders() for cuda in _CUDA_PACKAGES]
    unfit = []
    for path in dict.fromkeys(candidates):
        if path in homes or path.is_file():
            try:
                return _examine_nvcc(path)
            except Missing as missing:
                unfit.append(f"{path}: {missing}")
    raise Missing("; ".join([*unfit, f"no nvcc was found: {NVCC_REMEDY}"]))


_CUDA_PACKAGES = ("cu13", "cu14", "cu12")  # site-packages/nvidia/cu13: the toolkit's parts from the package index


def _examine_nvcc(path: Path) -> Nvcc:
    if not path.is_file():
        raise Missing("there is no such file")
    release = re.search(r"release (\d+)\.(\d+)", _output(path, "--version"))
    # `nvcc` may be a script that calls the real one somewhere else, so the compiler itself is asked for its root.
    top = re.search(r"^#\$ TOP=(.*)$", _output(path, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull), re.M)
    if release is None or top is None:
        raise Missing("it does not run as an nvcc")
    nvcc = Nvcc(path, Path(top[1]).resolve(), (int(release[1]), int(release[2])))
    if nvcc.version < OLDEST_NVCC:
        raise Missing(f"nvcc {dotted(nvcc.version)} is too old, {dotted(OLDEST_NVCC)} is needed")
    try:
        libcudacxx = [nvcc.include / "nv/target", nvcc.include / "cccl/nv/target"]
        complete = nvcc.runtime.is_file() and any(file.is_file() for file in libcudacxx)  # cuda_fp16.h needs the latter
    except StopIteration:
        complete = False
    if not complete:
        raise Missing(f"parts of its toolkit in {nvcc.root} are missing, {NVCC_REMEDY}")
    return nvcc


def find_cuda_headers() -> Path:
    """The folder of cuda_runtime.h: nvcc's, or that from the package index; the emulated kernels need no more."""
    try:
        return find_nvcc().include
    except Missing:
        for folder in package_folders():
            for cuda in _CUDA_PACKAGES:
                include = folder / "nvidia" / cuda / "include"
                if all((include / name).is_file() for name in ("cuda_runtime.h", "crt/host_defines.h")):
                    return include
    raise Missing(f"the CUDA headers were not found; {HEADERS_REMEDY}")


def find_cuobjdump() -> Path:
    """What shows machine code: nvcc's own, or that on the PATH or from the package index; nvdisasm lies beside it."""
    places = [*map(Path, os.get_exec_path())]
    with contextlib.suppress(Missing):  # what another machine has compiled can be read all the same
        places.append(find_nvcc().root / "bin")
    for folder in package_folders():
        places += [
            *(folder / "nvidia" / cuda / "bin" for cuda in _CUDA_PACKAGES),
            folder / "triton/backends/nvidia/bin",
        ]
    for place in places:
        if all((place / tool).is_file() for tool in ("cuobjdump", "nvdisasm")):
            return place / "cuobjdump"
    raise Missing(f"there is no cuobjdump; {DISASSEMBLER_REMEDY}")


@dataclass(frozen=True)
class Arch:
    """A kind of GPU to compile for."""

    number: str
    """As nvcc writes it: 80, 90a."""
    ptx: bool = False
    """Also keep the intermediate code, which drivers compile for newer GPUs."""

    def __str__(self) -> str:
        digits, suffix = re.fullmatch(r"(\d+)([a-z]?)", self.number).groups()  # type: ignore[union-attr]
        return f"{digits[:-1]}.{digits[-1]}{suffix}{'+PTX' if self.ptx else ''}"

    @property
    def base(self) -> str:
        """Its number without the letter: 90a -> 90."""
        return self.number.rstrip("af")

    def flags(self) -> list[str]:
        """nvcc's options; -arch would drop the letter of 90a in one of the two stages."""
        flags = [f"-gencode=arch=compute_{self.number},code=sm_{self.number}"]
        return flags + [f"-gencode=arch=compute_{self.base},code=compute_{self.base}"] * self.ptx


def parse_archs(text: str, source: str) -> list[Arch]:
    """8.0;9.0a+PTX, separated by semicolons, commas or spaces. 9.0 means 9.0a, which is what its GPUs can do."""
    archs = []
    for word in re.split(r"[;,\s]+", text.strip()):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if found is None:
            raise UserError(f"{source} has {word!r}, expected compute capabilities such as {DEFAULT_ARCHS}")
        number = found[1] + found[2]
        archs.append(Arch(number + ("a" if number == "90" else found[3]), found[4] is not None))
    return list(dict.fromkeys(archs))


def choose_archs(nvcc: Nvcc) -> tuple[list[Arch], str]:
    """What to compile for, and who said so: the environment, the GPUs of this machine, or the default."""
    supported = set(re.findall(r"compute_(\d+)", _output(nvcc.path, "--list-gpu-arch")))

    def possible(arch: Arch) -> bool:
        return arch.base in supported and int(arch.base) >= OLDEST_ARCH

    for source in ("FASTGPT_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        if os.environ.get(source):
            archs = parse_archs(os.environ[source], source)
            kept = [arch for arch in archs if possible(arch)]
            # torch's list is often set for everything in a container image: there the old ones are passed over
            if not kept or (source == "FASTGPT_CUDA_ARCHS" and kept != archs):
                unfit = ", ".join(str(arch) for arch in archs if arch not in kept)
                oldest = Arch(str(OLDEST_ARCH))
                raise UserError(
                    f"{source} asks for {unfit}; nvcc {dotted(nvcc.version)} and the kernels reach from {oldest} to "
                    f"{Arch(max(supported, key=int, default=oldest.number))}; name others, or unset it"
                )
            return kept, source
    visible = visible_archs()
    if visible and all(map(possible, visible)):
        return visible, "the GPU here"
    return [arch for arch in parse_archs(DEFAULT_ARCHS, "the default") if possible(arch)], "the default"


def visible_archs() -> list[Arch]:
    """The kinds of the GPUs in this machine, by nvidia-smi; torch is not asked."""
    program = shutil.which("nvidia-smi")
    listed = _output(program, "--query-gpu=compute_cap", "--format=csv,noheader") if program else ""
    numbers = sorted(set(re.findall(r"^\d+\.\d$", listed, re.M)))
    return parse_archs(";".join(numbers), "nvidia-smi") if numbers else []


# ---- how wide -------------------------------------------------------------------------------------------


def jobs() -> int:
    """Compilers to run at a time: $MAX_JOBS, else as many as the cores and 70 % of the free memory allow."""
    asked = os.environ.get("MAX_JOBS")
    if asked:
        if not asked.isdecimal() or int(asked) < 1:
            raise UserError(f"MAX_JOBS={asked}, expected a whole number of at least 1; unset it to let fastgpt choose")
        return int(asked)
    cores, quota = machine.cores(), machine.cpu_quota()
    if quota is not None:
        cores = min(cores, math.ceil(quota))
    _, available = machine.memory()
    by_memory = int(available * MEMORY_SHARE / JOB_BYTES) if available else cores
    return max(1, min(cores, by_memory))

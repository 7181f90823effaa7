"""Builds what runs the functions of csrc/ptx one by one: `python -m tests.ptx.build`, which `make kernels` calls too.

build/ptx/vectors.so, by nvcc, needs a GPU and no more: no torch, no toolkit. What stands for it on the emulator is
built by the tests.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from fastgpt.errors import UserError
from fastgpt.native import build, emulate, toolchain

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WORK = ROOT / "build" / "ptx"
LIBRARY = WORK / "vectors.so"
SOURCE = HERE / "vectors.cu"
KERNELS = HERE.parent / "emulator" / "kernels.cuh"
ARCHS = "8.0+PTX;9.0a"  # nobody else's: every GPU from 8.0 on runs what it has


def digest() -> str:
    """Of the sources that a library of vectors is made of: one that is built from others says nothing about these."""
    files = [*(ROOT / "csrc/ptx").glob("*.cuh"), *(ROOT / "csrc/device").glob("*"), ROOT / "csrc/host/launch.h"]
    sha = hashlib.sha256()
    for path in [*sorted(files), KERNELS, SOURCE]:
        sha.update(path.name.encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()[:16]


def vectors() -> Path:
    """The vectors for a GPU, brought up to date. Raises toolchain.Missing."""
    said = WORK / "vectors.txt"
    if LIBRARY.exists() and said.exists() and said.read_text() == digest():
        return LIBRARY
    nvcc, gxx = toolchain.find_nvcc(), toolchain.find_compiler()
    WORK.mkdir(parents=True, exist_ok=True)
    built = WORK / ".vectors.so"
    flags = [flag for arch in toolchain.parse_archs(ARCHS, "ARCHS") for flag in arch.flags()]
    command = [str(nvcc.path), *build._NVCC, *flags, "-ccbin", gxx.path, "-Icsrc", f"-I{KERNELS.parent}", "-shared"]
    command += [f'-DFASTGPT_VECTORS_DIGEST="{digest()}"', str(SOURCE.relative_to(ROOT)), "-o", str(built)]
    run([*command, "--threads=2"])
    built.replace(LIBRARY)
    said.write_text(digest())
    return LIBRARY


def emulated() -> Path:
    """The same on the emulator. Raises toolchain.Missing."""
    return emulate.build_library([SOURCE], beside=KERNELS.parent)


def run(command: list[str]) -> None:
    """Runs a compiler in the repository. Raises UserError with its words."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{command[0]} failed:\n{done.stderr}")


def main() -> int:
    """Returns 2 where the vectors cannot be built."""
    try:
        print(f"{vectors().relative_to(ROOT)} is built: every function of csrc/ptx, for a GPU")
    except (toolchain.Missing, UserError) as error:
        print(f"build/ptx/vectors.so is not built: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

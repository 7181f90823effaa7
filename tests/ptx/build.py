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
from fastgpt.native import build, toolchain

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WORK = ROOT / "build" / "ptx"
LIBRARY = WORK / "vectors.so"
SOURCE = HERE / "vectors.cu"
ARCHS = "8.0+PTX;9.0a"  # nobody else's: every GPU from 8.0 on runs what it has


def digest() -> str:
    """Of the sources that a library of vectors is made of: one that is built from others says nothing about these."""
    files = [*(ROOT / "csrc/ptx").glob("*.cuh"), *(ROOT / "csrc/device").glob("*"), ROOT / "csrc/host/launch.h"]
    sha = hashlib.sha256()
    for path in sorted([*files, *HERE.glob("*.cu*")]):
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
    run([str(nvcc.path), *build._NVCC, *flags, "-ccbin", gxx.path, "-Icsrc", "-shared", "--threads=2",
         f'-DFASTGPT_VECTORS_DIGEST="{digest()}"', str(SOURCE.relative_to(ROOT)), "-o", str(built)])  # fmt: skip
    built.replace(LIBRARY)
    said.write_text(digest())
    return LIBRARY


def emulated(product: Path, *sources: Path) -> Path:
    """A library of these kernels and the emulator; what is up to date is kept. Raises toolchain.Missing."""
    built = build.build("emulated")  # whose objects of the emulator serve here too
    if built["status"] != "built":
        raise toolchain.Missing(built["reason"])
    gxx = str(toolchain.find_compiler(toolchain.OLDEST_GXX_FOR_EMULATOR).path)
    command = [gxx, *build._KERNEL, "-fno-builtin-memcpy", "-Icsrc", "-DFASTGPT_EMULATED"]
    command += [f"-ffile-prefix-map={ROOT}=.", "-isystem", str(toolchain.find_cuda_headers())]
    product.parent.mkdir(parents=True, exist_ok=True)
    with build._alone_in(product.parent):
        return _emulated(command, gxx, product, sources)


def _emulated(command: list[str], gxx: str, product: Path, sources: tuple[Path, ...]) -> Path:
    headers = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), *HERE.glob("*.cuh")]
    headers += [*(header for source in sources for header in source.parent.glob("*.h")), Path(build.__file__)]
    newest = max(header.stat().st_mtime for header in headers)
    emulator = sorted((ROOT / "csrc" / "emulator").glob("*.cpp"))
    objects = [build.WORK / "emulated" / f"{source.relative_to(ROOT)}.o" for source in emulator]
    for source in sources:
        objects.append(product.parent / f"{source.stem}.o")
        if not _is_newer(objects[-1], max(newest, source.stat().st_mtime)):
            run([*command, "-c", str(source.relative_to(ROOT)), "-o", str(objects[-1])])
    if not _is_newer(product, max(o.stat().st_mtime for o in objects)):
        run([gxx, "-shared", *map(str, objects), "-o", str(product), "-Wl,--no-undefined"])
    return product


def _is_newer(file: Path, time: float) -> bool:
    return file.exists() and file.stat().st_mtime > time


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

"""Builds the mini-kernels and links them with the emulator; what is up to date in build/ is kept."""

from __future__ import annotations

import ctypes
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fastgpt.native import build, toolchain

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WORK = ROOT / "build" / "emulator-tests"


@dataclass
class Emulator:
    library: ctypes.CDLL

    def configure(self, **settings: Any) -> None:
        self.library.fastgpt_emulator_configure(json.dumps(settings).encode())

    def text(self, function: str, *arguments: str | int) -> str:
        call = getattr(self.library, function)
        call.restype = ctypes.c_char_p
        return call(*(a.encode() if isinstance(a, str) else a for a in arguments)).decode()

    def findings(self) -> list[dict[str, Any]]:
        return json.loads(self.text("fastgpt_emulator_findings"))

    def counters(self) -> list[dict[str, Any]]:
        return json.loads(self.text("fastgpt_emulator_counters"))

    def sites(self) -> list[dict[str, Any]]:
        return json.loads(self.text("fastgpt_emulator_sites"))


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    built = build.build("emulated")  # whose objects of the emulator serve here too
    if built["status"] != "built":
        pytest.skip(built["reason"])
    gxx = str(toolchain.find_compiler(toolchain.OLDEST_GXX_FOR_EMULATOR).path)
    command = [gxx, *build._KERNEL, "-fno-builtin-memcpy", "-Icsrc", "-DFASTGPT_EMULATED"]
    command += [f"-ffile-prefix-map={ROOT}=.", "-isystem", str(toolchain.find_cuda_headers())]
    WORK.mkdir(parents=True, exist_ok=True)
    headers = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), HERE / "case.h", Path(build.__file__)]
    newest = max(header.stat().st_mtime for header in headers)
    sources = sorted((ROOT / "csrc" / "emulator").glob("*.cpp"))
    objects = [build.WORK / "emulated" / f"{source.relative_to(ROOT)}.o" for source in sources]
    for source in sorted(HERE.glob("*.cu")):
        objects.append(WORK / f"{source.stem}.o")
        if not _is_newer(objects[-1], max(newest, source.stat().st_mtime)):
            _run([*command, "-c", str(source.relative_to(ROOT)), "-o", str(objects[-1])])
    product = WORK / "emulator_tests.so"
    if not _is_newer(product, max(o.stat().st_mtime for o in objects)):
        _run([gxx, "-shared", *map(str, objects), "-o", str(product), "-Wl,--no-undefined"])
    return ctypes.CDLL(str(product))


def _is_newer(file: Path, time: float) -> bool:
    return file.exists() and file.stat().st_mtime > time


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def emulator(library: ctypes.CDLL) -> Emulator:
    emulator = Emulator(library)
    emulator.configure()
    emulator.findings()
    return emulator

"""Builds the mini-kernels and links them with the emulator; what is up to date in build/ is kept."""

from __future__ import annotations

import ctypes
import json
import re
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
    """The mini-kernels, compiled as the kernels of csrc are, by the rule of their ninja file, and the emulator's own
    objects of that build."""
    built = build.build("emulated")
    if built["status"] != "built":
        pytest.skip(built["reason"])
    plan, _ = build.plan("emulated", build.CSRC, build.WORK / "emulated")
    gxx = toolchain.find_compiler(toolchain.OLDEST_GXX_FOR_EMULATOR).path
    emulators = [source for rule, source in build.sources(build.CSRC, "emulated") if rule == "emulator"]
    objects = [build._path(build.WORK / "emulated" / f"{source}.o") for source in emulators]
    lines = [f"builddir = {build._path(WORK)}", *re.findall(r"^rule kernel\n(?:  .*\n)+", plan, re.MULTILINE)]
    lines += ["rule link", f"  command = {build._shell([gxx, '-shared', '$in', '-o', '$out', '-Wl,--no-undefined'])}"]
    for source in sorted(HERE.glob("*.cu")):
        objects.append(build._path(WORK / f"{source.stem}.o"))
        lines.append(f"build {objects[-1]}: kernel {build._path(source.relative_to(ROOT))}")
    product = WORK / "emulator_tests.so"
    lines.append(f"build {build._path(product)}: link {' '.join(objects)}")
    WORK.mkdir(parents=True, exist_ok=True)
    with build._alone_in(WORK):
        build._write(WORK / "build.ninja", "\n".join([*lines, ""]))
        build._run_ninja(ROOT, WORK, toolchain.jobs(), verbose=False)
    return ctypes.CDLL(str(product))


@pytest.fixture
def emulator(library: ctypes.CDLL) -> Emulator:
    emulator = Emulator(library)
    emulator.configure()
    emulator.findings()
    return emulator

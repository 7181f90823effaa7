"""The mini-kernels, linked with the emulator."""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fastgpt.native import emulate, toolchain

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


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
    try:
        return ctypes.CDLL(str(emulate.build_library(sorted(HERE.glob("*.cu")), beside=HERE)))
    except toolchain.Missing as missing:
        pytest.skip(str(missing))


@pytest.fixture
def emulator(library: ctypes.CDLL) -> Emulator:
    emulator = Emulator(library)
    emulator.configure()
    emulator.findings()
    return emulator

"""Every function of csrc/ptx on a GPU against what the emulator gives for it.

    python -m tests.ptx.vectors             on the GPU here, against recorded.json; lines of JSON for each
    python -m tests.ptx.vectors --emulated  the same with the emulator in the GPU's place
    python -m tests.ptx.vectors --record    writes recorded.json anew, from the emulator

vectors.cu lists the vectors and runs them. Inputs are a pure function of a vector's name, so only outputs are
recorded: a digest where every bit must agree; the numbers where the order of a sum and its rounding are the
hardware's. Then, with u = 2^-23, products exact, and each of the `terms` of a sum and its result rounded or cut off
at most once at the size of the largest term,

    |difference|  <=  (terms + 1) * u * sum of |terms|

and the emulator, which rounds to nearest after each term, is within half of that itself: 1.5 times it is the bound.
Approximations (ex2.approx) are as wrong as the manual allows, on either side, so twice that is theirs.
The sums of absolute values are recorded too: the emulator's outputs for the inputs without their signs. What is not
finite must be so in the same way. Needs numpy and the library, neither torch nor a toolkit.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.errors import UserError
from fastgpt.native import toolchain

from . import build

RECORDED = Path(__file__).parent / "recorded.json"
LIBRARY = build.LIBRARY
UNIT = 2.0**-23
ALIGNMENT = 128


@dataclass(frozen=True)
class Vector:
    """As vectors.cu lists it."""

    name: str
    chip: int
    values: str
    terms: int
    relative: float
    """In units of 2^-24."""
    inputs: list[tuple[str, int]]
    """(type, bytes) of each."""
    out_bytes: int


class Library:
    """vectors.cu, compiled for a GPU or for the emulator. Raises OSError where it does not load."""

    def __init__(self, path: Path):
        self.handle = ctypes.CDLL(str(path))
        self.handle.ptx_vectors.restype = ctypes.c_char_p
        self.handle.ptx_run.restype = ctypes.c_char_p
        self.handle.ptx_run.argtypes = [ctypes.c_char_p, *[ctypes.c_void_p, ctypes.c_size_t] * 2]
        self.vectors = {v["name"]: Vector(**v) for v in json.loads(self.handle.ptx_vectors())}

    def digest(self) -> str:
        """Of the sources of a library for a GPU."""
        self.handle.ptx_digest.restype = ctypes.c_char_p
        return self.handle.ptx_digest().decode()

    def chip(self) -> int:
        """90 for a GPU of compute capability 9.0; what is negative is the number of CUDA's error."""
        return self.handle.ptx_chip()

    def run(self, vector: Vector, magnitudes: bool = False) -> bytes:
        """The outputs, each padded to a multiple of 128 bytes. Raises RuntimeError."""
        given = _aligned(inputs(vector, magnitudes))
        out = _aligned(bytes(vector.out_bytes))
        error = self.handle.ptx_run(vector.name.encode(), given.ctypes.data, given.nbytes, out.ctypes.data, out.nbytes)
        if error:
            raise RuntimeError(error.decode())
        return out.tobytes()


def _aligned(content: bytes) -> np.ndarray:
    memory = np.empty(len(content) + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    memory[start : start + len(content)] = np.frombuffer(content, np.uint8)
    return memory[start : start + len(content)]


# ---- inputs ----------------------------------------------------------------------------------------------


def random_words(name: str, count: int) -> np.ndarray:
    """uint64, by splitmix64 over counters that begin at a digest of the name: the same everywhere, and always."""
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        z = np.uint64(start) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def inputs(vector: Vector, magnitudes: bool = False) -> bytes:
    """All inputs of a vector in one, each padded; without their signs where `magnitudes` are asked for."""
    parts = []
    for number, (kind, size) in enumerate(vector.inputs):
        words = random_words(f"{vector.name}/{number}", size)
        if kind == "bits" or vector.values == "bits":
            part = words.astype(np.uint8).tobytes()
        else:
            part = _numbers(words[: size // (4 if kind == "f32" else 2)], kind, vector.values, magnitudes)
        parts.append(part.ljust(-(-size // ALIGNMENT) * ALIGNMENT, b"\0"))
    return b"".join(parts)


def _numbers(words: np.ndarray, kind: str, values: str, magnitudes: bool) -> bytes:
    """whole: -8 .. 8, so that sums are exact. sums: fractions of two signs and six sizes. normal: those, and in one of
    a hundred places a number that is subnormal in 16 bits, infinite or NaN."""
    if values == "whole":
        x = (words % np.uint64(17)).astype(np.float64) - 8
    else:
        fraction = (words >> np.uint64(40)).astype(np.float64) * 2.0**-24
        size = np.exp2((words >> np.uint64(8) & np.uint64(7)).astype(np.float64) - 5)
        x = (1 + fraction) * size * np.where(words & np.uint64(1), -1.0, 1.0)
        if values == "normal":
            x = np.where(words % np.uint64(61) == 7, x * 2.0**-18, x)
            x = np.where(words % np.uint64(499) == 7, np.inf, x)
            x = np.where(words % np.uint64(997) == 7, np.nan, x)
    if magnitudes:
        x = np.abs(x)
    single = x.astype(np.float32)
    if kind == "f32":
        return single.tobytes()
    if kind == "f16":
        return x.astype(np.float16).tobytes()
    bits = single.view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> np.uint32(16) & np.uint32(1))).astype(np.uint32)) >> np.uint32(16)
    return np.where(np.isnan(single), 0x7FC0, rounded).astype(np.uint16).tobytes()


# ---- outputs ---------------------------------------------------------------------------------------------


def record(library: Library) -> dict[str, Any]:
    """What is kept of the emulator's outputs."""
    recorded: dict[str, Any] = {}
    for vector in library.vectors.values():
        out = library.run(vector)
        recorded[vector.name] = {"sha256": hashlib.sha256(out).hexdigest()}
        if vector.relative:
            recorded[vector.name] = {"outputs": base64.b64encode(out).decode()}
        if vector.terms:
            magnitudes = library.run(vector, magnitudes=True)
            recorded[vector.name] = {
                "outputs": base64.b64encode(out).decode(),
                "magnitudes": base64.b64encode(magnitudes).decode(),
            }
    return recorded


def differs(vector: Vector, recorded: dict[str, Any], out: bytes) -> str:
    """How outputs differ from the recorded ones by more than they may, or nothing."""
    if vector.name not in recorded:
        return "nothing is recorded for it"
    expected = recorded[vector.name]
    if not (vector.terms or vector.relative):
        return "" if expected["sha256"] == hashlib.sha256(out).hexdigest() else "its bits are not the recorded ones"
    want, got = _floats(base64.b64decode(expected["outputs"])), _floats(out)
    finite = np.isfinite(want)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    with np.errstate(invalid="ignore"):
        if vector.relative:
            bound = (vector.relative + 1) * 2.0**-24 * np.abs(want)  # and that of what is recorded was rounded
        else:
            bound = 1.5 * (vector.terms + 1) * UNIT * _floats(base64.b64decode(expected["magnitudes"]))
        good = np.where(finite, np.abs(got - want) <= bound, same)
    if good.all():
        return ""
    worst = int(np.argmin(good))
    return (
        f"{int((~good).sum())} of {good.size} outputs are out of bounds; "
        f"number {worst} is {got[worst]:.9g}, expected {want[worst]:.9g} within {bound[worst]:.3g}"
    )


def _floats(content: bytes) -> np.ndarray:
    """As float64; padding is NaN everywhere."""
    return np.frombuffer(content, np.float32).astype(np.float64)


# ---- the command -----------------------------------------------------------------------------------------


def run_all(library: Library, chip: int, names: list[str], lines: Path | None) -> bool:
    """Says which vector is about to run and how it went, a line of JSON each, on stdout or at the end of a file; what
    the file tells of is passed over. False where the GPU's context was lost."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    told = set()
    if lines and lines.exists():
        for line in lines.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # one that was cut off
                told.add(json.loads(line)["name"])

    def say(**facts: Any) -> None:
        if lines:
            with lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(facts) + "\n")
        else:
            print(json.dumps(facts), flush=True)

    for name in (name for name in names if name not in told):
        vector = library.vectors[name]
        say(name=name, state="begun")
        if vector.chip > chip or (vector.chip == 90 and chip != 90):  # Hopper's own are in no newer GPU
            say(name=name, state="skipped", reason=f"needs sm_{vector.chip}a, the GPU is sm_{chip}")
            continue
        try:
            wrong = differs(vector, recorded, library.run(vector))
        except RuntimeError as error:
            say(name=name, state="failed", reason=str(error))
            return False
        say(
            name=name,
            state="failed" if wrong else "passed",
            reason=wrong,
            bitwise=not (vector.terms or vector.relative),
        )
    return True


def main(argv: list[str]) -> int:
    """Returns 0 where everything was run, whether or not it agreed; 2 where nothing can be; 3 where a GPU gave up."""
    parser = argparse.ArgumentParser(prog="python -m tests.ptx.vectors", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="which vectors; all")
    parser.add_argument("--emulated", action="store_true", help="on the emulator")
    parser.add_argument("--record", action="store_true", help="write recorded.json from the emulator")
    parser.add_argument("--list", action="store_true", help="only the names")
    arguments = parser.parse_args(argv)
    if arguments.emulated or arguments.record:
        try:
            library, chip = Library(build.emulated()), 90
        except (toolchain.Missing, UserError) as error:
            print(f"the vectors cannot be built for the emulator: {error}", file=sys.stderr)
            return 2
    else:
        try:
            library = Library(LIBRARY)
        except OSError as error:
            print(f"{LIBRARY.name} does not load: {error}; `make kernels` builds it where nvcc is", file=sys.stderr)
            return 2
        if library.digest() != build.digest():
            print(f"{LIBRARY.name} is of other sources than these; `make kernels` where nvcc is", file=sys.stderr)
            return 2
        chip = 0 if arguments.list else library.chip()
        if chip < 0:
            hint = "; there is no driver, or one older than the CUDA it was built with" if chip == -35 else ""
            print(f"no GPU can be used: CUDA's error {-chip}{hint}", file=sys.stderr)
            return 2
    if arguments.record:
        RECORDED.write_text(json.dumps(record(library), indent=0, sort_keys=True) + "\n", encoding="utf-8")
        return 0
    names = arguments.names or list(library.vectors)
    if arguments.list:
        print("\n".join(names))
        return 0
    lines = os.environ.get("FASTGPT_LINES")
    return 0 if run_all(library, chip, names, Path(lines) if lines else None) else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

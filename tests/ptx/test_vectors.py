"""Recorded outputs are those of the emulator, no function of csrc/ptx is left out, and what differs is told."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastgpt.native import toolchain
from tests.ptx import build, vectors

ROOT = Path(__file__).parent.parent.parent
RECORDED = json.loads(vectors.RECORDED.read_text())


@pytest.fixture(scope="module")
def library() -> vectors.Library:
    try:
        return vectors.Library(build.emulated())
    except toolchain.Missing as missing:
        pytest.skip(str(missing))


def test_the_emulator_gives_what_is_recorded(library: vectors.Library) -> None:
    """To the bit, sums included. Where a model was mended: python -m tests.ptx.vectors --record."""
    assert set(RECORDED) == set(library.vectors)
    assert [name for name, kept in vectors.record(library).items() if kept != RECORDED[name]] == []


def test_no_function_of_csrc_ptx_is_left_out(library: vectors.Library) -> None:
    text = "".join(path.read_text() for path in (build.KERNELS, build.SOURCE))
    for file in sorted((ROOT / "csrc/ptx").glob("*_gpu.cuh")):
        for name in re.findall(r"FASTGPT_PTX [\w*]+ ?\*?(\w+)\(", file.read_text()):
            # shared_address: through every function that takes shared memory; pin_registers: no instruction
            left_out = name in ("shared_address", "pin_registers")
            assert re.search(rf"\b{name}[<(>,]", text) or left_out, f"{file.name}: {name}"
    # Overloads, and what is a template argument in the kernels.
    names = set(library.vectors)
    assert names >= {f"tma_{what}_{rank}d" for what in ("store", "reduce_add", "multicast") for rank in range(1, 6)}
    assert names >= {f"{op}_x{n}{t}" for op in ("ldmatrix", "stmatrix") for n in (1, 2, 4) for t in ("", "_transposed")}
    assert names >= {f"wgmma_bf16{a}_n{n}" for a in ("", "_registers") for n in range(8, 257, 8)}
    assert names >= {f"cp_async_{n}" for n in (4, 8, 16)}


@pytest.mark.slow
def test_every_instruction_is_in_the_compiled_vectors(tmp_path: Path) -> None:
    """Each string of asm in csrc/ptx is among the PTX that nvcc makes of the vectors."""
    try:
        nvcc, gxx = toolchain.find_nvcc(), toolchain.find_compiler()
    except toolchain.Missing as missing:
        pytest.skip(str(missing))
    ptx = tmp_path / "vectors.ptx"
    command = [str(nvcc.path), "-ccbin", gxx.path, "-std=c++17", "-Icsrc", f"-I{build.KERNELS.parent}"]
    command += ["-arch=compute_90a", "--ptx", '-DFASTGPT_VECTORS_DIGEST=""', str(build.SOURCE), "-o", str(ptx)]
    build.run(command)
    found = set(re.findall(r"^\s*(?:\{|@!?%?\w+ )?\s*([a-z]\w*(?:[.:]+\w+)+)", ptx.read_text(), re.M))
    wanted = {f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16" for n in range(8, 257, 8)}
    wanted |= {f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.f16.f16" for n in (8, 16, 64, 128)}
    for file in (ROOT / "csrc/ptx").glob("*_gpu.cuh"):
        code = re.sub(r"#define (?:[^\n]*\\\n)*[^\n]*", "", file.read_text())  # wgmma's cases, which are listed above
        code = re.sub(r"static_assert\([^\n]*", "", code)
        text = re.sub(r'"\s*"', "", code)
        wanted |= set(re.findall(r'(?:"|\\n)([a-z]\w*(?:[.:]+\w+)+)', text))
    wanted = {word for word in wanted if not word.endswith((".cuh", ".h"))}
    missing = wanted - found
    assert len(wanted) > 90
    assert missing == set()


# ---- the inputs, the bound ---------------------------------------------------------------------------------


def decoded(vector: vectors.Vector) -> list[np.ndarray]:
    """The inputs as float64."""
    content, found = vectors.inputs(vector), []
    for kind, size in vector.inputs:
        part, content = content[:size], content[-(-size // 128) * 128 :]
        if kind == "bf16":
            found.append((np.frombuffer(part, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64))
        else:
            found.append(np.frombuffer(part, np.float16 if kind == "f16" else np.float32).astype(np.float64))
    return found


def products(vector: vectors.Vector) -> tuple[np.ndarray, np.ndarray]:
    """What numpy makes of A B^T + C, and of the absolute values."""
    a, b, *c = decoded(vector)
    if "tf32" in vector.name:
        a, b = ((x.astype(np.float32).view(np.uint32) & 0xFFFFE000).view(np.float32).astype(float) for x in (a, b))
        a, b = a.reshape(16, 8), b.reshape(8, 8).T
    elif vector.name.startswith("mma"):
        a, b = a.reshape(16, 16), b.reshape(8, 16)
    else:
        a, b = a.reshape(64, 64), b.reshape(-1, 64)
    with np.errstate(invalid="ignore"):
        more = c[0].reshape(a.shape[0], -1) if c else np.zeros((a.shape[0], b.shape[0]))
        return (
            (a[:, None] * b[None]).sum(-1) + more,
            (np.abs(a)[:, None] * np.abs(b)[None]).sum(-1) + np.abs(more),
        )


def test_products_of_every_width_and_layout_are_numpys(library: vectors.Library) -> None:
    """Sums of whole numbers, so to the bit; the digests above are worth what this says."""
    checked = 0
    for vector in library.vectors.values():
        if vector.name.startswith(("mma", "wgmma")) and vector.values == "whole":
            got = np.frombuffer(library.run(vector), np.float32)
            assert np.array_equal(got, products(vector)[0].ravel()), vector.name
            checked += 1
    assert checked > 95


def test_the_bound_is_that_of_the_rule(library: vectors.Library) -> None:
    """Both roundings that a sum may have, to nearest and cut off at the largest term's size, are within it; a sum
    that is kept in 16 bits is not."""
    for vector in (v for v in library.vectors.values() if v.terms):
        exact, magnitudes = products(vector)
        finite = np.isfinite(exact).ravel()
        assert 0.4 < finite.mean() < 1, vector.name
        kept = RECORDED[vector.name]
        recorded = vectors._floats(base64.b64decode(kept["magnitudes"]))[: exact.size]
        sums = magnitudes.ravel()[finite]
        rounding = (vector.terms + 1) * vectors.UNIT / 2 * sums  # each addition to nearest, and nothing cancels
        assert np.all(np.abs(recorded[finite] - sums) <= rounding), vector.name
        with np.errstate(invalid="ignore"):
            ok = np.isfinite(exact)
            cut = np.where(ok, exact - np.sign(exact) * vectors.UNIT * magnitudes, exact)  # each term, the worst way
            narrow = np.where(ok, exact + 2.0**-12 * magnitudes, exact)
        assert vectors.differs(vector, RECORDED, as_outputs(exact)) == "", vector.name
        assert vectors.differs(vector, RECORDED, as_outputs(cut)) == "", vector.name
        assert "out of bounds" in vectors.differs(vector, RECORDED, as_outputs(narrow)), vector.name
        a_nan = exact.copy()
        a_nan.ravel()[np.flatnonzero(finite)[0]] = np.nan
        assert "1 of" in vectors.differs(vector, RECORDED, as_outputs(a_nan)), vector.name
        huge = np.nan_to_num(exact, nan=0.0, posinf=1e38, neginf=-1e38)
        assert "out of bounds" in vectors.differs(vector, RECORDED, as_outputs(huge)), vector.name


def as_outputs(x: np.ndarray) -> bytes:
    return x.astype(np.float32).tobytes()


def test_a_single_bit_is_noticed(library: vectors.Library) -> None:
    vector = library.vectors["ldmatrix_x4"]
    out = bytearray(library.run(vector))
    assert vectors.differs(vector, RECORDED, bytes(out)) == ""
    out[5] ^= 1
    assert vectors.differs(vector, RECORDED, bytes(out)) == "its bits are not the recorded ones"


def test_inputs_are_a_function_of_the_name() -> None:
    """These words are in every recorded digest."""
    assert [hex(word) for word in vectors.random_words("x", 2)] == FIRST_WORDS
    assert not np.array_equal(vectors.random_words("x", 4), vectors.random_words("y", 4))


FIRST_WORDS = ["0x3dd661bccc3e551a", "0x57df189ae6c0508a"]


# ---- the command --------------------------------------------------------------------------------------------


def test_the_command_says_each_line_at_once(library: vectors.Library, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.ptx.vectors", "--emulated", "mma_bf16", "mma_f16_rounding"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["name"], line["state"]) for line in lines] == [
        ("mma_bf16", "begun"), ("mma_bf16", "passed"), ("mma_f16_rounding", "begun"), ("mma_f16_rounding", "passed"),
    ]  # fmt: skip


def test_without_a_gpu_the_library_for_one_still_loads() -> None:
    """With the runtime inside, and no driver."""
    if not vectors.LIBRARY.exists():
        pytest.skip("make kernels has not built it")
    library = vectors.Library(vectors.LIBRARY)
    if library.digest() != build.digest():
        pytest.skip("it is of other sources; make kernels")
    assert set(library.vectors) == set(RECORDED)
    if library.chip() < 0:
        with pytest.raises(RuntimeError, match="allocating"):
            library.run(library.vectors["mma_bf16"])

"""Kernels of one's own, from Python: what is passed to them, what is refused, what comes back."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgpt.errors import UserError
from fastgpt.native import emulate, toolchain

ROOT = Path(__file__).parents[2]
SOURCE = """// __global__ void in_a_comment(int n) {}
template <class T>
__global__ void of_a_template(T* y) {}

__global__ __launch_bounds__(64) void affine(const float* x, float* y, double slope, long long shift, unsigned char n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x ? float(slope) * x[i] + shift : shift;  // HERE affine
}
__global__ void increase(int* y) { y[threadIdx.x] += 1; }
__global__ void where(int* y) { y[0] = gridDim.x * 100 + gridDim.y * 10 + blockDim.z; }
__global__ void halves(const __half* x, __nv_bfloat16* y) { y[threadIdx.x] = __float2bfloat16(__half2float(*x)); }
__global__ void nothing() {}
__global__ void neighbour(float* y) {
  __shared__ float shared[64];
  shared[threadIdx.x] = threadIdx.x;
  __syncthreads();  // HERE barrier
  y[threadIdx.x] = shared[63 - threadIdx.x];  // HERE neighbour
}
struct Numbers {
  float at[11];
};
__global__ void same(float* y) {
  __shared__ Numbers shared;
  if (threadIdx.x == 0) for (int i = 0; i < 11; ++i) shared.at[i] = i;
  __syncthreads();
  const Numbers mine = shared;
  for (int i = 0; i < 11; ++i) y[threadIdx.x * 11 + i] = mine.at[i];
}
"""


def compiled(source: str | Path) -> emulate.Kernels:
    try:
        return emulate.compile(source)
    except toolchain.Missing as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("patience", [0.05, 60.0])
def test_a_compilation_that_lasts_is_told_in_one_line(
    patience: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build_library = emulate.build_library

    def slow(*given: Any, **options: Any) -> Path:
        time.sleep(0.5)
        return build_library(*given, **options)

    monkeypatch.setattr(emulate, "PATIENCE_SECONDS", patience)
    monkeypatch.setattr(emulate, "build_library", slow)
    compiled("__global__ void nothing() {}")
    said = "fastgpt: compiling kernel.cu, and the emulator where that is not done yet ...\n"
    assert capsys.readouterr().err == (said if patience < 0.5 else "")


@pytest.fixture(scope="module")
def kernels() -> emulate.Kernels:
    return compiled(SOURCE)


def line_of(mark: str) -> int:
    return next(number for number, line in enumerate(SOURCE.splitlines(), 1) if line.endswith(mark))


def test_kernels_and_parameters_are_found(kernels: emulate.Kernels) -> None:
    assert set(kernels.parameters) == {"affine", "increase", "where", "halves", "nothing", "neighbour", "same"}
    assert [(p.name, p.type) for p in kernels.parameters["affine"]] == [
        ("x", "const float32*"),
        ("y", "float32*"),
        ("slope", "float64"),
        ("shift", "int64"),
        ("n", "uint8"),
    ]


def test_arguments_arrive(kernels: emulate.Kernels) -> None:
    x, y = np.arange(100, dtype=np.float32), np.empty(100, np.float32)
    kernels.launch("affine", 2, 64, x, y, 0.5, -(2**33), 100)
    assert np.array_equal(y, x * np.float32(0.5) - np.float32(2**33))
    kernels.launch("affine", 2, 64, None, y, 0.5, 7, 100)
    assert (y == 7).all()
    halves, bf16 = torch.full((1,), 1.5, dtype=torch.float16), torch.empty(3, dtype=torch.bfloat16)
    kernels.launch("halves", 1, 3, halves, bf16)
    assert (bf16 == 1.5).all()
    kernels.launch("nothing", 1, 1)


def test_grids_have_up_to_three_dimensions(kernels: emulate.Kernels) -> None:
    y = np.zeros(1, np.int32)
    with pytest.raises(emulate.KernelFault, match="data race"):  # two blocks, one place
        kernels.launch("where", (1, 2), 1, y)
    kernels.launch("where", (1,), (1, 1, 1), y)
    assert y[0] == 111


def test_an_output_is_unwritten_memory_unless_it_is_in_place(kernels: emulate.Kernels) -> None:
    y = np.full(4, 5, np.int32)
    with pytest.raises(emulate.KernelFault, match="uninitialised read"):
        kernels.launch("increase", 1, 4, y)
    y[:] = 5
    kernels.launch("increase", 1, 4, y, in_place=["y"])
    assert (y == 6).all()


def test_a_fault_names_kernel_tensor_and_line(kernels: emulate.Kernels) -> None:
    x, y = torch.ones(100), torch.ones(99)
    with pytest.raises(emulate.KernelFault, match="past the end of 'y'") as raised:
        kernels.launch("affine", 2, 64, x, y, 1.0, 0, 100)
    [finding] = raised.value.findings
    assert (finding.kind, finding.kernel) == ("out of bounds", "affine")
    assert (finding.file, finding.line) == ("kernel.cu", line_of("HERE affine"))
    kernels.launch("affine", 2, 64, x, y, 1.0, 0, 99)  # and the next launch is clean


def test_counters(kernels: emulate.Kernels) -> None:
    x, y = torch.ones(64), torch.empty(64)
    counts = kernels.launch("affine", 1, 64, x, y, 1.0, 0, 64)
    assert {(line["kernel"], line["line"]) for line in counts.lines} == {("affine", line_of("HERE affine"))}
    assert (counts.total("bytes"), counts.total("bytes", access="store"), counts.total("sectors")) == (512, 256, 16)
    again = kernels.launch("affine", 1, 64, x, y, 1.0, 0, 64)
    assert again == counts  # of one launch, not of all


def test_a_copy_of_what_all_lanes_share_has_no_bank_conflicts(kernels: emulate.Kernels) -> None:
    """44 bytes: it ends with less than 16, and no instruction takes 12."""
    y = torch.empty(64, 11)
    counts = kernels.launch("same", 1, 64, y)
    assert torch.equal(y, torch.arange(11.0).expand(64, 11))
    assert counts.total("bank_conflicts") == 0 and counts.total("wavefronts", access="load") == 2 * (2 * 4 + 2 + 1)


def test_a_barrier_can_be_taken_out(kernels: emulate.Kernels) -> None:
    y = torch.empty(64)
    kernels.launch("neighbour", 1, 64, y)
    [barrier] = [site for site in kernels.sites() if site.line == line_of("HERE barrier")]
    assert barrier.kind == "__syncthreads"
    with pytest.raises(emulate.KernelFault) as raised:
        kernels.launch("neighbour", 1, 64, y, disabled_site=barrier.id)
    assert line_of("HERE neighbour") in {finding.line for finding in raised.value.findings}
    kernels.launch("neighbour", 1, 64, y)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("none", 1, 1), {}, "there is no kernel none"),
        (("increase", 1, 1), {}, r"takes 1 arguments \(y\), not 0"),
        (("increase", 0, 1, np.zeros(1, np.int32)), {}, "grid must be"),
        (("increase", 1, (1, 1, 1, 1), np.zeros(1, np.int32)), {}, "block must be"),
        (("increase", 1, 2048, np.zeros(2048, np.int32)), {}, "a block of 2048 threads"),
        (("increase", 1, 1, np.zeros(1, np.int64)), {}, r"y is int32\*, got int64"),
        (("increase", 1, 1, [1]), {}, "a numpy array, a torch tensor or None"),
        (("increase", 1, 1, torch.zeros(4, dtype=torch.int32)[::2]), {}, "not contiguous"),
        (("increase", 1, 1, np.broadcast_to(np.zeros(1, np.int32), (1,))), {}, "read-only"),
        (("increase", 1, 1, torch.zeros(1, dtype=torch.int32, device="meta")), {}, "is on meta"),
        (("affine", 1, 1, None, torch.zeros(1), 1.0, 0.5, 1), {}, "shift is int64, got 0.5"),
        (("affine", 1, 1, None, torch.zeros(1), 1.0, 0, 1), {"in_place": ["x"]}, "writes to no x"),
    ],
)
def test_what_does_not_fit_is_refused(
    kernels: emulate.Kernels, arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.launch(*arguments, **options)


def test_a_file_and_the_headers_beside_it(tmp_path: Path) -> None:
    (tmp_path / "value.h").write_text("constexpr int kValue = 3;\n")
    source = tmp_path / "given.cu"
    source.write_text('#include "value.h"\n__global__ void given(int* y) { y[threadIdx.x] = kValue; }\n')
    y = np.zeros(2, np.int32)
    counts = compiled(source).launch("given", 1, 2, y)
    assert y.tolist() == [3, 3]
    assert [(line["file"], line["line"]) for line in counts.lines] == [("given.cu", 2)]
    (tmp_path / "value.h").write_text("constexpr int kValue = 4;\n")
    compiled(source).launch("given", 1, 2, y)
    assert y.tolist() == [4, 4]


def test_a_kernel_of_the_package_that_changes_is_compiled_anew(tmp_path: Path, monkeypatch) -> None:
    """A source may include it."""
    monkeypatch.setattr(emulate.build, "CSRC", tmp_path)
    digests = set()
    for text in ("one", "two"):
        (tmp_path / "kernel.cu").write_text(text)
        digests.add(emulate._digest_of_ingredients(tmp_path / "beside"))
    assert len(digests) == 2


MANY = """
import ctypes, shutil, sys, torch
from pathlib import Path
from fastgpt.native import emulate, loading
held = [loading.library("emulated")]
for i in range(40):  # as many libraries as files
    copy = Path(sys.argv[2]) / f"{i}.so"
    shutil.copy(sys.argv[1], copy)
    held.append(ctypes.CDLL(str(copy)))
kernels = emulate.compile(Path(sys.argv[3]))
path = str(kernels.library.path)
assert path in Path("/proc/self/maps").read_text()
del kernels
assert path not in Path("/proc/self/maps").read_text()
"""


def test_a_process_holds_many_and_lets_go_of_those_that_nobody_has(kernels: emulate.Kernels, tmp_path: Path) -> None:
    source = tmp_path / "let_go.cu"
    source.write_text("__global__ void let_go(int* y) { y[threadIdx.x] = 1; }\n")
    command = [sys.executable, "-c", MANY, str(kernels.library.path), str(tmp_path), str(source)]
    subprocess.run(command, check=True, cwd=ROOT)


def test_what_does_not_compile_says_why() -> None:
    compiled(SOURCE)
    with pytest.raises(UserError, match=r"kernel\.cu:1:.*error: 'missing' was not declared|missing"):
        emulate.compile("__global__ void wrong(int* y) { *y = missing; }")

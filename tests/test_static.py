"""benchmarks/static.py: the kernels are what the baseline says, and whatever becomes worse is told."""

from __future__ import annotations

import copy
import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastgpt.native import loading, toolchain
from fastgpt.native.schemas import read_schemas
from tests.native_cases import built

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import cases  # noqa: E402 - found through the line above
import machine_code  # noqa: E402
import static  # noqa: E402
from occupancy import CHIPS, occupancy  # noqa: E402

ALL = cases.every_case()


# ---- the kernels of this commit --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    built("emulated")
    return static.measure(ALL)


@pytest.fixture(scope="module")
def compiled(found: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The machine code, compared only with that of the same compiler."""
    built("cuda")
    if "skipped" in found:
        pytest.skip(found["skipped"])
    return found["machine_code"]


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_traffic(case: cases.Case, found: dict[str, Any]) -> None:
    """Each tensor once, and hardly more; by whole sectors; bitwise what the baseline has."""
    wrong = static.missed(case, found["traffic"][case.name])
    before = static.read_baseline()["traffic"]
    now = {"traffic": {case.name: found["traffic"][case.name]}}
    changed = static.differences(now, {"traffic": {k: v for k, v in before.items() if k == case.name}})
    assert not wrong and not changed, "\n".join([*wrong, *changed, f"if it is meant to be so: {static.ACCEPT}"])


def test_the_baseline_has_no_case_that_is_gone() -> None:
    assert static.read_baseline()["traffic"].keys() == {case.name for case in ALL}


def test_machine_code(found: dict[str, Any], compiled: dict) -> None:
    baseline = static.read_baseline()
    compared = static.comparable(found, baseline)
    if "skipped" in compared:
        pytest.skip(compared["skipped"])
    changed = static.differences(compared, baseline)
    assert not changed, "\n".join([*changed, f"if it is meant to be so: {static.ACCEPT}"])


def test_every_entry_and_every_kernel_is_reached_by_a_case(found: dict[str, Any], request) -> None:
    assert {case.entry for case in ALL} == set(read_schemas())
    request.getfixturevalue("compiled")
    assert not static.unreached(found)


def test_nothing_lies_in_local_memory_and_vectors_are_vectors(found: dict[str, Any], compiled: dict) -> None:
    """In the machine code of every architecture: spills are in local memory, and what is loaded and stored by 16 bytes
    is LDG.128 and STG.128, where a compiler may have thought otherwise. A sum of everything stores single numbers."""
    for arch, kernels in compiled.items():
        for name, row in kernels.items():
            count = row["instructions"]
            assert row["local_bytes"] == count["LDL"] == count["STL"] == 0, f"{arch} {name} uses local memory"
        for case in ALL:
            if case.path == "vector":
                reached = [kernels[name]["instructions"] for name in found["traffic"][case.name]["shapes"]]
                kinds = ("LDG.128",) if case.entry == "grad_norm" else ("LDG.128", "STG.128")
                assert any(all(kernel[kind] for kind in kinds) for kernel in reached), f"{arch} {case.name}"
        for name in static.on_vectors(found) & kernels.keys():
            assert kernels[name]["instructions"]["STG.16"] == 0, f"{arch} {name} stores single 16-bit elements"


# ---- what is told ----------------------------------------------------------------------------------------------

TRAFFIC = {
    "path": "vector",
    "launches": 1,
    "least_bytes": 1000,
    "bytes": 1010,
    "sectors": 32,
    "ideal_sectors": 32,
    "bank_conflicts": 0,
    "least_flops": 0,
    "flops": 0,
    "shapes": {"k": [128, 0]},
}
MACHINE_CODE = {
    "registers": 40,
    "shared_bytes": 0,
    "local_bytes": 0,
    "instructions": {**dict.fromkeys((*machine_code.KINDS, "other"), 0), "LDG.128": 4},
    "threads": 128,
    "dynamic_shared_bytes": 0,
    "warps": 48,
    "limit": "registers",
}
BASELINE = {
    "traffic": {"call": TRAFFIC},
    "machine_code": {"sm_80": {"k": MACHINE_CODE}},
    "compiled_by": {"nvcc": "13.0", "archs": ["8.0+PTX"]},
}


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("traffic", "call", "bytes"), 2020, "call: bytes 1,010 -> 2,020 (worse)"),
        (("traffic", "call", "sectors"), 33, "call: sectors 32 -> 33 (worse)"),
        (("traffic", "call", "bank_conflicts"), 3, "call: bank conflicts 0 -> 3 (worse)"),
        (("traffic", "call", "launches"), 2, "call: launches 1 -> 2 (worse)"),
        (("traffic", "call", "flops"), 2, "call: flops 0 -> 2 (worse)"),
        (("traffic", "call", "bytes"), 1000, "call: bytes 1,010 -> 1,000 (better: accept it, and it will be held)"),
        (("machine_code", "sm_80", "k", "registers"), 41, "sm_80 k: registers 40 -> 41 (worse)"),
        (("machine_code", "sm_80", "k", "shared_bytes"), 16, "sm_80 k: shared bytes 0 -> 16 (worse)"),
        (("machine_code", "sm_80", "k", "local_bytes"), 8, "sm_80 k: local bytes 0 -> 8 (worse)"),
        (("machine_code", "sm_80", "k", "warps"), 44, "sm_80 k: warps 48 -> 44 (worse)"),
        (("machine_code", "sm_80", "k", "instructions", "STL"), 1, "sm_80 k: STL 0 -> 1 (worse)"),
        (("machine_code", "sm_80", "k", "instructions", "STG"), 5, "sm_80 k: STG 0 -> 5 (worse)"),
        (("machine_code", "sm_80", "k", "instructions", "STG.16"), 8, "sm_80 k: STG.16 0 -> 8 (worse)"),
        (("machine_code", "sm_80", "k", "instructions", "LDG.128"), 0, "sm_80 k: LDG.128 4 -> 0 (worse)"),
        (("traffic", "other"), TRAFFIC, "other: is new"),
        (("machine_code", "sm_80", "l"), MACHINE_CODE, "sm_80 l: is new"),
    ],
)
def test_what_became_worse_is_told(place: tuple[str, ...], value: Any, said: str) -> None:
    now: Any = copy.deepcopy(BASELINE)
    assert static.differences(now, BASELINE) == []
    inner = now
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    assert static.differences(now, BASELINE) == [said]


def test_what_has_gone_is_told() -> None:
    now = {**BASELINE, "traffic": {}, "machine_code": {"sm_80": {}}}
    assert static.differences(now, BASELINE) == ["call: has gone", "sm_80 k: has gone"]


def test_other_instructions_come_and_go_with_every_edit() -> None:
    now = copy.deepcopy(BASELINE)
    now["machine_code"]["sm_80"]["k"]["instructions"].update({"LDG.128": 2, "other": 7, "FP32": 9})
    assert static.differences(now, BASELINE) == []


def test_narrow_stores_are_those_of_a_generic_path() -> None:
    """Which stores one element at a time, unrolled as the compiler likes; and of a kernel that serves both paths."""
    for path, shapes in (("generic", {"k": [128, 0]}), ("vector", {})):
        before = copy.deepcopy(BASELINE)
        before["traffic"] |= {"other": {**TRAFFIC, "path": "generic", "shapes": {"k": [128, 0]}}}
        before["traffic"]["call"] |= {"path": path, "shapes": shapes}
        now = copy.deepcopy(before)
        now["machine_code"]["sm_80"]["k"]["instructions"]["STG.16"] = 8
        assert static.differences(now, before) == []


def test_machine_code_of_another_compiler_is_not_compared() -> None:
    now = {**BASELINE, "compiled_by": {"nvcc": "12.8", "archs": ["8.0+PTX"]}}
    compared = static.comparable(now, BASELINE)
    assert "machine_code" not in compared
    assert compared["skipped"] == "it is of nvcc 12.8 for 8.0+PTX, and the baseline of nvcc 13.0 for 8.0+PTX"
    assert static.comparable(BASELINE, BASELINE) is BASELINE


def test_a_case_is_held_to_its_promises() -> None:
    case = cases.Case("entry", "x", "vector", lambda device: (), least_bytes=1000, most=1.02, most_sectors=1.0)
    assert static.missed(case, TRAFFIC) == []
    assert static.missed(case, {**TRAFFIC, "bytes": 1021}) == [
        "entry x: moves 1.021 times the least bytes, at most 1.020 are allowed"
    ]
    assert static.missed(case, {**TRAFFIC, "sectors": 33, "path": "generic"}) == [
        "entry x: takes the path generic, expected vector",
        "entry x: moves 1.031 times the fewest sectors, at most 1.000 are allowed",
    ]
    assert static.unreached({"traffic": {"call": TRAFFIC}, "machine_code": {"sm_80": {"k": {}, "l": {}}}}) == [
        "l: no case in benchmarks/cases reaches it"
    ]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The baseline's file, and a measurement that gives just that baseline."""
    file = tmp_path / "static.json"
    monkeypatch.setattr(static, "BASELINE", file)
    monkeypatch.setattr(static, "__file__", str(tmp_path / "benchmarks/static.py"))
    monkeypatch.setattr(static, "every_case", lambda: [cases.Case("call", "", "vector", lambda device: (), 1000)])
    monkeypatch.setattr(cases.Case, "name", property(lambda case: case.entry))
    monkeypatch.setattr(static, "measure", lambda cases, **options: copy.deepcopy(BASELINE))
    return file


def test_from_worse_to_accepted(results: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert static.main([]) == 1 and "call: is new" in capsys.readouterr().out
    assert static.main(["--accept"]) == 0
    assert json.loads(results.read_text()) == BASELINE
    assert static.main([]) == 0 and "As in the baseline." in capsys.readouterr().out
    worse = copy.deepcopy(BASELINE)
    worse["traffic"]["call"]["bytes"] = 5000
    monkeypatch.setattr(static, "measure", lambda cases, **options: copy.deepcopy(worse))
    assert static.main([]) == 1
    said = capsys.readouterr().out
    assert "call: bytes 1,010 -> 5,000 (worse)" in said and said.rstrip().endswith("benchmarks/static.py --accept")
    assert static.main(["--accept"]) == 0 and static.main([]) == 0


def test_without_a_compiler_its_part_is_skipped_and_its_baseline_stays(results: Path, monkeypatch, capsys) -> None:
    static.accept(BASELINE)
    without = {"traffic": {"call": {**TRAFFIC, "bytes": 1005}}, "skipped": "no nvcc was found"}
    monkeypatch.setattr(static, "measure", lambda cases, **options: without)
    assert static.main([]) == 1
    assert "skipped: the machine code: no nvcc was found" in capsys.readouterr().out
    assert static.main(["--accept"]) == 0 and static.main([]) == 0
    assert json.loads(results.read_text()) == {**BASELINE, "traffic": without["traffic"]}


def test_without_cuobjdump_or_library_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "FOLDER", tmp_path)
    with pytest.raises(static.Skipped, match="_ops.so is not built"):
        static.machine_code_of({})
    (tmp_path / "_ops.so").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FASTGPT_NVCC", "")
    monkeypatch.setattr(toolchain, "USUAL_NVCC", tmp_path / "nvcc")
    monkeypatch.setattr(toolchain, "package_folders", lambda: [])
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(static.Skipped, match="there is no cuobjdump; pip install nvidia-cuda-cuobjdump"):
        static.machine_code_of({})


# ---- machine code -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("LDG.E.128.CONSTANT", "LDG.128"),
        ("LDG.E.U16", "LDG"),
        ("STG.E.128", "STG.128"),
        ("STG.E", "STG"),
        ("STG.E.64", "STG.64"),
        ("STG.E.U16", "STG.16"),
        ("STG.E.U8", "STG.16"),
        ("LDS.128", "LDS"),
        ("LDSM.16.MT88.4", "LDSM"),
        ("LDGSTS.E.BYPASS.128", "LDGSTS"),
        ("LDL.64", "LDL"),
        ("LDC.64", "other"),
        ("REDUX.SUM", "other"),
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU", "ATOM"),
        ("UTMALDG.2D", "UTMALDG"),
        ("HGMMA.64x128x16.F32.BF16", "HGMMA"),
        ("HMMA.16816.F32.BF16", "HMMA"),
        ("BAR.SYNC.DEFER_BLOCKING", "BAR"),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT", "SYNCS"),
        ("MUFU.RSQ", "MUFU"),
        ("FFMA", "FP32"),
        ("STSM.16.M88.4", "STSM"),
    ],
)
def test_kinds_of_instructions(opcode: str, kind: str) -> None:
    assert machine_code.kind_of(opcode) == kind


RESOURCES = """
Fatbin elf code:
================
arch = sm_80
identifier = csrc/a/a.cu

Resource usage:
 Common:
  GLOBAL:0
 Function _Z1kPf:
  REG:24 STACK:16 SHARED:64 LOCAL:0 CONSTANT[0]:360 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Function _Z1kPf:
  REG:26 STACK:0 SHARED:1088 LOCAL:0 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
LISTING = """
Fatbin elf code:
================
arch = sm_80
	code for sm_80
		Function : _Z1kPf
	.headerflags	@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;     /* 0x00000a00ff017624 */
                                                                               /* 0x000fe400078e00ff */
        /*0080*/              @!P0 LDG.E.128 R4, [R2.64] ;                     /* 0x000000000000894d */
        /*0090*/                   STL [R1], R4 ;                              /* 0x00000000000c7919 */
Fatbin elf code:
================
arch = sm_90a
		Function : _Z1kPf
        /*0000*/             @!UP0 UTMALDG.2D [UR8], [UR4] ;                   /* 0x00000a00ff017624 */
"""


def test_what_cuobjdump_prints_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvdisasm").touch()
    tool = tmp_path / "cuobjdump"
    tool.write_text(
        f"#!/bin/sh\n[ $1 = -sass ] && cat <<'E'\n{LISTING}\nE\n[ $1 = -sass ] || cat <<'E'\n{RESOURCES}\nE\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(toolchain, "find_cuobjdump", lambda: tool)
    if not shutil.which("c++filt"):
        pytest.skip("no c++filt is here")
    found = machine_code.read(tmp_path / "_ops.so")
    older, newer = found["sm_80"]["k"], found["sm_90a"]["k"]
    assert (older.registers, older.shared_bytes, older.local_bytes) == (24, 64, 16)
    assert dict(older.instructions) == {"other": 1, "LDG.128": 1, "STL": 1}
    assert (newer.registers, newer.shared_bytes, newer.local_bytes) == (26, 64, 0)  # less what the system reserves
    assert dict(newer.instructions) == {"UTMALDG": 1}


def test_plain_names() -> None:
    name = "void fastgpt::(anonymous namespace)::k<__half, fastgpt::(anonymous namespace)::Tile>(fastgpt::Norm, float*)"
    assert machine_code.plain_name(name) == "k<__half, Tile>"
    assert machine_code.plain_name("fastgpt::_GLOBAL__N__e1_7_norm_cu_50::k<(int)3>(int)") == "k<(int)3>"
    assert machine_code.plain_name("columns") == "columns"


# ---- occupancy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chip", "threads", "registers", "shared", "blocks", "limit"),
    [
        # threads: 2048 of a multiprocessor
        ("sm_80", 1024, 32, 0, 2, "warps"),
        ("sm_80", 256, 32, 0, 8, "warps"),
        ("sm_80", 32, 16, 0, 32, "blocks"),
        # 65536 registers: 128 threads of 96 take 12288, so 5 blocks; 255 of 128 threads fit twice
        ("sm_80", 128, 96, 0, 5, "registers"),
        ("sm_90a", 128, 255, 0, 2, "registers"),
        # 33 a thread are 1056 a warp, given as 1280: 12 warps in each quarter
        ("sm_80", 256, 33, 0, 6, "registers"),
        # each block's shared memory and 1 KiB more, of 164 and 228 KiB
        ("sm_80", 128, 32, 81 << 10, 2, "shared memory"),
        ("sm_80", 128, 32, 82 << 10, 1, "shared memory"),
        ("sm_90a", 128, 168, 227 << 10, 1, "shared memory"),
        ("sm_90a", 128, 32, 113 << 10, 2, "shared memory"),
    ],
)
def test_occupancy(chip: str, threads: int, registers: int, shared: int, blocks: int, limit: str) -> None:
    found = occupancy(CHIPS[chip], threads, registers, shared)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.warps == blocks * -(-threads // 32) and found.share == found.warps / 64


NVIDIAS = """
#include <cuda_occupancy.h>
extern "C" int blocks(int minor, int major, int shared_of_chip, int threads, int registers, int shared, int dynamic) {
  cudaOccDeviceProp chip;
  chip.computeMajor = major; chip.computeMinor = minor;
  chip.maxThreadsPerBlock = 1024; chip.maxThreadsPerMultiprocessor = 2048;
  chip.regsPerBlock = chip.regsPerMultiprocessor = 65536;
  chip.warpSize = 32;
  chip.sharedMemPerBlock = 48 << 10; chip.sharedMemPerMultiprocessor = shared_of_chip;
  chip.numSms = 1;
  chip.sharedMemPerBlockOptin = shared_of_chip - 1024; chip.reservedSharedMemPerBlock = 1024;
  cudaOccFuncAttributes kernel;
  kernel.maxThreadsPerBlock = 1024; kernel.numRegs = registers; kernel.sharedSizeBytes = shared;
  kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN; kernel.maxDynamicSharedSizeBytes = shared_of_chip;
  cudaOccDeviceState state;
  state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
  cudaOccResult result;
  if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &chip, &kernel, &state, threads, dynamic)) return -1;
  return result.activeBlocksPerMultiprocessor;
}
"""


def test_occupancy_is_nvidias(tmp_path: Path) -> None:
    """The toolkit's own formula, in a header of plain C++."""
    try:
        include = toolchain.find_cuda_headers()
        compiler = toolchain.find_compiler().path
    except toolchain.Missing as missing:
        pytest.skip(str(missing))
    if not (include / "cuda_occupancy.h").is_file():
        pytest.skip("cuda_occupancy.h is not here")
    source, library = tmp_path / "occupancy.cpp", tmp_path / "occupancy.so"
    source.write_text(NVIDIAS)
    subprocess.run([compiler, "-shared", "-fPIC", "-isystem", include, source, "-o", library], check=True)
    blocks = ctypes.CDLL(str(library)).blocks
    for name, (major, minor) in {"sm_80": (8, 0), "sm_90a": (9, 0)}.items():
        chip = CHIPS[name]
        for threads in (32, 96, 128, 160, 256, 384, 512, 1024):
            for registers in (16, 24, 32, 33, 40, 64, 65, 96, 128, 168, 255):
                for static_, dynamic in ((0, 0), (16, 0), (1024, 0), (4096, 1), (0, 50_000), (100, 100_000)):
                    theirs = blocks(minor, major, chip.shared_bytes, threads, registers, static_, dynamic)
                    ours = occupancy(chip, threads, registers, static_ + dynamic).blocks
                    assert ours == theirs, (name, threads, registers, static_, dynamic)

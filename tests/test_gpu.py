"""make gpu with toys in the place of its stages: what passes, disagrees, hangs, dies or takes too long is told, each
for itself, and the rest goes on. And the clock of the benchmarks, with a processor's in the GPU's place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

import bench_adamw  # noqa: E402 - found through the line above
import bench_cross_entropy  # noqa: E402
import bench_norm  # noqa: E402
import gpu  # noqa: E402
import operations  # noqa: E402

from tests.ptx import vectors  # noqa: E402

# Things that are told of, one after the other; those that the file tells of are passed over.
TOY = """
import json, os, signal, sys, time
from pathlib import Path
lines = Path(os.environ["FASTGPT_LINES"])
told = {json.loads(line)["name"] for line in lines.read_text().splitlines() if line} if lines.exists() else set()
def say(**facts):
    with lines.open("a") as file:
        file.write(json.dumps(facts) + "\\n")
code = 0
for name in sys.argv[1:]:
    if name in told:
        continue
    say(name=name, state="begun")
    if name == "hangs":
        time.sleep(60)
    if name == "dies":
        print("last words")
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "gives up":
        say(name=name, state="failed", reason="illegal memory access")
        sys.exit(3)
    if name == "disagrees":
        say(name=name, state="failed", reason="its bits are not the recorded ones")
        code = 1
    else:
        say(name=name, state="passed")
sys.exit(code)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    monkeypatch.setattr(gpu, "STALL", {"vectors": 1.5, "tests": 1.5})
    return tmp_path


def supervised(place: Path, *names: str, seconds: float = 20) -> gpu.Stage:
    stage = gpu.Stage("vectors")
    code = gpu.supervise(stage, [sys.executable, str(place / "toy.py"), *names], time.monotonic() + seconds)
    gpu.conclude(stage, code, list(names))
    return stage


def test_what_passes(place: Path) -> None:
    stage = supervised(place, "a", "b")
    assert (stage.state, stage.reason, stage.count("passed")) == ("passed", "", 2)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("disagrees", "its bits are not the recorded ones"),
        ("dies", "the process ended with code -11"),
        ("gives up", "illegal memory access"),
        ("hangs", "nothing was heard for 2 s: it hangs"),
    ],
)
def test_one_that_does_not_keeps_no_other_from_running(place: Path, name: str, why: str) -> None:
    stage = supervised(place, "a", name, "b", "c")
    assert (stage.state, stage.reason) == ("failed", "1 failed")
    assert [said["state"] for said in stage.results.values()] == ["passed", "failed", "passed", "passed"]
    assert stage.results[name]["reason"] == why
    assert any(f"FAILED {name}: {why}" in line for line in gpu.summary(stage))


def test_the_end_of_the_time(place: Path) -> None:
    began = time.monotonic()
    stage = supervised(place, "a", "hangs", "b", seconds=1)
    assert time.monotonic() - began < 10
    assert (stage.state, stage.reason) == ("incomplete", "out of time")
    assert [said["state"] for said in stage.results.values()] == ["passed", "not run", "not run"]


def test_what_dies_before_it_begins(place: Path) -> None:
    (place / "toy.py").write_text("raise SystemExit('no such library')")
    stage = supervised(place, "a")
    assert stage.state == "failed" or stage.state == "incomplete"
    assert "no such library" in stage.log


# ---- pytest as a stage ---------------------------------------------------------------------------------------

SUITE = """
import os, signal
import pytest

def test_a(): pass
def test_wrong(): assert 1 == 2
def test_lost(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_memory(): raise RuntimeError("CUDA error: out of memory")
@pytest.mark.skip(reason="no second GPU")
def test_skipped(): pass
def test_dies(): os.kill(os.getpid(), signal.SIGKILL)
@pytest.fixture
def broken():
    yield
    raise ValueError("at the end")
def test_teardown(broken): pass
def test_z(): pass
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_suite_goes_on_after_its_process(place: Path, workers: int) -> None:
    (place / "test_suite.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-p", "tests.lines", "-p", "no:cacheprovider", "--rootdir", str(place)]
    if workers:
        command += ["-n", str(workers), "--dist", "loadgroup"]
    stage = gpu.Stage("tests")
    gpu.STALL["tests"] = 60.0
    code = gpu.supervise(stage, [*command, str(place / "test_suite.py")], time.monotonic() + 60)
    gpu.conclude(stage, code)
    states = {name.split("::")[1]: said["state"] for name, said in stage.results.items()}
    assert states == {
        "test_a": "passed", "test_wrong": "failed", "test_lost": "failed", "test_memory": "failed",
        "test_skipped": "skipped", "test_dies": "failed", "test_teardown": "failed", "test_z": "passed",
    }  # fmt: skip
    assert stage.state == "failed"
    assert any("FAILED" in line and "assert 1 == 2" in line for line in gpu.summary(stage))


# ---- training -------------------------------------------------------------------------------------------------

# In the place of benchmarks/train.py.
TRAIN = """
import json, sys, time
out = sys.argv[sys.argv.index("--out") + 1]
if "--profile" in sys.argv:
    found = {"profile": {"gpt2": {"fastgpt": {"milliseconds": {"GEMM": 40.0, "attention": 50.0}}}}}
else:
    loop = {"tokens_per_second": 1234.5, "ms_per_step": 2.5, "mfu": 0.5, "peak_mib": 3e3, "seconds_to_first_step": 9}
    loops = {"fastgpt": loop, "compiled": loop} if "--compile" in sys.argv else {"fastgpt": loop}
    found = {"shapes": {"gpt2": {"loops": loops}}}
if "--nanogpt" in sys.argv:
    time.sleep(60)
open(out, "w").write(json.dumps(found))
"""


def test_training_keeps_what_it_found_before_the_end_of_its_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "benchmarks").mkdir()
    (place / "benchmarks/train.py").write_text(TRAIN)
    monkeypatch.setattr(gpu, "ROOT", place)
    here = dict.fromkeys(("gpu", "triton", *gpu.TRAINS_WITH), True)
    stage = gpu.Stage("training")
    gpu.training(stage, here, time.monotonic() + 30)
    said = list(gpu.summary(stage))
    assert stage.state == "passed"
    assert "a step of fastgpt, gpt2, profiled, ms: attention 50.00, GEMM 40.00" in said[1]
    assert "gpt2, eager, fastgpt: 1,234 tokens/s, 2.50 ms, MFU 50.0%, 3,000 MiB, 9.0 s to the first step" in said[2]
    assert "gpt2, peers, compiled" in said[4]
    late = gpu.Stage("training")
    gpu.training(late, {**here, "nanogpt": "somewhere"}, time.monotonic() + 2)
    assert late.state == "incomplete" and list(late.data) == ["profile", "eager"]
    assert late.results["peers"]["state"] == "not run"
    with pytest.raises(gpu.Unfit, match="the trainer needs tomli-w: pip install tomli-w"):
        gpu.training(gpu.Stage("training"), {**here, "tomli_w": False}, 0.0)


# ---- the whole ------------------------------------------------------------------------------------------------

BENCHMARK = """
import json, sys, time
# operations
out = sys.argv[sys.argv.index("--out") + 1]
result = {"machine": {}, "copy": {"gb_per_second": 1000.0}, "left_out": {"liger": "liger-kernel is not installed"},
          "failed": {}, "rows": [{"op": "toy", "direction": "forward", "rows": 4, "columns": 8, "dtype": "bf16",
          "contender": "fastgpt", "least_bytes": 500000, "microseconds": 1.0, "gb_per_second": 500.0, "of_copy": 0.5}]}
open(out, "w").write(json.dumps(result))
KIND
"""


@pytest.mark.parametrize("kind", ["pass", "time.sleep(60)", "sys.exit(1)"])
def test_all_stages_and_the_table(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, kind: str) -> None:
    """A GPU that is not there, vectors of which one disagrees, a benchmark that passes, takes too long or fails."""
    (place / "benchmarks").mkdir()
    (place / "benchmarks/bench_toy.py").write_text(BENCHMARK.replace("KIND", kind))
    here = {"torch": True, "numpy": True, "pytest": False, "tiktoken": True, "safetensors": True, "tomli_w": False,
            "triton": False, "version": "2.11.0", "gpu": True,
            "name": "Toy H100", "ops": ["toy"], "libraries": [], "nvcc": "13.0", "driver": "12.8"}  # fmt: skip
    monkeypatch.setattr(gpu, "probe", lambda: here)
    monkeypatch.setattr(gpu, "machine", lambda _: {"commit": "abc"})
    monkeypatch.setattr(gpu, "ROOT", place)
    vector = [sys.executable, str(place / "toy.py"), "a", "disagrees"]
    monkeypatch.setitem(
        gpu.STAGES, "vectors", lambda stage, _, end: gpu.conclude(stage, gpu.supervise(stage, vector, end))
    )
    code = gpu.main(["--out", str(place / "out.json"), "--seconds", "6"])
    said = capsys.readouterr().out
    assert code == 1
    result = json.loads((place / "out.json").read_text())
    states = {name: stage["state"] for name, stage in result["stages"].items()}
    last = {"pass": "passed", "time.sleep(60)": "incomplete", "sys.exit(1)": "failed"}[kind]
    assert states == {"vectors": "failed", "tests": "failed", "training": "failed", "benchmarks": last}
    assert result["machine"] == {"commit": "abc"} and result["probe"]["name"] == "Toy H100"
    assert "pytest is not installed: pip install pytest" in said
    assert "FAILED disagrees: its bits are not the recorded ones" in said
    assert "toy forward 4 x 8 bf16" in said and "1.0   50%" in said  # what was measured before the end is shown
    assert "left out: liger: liger-kernel is not installed" in said
    assert "The driver is for CUDA 12.8" in said


@pytest.mark.parametrize(
    ("probe", "why"),
    [
        ('{"torch": false}', "torch is not installed for"),
        ('{"torch": true, "version": "2.10.1+cu128"}', "torch 2.10.1+cu128 is too old, 2.11 is needed"),
    ],
)
def test_what_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any, probe: str, why: str) -> None:
    monkeypatch.setattr(gpu, "PROBE", f"print('PROBE' + {probe!r})")
    assert gpu.main([]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert why in line


def test_a_vector_that_disagrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = json.loads(vectors.RECORDED.read_text())
    vector = vectors.Vector("mma_bf16", 80, "whole", 0, 0.0, [["bf16", 512]], 512)
    library = SimpleNamespace(vectors={"mma_bf16": vector}, run=lambda v: b"wrong")
    monkeypatch.setattr(vectors, "RECORDED", tmp_path / "recorded.json")
    vectors.RECORDED.write_text(json.dumps(recorded))
    assert vectors.run_all(library, 90, ["mma_bf16"], tmp_path / "lines")
    assert gpu.told(tmp_path / "lines")["mma_bf16"]["state"] == "failed"
    assert vectors.run_all(library, 75, ["mma_bf16"], tmp_path / "others")
    assert gpu.told(tmp_path / "others")["mma_bf16"]["state"] == "skipped"


def test_it_starts_with_the_standard_library_alone() -> None:
    code = "import sys; sys.path.insert(0, 'tools'); import gpu; assert not {'torch', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- the clock ---------------------------------------------------------------------------------------------------


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> operations.Clock:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(operations, "FLUSH_BYTES", 1 << 16)
    monkeypatch.setattr(operations, "COPY_BYTES", (1 << 16, 1 << 18))
    monkeypatch.setattr(operations, "ROWS", 4)
    monkeypatch.setattr(operations, "RUNS", (4, 8))
    return operations.Clock("cpu")


def test_times_and_their_table(clock: operations.Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2e3 < clock.microseconds(lambda: time.sleep(0.002))["microseconds"] < 2e5
    report = operations.Report({"machine": {}, "copy": clock.copies()}, tmp_path / "out.json")
    assert report.facts["copy"]["gb_per_second"] == max(report.facts["copy"]["by_bytes"].values()) > 0
    monkeypatch.setattr(
        operations, "missing", lambda name, _: {"compile": "no triton", "liger": "not installed"}.get(name, "")
    )
    cases = [bench_norm.case(op, way, 8, torch.float32) for op in bench_norm.EAGER for way in operations.DIRECTIONS]
    operations.time_all(cases, report, time.monotonic() + 60, clock, "cpu")
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["left_out"] == {"compile": "no triton", "liger": "not installed"} and not result["failed"]
    assert [(r["op"], r["direction"], r["contender"]) for r in result["rows"]][:3] == [
        ("layer_norm", "forward", "fastgpt"), ("layer_norm", "forward", "eager"), ("layer_norm", "backward", "fastgpt"),
    ]  # fmt: skip
    lines = list(operations.harness.time_table(result))
    assert "fastgpt" in lines[2] and lines[3].startswith("layer_norm forward 4 x 8 fp32")
    first = {r["contender"]: r["microseconds"] for r in result["rows"][:2]}
    assert lines[3].endswith(f"{first['eager'] / first['fastgpt']:8.2f}")


def test_ours_that_fails_and_no_time_left(clock: operations.Clock, tmp_path: Path) -> None:
    def broken(device: str, rows: int) -> Any:
        raise RuntimeError("launching a kernel: invalid argument\nand more")

    case = operations.Case("toy", "forward", 8, torch.float32, lambda rows: 1, {"fastgpt": broken, "eager": broken})
    report = operations.Report({"copy": {"gb_per_second": 1.0}}, tmp_path / "out.json")
    operations.time_all([case], report, time.monotonic() + 60, clock, "cpu")
    why = "RuntimeError: launching a kernel: invalid argument"
    assert report.failed == {"toy forward 8 fp32": why} and report.left_out == {"toy forward 8 fp32: eager": why}
    late = operations.Report({"copy": {"gb_per_second": 1.0}})
    operations.time_all([case], late, time.monotonic() - 1, clock, "cpu")
    assert late.left_out == {"fastgpt, eager": "2 of 2: out of time"} and not late.failed


def test_least_bytes() -> None:
    forward = bench_norm.case("layer_norm", "forward", 768, torch.bfloat16).least_bytes(10)
    assert forward == 4 * 10 * 768 * 2 + 2 * 10 * 4 + 2 * 768 * 2
    backward = bench_norm.case("rms_norm", "backward", 768, torch.float32).least_bytes(10)
    assert backward == 4 * 10 * 768 * 4 + 10 * 4 + 2 * 768 * 4
    gradient = bench_cross_entropy.case("gradient", 4096, torch.bfloat16).least_bytes(10)
    assert gradient == 2 * (2 * 4096 * 2 + 8 + 2 * 4)  # of two rows, on the emulator


def test_least_bytes_of_an_update() -> None:
    """Of a parameter, by its kind."""
    parameters = sum(bench_adamw.sizes(operations.ROWS))
    assert parameters == operations.ROWS * bench_adamw.COLUMNS + bench_adamw.VECTORS * bench_adamw.WIDTH
    cases = [case for case in bench_adamw.cases() if case.op == "adamw"]
    each = {case.name: case.least_bytes(operations.ROWS) / parameters for case in cases}
    assert each == {
        "adamw plain 4096 fp32": 28,
        "adamw master 4096 bf16": 28,
        "adamw master, wide 4096 bf16": 30,
        "adamw stochastic 4096 bf16": 22,
    }


def test_counts_on_a_cpu(tmp_path: Path) -> None:
    from tests.native_cases import built

    built("emulated")
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "benchmarks/bench_norm.py"), "--only", "rms_norm forward 768 bf16"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "these are no times" in done.stdout
    [row] = json.loads(out.read_text())["rows"]
    assert 1 <= row["bytes_over_least"] < 1.1 and row["sectors_over_fewest"] == 1

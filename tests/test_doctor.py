"""The doctor: what it finds, and that every problem comes with its remedy."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastgpt import accuracy, cli, doctor, machine, native, units
from fastgpt.native import loading, toolchain
from tests.native_cases import good_info, toy_library

REAL = {name: getattr(doctor, name) for name in ("_libraries", "_toolchain", "_try_op")}
ROOT = Path(__file__).resolve().parents[1]


def problems() -> dict[str, dict]:
    """What `examine` complains of, by its words."""
    return {problem["what"]: problem for problem in doctor.examine()["problems"]}


def only(found: dict[str, dict], part: str) -> dict:
    matching = [problem for what, problem in found.items() if part in what]
    assert len(matching) == 1, found
    return matching[0]


@pytest.fixture(autouse=True)
def healthy(monkeypatch):
    """A machine on which the doctor finds nothing, so that a test sees its own problem alone."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("FASTGPT_REQUIRE_KERNELS", raising=False)
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    monkeypatch.setattr(machine, "memory", lambda: (16 << 30, 8 << 30))
    monkeypatch.setattr(machine, "disk_free", lambda path=".": 100 << 30)
    monkeypatch.setattr(machine, "nvidia_driver", lambda: None)
    for name in ("CUDA_HOME", "CUDA_PATH", "FASTGPT_NVCC", "FASTGPT_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor, "_libraries", lambda *_: [])
    monkeypatch.setattr(doctor, "_toolchain", lambda *_: {"missing": {}})
    monkeypatch.setattr(doctor, "_try_op", lambda *_: None)


@pytest.fixture
def real(monkeypatch):
    """The parts that take long, as they are."""
    for name, function in REAL.items():
        monkeypatch.setattr(doctor, name, function)


# ---- what it says ----------------------------------------------------------------------------------


def test_a_healthy_machine(real, capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("No problems found.\n")
    for words in (torch.__version__, "threads", "8.0 GiB free of 16.0 GiB", "Python    3."):
        assert words in out, words
    assert max(map(len, out.splitlines())) < 200
    facts = doctor.examine()
    assert all(row["state"] in ("loaded", "not built") for row in facts["libraries"])
    for row in facts["ops"]:
        assert row["errors"].keys() == {"bfloat16", "float32"} and json.dumps(row)
        line = next(line for line in reversed(out.splitlines()) if line.split()[:1] == [row["op"]])
        assert (
            f"{row['errors']['bfloat16']['ours']:.1e}" in line and f"{row['errors']['float32']['torchs']:.1e}" in line
        )
    for library in facts["libraries"]:
        row = next(line for line in out.splitlines() if line.split()[:1] == [library["library"]])
        if library["state"] == "loaded" and library["library"] == "_ops.so":
            assert ", ".join(library["built"]["archs"]) in row and library["built"]["archs_from"] in row


def test_every_op_is_listed_with_its_reason(capsys):
    from fastgpt import native

    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    rows = native.status()
    assert len(rows) > 10
    for row in rows:
        line = next(line for line in out.splitlines() if line.split()[:1] == [row["op"]])
        assert row["implementation"] in line and row["reason"] in line


def test_json_has_everything_that_the_page_has(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["problems"] == []
    assert {"fastgpt", "python", "system", "torch", "packages", "cpu", "memory", "disk", "gpu", "ops"} <= facts.keys()
    assert facts["cpu"]["cores"] >= 1 and isinstance(facts["cpu"]["features"], list)
    assert facts["torch"]["threads"] >= 1 and facts["torch"]["cxx11_abi"] in (True, False)
    assert doctor.report(facts)  # the page is made of the JSON alone


# ---- what it finds -----------------------------------------------------------------------------------

REAL_VERSION = doctor._version


def without(monkeypatch, package: str) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == package else REAL_VERSION(name))


def test_torch_missing(monkeypatch, capsys):
    without(monkeypatch, "torch")
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "error: torch is not installed" in out and "mend: pip install torch" in out


def test_torch_broken(monkeypatch):
    real = importlib.import_module

    def broken(name, *rest):
        if name == "torch":
            raise OSError("libtorch_cpu.so: undefined symbol: foo\nmore")
        return real(name, *rest)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    found = only(problems(), "does not load: libtorch_cpu.so: undefined symbol: foo")
    assert found["fatal"] and "reinstall" in found["remedy"]


def test_torch_too_old(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.3.1+cpu")
    found = only(problems(), "torch 2.3.1+cpu is too old")
    assert found["fatal"] and "torch>=2.11" in found["remedy"]


@pytest.mark.parametrize("package", doctor.REQUIRED)
def test_a_required_package_missing(package, monkeypatch):
    without(monkeypatch, package)
    found = only(problems(), f"{package} is not installed")
    assert found["fatal"] and found["remedy"] == f"pip install {package.replace('_', '-')}"


def test_an_optional_package_missing_is_no_problem(monkeypatch, capsys):
    without(monkeypatch, "pyarrow")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "not installed: pyarrow (reads .parquet)" in out and "No problems" in out


def test_a_gpu_that_this_torch_cannot_use(monkeypatch):
    monkeypatch.setattr(machine, "nvidia_driver", lambda: "550.54.14")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = only(problems(), "built for CPUs only")
    assert not found["fatal"] and "built for CUDA" in found["remedy"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = only(problems(), "cannot use the NVIDIA driver 550.54.14")
    assert "update the driver" in found["remedy"]


def test_gpus_are_named(monkeypatch):
    card = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=139 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    facts = doctor.examine()
    assert [d["capability"] for d in facts["gpu"]["devices"]] == ["9.0", "9.0"]
    assert doctor.report(facts).count("NVIDIA H200, compute capability 9.0, 139.0 GiB") == 2


def test_too_many_threads_for_the_container(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(machine, "cpu_quota", lambda: 2.0)
    assert only(problems(), "8 threads, but the container grants 2 cores")["remedy"] == "export OMP_NUM_THREADS=2"


def test_idle_cores(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(machine, "cores", lambda: 8)
    assert only(problems(), "leaves most of the 8 cores idle")["remedy"] == "unset OMP_NUM_THREADS"


def test_little_memory_and_disk(monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: (16 << 30, 100 << 20))
    monkeypatch.setattr(machine, "disk_free", lambda path=".": 5 << 20)
    found = problems()
    assert len(found) == 2
    assert only(found, "100.0 MiB of memory") and only(found, "5.0 MiB are free on the disk")


def test_kernels_required_but_missing(monkeypatch):
    from fastgpt import native

    rows = [{"op": "gelu", "implementation": "reference", "reason": "no CUDA device"}]
    monkeypatch.setattr(native, "status", lambda: rows)
    assert not problems()
    monkeypatch.setenv("FASTGPT_REQUIRE_KERNELS", "1")
    assert "unset it" in only(problems(), "FASTGPT_REQUIRE_KERNELS=1")["remedy"]
    rows[0]["implementation"] = "kernel"
    assert not problems()


def test_a_broken_native_part_does_not_break_the_doctor(monkeypatch, capsys):
    from fastgpt import native

    monkeypatch.setattr(native, "status", lambda: 1 / 0)
    assert cli.main(["doctor"]) == 1
    assert "error: the ops cannot be listed: division by zero" in capsys.readouterr().out


def test_it_runs_where_torch_cannot_be_imported(tmp_path):
    """The doctor is called when something is broken: a torch that fails to load, in a real process."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "fastgpt", "doctor"], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 1 and done.stderr == ""
    assert "does not load: libcudart.so.12: cannot open shared object" in done.stdout


# ---- compiled libraries -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the libraries are looked for, in an installed package."""
    place = tmp_path / "package/fastgpt/native"
    place.mkdir(parents=True)
    monkeypatch.setattr(loading, "FOLDER", place)
    monkeypatch.setattr(loading, "_libraries", {})
    monkeypatch.setattr(native, "_cuda_ops", None)
    monkeypatch.setattr(native, "_devices_checked", False)
    monkeypatch.setattr(doctor, "_libraries", REAL["_libraries"])
    return place


def gpu(monkeypatch, capability: tuple[int, int]) -> None:
    card = SimpleNamespace(name="NVIDIA X", major=capability[0], minor=capability[1], total_memory=8 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("info", "code", "after", "said"),
    [
        (good_info(), "", cut_off, "_ops.so is truncated: it should have"),
        (good_info(), "", lambda path: path.write_bytes(b"<html>"), "_ops.so is not a shared library"),
        (good_info(schema_digest="0123"), "", None, "_ops.so is stale: it was built for other schemas (0123)"),
        (good_info(version=7), "", None, "_ops.so has build info of version 7"),
        (good_info(kind="emulated"), "", None, "_ops.so holds the emulated kernels, expected the cuda ones"),
        (good_info(torch_target="9.1"), "", None, "_ops.so needs torch 9.1 or newer, and this is torch"),
        (good_info(), "void absent(); void (*use)() = absent;", None, "_ops.so does not load: "),
        (None, "", None, "_ops.so is no library of fastgpt"),
    ],
)
def test_a_library_that_does_not_fit(info, code, after, said, folder, capsys):
    path = toy_library(folder / "_ops.so", info, code)
    if after:
        after(path)
    found = only(problems(), said)
    remedy = "upgrade torch" if "needs torch" in said else "install fastgpt again from its source"
    assert found["remedy"] == remedy and not found["fatal"]
    assert cli.main(["doctor"]) == 0  # the reference serves
    out = capsys.readouterr().out
    assert re.search(r"_ops\.so +refused", out) and f"mend: {remedy}" in out


def test_no_library_is_a_problem_only_where_a_gpu_is(folder, monkeypatch):
    assert not problems()
    (folder / "_ops_build_info.json").write_text(json.dumps({"status": "missing", "reason": "no nvcc was found"}))
    monkeypatch.setattr(loading, "_libraries", {})
    gpu(monkeypatch, (9, 0))
    found = only(problems(), "_ops.so is not built: no nvcc was found")
    assert found["remedy"] == "then install fastgpt again from its source"


def test_kernels_for_other_gpus(folder, monkeypatch):
    toy_library(folder / "_ops.so", good_info())
    gpu(monkeypatch, (7, 5))
    found = only(problems(), "_ops.so is built for 8.0+PTX, 9.0a, and a GPU here has compute capability 7.5")
    assert found["remedy"] == "install fastgpt again from its source"


# ---- what they are built with --------------------------------------------------------------------------------


@pytest.fixture
def no_toolkit(tmp_path, monkeypatch):
    """A machine with a g++ and no CUDA toolkit; the folder is its PATH."""
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin/g++", "echo 13.2.0")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(toolchain, "USUAL_NVCC", tmp_path / "none")
    monkeypatch.setattr(toolchain, "package_folders", lambda: [])
    monkeypatch.setattr(doctor, "_toolchain", REAL["_toolchain"])
    return tmp_path / "bin"


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_no_nvcc_is_a_problem_only_where_a_gpu_is(no_toolkit, monkeypatch):
    facts = doctor.examine()
    assert not facts["problems"] and "no nvcc was found" in facts["toolchain"]["missing"]["nvcc"]
    assert facts["toolchain"]["compiler"] == f"13.2.0, {no_toolkit / 'g++'}"
    gpu(monkeypatch, (9, 0))
    found = only(problems(), "no kernels can be built for the GPU: no nvcc was found")
    assert found["remedy"] == toolchain.NVCC_REMEDY


def test_an_nvcc_that_is_too_old(no_toolkit, monkeypatch):
    nvcc = program(
        no_toolkit / "nvcc",
        f"""case $1 in
--version) echo "Cuda compilation tools, release 11.8, V11.8.89";;
*) echo "#$ TOP={no_toolkit}" >&2;;
esac""",
    )
    gpu(monkeypatch, (9, 0))
    found = only(problems(), f"{nvcc}: nvcc 11.8 is too old, 12.0 is needed")
    assert found["remedy"] == toolchain.NVCC_REMEDY
    monkeypatch.setenv("FASTGPT_NVCC", str(nvcc))
    found = only(problems(), f"FASTGPT_NVCC={nvcc} cannot be used: nvcc 11.8 is too old")
    assert found["remedy"] == "unset it to search for one"


def test_an_nvcc_that_hangs_is_not_waited_for(no_toolkit, monkeypatch):
    program(no_toolkit / "nvcc", "exec /bin/sleep 60")
    monkeypatch.setattr(doctor, "TOOL_PATIENCE", 0.2)
    gpu(monkeypatch, (9, 0))
    assert only(problems(), "it does not run as an nvcc")
    assert toolchain.PATIENCE == 60


def test_a_wish_for_architectures_that_cannot_be(no_toolkit, monkeypatch):
    nvcc = toolchain.Nvcc(Path("nvcc"), no_toolkit, (13, 0))
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: nvcc)
    monkeypatch.setattr(toolchain, "_output", lambda *_: "compute_75 compute_80 compute_90")
    monkeypatch.setenv("FASTGPT_CUDA_ARCHS", "6.0")
    found = only(problems(), "FASTGPT_CUDA_ARCHS asks for 6.0; nvcc 13.0 and the kernels reach from 7.5 to 9.0")
    assert found["remedy"] == "name others, or unset it"


def test_a_part_that_breaks_is_a_problem_and_the_rest_is_told(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_libraries", lambda *_: 1 / 0)
    monkeypatch.setattr(doctor, "_toolchain", lambda *_: {}["x"])
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "problem: the compiled libraries cannot be looked at: division by zero" in out
    assert "problem: the compilers cannot be looked at: 'x'" in out and "Which implementation each op uses" in out


# ---- the ops ----------------------------------------------------------------------------------------------------


def test_every_op_has_a_trial():
    assert tuple(accuracy.TRIALS) == native.OPS


@pytest.fixture
def one_op(monkeypatch):
    """The doctor tries gelu alone; the row that it will say, and no emulator."""
    row = {"op": "gelu", "implementation": "reference", "reason": "a test"}
    monkeypatch.setattr(native, "status", lambda: [row])
    monkeypatch.setattr(loading, "_libraries", {kind: loading.Refused("none") for kind in loading.FILES})
    monkeypatch.setattr(doctor, "_try_op", REAL["_try_op"])
    return row


def trial(monkeypatch, ours) -> None:
    before = accuracy.TRIALS["gelu"]
    monkeypatch.setitem(accuracy.TRIALS, "gelu", accuracy.Trial(before.inputs, ours, before.torchs))


def test_an_op_that_is_wrong(one_op, monkeypatch):
    assert not problems()
    trial(monkeypatch, lambda x: 1.1 * torch.nn.functional.gelu(x))
    found = problems()
    for dtype in ("bfloat16", "float32"):
        assert "make kernels" in only(found, f"gelu in {dtype} is off by 1.0e-01, torch's own by")["remedy"]
    trial(monkeypatch, lambda x: x * float("nan"))
    assert only(problems(), "gelu in float32 is off by inf")


def test_an_op_that_breaks(one_op, monkeypatch):
    def broken(x):
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    trial(monkeypatch, broken)
    assert only(problems(), "gelu does not run here: CUDA error: an illegal memory access")["remedy"] == doctor.REBUILD


@pytest.mark.parametrize("ours, slow", [(1.0, False), (1.05, False), (1.5, True)])
def test_a_kernel_is_timed_beside_torch(ours, slow, one_op, monkeypatch, capsys):
    """With the clock of a GPU that takes `ours` milliseconds where torch's function takes one."""
    now = 0.0
    real = accuracy.TRIALS["gelu"]

    def taking(milliseconds):
        def gelu(x):
            nonlocal now
            now += milliseconds / 1000
            return real.torchs(x)

        return gelu

    monkeypatch.setitem(accuracy.TRIALS, "gelu", accuracy.Trial(real.inputs, taking(ours), taking(1.0)))
    measure = accuracy.microseconds
    monkeypatch.setattr(
        accuracy, "microseconds", lambda op, device: measure(op, device, clock=lambda: now, times_larger=1)
    )
    said = {"path": "vector", "reason": "16-byte accesses", "entry": "gelu_forward"}
    library = SimpleNamespace(ops=frozenset(), json=lambda function: said)
    monkeypatch.setattr(loading, "_libraries", {"cuda": library, "emulated": loading.Refused("none")})
    one_op["implementation"] = "CUDA kernels"
    found = doctor.examine()
    [row] = found["ops"]
    assert row["microseconds"] == pytest.approx({"ours": 1000 * ours, "torchs": 1000})
    assert [p["what"] for p in found["problems"]] == (["gelu takes 1500 us where torch's own takes 1000"] * slow)
    text = doctor.report(found)
    assert "a test; path vector (16-byte accesses)" in text
    assert f"{1000 * ours:.1f}  1000.0" in text


# ---- the machine --------------------------------------------------------------------------------------


def fake_files(monkeypatch, **files: str) -> None:
    by_path = {name.replace("__", "/"): text for name, text in files.items()}
    monkeypatch.setattr(machine, "_read", lambda path: by_path.get(path, ""))


def test_cpu_features_and_name_are_read_from_the_system(monkeypatch):
    text = (
        "processor : 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile amx_bf16 x\n"
    )
    fake_files(monkeypatch, **{"/proc/cpuinfo": text})
    assert machine.cpu_name() == "Some CPU @ 2 GHz"
    assert machine.cpu_features() == ["avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16"]
    fake_files(monkeypatch)
    assert machine.cpu_features() == [] and machine.cpu_name()


def test_a_containers_limits_count(monkeypatch):
    monkeypatch.undo()
    info = "MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:  800 kB\n"
    fake_files(monkeypatch, **{"/proc/meminfo": info})
    assert machine.memory() == (1_024_000, 819_200) and machine.cpu_quota() is None
    limits = {"/sys/fs/cgroup/memory.max": "500000\n", "/sys/fs/cgroup/memory.current": "100000\n"}
    fake_files(monkeypatch, **{"/proc/meminfo": info, **limits, "/sys/fs/cgroup/cpu.max": "150000 100000\n"})
    assert machine.memory() == (500_000, 400_000) and machine.cpu_quota() == 1.5
    unlimited = {"/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/cpu.max": "max 100000\n"}
    fake_files(monkeypatch, **{"/proc/meminfo": info, **unlimited})
    assert machine.memory() == (1_024_000, 819_200) and machine.cpu_quota() is None


def test_the_driver_is_read_from_the_system(monkeypatch):
    monkeypatch.undo()
    first = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\nGCC version: 12\n"
    fake_files(monkeypatch, **{"/proc/driver/nvidia/version": first})
    assert machine.nvidia_driver() == "550.54.14"


def test_free_space_is_found_for_a_folder_that_is_not_there_yet(monkeypatch, tmp_path):
    monkeypatch.undo()
    assert machine.disk_free(tmp_path / "a" / "b") > 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.size(0), "0 B"),
        (units.size(1023), "1023 B"),
        (units.size(1536), "1.5 KiB"),
        (units.size(3 << 30), "3.0 GiB"),
        (units.size(5 << 42), "20.0 TiB"),
        (units.duration(75), "1:15"),
        (units.duration(3675), "1:01:15"),
        (units.duration(12 * 86400), "12 days"),
        (units.short_number(1_234_567), "1.23M"),
        (units.short_number(999), "999"),
    ],
)
def test_numbers_for_people(text, expected):
    assert text == expected


def test_other_programs_on_the_same_cores_are_seen(monkeypatch):
    """From the counts of the system, in hundredths of seconds: user, nice, system, idle, waiting, interrupts."""
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: {0, 2}, raising=False)
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(machine, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(machine.os, "times", lambda: (own, 0.0, 9.0, 9.0, 0.0))
    stat = "cpu  9 9 9 9\ncpu0 {} 10 100 5000 7 1 2 0\ncpu1 {} 0 0 0 0 0 0 0\ncpu2 50 0 0 0 0 0 0 0\nintr 3\n"
    monkeypatch.setattr(machine, "_read", lambda path: stat.format(*user))
    now, own, user = 100.0, 3.0, (1000, 500)
    load = machine.OtherLoad()
    now, own, user = 102.0, 3.5, (1150, 900)  # core 1 is not ours
    assert load.cores() == pytest.approx((1.5 - 0.5) / 2)
    monkeypatch.setattr(machine, "_read", lambda path: "")
    assert machine.OtherLoad().cores() is None and load.cores() is None


@pytest.mark.parametrize(
    ("threads", "others", "environment", "told"),
    [
        (2, 1.0, {}, True),
        (2, 0.4, {}, False),
        (1, 2.0, {}, False),  # a thread alone waits for none
        (2, None, {}, False),
        (2, 2.0, {"OMP_WAIT_POLICY": "passive"}, False),
        (2, 2.0, {"GOMP_SPINCOUNT": "0"}, False),
    ],
)
def test_a_busy_machine_is_told_where_threads_would_wait(threads, others, environment, told, monkeypatch):
    import torch

    from fastgpt.estimate import load_warning

    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(machine.OtherLoad, "cores", lambda self: others)
    found = [what for what in problems() if "keep" in what]
    assert bool(found) == told == bool(load_warning(torch.device("cpu"), others))
    assert load_warning(torch.device("cuda"), others) == []
    if told:
        assert "other programs keep 1.0 of the 2 cores busy" in found[0]
        assert "OMP_WAIT_POLICY=PASSIVE" in load_warning(torch.device("cpu"), others)[0]

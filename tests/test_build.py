"""The builder: what it finds, what it decides, what it leaves where; and the installs that end in it."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from fastgpt import machine
from fastgpt.errors import UserError
from fastgpt.native import build, loading, schemas, toolchain
from fastgpt.native.toolchain import Arch, Missing
from tests.native_cases import REAL, ROOT, built, toy_sources

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="kernels are built on Linux x86_64 only"
)
VARIABLES = ("FASTGPT_NVCC", "CUDA_HOME", "CUDA_PATH", "FASTGPT_CUDA", "FASTGPT_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST",
             "MAX_JOBS", "CXX")  # fmt: skip


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# ---- nvcc --------------------------------------------------------------------------------------------------


def toolkit(root: Path, version: str = "13.0", lib: str = "lib64") -> Path:
    """A CUDA toolkit as far as the builder looks at it."""
    for name in (
        "include/cuda_runtime.h",
        "include/crt/host_defines.h",
        "include/nv/target",
        f"{lib}/libcudart_static.a",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    archs = "\n".join(f"echo compute_{n}" for n in (75, 80, 86, 89, 90, 100))
    return script(
        root / "bin/nvcc",
        f"""case $1 in
--version) echo "Cuda compilation tools, release {version}, V{version}.88";;
--dryrun) echo "#$ _HERE_={root}/bin" >&2; echo "#$ TOP={root}/bin/.." >&2;;
--list-gpu-arch) {archs};;
esac""",
    )


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine without any toolkit; the folder is its site-packages."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(toolchain, "USUAL_NVCC", tmp_path / "usr/local/cuda/bin/nvcc")
    monkeypatch.setattr(toolchain, "package_folders", lambda: [tmp_path / "site-packages"])
    return tmp_path / "site-packages"


def test_nvcc_is_found_in_this_order(nowhere, monkeypatch, tmp_path):
    expected = [
        toolkit(tmp_path / "named"),
        toolkit(tmp_path / "home"),
        toolkit(tmp_path, lib="lib"),  # its bin is the PATH
        toolkit(tmp_path / "usr/local/cuda"),
        toolkit(nowhere / "nvidia/cu13", lib="lib"),
    ]
    monkeypatch.setenv("FASTGPT_NVCC", str(expected[0]))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    found = []
    for path in expected:
        found.append(toolchain.find_nvcc().path)
        path.unlink()
        monkeypatch.delenv("FASTGPT_NVCC", raising=False)
    assert found == expected
    with pytest.raises(Missing, match=r"no nvcc was found: install the CUDA toolkit or the `\.\[nvcc\]` extra"):
        toolchain.find_nvcc()


def test_an_nvcc_that_is_a_script_elsewhere_leads_to_its_toolkit(nowhere, tmp_path):
    real = toolkit(tmp_path / "opt/cuda")
    script(tmp_path / "bin/nvcc", f'exec {real} "$@"')
    nvcc = toolchain.find_nvcc()
    assert nvcc.path == tmp_path / "bin/nvcc" and nvcc.root == tmp_path / "opt/cuda"
    assert nvcc.runtime == tmp_path / "opt/cuda/lib64/libcudart_static.a"


@pytest.mark.parametrize("broken", ["old", "no toolkit", "no program", "fails", "hangs"])
def test_an_nvcc_that_cannot_be_used_is_named_and_the_next_is_taken(broken, nowhere, monkeypatch, tmp_path):
    home = toolkit(tmp_path / "home", version="11.8" if broken == "old" else "13.0")
    if broken == "no toolkit":
        shutil.rmtree(tmp_path / "home/include/nv")
    elif broken == "no program":
        home.unlink()
    elif broken == "fails":
        script(home, "exit 1")
    elif broken == "hangs":
        script(home, "exec /bin/sleep 60")
        monkeypatch.setattr(toolchain, "PATIENCE", 0.2)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    reason = {"old": "11.8 is too old", "no toolkit": "parts of its toolkit", "no program": "no such file"}
    with pytest.raises(Missing, match=f"home/bin/nvcc: .*{reason.get(broken, 'does not run')}.*; no nvcc was found"):
        toolchain.find_nvcc()
    good = toolkit(tmp_path)
    assert toolchain.find_nvcc().path == good
    monkeypatch.setenv("FASTGPT_NVCC", str(home))  # named in so many words
    with pytest.raises(UserError, match="FASTGPT_NVCC=.*cannot be used"):
        toolchain.find_nvcc()


def test_headers_of_cuda_come_from_nvcc_or_from_the_package_index(nowhere, tmp_path):
    with pytest.raises(Missing, match="pip install 'cuda-toolkit"):
        toolchain.find_cuda_headers()
    toolkit(nowhere / "nvidia/cu13")
    shutil.rmtree(nowhere / "nvidia/cu13/bin")  # headers only
    assert toolchain.find_cuda_headers() == nowhere / "nvidia/cu13/include"
    toolkit(tmp_path)
    assert toolchain.find_cuda_headers() == tmp_path / "include"


def environment_script():
    """tools/environment.py as a module."""
    spec = importlib.util.spec_from_file_location("environment", ROOT / "tools/environment.py")
    environment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(environment)
    return environment


def test_make_test_takes_the_headers_from_the_package_index_where_no_toolkit_is(nowhere, tmp_path, monkeypatch):
    environment = environment_script()
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert environment.cuda_tools("test") == [environment.CUDA_HEADERS]
    assert environment.CUDA_HEADERS in toolchain.HEADERS_REMEDY
    toolkit(tmp_path)
    assert environment.cuda_tools("test") == environment.DISASSEMBLER
    for tool in ("cuobjdump", "nvdisasm"):
        (tmp_path / "bin" / tool).touch()
    assert environment.cuda_tools("test") == []
    (tmp_path / "bin/nvcc").unlink()
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert environment.cuda_tools("test") == []


def test_make_demo_takes_the_headers_only_for_a_compiler(nowhere, tmp_path, monkeypatch):
    """And nothing that its environment asks for is an error there: the demo goes on without the kernels."""
    environment = environment_script()
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert environment.cuda_tools("demo") == []
    compiler(tmp_path / "bin/g++", "12.2.0")
    assert environment.cuda_tools("demo") == [environment.CUDA_HEADERS]
    monkeypatch.setenv("FASTGPT_NVCC", "missing")
    assert environment.cuda_tools("demo") == []
    monkeypatch.delenv("FASTGPT_NVCC")
    toolkit(tmp_path)
    assert environment.cuda_tools("demo") == []


# ---- the compiler, torch, ninja ------------------------------------------------------------------------------


def compiler(path: Path, version: str, name: str = "g++ (GCC)") -> Path:
    return script(path, f'case $1 in --version) echo "{name} {version}";; *) echo {version};; esac')


def test_the_compiler_is_gxx_of_a_fitting_version(nowhere, monkeypatch, tmp_path):
    with pytest.raises(Missing, match=r"no g\+\+ 11 or newer was found; install one .*apt install"):
        toolchain.find_compiler()
    compiler(tmp_path / "bin/g++", "9.4.0")
    with pytest.raises(Missing, match=r"only g\+\+ \(GCC\) 9.4.0; install one \(apt install g\+\+-11\)"):
        toolchain.find_compiler()
    compiler(tmp_path / "bin/c++", "17.0.1", name="clang version")
    newer = compiler(tmp_path / "bin/g++-12", "12.2.0")
    assert toolchain.find_compiler().path == str(newer)
    with pytest.raises(Missing, match=r"g\+\+ 13 or newer is needed"):
        toolchain.find_compiler((13, 0))
    monkeypatch.setenv("CXX", "c++")
    with pytest.raises(UserError, match="CXX=c.. is clang version 17.0.1"):
        toolchain.find_compiler()
    monkeypatch.setenv("CXX", "missing")
    with pytest.raises(UserError, match="CXX=missing is no compiler"):
        toolchain.find_compiler()


def headers(folder: Path, version: str) -> Path:
    numbers = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    file = folder / "torch/include/torch/headeronly/version.h"
    file.parent.mkdir(parents=True)
    file.write_text("".join(f"#define TORCH_VERSION_{name} {number}\n" for name, number in numbers))
    return folder / "torch"


def test_torch_is_found_by_its_files(nowhere):
    with pytest.raises(Missing, match="install torch, then fastgpt again"):
        toolchain.find_torch()
    folder = headers(nowhere, "2.11.1")
    assert toolchain.find_torch() == toolchain.Torch(folder, (2, 11, 1))
    shutil.rmtree(folder)
    headers(nowhere, "2.9.0")
    with pytest.raises(Missing, match="older than 2.11: pip install --upgrade 'torch>=2.11'"):
        toolchain.find_torch()
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "version.py").touch()  # older still: without these headers
    with pytest.raises(Missing, match="older than 2.11"):
        toolchain.find_torch()


def test_an_isolated_build_sees_the_environment_that_it_is_for():
    """Where site-packages is not on sys.path."""
    code = "import sys; from fastgpt.native import toolchain as t; " + (
        "sys.path = [p for p in sys.path if 'site-packages' not in p]; print(*t.package_folders(), sep='\\n')"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert sysconfig.get_path("platlib") in done.stdout.splitlines()


def test_the_builder_never_imports_torch():
    code = "import sys; import fastgpt.native.build as b; b.plan; assert 'torch' not in sys.modules; " + (
        "b.toolchain.find_torch(); b.schema_digest(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---- for which GPUs --------------------------------------------------------------------------------------------


@pytest.fixture
def nvcc(nowhere, tmp_path):
    toolkit(tmp_path)
    return toolchain.find_nvcc()


def chosen(nvcc) -> tuple[list[str], str]:
    archs, source = toolchain.choose_archs(nvcc)
    return [str(arch) for arch in archs], source


def test_architectures_come_from_the_environment_the_gpu_or_the_default(nvcc, monkeypatch, tmp_path):
    assert chosen(nvcc) == (["8.0+PTX", "9.0a"], "the default")
    smi = script(tmp_path / "bin/nvidia-smi", "echo 9.0; echo 8.6; echo 9.0")
    assert chosen(nvcc) == (["8.6", "9.0a"], "the GPU here")
    script(smi, "echo 12.0")  # newer than this nvcc: its driver compiles the default's PTX
    assert chosen(nvcc) == (["8.0+PTX", "9.0a"], "the default")
    script(smi, "echo No devices were found; exit 6")
    assert chosen(nvcc)[1] == "the default"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "5.2 7.5 8.0 9.0+PTX")
    assert chosen(nvcc) == (["7.5", "8.0", "9.0a+PTX"], "TORCH_CUDA_ARCH_LIST")
    monkeypatch.setenv("FASTGPT_CUDA_ARCHS", "8.9;9.0a")
    assert chosen(nvcc) == (["8.9", "9.0a"], "FASTGPT_CUDA_ARCHS")


@pytest.mark.parametrize(
    ("archs", "message"), [("sm_90", "has 'sm_90', expected"), ("7.0", "asks for 7.0; .* from 7.5 to 10.0"),
                           ("8.0;12.0", "asks for 12.0")]
)  # fmt: skip
def test_architectures_that_cannot_be_are_refused(archs, message, nvcc, monkeypatch):
    monkeypatch.setenv("FASTGPT_CUDA_ARCHS", archs)
    with pytest.raises(UserError, match=message):
        toolchain.choose_archs(nvcc)


def test_hopper_keeps_its_letter_in_both_stages():
    assert Arch("90a").flags() == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert Arch("80", ptx=True).flags()[1:] == ["-gencode=arch=compute_80,code=compute_80"]


@pytest.mark.parametrize(
    ("arch", "runs", "does_not"),
    [
        ("8.0", (8, 9), (9, 0)),
        ("8.6", (8, 6), (8, 0)),
        ("8.0+PTX", (12, 0), (7, 5)),
        ("9.0a", (9, 0), (10, 0)),
        ("9.0a+PTX", (10, 0), (8, 9)),
    ],
)
def test_which_gpu_runs_what(arch, runs, does_not):
    assert loading.runs_on(arch, runs) and not loading.runs_on(arch, does_not)


# ---- how wide ----------------------------------------------------------------------------------------------------

GIB = 1 << 30


@pytest.mark.parametrize(
    ("asked", "cores", "quota", "free", "expected"),
    [
        (None, 8, None, 64 * GIB, 8),
        (None, 8, None, 5 * GIB, 2),  # 70 % of 5 GiB hold two jobs of 1.5
        (None, 8, 2.5, 64 * GIB, 3),  # the container's share
        (None, 8, None, GIB, 1),
        (None, 8, None, 0, 8),  # the system does not tell
        ("3", 8, 1.0, GIB, 3),
    ],
)
def test_jobs_by_cores_and_memory(asked, cores, quota, free, expected, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: cores)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    monkeypatch.setattr(machine, "memory", lambda: (64 * GIB, free))
    if asked:
        monkeypatch.setenv("MAX_JOBS", asked)
    assert toolchain.jobs() == expected


@pytest.mark.parametrize("asked", ["0", "-1", "many"])
def test_a_wrong_number_of_jobs_is_refused(asked, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", asked)
    with pytest.raises(UserError, match=f"MAX_JOBS={asked}, expected a whole number"):
        toolchain.jobs()


# ---- building ----------------------------------------------------------------------------------------------------


class Toy:
    """Tiny sources and where their library goes."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.csrc, self.out, self.work, self.kind = toy_sources(folder), folder / "out", folder / "work", kind
        self.library = self.out / loading.FILES[kind]
        self.seen: dict[str, int] = {}

    def build(self) -> dict:
        return build.build(self.kind, self.csrc, self.out, self.work)

    def compiled(self) -> set[str]:
        """The sources that were compiled since the last call."""
        now = {path.stem: path.stat().st_mtime_ns for path in self.work.rglob("*.o")}
        old, self.seen = self.seen, now
        return {name for name, at in now.items() if old.get(name) != at}


@pytest.fixture(params=["cuda", "emulated"])
def toy(request, tmp_path, monkeypatch):
    if request.param == "cuda":
        monkeypatch.setenv("FASTGPT_CUDA_ARCHS", "8.0")
        try:
            toolchain.find_nvcc()
        except Missing as missing:
            pytest.skip(str(missing))
    return Toy(tmp_path / "a folder", request.param)  # with a space in its path


def test_what_is_touched_is_compiled_again_and_nothing_else(toy, monkeypatch):
    everything = {"toy.cu", "toy.cpp", "info.cpp"} | ({"hooks.cpp"} if toy.kind == "emulated" else set())
    result = toy.build()
    assert result["status"] == "built" and result["jobs"] >= 1 and toy.compiled() == everything
    content, written = toy.library.read_bytes(), toy.library.stat().st_mtime_ns
    assert toy.build() == result and not toy.compiled()
    assert toy.library.stat().st_mtime_ns == written
    for touched, expected in (("toy/toy.h", {"toy.cu", "toy.cpp"}), ("toy/toy.cu", {"toy.cu"})):
        file = toy.csrc / touched
        file.write_text(file.read_text() + "// touched\n")
        toy.build()
        assert toy.compiled() == expected, touched
    info, beside = loading.read_info(toy.library), loading.build_result(toy.kind, toy.out)
    assert info["kind"] == toy.kind and info == {name: beside[name] for name in info}
    if toy.kind == "cuda":
        assert info["archs"] == ["8.0"]
    else:  # findings name the same file on every machine
        assert b"csrc/toy/toy.cu" in content and str(toy.csrc.parent).encode() not in content


def test_a_library_that_does_not_compile_any_more_is_an_error_and_the_old_one_stays(tmp_path, capfd):
    toy = Toy(tmp_path, "emulated")
    toy.build()
    before = toy.library.read_bytes()
    (toy.csrc / "toy/toy.cpp").write_text("void f() { undeclared(); }\n")
    with pytest.raises(UserError, match=r"could not be compiled .*FASTGPT_CUDA=0 installs"):
        toy.build()
    assert "undeclared" in capfd.readouterr().err
    assert toy.library.read_bytes() == before
    (toy.csrc / "toy/toy.cpp").write_text("void missing(); extern void (*f)(); void (*f)() = missing;\n")
    with pytest.raises(UserError):  # found by the linker, and not by a user
        toy.build()
    assert not [path for path in toy.out.iterdir() if path.name.startswith(".")]


def test_the_emulated_library_watches_the_kernel_and_hides_its_symbols(tmp_path):
    import ctypes

    import torch  # noqa: F401  (its libraries must be there first)

    toy = Toy(tmp_path, "emulated")
    toy.build()
    library = ctypes.CDLL(str(toy.library))
    values = (ctypes.c_float * 4)(1, 2, 3, 4)
    library.toy(values)
    assert list(values) == [2, 4, 6, 8] and library.times_hooked() >= 8
    exported = subprocess.run(["nm", "-D", "--defined-only", toy.library], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in exported.stdout.splitlines()} - {"__bss_start", "_edata", "_end"}
    assert names == {"toy", "times_hooked", "fastgpt_build_info"}
    dynamic = subprocess.run(["readelf", "-d", toy.library], capture_output=True, text=True, check=True).stdout
    assert "soname: [_ops_emulated.so]" in dynamic and "tsan" not in dynamic


def test_without_a_tool_nothing_is_built_and_the_reason_is_kept(tmp_path, monkeypatch):
    toy = Toy(tmp_path, "emulated")

    def missing(*_):
        raise Missing("no g++ was found")

    with monkeypatch.context() as patch:
        patch.setattr(toolchain, "find_compiler", missing)
        assert toy.build()["reason"] == "no g++ was found"
        assert loading.build_result("emulated", toy.out)["status"] == "missing" and not toy.library.exists()
    assert toy.build()["status"] == "built"
    with monkeypatch.context() as patch:
        patch.setattr(toolchain, "find_compiler", missing)
        assert toy.build()["reason"] == "no g++ was found; the one built before stays"
        assert toy.library.exists()
    assert toy.build()["status"] == loading.build_result("emulated", toy.out)["status"] == "built"


@pytest.mark.parametrize("system", [("Darwin", "arm64"), ("Linux", "aarch64"), ("Windows", "AMD64")])
def test_on_other_systems_the_install_is_plain_python(system, tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: system[0])
    monkeypatch.setattr(platform, "machine", lambda: system[1])
    result = build.build_as_wished(tmp_path, tmp_path / "out", tmp_path / "work", in_place=False)
    assert result["reason"] == f"kernels are built on Linux x86_64 only, and this is {' '.join(system)}"


@pytest.mark.parametrize("in_place", [True, False])
def test_fastgpt_cuda_decides(in_place, nowhere, tmp_path, monkeypatch):
    """0 builds nothing and leaves nothing; 1 is an error without nvcc; auto builds what it can."""

    def install():
        out.mkdir(exist_ok=True)
        (out / "_ops.so").write_text("built before")
        return build.build_as_wished(tmp_path, out, tmp_path / "work", in_place=in_place)

    out = tmp_path / "out"
    monkeypatch.setenv("FASTGPT_CUDA", "0")
    assert install()["reason"] == "FASTGPT_CUDA=0 asked for none" and not (out / "_ops.so").exists()
    monkeypatch.setenv("FASTGPT_CUDA", "auto")
    assert install()["status"] == "missing"
    assert (out / "_ops.so").exists() == in_place  # in the source tree it may have been carried there
    monkeypatch.setenv("FASTGPT_CUDA", "1")
    with pytest.raises(
        UserError, match=r"FASTGPT_CUDA=1 asks for CUDA kernels: no g\+\+ 11 or newer was found; install"
    ):
        install()
    compiler(tmp_path / "bin/g++", "12.2.0")
    headers(nowhere, "2.11.0")
    with pytest.raises(UserError, match=r"FASTGPT_CUDA=1 .*no nvcc was found: install the CUDA toolkit"):
        install()
    monkeypatch.setenv("FASTGPT_CUDA", "yes")
    with pytest.raises(UserError, match="FASTGPT_CUDA=yes, expected 0"):
        install()


def test_the_command_says_what_is_built_or_why_not(monkeypatch, capsys, tmp_path):
    done = {
        "status": "built",
        "nvcc": "13.0",
        "archs": ["8.0", "9.0a"],
        "compiler": "g++ 12.2.0",
        "torch_target": "2.11",
    }
    results = {
        "cuda": {"kind": "cuda", **done},
        "emulated": {"kind": "emulated", "status": "missing", "reason": "a reason"},
        "python": {"kind": "python", "status": "built", "compiler": "g++ 12.2.0", "python": "3.11"},
    }
    monkeypatch.setattr(build, "build", lambda kind, *_, **options: results[kind])
    assert build.main([]) == 0
    assert capsys.readouterr().out == (
        "_ops.so is built, by nvcc 13.0 for 8.0, 9.0a, g++ 12.2.0, for torch 2.11 and newer\n"
        "_ops_emulated.so is not built: a reason\n"
        f"{loading.MODULE} is built, by g++ 12.2.0, for Python 3.11\n"
    )
    assert build.main(["emulated"]) == 2
    assert capsys.readouterr().out == "_ops_emulated.so is not built: a reason\n"
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    monkeypatch.setenv("FASTGPT_CUDA", "0")
    assert build.main(["cuda"]) == 2
    assert capsys.readouterr().out == "_ops.so is not built: FASTGPT_CUDA=0 asked for none\n"
    monkeypatch.setattr(build, "CSRC", Path("nowhere"))
    assert build.main([]) == 2
    error = capsys.readouterr().err
    assert "sources are not installed" in error and error.count("\n") == 1


# ---- the libraries themselves --------------------------------------------------------------------------------------

HARMLESS = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}  # weak, of the C runtime


@pytest.mark.parametrize("kind", list(loading.FILES))
def test_nothing_outside_the_stable_abi_is_needed(kind):
    """Names of the C and C++ libraries carry a version; all others must be in torch's stable ABI, none is Python's."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", built(kind)], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in listed.stdout.splitlines()}
    others = {name for name in names if "@" not in name} - HARMLESS
    stable = {
        name for file in ("cpu", "cuda") for name in (ROOT / f"tests/stable_symbols_{file}.txt").read_text().split()
    }
    assert len(stable) > 500 and others <= stable, others - stable
    dynamic = subprocess.run(["readelf", "-d", built(kind)], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed
    assert not any("python" in name or "cuda" in name for name in needed), needed
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


# Every instantiation of a kernel costs time to compile, and bytes for each architecture.
INSTANTIATIONS = {
    "norm": 30,
    "swiglu": 16,
    "gelu": 16,
    "cross_entropy": 27,
    "rotary": 30,
    "embedding": 24,
    "adamw": 7,
    "grad_norm": 4,
    "attention": 53,
}


def test_instantiations_are_counted():
    built("cuda")
    counts: dict[str, int] = {}
    for path in build.CSRC.glob("*/*.cu"):
        noted = build.WORK / "cuda/csrc" / path.parent.name / f"{path.name}.o.kernels"
        names = {kernel["name"] for kernel in json.loads(noted.read_text())}
        counts[path.parent.name] = counts.get(path.parent.name, 0) + len(names)
    assert set(counts) == set(INSTANTIATIONS)
    assert all(0 < counts[op] <= limit for op, limit in INSTANTIATIONS.items()), counts


MEASURED = """
import resource, sys
from pathlib import Path
from fastgpt.native import build
assert build.build("cuda", out=Path(sys.argv[1]), work=Path(sys.argv[1]))["status"] == "built"
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print((used.ru_utime + used.ru_stime) / 2, used.ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("archs", "seconds"), [("9.0a", 120), ("", 300)], ids=["one architecture", "the default"])
def test_a_whole_build_is_quick_and_small(archs, seconds, tmp_path):
    """On two cores: half of the processor time, whatever else the machine is doing."""
    needs_nvcc()
    environment = {**os.environ, "MAX_JOBS": "2", "FASTGPT_CUDA_ARCHS": archs, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    took, largest = map(float, done.stdout.split())
    assert took < seconds and largest < toolchain.JOB_BYTES


@pytest.mark.slow
def test_nothing_spills_on_architectures_that_are_not_built_by_default(monkeypatch, tmp_path):
    """A spill ends the build."""
    needs_nvcc()
    archs = ["7.5", "8.6", "8.9", "10.0", "12.0"]
    monkeypatch.setenv("FASTGPT_CUDA_ARCHS", ";".join(archs))
    result = build.build("cuda", out=tmp_path / "out", work=tmp_path / "work")
    assert (result["status"], result["archs"]) == ("built", archs)


@pytest.mark.slow
def test_the_libraries_load_in_a_second_torch(tmp_path):
    """Another version than the one whose headers they were compiled with; a download of gigabytes."""
    import torch

    environment = Environment(tmp_path / "env", torch=False)
    this = torch.__version__.partition("+")[0]
    done = environment.pip(f"torch>={'.'.join(map(str, toolchain.OLDEST_TORCH))},!={this}", "numpy")
    assert done.returncode == 0, done.stderr
    for kind in loading.FILES:
        built(kind)
        code = f"KIND = {kind!r}\nimport torch\nassert torch.__version__.partition('+')[0] != {this!r}\n{REAL}"
        variables = environment.variables(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        done = subprocess.run([environment.python, "-c", code], capture_output=True, text=True, env=variables)
        assert done.returncode == 0, done.stderr
        assert set(done.stdout.split()) == {*schemas.read_pages(), *loading.SERVED_BY}


@pytest.mark.slow
def test_the_emulated_library_needs_headers_of_cuda_alone(monkeypatch, tmp_path):
    """Those from the package index, on a machine without a toolkit."""
    packages = tmp_path / "packages"
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", packages, environment_script().CUDA_HEADERS]
    subprocess.run(command, check=True)
    folders = [packages, *toolchain.package_folders()]
    monkeypatch.setattr(toolchain, "package_folders", lambda: folders)
    monkeypatch.setattr(toolchain, "USUAL_NVCC", tmp_path / "none")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert toolchain.find_cuda_headers().is_relative_to(packages)
    assert build.build("emulated", out=tmp_path / "out", work=tmp_path / "work")["status"] == "built"


# ---- installs, as people do them; each takes a while -----------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the source tree with tiny kernels."""
    copy = tmp_path_factory.mktemp("checkout") / "fastgpt"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split("\0")[:-1]:
        if (name.startswith("csrc/python/") or not name.startswith("csrc/")) and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    toy_sources(copy)
    subprocess.run(
        "git init -q && git add -A && git -c user.name=x -c user.email=x@x commit -qm x", shell=True, cwd=copy
    )
    return copy


class Environment:
    """A new virtual environment, with the torch of this one where asked for."""

    def __init__(self, folder: Path, torch: bool = True) -> None:
        venv.create(folder, with_pip=True)
        self.folder, self.python = folder, folder / "bin/python"
        self.site = next((folder / "lib").glob("python*/site-packages"))
        if torch:
            (self.site / "torch").symlink_to(toolchain.find_torch().folder)

    def variables(self, **changes: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", *VARIABLES)}
        return {**kept, "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin", "FASTGPT_CUDA_ARCHS": "8.0", **changes}

    def pip(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess:
        command = [self.python, "-m", "pip", "install", *map(str, arguments)]
        return subprocess.run(command, env=self.variables(**variables), capture_output=True, text=True)

    def native(self) -> Path:
        """Where fastgpt.native is when it is imported."""
        code = "import fastgpt.native as n; print(n.__file__)"
        done = subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True, cwd=self.folder)
        return Path(done.stdout.strip()).parent

    def result(self) -> dict:
        return loading.build_result("cuda", self.native())


def needs_nvcc() -> None:
    try:
        toolchain.find_nvcc()
    except Missing as missing:
        pytest.skip(str(missing))


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["plain", "editable"])
@pytest.mark.parametrize("isolated", [False, True], ids=["in this environment", "isolated"])
def test_an_install_builds_the_kernels(editable, isolated, checkout, tmp_path):
    needs_nvcc()
    environment = Environment(tmp_path / "env")
    if not isolated:
        assert environment.pip("setuptools>=77", "wheel", "ninja").returncode == 0
    options = ["--no-deps", *([] if isolated else ["--no-build-isolation"]), *(["-e"] if editable else [])]
    done = environment.pip(*options, checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    native = environment.native()
    assert (native == checkout / "fastgpt/native") == editable
    assert environment.result()["status"] == "built" and environment.result()["archs"] == ["8.0"]
    assert loading.read_info(native / "_ops.so")["kind"] == "cuda"
    unignored = subprocess.run(["git", "status", "--porcelain"], cwd=checkout, capture_output=True, text=True).stdout
    assert unignored == ""
    ignored = subprocess.run(
        ["git", "status", "--porcelain", "--ignored"], cwd=checkout, capture_output=True, text=True
    ).stdout.split("!! ")[1:]
    allowed = {"build/", "fastgpt.egg-info/", "fastgpt/native/_ops.so", "fastgpt/native/_ops_build_info.json",
               "fastgpt/_C_build_info.json"}  # fmt: skip
    module = f"fastgpt/{loading.MODULE}"
    assert {name.strip() for name in ignored if "__pycache__" not in name} <= {*allowed, module}
    if editable:
        objects = checkout / "build/native/cuda"  # not of fastgpt._C: in each isolated build pybind11 lies elsewhere
        before = {path: path.stat().st_mtime_ns for path in objects.rglob("*.o")}
        header = checkout / "csrc/toy/toy.cu"
        header.touch()
        assert environment.pip(*options, checkout).returncode == 0
        after = {path: path.stat().st_mtime_ns for path in objects.rglob("*.o")}
        assert [path.name for path in after if after[path] != before.get(path)] == ["toy.cu.o"]


@pytest.fixture
def without_toolkit(checkout, tmp_path) -> Path:
    """The checkout, as on a machine where /usr/local/cuda is not."""
    copy = tmp_path / "copy"
    shutil.copytree(checkout, copy)
    setup = copy / "setup.py"
    hide = "from fastgpt.native import toolchain\n\ntoolchain.USUAL_NVCC = Path('nowhere')\n\n\nclass BuildKernels"
    setup.write_text(setup.read_text().replace("class BuildKernels", hide, 1))
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("lacking", ["torch", "nvcc", "g++"])
def test_an_install_without_a_tool_is_plain_python_and_says_how_to_mend_it(lacking, without_toolkit, tmp_path):
    environment = Environment(tmp_path / "env", torch=lacking != "torch")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("g++", "gcc", "cc", "as", "ld") if lacking == "nvcc" else ():
        (tools / name).symlink_to(shutil.which(name))
    path = f"{environment.folder / 'bin'}:{tools}" if lacking != "torch" else os.environ["PATH"]
    done = environment.pip("--no-deps", without_toolkit, PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = environment.result()
    reason = {"torch": "install torch, then fastgpt again", "nvcc": "no nvcc was found", "g++": "no g++ 11 or newer"}
    assert result["status"] == "missing" and reason[lacking] in result["reason"]
    assert not (environment.native() / "_ops.so").exists()
    done = environment.pip("--no-deps", without_toolkit, PATH=path, FASTGPT_CUDA="1")
    assert done.returncode != 0 and "FASTGPT_CUDA=1 asks for CUDA kernels" in done.stdout + done.stderr


@pytest.mark.slow
def test_the_compiler_of_the_package_index_is_enough(without_toolkit, tmp_path):
    environment = Environment(tmp_path / "env")
    needed = re.search(r'^nvcc = \["(.*?)"\]', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert environment.pip(needed).returncode == 0
    done = environment.pip("--no-deps", without_toolkit)
    assert done.returncode == 0, done.stdout + done.stderr
    assert environment.result()["status"] == "built" and (environment.native() / "_ops.so").exists()


@pytest.mark.slow
def test_a_wheel_is_for_every_python(checkout, tmp_path):
    """The command of `make wheel`."""
    needs_nvcc()
    command = re.search(r"-m (pip wheel .*) && ", (ROOT / "Makefile").read_text())[1].split()
    command[command.index("dist")] = str(tmp_path)
    variables = {**os.environ, "FASTGPT_CUDA": "1", "FASTGPT_CUDA_ARCHS": "8.0"}
    subprocess.run([sys.executable, "-m", *command], cwd=checkout, env=variables, check=True, capture_output=True)
    (wheel,) = tmp_path.iterdir()
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"fastgpt/native/_ops.so", "fastgpt/native/_ops_build_info.json", "fastgpt/model.py"} <= set(names)
    assert not [name for name in names if "emulated" in name or name.startswith(("csrc", "tests", "tools"))]

"""fastgpt._C, the typed view of the kernels; and what a build notes of their registers and memory."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastgpt import native, ops
from fastgpt.native import build, loading, resources, toolchain
from tests.native_cases import ROOT, built, toy_sources

STUB = ROOT / "fastgpt/_C.pyi"


@pytest.fixture(scope="module")
def module() -> ModuleType:
    result = build.build("python", out=loading.MODULE_FOLDER)
    if result["status"] != "built":
        pytest.skip(build.describe(result))
    return importlib.import_module("fastgpt._C")


@pytest.fixture
def emulated(module: ModuleType):
    built("emulated")
    return module.Library("emulated")


X, WEIGHT = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)), torch.ones(64)


# ---- the view ------------------------------------------------------------------------------------------------


def test_the_stub_has_what_the_module_has_and_everything_says_what_it_is(module: ModuleType) -> None:
    classes = {node.name: node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ClassDef)}
    assert set(classes) == {name for name in vars(module) if not name.startswith("_")} and module.__doc__
    for name, node in classes.items():
        kind = getattr(module, name)
        members = {member for member in vars(kind) if not member.startswith("_")}
        assert {part.name for part in node.body} - {"__init__"} == members and kind.__doc__
        assert all(getattr(kind, member).__doc__ for member in members)


def test_build_info_is_the_librarys(emulated) -> None:
    info = native.loading.library("emulated").info
    assert emulated.path == str(loading.FOLDER / "_ops_emulated.so")
    assert {name: getattr(emulated.build_info, name) for name in ("kind", "schema_digest", "torch_target")} == {
        name: info[name] for name in ("kind", "schema_digest", "torch_target")
    }
    assert emulated.build_info.nvcc == "" and emulated.build_info.archs == []
    assert "BuildInfo(kind='emulated', " in repr(emulated.build_info)


def test_every_kernel_has_registers_and_memory_on_every_architecture(module: ModuleType) -> None:
    built("cuda")
    library = module.Library()
    listed = subprocess.run(
        ["nm", "-C", "--defined-only", built("emulated")], capture_output=True, text=True, check=True
    )
    plain = re.sub(r"fastgpt::|\(anonymous namespace\)::", "", listed.stdout)
    names = set(re.findall(r" (?:void )?(\w+_kernel(?:<[^()]*>)?)\([^()]*\)$", plain, re.M))
    kernels = library.kernels()
    assert names and {kernel.name for kernel in kernels} == names, "those that the emulator runs"
    assert len(kernels) == len(names) * len(library.build_info.archs) == len({(k.name, k.arch) for k in kernels})
    for kernel in kernels:
        ends_at_once = "sm90" in kernel.name and not kernel.arch.startswith("90")  # it is not launched there
        assert ends_at_once or kernel.registers >= 16, kernel
        assert kernel.registers <= 255 and kernel.spilled_bytes == kernel.local_bytes == 0, kernel
        assert kernel.shared_bytes <= 48 * 1024
    assert any(kernel.shared_bytes for kernel in kernels)


def test_a_call_is_asked_which_path_it_would_take(emulated) -> None:
    x = X.clone().requires_grad_()
    with native.emulated(profile=True):
        native.counters()
        (aligned,) = emulated.choose_path(lambda: ops.rms_norm(X, WEIGHT))
        forward, backward = emulated.choose_path(lambda: ops.layer_norm(x[:, 1:], WEIGHT[1:]).sum().backward())
        assert native.counters() == [], "nothing was launched"
        assert emulated.choose_path(lambda: None) == []
        with pytest.raises(KeyError):
            emulated.choose_path(lambda: {}["a call that fails"])
        y = ops.rms_norm(X, WEIGHT)
        assert native.counters() != []
    assert (aligned.entry, aligned.path) == ("rms_norm_forward", "vector") and aligned.reason
    assert [(p.entry, p.path) for p in (forward, backward)] == [
        ("layer_norm_forward", "generic"),
        ("layer_norm_backward", "generic"),
    ]
    assert forward.reason == "the width is no multiple of 16 bytes"
    last = emulated.last_path()
    assert (last.entry, last.path, last.reason) == (aligned.entry, aligned.path, aligned.reason)
    torch.testing.assert_close(y, ops.rms_norm(X, WEIGHT))


def test_counters_and_findings_are_those_of_the_emulator(emulated) -> None:
    with native.emulated(profile=True):
        ops.rms_norm(X, WEIGHT)
        said = native.counters()
        ops.rms_norm(X, WEIGHT)
        seen = emulated.counters()
    plain = [(line["kernel"], line["file"], line["line"], line["space"], line["requests"]) for line in said]
    assert plain == [(c.kernel, c.file, c.line, c.space, c.requests) for c in seen] and seen[0].bytes
    assert [line["sectors"] for line in said if line["space"] == "global"] == [
        c.units for c in seen if c.space == "global"
    ]

    wide, weight = torch.randn(2, 2048), torch.ones(2048)
    with native.emulated():
        ops.rms_norm(wide, weight)
        sites = [site.id for site in native.sites() if site.kind == "__syncthreads"]
    for site in sites:
        try:
            with native.emulated(disabled_site=site):
                ops.rms_norm(wide, weight)
        except RuntimeError as error:
            raised = str(error)
            break
    (first, *_) = emulated.findings()
    assert first.kind and first.message in raised and first.kernel.startswith("fastgpt::")
    assert first.file.startswith("csrc/") and first.line > 0 and len(first.thread) == len(first.block) == 3
    assert emulated.findings() == []


def test_what_the_other_library_tells_is_refused_and_so_is_a_library_that_is_not_there(
    emulated, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="has no fastgpt_kernels: it is the other library that tells this"):
        emulated.kernels()
    monkeypatch.setattr(loading, "_libraries", {"cuda": loading.Refused("_ops.so is not built: it is a test")})
    with pytest.raises(RuntimeError, match=r"_ops.so is not built: it is a test"):
        module.Library()


# ---- building it ---------------------------------------------------------------------------------------------


def test_without_headers_it_is_not_built_and_the_reason_is_kept(tmp_path: Path, monkeypatch) -> None:
    csrc = toy_sources(tmp_path)
    assert build.build("python", csrc, tmp_path, tmp_path / "work")["reason"] == "its sources are not here"
    (csrc / "python").mkdir()
    (csrc / "python/module.cpp").write_text("")
    monkeypatch.setattr(toolchain, "package_folders", lambda: [tmp_path])
    result = build.build("python", csrc, tmp_path, tmp_path / "work")
    assert (result["status"], result["reason"]) == ("missing", "pybind11 was not found; pip install pybind11")
    monkeypatch.setattr(loading, "MODULE_FOLDER", tmp_path)
    row = native.libraries()[-1]
    assert (
        row["state"] == "not built" and "pybind11 was not found; pip install pybind11; the kernels do" in row["reason"]
    )
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "the headers of Python were not found" in build.build("python", csrc, tmp_path, tmp_path / "work")["reason"]


def test_the_libraries_know_nothing_of_python() -> None:
    """The module's sources go into it alone."""
    for kind in loading.FILES:
        assert not [name for _, name in build.sources(build.CSRC, kind) if "/python/" in name]
    assert build.sources(build.CSRC, "python") == [("module", "csrc/python/module.cpp")]


# ---- registers and memory --------------------------------------------------------------------------------------

SAID = """ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function '_Z3onePf' for 'sm_80'
ptxas info    : Function properties for _Z3onePf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 4096 bytes smem, 400 bytes cmem[0]
a.cu(3): warning #177-D: variable "x" was declared but never referenced
ptxas info    : Compiling entry function '_Z3onePf' for 'sm_90a'
ptxas info    : Function properties for _Z3onePf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers
"""
ONE = {"name": "_Z3onePf", "arch": "80", "registers": 32, "shared_bytes": 4096, "local_bytes": 16, "spilled_bytes": 8}


def test_what_ptxas_says_is_read_and_the_rest_is_passed_on() -> None:
    kernels, others = resources.parse(SAID)
    assert kernels[0] == ONE
    assert kernels[1] == {**dict.fromkeys(ONE, 0), "name": "_Z3onePf", "arch": "90a", "registers": 18}
    assert others == SAID.splitlines(keepends=True)[5]


def test_a_compiler_that_fails_fails_the_build(tmp_path: Path, capsys) -> None:
    say = "import sys; sys.stderr.write(sys.argv[1]); sys.exit(int(sys.argv[2]))"
    for code in (3, 0):
        out = tmp_path / f"{code}.kernels"
        assert resources.main(["compile", str(out), sys.executable, "-c", say, SAID, str(code)]) == code
        assert out.exists() == (code == 0)
        assert capsys.readouterr().err == SAID.splitlines(keepends=True)[5]
    names = {kernel["name"] for kernel in json.loads((tmp_path / "0.kernels").read_text())}
    assert names in ({"one"}, {"_Z3onePf"})


def test_a_wgmma_that_is_serialised_fails_the_build(tmp_path: Path, capsys) -> None:
    """ptxas calls it information and goes on."""
    warning = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\n"
    say = "import sys; sys.stderr.write(sys.argv[1])"
    assert resources.main(["compile", str(tmp_path / "out"), sys.executable, "-c", say, SAID + warning]) == 1
    assert warning in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_header_changes_only_when_a_kernel_does(tmp_path: Path) -> None:
    part, header = tmp_path / "part", tmp_path / "header.h"
    part.write_text(json.dumps([ONE] * 200))
    resources.main(["join", str(header), str(part)])
    text, written = header.read_text(), header.stat().st_mtime_ns
    assert json.loads("".join(text.split('R"json(')[1:]).replace(')json" ', "").replace(')json"\n', "")) == [ONE] * 200
    resources.main(["join", str(header), str(part)])
    assert header.stat().st_mtime_ns == written
    part.write_text(json.dumps([ONE]))
    resources.main(["join", str(header), str(part)])
    assert header.read_text() != text

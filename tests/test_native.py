"""What serves an op, and how loudly it says so; which libraries of kernels are refused; the emulator's switch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastgpt import native, ops
from fastgpt.errors import UserError
from fastgpt.native import loading, schemas
from tests.native_cases import REAL, built, good_info, toy_library

ON_GPU, ON_CPU = SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=False)
HELPERS = {"document_bounds", "rotary_tables"}  # of other ops: they have no kernel of their own


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library is built, and nothing was said yet."""
    monkeypatch.setattr(native, "_warned", False)
    monkeypatch.setattr(native, "_cuda_ops", None)
    monkeypatch.setattr(native, "_devices_checked", False)
    monkeypatch.setattr(loading, "_libraries", {"cuda": loading.Refused("_ops.so is not built: it is a test")})
    monkeypatch.delenv("FASTGPT_REQUIRE_KERNELS", raising=False)


def test_a_gpu_without_kernels_is_worth_one_warning(capfd: pytest.CaptureFixture[str]) -> None:
    assert native.select(ON_CPU) is None
    assert capfd.readouterr().err == ""
    assert native.select(ON_GPU) is None and native.select(ON_GPU) is None
    said = capfd.readouterr().err
    assert said.startswith("fastgpt: no CUDA kernels are built; the PyTorch reference runs on the GPU (_ops.so is not")
    assert said.count("\n") == 1


def test_required_kernels_that_are_missing_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGPT_REQUIRE_KERNELS", "1")
    with pytest.raises(RuntimeError, match="no CUDA kernels built; unset FASTGPT_REQUIRE_KERNELS"):
        native.select(ON_GPU)
    assert native.select(ON_CPU) is None
    monkeypatch.setenv("FASTGPT_REQUIRE_KERNELS", "0")
    assert native.select(ON_GPU) is None


def test_status_has_every_op_and_a_reason() -> None:
    rows = native.status()
    public = set(ops.__all__) - HELPERS
    assert {row["op"] for row in rows} == {name.rstrip("_") for name in public}, "named as their pages"
    assert all(row["implementation"] == "reference" and row["reason"] for row in rows)


def test_imports_are_light() -> None:
    """The builder imports `fastgpt.native` where there is no torch; the ops need torch and nothing that is not core."""
    code = "import sys; import fastgpt.native; assert 'torch' not in sys.modules; import fastgpt.ops; " + (
        "print([m for m in ('tokenizers', 'tiktoken', 'tyro', 'rich', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- libraries that do not fit ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the libraries are looked for."""
    monkeypatch.setattr(loading, "FOLDER", tmp_path)
    monkeypatch.setattr(loading, "_libraries", {})
    (tmp_path / "loads").mkdir()
    return tmp_path


def leaving_a_trace(folder: Path) -> str:
    """C++ that shows that it ran: what torch's registrations do, too."""
    return f"""
#include <cstdio>
__attribute__((constructor)) static void run() {{ std::fclose(std::fopen("{folder / "loads/trace"}", "w")); }}
extern "C" const char* greeting() {{ return "{{\\"hello\\": 1}}"; }}
"""


def refusal(folder: Path, kind: str = "cuda") -> str:
    """The line with which the library is refused, before any of its code has run."""
    with pytest.raises(loading.Refused) as caught:
        loading.load(kind, folder)
    assert not (folder / "loads/trace").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_library_that_fits_is_loaded_once(folder: Path) -> None:
    toy_library(folder / "_ops.so", good_info(), leaving_a_trace(folder))
    library = loading.library("cuda")
    assert isinstance(library, loading.Library) and library.info == good_info()
    assert (folder / "loads/trace").exists()
    assert library.json("fastgpt_build_info") == good_info() and library.json("greeting") == {"hello": 1}
    assert loading.library("cuda") is library


def test_a_missing_library_says_why_and_how_to_build_it(folder: Path) -> None:
    installed = "_ops.so is not built: install fastgpt again from its source"
    assert refusal(folder) == installed
    assert "`make kernels`" in refusal(folder, "emulated")
    (folder / "_ops_build_info.json").write_text(json.dumps({"status": "missing", "reason": "no nvcc was found"}))
    assert refusal(folder) == "_ops.so is not built: no nvcc was found; then install fastgpt again from its source"
    (folder / "_ops_build_info.json").write_text("{")
    assert refusal(folder) == installed


@pytest.mark.parametrize(
    "content", [b"", b"\x7fEL", b"not a library at all", b"<html>" * 100, b"\xcf\xfa\xed\xfe" * 32]
)
def test_what_is_no_library_is_refused(content: bytes, folder: Path) -> None:
    (folder / "_ops.so").write_bytes(content)
    assert "_ops.so is not a shared library; " in refusal(folder)


def test_a_library_cut_off_anywhere_is_refused(folder: Path) -> None:
    whole = toy_library(folder / "_ops.so", good_info(), leaving_a_trace(folder)).read_bytes()
    for size in [4, 10, 63, 64, 65, *range(200, len(whole), len(whole) // 40), len(whole) - 1]:
        (folder / "_ops.so").write_bytes(whole[:size])
        assert "_ops.so is truncated: " in refusal(folder), size


@pytest.mark.parametrize("at", [4, 5, 18], ids=["32 bits", "big endian", "another processor"])
def test_a_library_for_another_machine_is_refused(at: int, folder: Path) -> None:
    whole = bytearray(toy_library(folder / "_ops.so", good_info(), leaving_a_trace(folder)).read_bytes())
    whole[at] = {4: 1, 5: 2, 18: 243}[at]
    (folder / "_ops.so").write_bytes(whole)
    assert "_ops.so is built for another kind of machine than this one" in refusal(folder)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (None, "is no library of fastgpt: it has no build info"),
        ("text", "has build info that cannot be read"),
        ({}, "has build info that cannot be read"),
        (good_info(version=2), "has build info of version 2, expected 1"),
        (good_info(kind="emulated"), "holds the emulated kernels, expected the cuda ones"),
        (good_info(schema_digest="0123"), r"is stale: it was built for other schemas (0123) than fastgpt/ops has now"),
        (good_info(torch_target="9.1"), "needs torch 9.1 or newer, and this is torch "),
    ],
)
def test_a_library_with_other_build_info_is_refused(info: dict | None, message: str, folder: Path) -> None:
    toy_library(folder / "_ops.so", info, leaving_a_trace(folder))
    assert f"_ops.so {message}" in refusal(folder)


def test_one_schema_changed_since_makes_a_library_stale(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_library(folder / "_ops.so", good_info(), leaving_a_trace(folder))
    pages = folder / "pages"
    pages.mkdir()
    for page in schemas.OPS_FOLDER.glob("*.py"):
        (pages / page.name).write_text(page.read_text())
    monkeypatch.setattr(loading, "schema_digest", lambda: schemas.schema_digest(pages))
    assert loading.load("cuda", folder)
    (folder / "loads/trace").unlink()
    (pages / "swiglu.py").write_text('SCHEMAS = {"swiglu_forward": "(Tensor gate, float limit) -> Tensor"}\n')
    assert "is stale" in refusal(folder)


def test_a_library_that_the_system_cannot_load_is_refused(folder: Path) -> None:
    toy_library(folder / "_ops.so", good_info(), "void absent(); void (*use)() = absent;")
    assert "_ops.so does not load: " in (reason := refusal(folder)) and "undefined symbol" in reason


def test_a_refused_library_falls_back_loudly(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    toy_library(folder / "_ops.so", good_info(schema_digest="0123"), leaving_a_trace(folder))
    assert native.select(ON_CPU) is None and capfd.readouterr().err == ""
    assert native.select(ON_GPU, "layer_norm") is None
    assert "the PyTorch reference runs on the GPU (_ops.so is stale" in capfd.readouterr().err
    states = {row["library"]: row for row in native.libraries()}
    assert states["_ops.so"]["state"] == "refused" and "is stale" in states["_ops.so"]["reason"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert all("_ops.so is stale" in row["reason"] for row in native.status())
    monkeypatch.setenv("FASTGPT_REQUIRE_KERNELS", "1")
    with pytest.raises(native.KernelsMissing, match=r"for layer_norm there are no CUDA kernels built.*is stale"):
        native.select(ON_GPU, "layer_norm")


# ---- with CUDA kernels -----------------------------------------------------------------------------------


@pytest.fixture
def kernels_of_layer_norm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toy_library(folder / "_ops.so", good_info())
    library = loading.Library(path, good_info(), frozenset({"layer_norm"}), loading.load("cuda", folder).handle)
    monkeypatch.setattr(loading, "_libraries", {"cuda": library})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))


@pytest.mark.usefixtures("kernels_of_layer_norm")
def test_kernels_serve_their_ops_and_the_others_are_named_once(capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.select(ON_GPU, "layer_norm") is torch.ops.fastgpt and capfd.readouterr().err == ""
    assert native.select(ON_GPU, "gelu") is None and native.select(ON_GPU, "attention") is None
    said = capfd.readouterr().err
    assert "no CUDA kernels are built for swiglu, gelu, rms_norm, attention" in said and said.count("\n") == 1
    rows = {row["op"]: row for row in native.status()}
    assert rows["layer_norm"]["implementation"] == "CUDA kernels" and "8.0+PTX, 9.0a" in rows["layer_norm"]["reason"]
    assert rows["gelu"]["implementation"] == "reference" and "no CUDA kernel yet" in rows["gelu"]["reason"]
    monkeypatch.setenv("FASTGPT_REQUIRE_KERNELS", "1")
    assert native.select(ON_GPU, "layer_norm") is torch.ops.fastgpt
    with pytest.raises(native.KernelsMissing, match="for gelu there are no CUDA kernels"):
        native.select(ON_GPU, "gelu")


@pytest.mark.usefixtures("kernels_of_layer_norm")
def test_kernels_for_other_gpus_are_left_aside(capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert native.select(ON_GPU, "layer_norm") is None
    assert "_ops.so is built for 8.0+PTX, 9.0a, and a GPU here has compute capability 7.5" in capfd.readouterr().err


# ---- the emulator ----------------------------------------------------------------------------------------

EMULATOR = """
#include <string>
static std::string settings = "null";
extern "C" {
void fastgpt_emulator_configure(const char* json) { settings = json; }
const char* fastgpt_emulator_counters() { return settings.c_str(); }
const char* fastgpt_emulator_sites() { return R"([
  {"id": 3, "kind": "__syncthreads", "file": "a.cu", "line": 7, "inlined": ["b.cuh:1"],
   "alterations": ["twice"], "met": true},
  {"id": 4, "kind": "in_bounds", "file": "a.cu", "line": 8, "inlined": [],
   "alterations": [], "met": false}])"; }
const char* fastgpt_emulator_findings() {
  return R"([{"kind": "data race", "kernel": "k", "message": "m", "thread": [1, 2, 3], "block": [0, 0, 0],
              "file": "a.cu", "line": 7, "inlined": ["b.cuh:1"]},
              {"kind": "deadlock", "kernel": "k", "message": "m", "thread": null, "block": null,
               "file": "a.cu", "line": 9, "inlined": []}])";
}
}
"""


@pytest.fixture
def emulator(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has kernels of layer_norm, and remembers its settings."""
    info = good_info(kind="emulated")
    path = toy_library(folder / "_ops_emulated.so", info, EMULATOR)
    library = loading.Library(path, info, frozenset({"layer_norm"}), loading.load("emulated", folder).handle)
    monkeypatch.setattr(loading, "_libraries", {"emulated": library})


@pytest.mark.usefixtures("emulator")
def test_inside_emulated_cpu_tensors_go_to_the_kernels() -> None:
    x = torch.ones(2)
    with native.emulated():
        assert native.select(x, "layer_norm") is torch.ops.fastgpt_emulated
        assert native.select(torch.empty(2, device="meta"), "layer_norm") is None
        with pytest.raises(native.KernelsMissing, match="gelu has no kernel for the emulator, which has: layer_norm; "):
            native.select(x, "gelu")
    assert native.select(x, "layer_norm") is None
    with native.emulated(only=["layer_norm"]):
        assert native.select(x, "layer_norm") is torch.ops.fastgpt_emulated
        assert native.select(x, "gelu") is None
    with native.emulated(only=[]):
        assert native.select(x, "layer_norm") is None
    with (
        pytest.raises(UserError, match="gelu cannot be emulated: there are kernels of layer_norm"),
        native.emulated(only=["layer_norm", "gelu"]),
    ):
        pass


@pytest.mark.usefixtures("emulator")
def test_settings_reach_the_emulator_and_end_with_their_block() -> None:
    default = {"chip": "sm_90a", "seed": 0, "checked": True, "profile": False, "disabled_site": -1}
    with native.emulated():
        assert native.counters() == default
        with pytest.raises(KeyError), native.emulated("sm_80", seed=3, checked=False, profile=True, disabled_site=5):
            assert native.counters() == {
                "chip": "sm_80", "seed": 3, "checked": False, "profile": True, "disabled_site": 5,
            }  # fmt: skip
            raise KeyError
        assert native.counters() == default
        with native.emulated(altered_site=(5, "twice")):
            assert native.counters() == default | {"altered_site": 5, "alteration": "twice"}
        with pytest.raises(ValueError, match="give one"), native.emulated(disabled_site=1, altered_site=(5, "twice")):
            pass
        assert native.counters() == default
        assert native.select(torch.ones(1), "layer_norm") is not None
    assert native.select(torch.ones(1), "layer_norm") is None


@pytest.mark.usefixtures("emulator")
def test_what_the_emulator_reports_is_typed() -> None:
    assert native.findings() == [
        native.Finding("data race", "k", "m", (1, 2, 3), (0, 0, 0), "a.cu", 7, ("b.cuh:1",)),
        native.Finding("deadlock", "k", "m", None, None, "a.cu", 9),
    ]
    barrier = native.Site(3, "__syncthreads", "a.cu", 7, ("b.cuh:1",), ("twice",))
    test = native.Site(4, "in_bounds", "a.cu", 8)
    assert native.sites() == [barrier, test]
    assert native.sites(met_inside=True) == [barrier]


@pytest.mark.usefixtures("folder")
def test_without_the_emulators_library_the_remedy_is_named() -> None:
    with pytest.raises(UserError, match="_ops_emulated.so is not built: `make kernels`"), native.emulated():
        pass
    with pytest.raises(UserError, match="make kernels"):
        native.findings()


# ---- the real ones ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(loading.FILES))
def test_what_is_built_here_loads(kind: str) -> None:
    """Also where torch has no CUDA: kernels for a GPU do no harm there."""
    built(kind)
    code = f"KIND = {kind!r}\n{REAL}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    # every op that declares entries has kernels, and so have those that are made of such an op
    assert set(done.stdout.split()) == {*schemas.read_pages(), *loading.SERVED_BY}

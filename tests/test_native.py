"""What serves an op, and how loudly it says so."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from fastgpt import native, ops
from fastgpt.native import loading

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
    assert {row["op"] for row in rows} == set(ops.__all__) - HELPERS
    assert all(row["implementation"] == "reference" and row["reason"] for row in rows)


def test_imports_are_light() -> None:
    """The builder imports `fastgpt.native` where there is no torch; the ops need torch and nothing that is not core."""
    code = "import sys; import fastgpt.native; assert 'torch' not in sys.modules; import fastgpt.ops; " + (
        "print([m for m in ('tokenizers', 'tiktoken', 'tyro', 'rich', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

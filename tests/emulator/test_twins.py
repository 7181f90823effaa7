"""Both twins of every function in csrc/ptx compile: the emulated with g++, the GPU's with nvcc where there is one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from fastgpt.native import toolchain

ROOT = Path(__file__).parent.parent.parent
SOURCE = "tests/emulator/every_instruction.cu"


def test_every_function_is_used() -> None:
    """The source below is worth something only if it calls every function of every file."""
    text = (ROOT / SOURCE).read_text()
    for file in sorted((ROOT / "csrc/ptx").glob("*_gpu.cuh")):
        emulated = (ROOT / "csrc/ptx" / file.name.replace("_gpu", "_emulated")).read_text()
        functions = set(re.findall(r"FASTGPT_PTX [\w*]+ ?\*?(\w+)\(", file.read_text()))
        assert functions, file.name
        assert functions == set(re.findall(r"FASTGPT_PTX [\w*]+ ?\*?(\w+)\(", emulated)), file.name
        missing = {name for name in functions if not re.search(rf"\b{name}[<(]", text)} - {"shared_address"}
        assert not missing, file.name


@pytest.mark.parametrize("arch", ["compute_80,code=sm_80", "compute_90a,code=sm_90a"])
def test_gpu_twins_compile(tmp_path: Path, arch: str) -> None:
    try:
        nvcc = toolchain.find_nvcc()
        gxx = toolchain.find_compiler()
    except toolchain.Missing as missing:
        pytest.skip(str(missing))
    command = [str(nvcc.path), "-ccbin", str(gxx.path), "-std=c++17", "-Icsrc", f"-gencode=arch={arch}"]
    done = subprocess.run(
        [*command, "-c", SOURCE, "-o", str(tmp_path / "out.o")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # What ptxas says about a misused wgmma: it would be serialised.
    assert "C75" not in done.stdout + done.stderr

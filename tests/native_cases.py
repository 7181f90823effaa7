"""What the tests of the compiled libraries share: the libraries built, and tiny sources to build others from."""

from __future__ import annotations

import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fastgpt.native import build, loading, schemas

ROOT = Path(__file__).resolve().parents[1]


@cache
def built(kind: str) -> Path:
    """The library of a kind in its place, brought up to date; skips the test where this machine cannot build it."""
    result = build.build(kind)
    if result["status"] != "built":
        pytest.skip(build.describe(result))
    return loading.FOLDER / loading.FILES[kind]


# A program that loads the library KIND, and prints the ops that it serves.
REAL = """
import torch
from fastgpt import native, ops
from fastgpt.native import loading
states = {row["library"]: row for row in native.libraries()}
assert states[loading.FILES[KIND]]["state"] == "loaded", states
library = loading.library(KIND)
assert library.json("fastgpt_build_info") == library.info
x, weight = torch.randn(3, 8), torch.ones(8)
if KIND == "emulated":
    with native.emulated(only=library.ops):
        for op in sorted(library.ops):
            assert native.select(x, op) is torch.ops.fastgpt_emulated
        y = torch.compile(ops.rms_norm, fullgraph=True, backend="eager")(x, weight)
        assert torch.equal(y, ops.rms_norm(x, weight))
        p, g, m, v = torch.ones(4, 4).unbind()  # lists of tensors go through the stable ABI
        ops.adamw_([p], [g], [m], [v], lr=0.5, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0, step=1)
        assert torch.equal(p, torch.full((4,), 0.5)) and ops.grad_norm([g, g]) == 8
print(*sorted(library.ops))
"""

TOY = {
    "toy/toy.h": "#pragma once\nvoid scale(float* x, int n);\n",
    "toy/toy.cu": """
#include "toy/toy.h"
#if defined(__CUDACC__)
__global__ void scale_kernel(float* x, int n) { if (threadIdx.x < n) x[threadIdx.x] *= 2; }
void scale(float* x, int n) { scale_kernel<<<1, 32>>>(x, n); }
#else
void scale(float* x, int n) { for (int i = 0; i < n; ++i) x[i] *= 2; }
#endif
""",
    "toy/toy.cpp": """
#include "toy/toy.h"
extern "C" __attribute__((visibility("default"))) void toy(float* x) { scale(x, 4); }
""",
    "emulator/hooks.cpp": """
extern "C" {
int hooked = 0;
void __tsan_init() {}
void __tsan_read4(void*) { ++hooked; }
void __tsan_write4(void*) { ++hooked; }
void __ubsan_handle_type_mismatch_v1(void*, unsigned long) {}
__attribute__((visibility("default"))) int times_hooked() { return hooked; }
}
""",
}


def toy_sources(folder: Path) -> Path:
    """A csrc/ with one op and next to no emulator, quick to compile."""
    for name, text in TOY.items():
        path = folder / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "csrc/host").mkdir(exist_ok=True)
    shutil.copy(ROOT / "csrc/host/info.cpp", folder / "csrc/host")
    return folder / "csrc"


def good_info(**changes: Any) -> dict[str, Any]:
    """The build info of a library that fits this package."""
    digest = schemas.schema_digest()
    info = {"version": 1, "kind": "cuda", "schema_digest": digest, "torch_target": "2.11", "archs": ["8.0+PTX", "9.0a"]}
    return {**info, **changes}


def toy_library(path: Path, info: dict[str, Any] | None, code: str = "") -> Path:
    """A shared library with this build info and some code of a test's own."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ is here")
    text = "" if info is None else f'#define FASTGPT_BUILD_INFO R"json({json.dumps(info)})json"\n'
    path.with_name("fastgpt_build_info.h").write_text(text)
    source = path.with_suffix(".cpp")
    source.write_text(code + ("" if info is None else f'\n#include "{ROOT / "csrc/host/info.cpp"}"\n'))
    command = [compiler, "-shared", "-fPIC", f"-I{path.parent}", source, "-o", path]
    subprocess.run(command, check=True, capture_output=True)
    return path

"""The Triton peers of the benchmarks are right, by the rule: run by Triton's interpreter, on a CPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# In a process of its own: whether Triton interprets is decided when the kernels are defined.
CODE = """
import torch
import torch.nn.functional as F
from benchmarks import triton_twins
from benchmarks.triton_twins import rms_norm, swiglu
from tests.rule import check_by_rule, randn

triton_twins.PROGRAMS = 7  # so that each has several rows here, too

def torch_swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up

def torch_rms_norm(x, weight):
    wide = x.double() if x.dtype == torch.float64 else x.float()  # statistics in 16 bits are no bar to be held to
    return F.rms_norm(wide, weight.shape, weight.to(wide.dtype), 1e-6).to(x.dtype)

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for shape in ((2, 10, 8), (20, 37), (3, 1030)):
        gate_up = randn(*shape[:-1], 2 * shape[-1], dtype=dtype)
        check_by_rule(swiglu, torch_swiglu, [gate_up], f"swiglu {shape}")
        x, weight = randn(*shape, dtype=dtype, seed=1), randn(shape[-1], dtype=dtype, seed=2)
        check_by_rule(rms_norm, torch_rms_norm, [x, weight], f"rms_norm {shape}")
print("right")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed; it is in '.[bench]'")
def test_twins_are_right() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "right", done.stderr[-3000:]

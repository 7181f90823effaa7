"""Whole training steps on kernels: on fake CUDA tensors for the way that a step takes, emulated for its numbers."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import ModelConfig, TrainConfig, Trainer, native, train
from fastgpt.config import CheckpointConfig, DataConfig, EvalConfig, OptimConfig
from fastgpt.model import ops_of
from fastgpt.native import loading, schemas, toolchain
from tests.fake_cuda import ACCUMULATION, CASES, LAYERS, PLANTS, STEPS
from tests.native_cases import ROOT, built
from tests.ops import kernels
from tests.synthetic import VOCAB, text_ids, write_dataset

# ---- fake CUDA -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What became of each case of fake_cuda.py."""
    command = [sys.executable, "-m", "tests.fake_cuda", str(tmp_path_factory.mktemp("fake_cuda"))]
    if torch.version.cuda is None:
        command.append(str(stand_in()))
    elif not torch.cuda.is_available():
        pytest.skip("this torch has CUDA, and autograd would look for the GPU, which is not here")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    print(done.stderr)  # where a case failed, its traceback
    return json.loads(done.stdout)


def stand_in() -> Path:
    """tests/fake_cuda.cpp, compiled against the torch here, once."""
    source = ROOT / "tests/fake_cuda.cpp"
    try:
        compiler, folder = toolchain.find_compiler(), toolchain.find_torch().folder
    except toolchain.Missing as missing:
        pytest.skip(str(missing))
    library = folder / "lib"
    command = [compiler.path, "-shared", "-fPIC", "-std=c++20", "-isystem", folder / "include", source]
    command += [f"-L{library}", f"-Wl,-rpath,{library}", "-ltorch_cpu", "-lc10"]
    key = hashlib.sha256(repr((torch.__version__, list(map(str, command)), source.read_text())).encode()).hexdigest()
    made = ROOT / "build/tests" / f"fake_cuda-{key[:12]}.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        temporary = made.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", temporary], check=True)
        temporary.replace(made)
    return made


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_the_device_once_when_all_is_queued(case: str, outcomes: dict[str, Any]) -> None:
    found = outcomes[case]
    assert found["error"] is None
    assert len(found["ends"]) == STEPS and found["reads"] == found["ends"]


@pytest.mark.parametrize("op", sorted(schemas.read_pages()))
def test_each_op_that_has_kernels_is_called_by_a_step(op: str, outcomes: dict[str, Any]) -> None:
    """Forward and backward, where it has both; that no reference is called, the cases hold for themselves."""
    entries = schemas.read_pages()[op]
    called = {entry for case in CASES for entry in outcomes[case]["entries"]}
    parts = {part: {entry for entry in entries if entry.endswith(part)} for part in ("_forward", "_backward")}
    both = called & set(entries).difference(*parts.values())  # does all at once
    for wanted in parts.values():
        assert both or not wanted or wanted & called, f"no case calls any of {wanted}"
    assert called & set(entries)


@pytest.mark.parametrize(("case", "op"), [("gpt2 float32", "layer_norm"), ("llama float32", "rms_norm")])
def test_norms_are_called_for_every_micro_batch(case: str, op: str, outcomes: dict[str, Any]) -> None:
    calls = STEPS * ACCUMULATION * (2 * LAYERS + 1)
    for part in ("forward", "backward"):
        assert outcomes[case]["entries"].count(f"{op}_{part}") == calls


@pytest.mark.parametrize("case", CASES)
def test_an_update_is_one_norm_and_a_call_for_each_group(case: str, outcomes: dict[str, Any]) -> None:
    """Of matrices and of vectors; and no optimizer of torch's beside it."""
    entries = outcomes[case]["entries"]
    assert (entries.count("grad_norm"), entries.count("adamw_")) == (STEPS, STEPS * 2)


@pytest.mark.parametrize("plant", PLANTS)
def test_whatever_waits_is_found(plant: str, outcomes: dict[str, Any]) -> None:
    assert outcomes[plant]["error"].startswith("Waited: ")


def test_a_reference_in_the_place_of_a_kernel_is_found(outcomes: dict[str, Any]) -> None:
    assert outcomes["no kernels"]["error"] == "AssertionError: the reference was called"


# ---- emulated ------------------------------------------------------------------------------------------------

TRAINED = 20
STYLES = {
    "gpt2": dict(norm="layernorm", activation="gelu", positions="learned"),
    "llama": dict(norm="rmsnorm", activation="swiglu", positions="rope", n_kv_head=1, linear_bias=False),
}


@pytest.mark.parametrize(("style", "precision"), [("gpt2", "bfloat16"), ("llama", "float32")])
def test_twenty_steps_of_the_trainer(style: str, precision: str, tmp_path: Path) -> None:
    """By the rule for loss curves: its largest deviation from the float64 run is at most twice the reference's own.

    Every op that the model has runs its kernels, forward and backward, and no reference is called."""
    built("emulated")
    write_dataset(tmp_path / "data", text_ids(3000), text_ids(100, seed=1))
    library = loading.library("emulated")
    exact = losses(tmp_path, style, "float64", ())
    reference = losses(tmp_path, style, precision, ())
    pages = {loading.SERVED_BY.get(op, op) for op in ops_of(ModelConfig(**STYLES[style]))}
    modules = [importlib.import_module(f"fastgpt.ops.{page}") for page in pages]
    with kernels.Spy() as spy, kernels.no_reference(*modules):
        found = losses(tmp_path, style, precision, library.ops)
    entries = schemas.read_pages()
    assert {page for page in entries if set(entries[page]) & set(spy.kernels)} == pages
    for page in pages:
        directions = [entry for entry in entries[page] if entry.rstrip("_").endswith(("_forward", "_backward"))]
        called = [entry for entry in directions if entry in spy.kernels]
        assert len({entry.rstrip("_").rpartition("_")[2] for entry in called}) == 2 or page in WHOLE, (page, called)
    op = {"gpt2": "layer_norm", "llama": "rms_norm"}[style]
    assert spy.kernels.count(f"{op}_forward") == spy.kernels.count(f"{op}_backward") == TRAINED * 2 * 3
    assert (spy.kernels.count("grad_norm"), spy.kernels.count("adamw_")) == (TRAINED, TRAINED * 2)
    assert exact[-1] < exact[0] - 0.5, "it learns"
    largest = {name: (run - exact).abs().max().item() for name, run in (("ours", found), ("torch", reference))}
    assert largest["ours"] <= 2 * largest["torch"], largest


WHOLE = ("cross_entropy", "adamw", "grad_norm")  # both directions in one entry, or none


def losses(folder: Path, style: str, precision: str, emulated: Any) -> torch.Tensor:
    """(TRAINED,) float64: the losses of the Trainer's steps, with the kernels of these ops emulated."""
    shape = dict(vocab_size=VOCAB, block_size=16, n_layer=1, n_head=2, n_embd=32)
    config = TrainConfig(
        model=ModelConfig(**shape, **STYLES[style]),
        data=DataConfig(path=str(folder / "data")),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        eval=EvalConfig(every=0),
        checkpoint=CheckpointConfig(every=0),
        out_dir=str(folder / "run"),
        steps=TRAINED,
        micro_batch_size=2,
        batch_tokens=2 * 2 * 16,
        precision="float32" if precision == "float64" else precision,
        device="cpu",
    )
    with pytest.MonkeyPatch.context() as patch, native.emulated(only=emulated, checked=False):
        if precision == "float64":
            patch.setattr(train, "apply_precision", lambda model, precision: model.double())
        trainer = Trainer(config)
        trainer.model.train()
        curve = [trainer._step()["loss"] for _ in range(TRAINED)]
        trainer._lock.release()
    return torch.tensor(curve, dtype=torch.float64)

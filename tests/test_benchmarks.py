"""The benchmarks in small. Training: every loop steps on the same tokens, and what is said of them adds up."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path += [str(BENCHMARKS), str(BENCHMARKS.parent / "tools")]

import gpu  # noqa: E402 - found through the line above
import harness  # noqa: E402
import operations  # noqa: E402
import train  # noqa: E402

from fastgpt import doctor, native, ops  # noqa: E402
from tests.native_cases import built  # noqa: E402

CPU = torch.device("cpu")
SHAPE = train.Shape("tiny", vocab_size=300, block_size=16, n_layer=1, n_head=2, n_embd=16, batch_size=4)
SIZES = [text for size in train.SIZES for text in (f"--{size}", str(getattr(SHAPE, size)))]

# A checkout of nanoGPT in the little that matters: the names, (logits, loss), targets.view, talk on stdout.
NANOGPT = """
from dataclasses import dataclass
import torch
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.1
    bias: bool = True

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        assert (config.n_layer, config.n_head, config.dropout, config.bias) == (1, 2, 0.0, False)
        print("number of parameters: noise")
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)
        torch.nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, idx, targets=None):
        logits = self.head(self.wte(idx))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("num decayed parameter tensors: noise")
        assert device_type == "cpu"
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    train.write_data(folder / "data", SHAPE)
    return folder


def test_the_whole_comparison(tmp_path: Path) -> None:
    """Without the packages that `make gpu` does not ask for."""
    absent = set(doctor.REQUIRED) - {"numpy", *gpu.TRAINS_WITH}
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n")
    out = tmp_path / "results" / "out.json"
    command = [sys.executable, str(BENCHMARKS / "train.py"), *SIZES, "--device", "cpu", "--threads", "1"]
    command += ["--steps", "3", "--rounds", "2", "--out", str(out), "--only", "fastgpt", "plain fp32"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "fastgpt is " in done.stdout
    result = json.loads(out.read_text())
    assert result["machine"]["torch"] == torch.__version__
    found = result["shapes"]["small"]["loops"]
    assert list(found) == ["fastgpt", "plain fp32"]
    for name, facts in found.items():
        assert f"\n  {name} " in done.stdout
        assert facts["threads"] == 1 and facts["ms_per_step"] > 0
        assert [len(turn["seconds"]) for turn in facts["turns"]] == [3, 3, 3]
        assert facts["first_step_seconds"] == facts["turns"][0]["seconds"][0]
        assert all(math.isfinite(loss) for turn in facts["turns"] for loss in turn["losses"])
        if sys.platform == "linux":
            assert facts["peak_mib"] > 1
    assert found["fastgpt"]["parameters"] == found["plain fp32"]["parameters"]
    assert found["plain fp32"]["speed_beside"]["fp32"] == 1.0


def test_a_checkout_of_nanogpt_trains_with_its_own_optimizer(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "model.py").write_text(NANOGPT)
    loops, _ = train.chosen_loops(CPU, train.parse(["--nanogpt", str(tmp_path)]))
    theirs = [loop for loop in loops if loop.program == "nanoGPT"]
    assert [loop.name for loop in theirs] == ["nanoGPT fp32", "nanoGPT bf16 autocast"]
    for loop in theirs:
        stepper = train.plain_loop(loop, SHAPE, CPU, folder, tmp_path)
        assert stepper.optimizer.defaults["lr"] == train.OPTIM.lr and not stepper.optimizer.defaults["fused"]
        losses = [stepper.step() for _ in range(20)]
        assert losses[-1] < losses[0]
    assert capsys.readouterr().out == ""  # it is noisy


def test_without_a_compiler_the_compiled_loops_are_left_out(monkeypatch, capsys) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    loops, left_out = train.chosen_loops(CPU, train.parse(["--compile"]))
    assert [loop.name for loop in loops] == ["fastgpt", "plain fp32", "plain bf16 autocast", "plain bf16"]
    reason = "there is no C++ compiler no-such-compiler; install one or set CXX"
    assert left_out == dict.fromkeys(["plain fp32 compiled", "plain bf16 autocast compiled"], reason)
    assert capsys.readouterr().out.splitlines() == [f"left out: {name}: {reason}" for name in left_out]
    monkeypatch.setenv("CXX", sys.executable)
    loops, left_out = train.chosen_loops(CPU, train.parse(["--compile"]))
    assert [loop.name for loop in loops if loop.compiled] == ["plain fp32 compiled", "plain bf16 autocast compiled"]
    assert not left_out and capsys.readouterr().out == ""


def test_the_loops_see_the_same_tokens(folder: Path) -> None:
    """Equal weights give equal losses, step after step: batches, loss, clipping and optimizer are the same."""
    stepper = train.plain_loop(train.Loop("plain", "float32"), SHAPE, CPU, folder, None)
    stepper.model.double()
    theirs = dict(stepper.model.named_parameters())

    class Compare(train.Callback):
        losses: list[float]

        def on_start(self, trainer) -> None:
            self.losses = []
            trainer.model.double()
            ours = dict(trainer.model.named_parameters())
            names = {"attention_norm": "norm_1", "ffn_norm": "norm_2", "attention.": "", "ffn.": "", "final_": ""}
            names |= {"token_embedding": "tokens", "position_embedding": "positions.weight"}
            for name, p in ours.items():
                for a, b in names.items():
                    name = name.replace(a, b)
                weight = theirs.pop(name).data
                p.data[: len(weight)] = weight

        def on_step(self, trainer, metrics) -> None:
            self.losses.append(metrics["loss"])
            if len(self.losses) == 5:
                raise harness.NoMore

    compare = Compare()
    train.fit(train.trainer_config(train.Loop("fastgpt", "float32"), SHAPE, CPU, folder), compare)
    assert not theirs
    # two programs in fp64, printed to what fp32 would show
    assert [f"{loss:.7f}" for loss in compare.losses] == [f"{stepper.step():.7f}" for _ in range(5)]
    assert len(set(compare.losses)) == 5


class FakeWorker:
    """Answers at once: a turn of `steps` that took what the worker's name says."""

    asked: list[str]

    def __init__(self, name: str, *_: Any):
        self.name = name

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def answer(self) -> dict[str, Any]:
        return {"precision": "float32", "parameters": 1, "milliseconds": {"GEMM": 3.0, "other": 1.0}}

    def ask(self, steps: int) -> dict[str, Any]:
        FakeWorker.asked.append(self.name)
        if "compiled" in self.name:
            raise harness.Failed(f"{self.name}: no such header")
        return {"seconds": [1.0] * steps, "losses": [2.0] * steps, "peak_mib": 3.0}


def test_the_order_moves_on_and_a_loop_that_does_not_compile_is_left_out(monkeypatch, capsys) -> None:
    monkeypatch.setattr(train, "Worker", FakeWorker)
    FakeWorker.asked = []
    a, b, c = (train.Loop("fastgpt", "auto"), train.Loop("plain", "float32", True), train.Loop("plain", "float32"))
    arguments = train.parse(["--rounds", "3", "--steps", "2"])
    left_out: dict[str, str] = {}
    found = train.compare([a, b, c], SHAPE, CPU, Path(), arguments, left_out)
    assert list(found) == [a.name, c.name]
    assert left_out == {b.name: "no such header"}
    assert FakeWorker.asked == [loop.name for loop in (a, b, c, c, a, c, a, a, c)]
    assert capsys.readouterr().out == "left out: plain fp32 compiled: no such header\n"


@pytest.mark.parametrize(
    "compiler, reason",
    [
        ("no-such-compiler", "there is no C++ compiler no-such-compiler; install one or set CXX"),
        ("true", "no such header"),
    ],
)
def test_the_results_name_what_was_left_out(compiler: str, reason: str, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(train, "Worker", FakeWorker)
    monkeypatch.setenv("CXX", compiler)
    FakeWorker.asked = []
    out = tmp_path / "out.json"
    only = ["--only", "fastgpt", "plain fp32", "plain fp32 compiled"]
    assert train.main([*SIZES, "--device", "cpu", "--compile", *only, "--out", str(out)]) == 0
    found = json.loads(out.read_text())["shapes"]["small"]
    assert list(found["loops"]) == ["fastgpt", "plain fp32"]
    assert found["left_out"] == {"plain fp32 compiled": reason}
    assert train.main([*SIZES, "--device", "cpu", "--compile", "--only", "plain fp32 compiled"]) == 2


def test_a_profile_is_in_the_results(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(train, "Worker", FakeWorker)
    out = tmp_path / "out.json"
    assert train.main([*SIZES, "--device", "cpu", "--profile", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["profile"]["small"]["fastgpt"]
    assert found["milliseconds"] == {"GEMM": 3.0, "other": 1.0} and found["precision"] == "float32"


@pytest.mark.parametrize("name", ["train", "quality", "bench_prepare"])
def test_a_benchmark_measures_the_checkout_that_it_is_in(name: str, tmp_path: Path) -> None:
    """Whatever is installed. And what measures `prepare`, which does without torch, does not load it either."""
    (tmp_path / "benchmarks").mkdir()
    for file in BENCHMARKS.glob("*.py"):
        shutil.copy(file, tmp_path / "benchmarks")
    (tmp_path / "fastgpt").symlink_to(BENCHMARKS.parent / "fastgpt")
    code = f"import sys; sys.path[0] = {str(tmp_path / 'benchmarks')!r}; import {name}, fastgpt; "
    code += "print(fastgpt.__file__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [str(tmp_path / "fastgpt/__init__.py"), str(name != "bench_prepare")], done.stderr


def test_ratios_are_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is slower in the third round: every loop is, and no ratio shows it."""
    monkeypatch.setattr(train, "peak_flops", lambda device: 1e9)
    loops = train.contenders(CPU, ["gpt2"], False, False)
    speed = dict(zip((loop.name for loop in loops), (1.0, 4.0, 2.0, 3.0), strict=True))
    found = {
        name: {
            "ready_seconds": 7.0,
            "turns": [
                {"seconds": [slow * seconds], "losses": [5.0 - turn], "peak_mib": 10.0 + turn}
                for turn, slow in enumerate((100.0, 1.0, 1.5, 9.0))
            ],
        }
        for name, seconds in speed.items()
    }
    references = train.summarise(found, loops, SHAPE, 1, CPU)
    assert references == {"fp32": "plain fp32", "best eager": "plain bf16 autocast", "best compiled": None}
    ours = found["fastgpt"]
    assert ours["speed_beside"] == {"fp32": 4.0, "best eager": 2.0}
    assert ours["ms_per_step"] == 1500.0 and ours["tokens_per_second"] == 64 / 1.5
    assert (ours["first_step_seconds"], ours["seconds_to_first_step"], ours["peak_mib"]) == (100.0, 107.0, 13.0)
    weights = 16 * (16 * 3 + 16 + 2 * 64) + 16 * 300
    assert round(ours["mfu"] * 1e9) == round(64 / 1.5 * (6 * weights + 12 * 16 * 8))  # of 16 tokens half are seen
    assert (ours["first_loss"], ours["last_loss"]) == (5.0, 2.0)
    assert statistics.median(facts["ms_per_step"] for facts in found.values()) == 3750.0


@pytest.mark.parametrize(
    "last, in_order, words",
    [(2.0, True, ""), (4.9, True, "further apart"), (math.nan, False, "plain: its loss is not finite")],
)
def test_losses_that_are_out_of_order_are_told(last: float, in_order: bool, words: str, capsys) -> None:
    found = {
        name: {"turns": [{"losses": [5.0, loss]}], "first_loss": 5.0, "last_loss": loss}
        for name, loss in (("fastgpt", 2.1), ("plain", last))
    }
    assert train.losses_in_order(found) is in_order
    said = capsys.readouterr().out
    assert words in said and bool(said) == bool(words)


def test_the_loss_takes_less_memory_than_its_logits(tmp_path: Path, capsys) -> None:
    if sys.platform != "linux":
        pytest.skip("reads /proc/self/status")
    out = tmp_path / "out.json"
    sizes = ["--loss-tokens", "1024", "--n_embd", "16", "--vocab_size", "8192"]
    assert train.main(["--loss-memory", "--device", "cpu", "--out", str(out), *sizes]) == 0
    found = json.loads(out.read_text())["loss_memory"]
    ours, theirs = found["peak_mib"].values()
    logits = 1024 * 8192 * 4 / 2**20
    assert 0 < ours < logits <= theirs / 2  # they keep the logits' softmax and its gradient
    assert found["ratio"] == theirs / ours
    assert f"{theirs / ours:.2f}" in capsys.readouterr().out


def test_a_backward_is_counted_with_its_forward() -> None:
    def event(name: str, milliseconds: float, parent: Any = None, sequence: int = -1) -> Any:
        event.now += 1
        return SimpleNamespace(
            name=name,
            self_cpu_time_total=1e3 * milliseconds,
            cpu_parent=parent,
            sequence_nr=sequence,
            time_range=SimpleNamespace(start=event.now),
        )

    event.now = 0
    backward = "autograd::engine::evaluate_function: "
    norm = event("group: norms", 1)
    view = event("aten::view", 2, norm, sequence=7)  # makes no node: 7 goes to the linear's
    linear = event("aten::linear", 4)
    product = event("aten::mm", 8, linear, sequence=7)
    update = event("Optimizer.step#AdamW.step", 16)
    node = event(backward + "MmBackward0", 32, sequence=7)
    inner = event("aten::mm", 64, node, sequence=9)
    unknown = event(backward + "torch::autograd::AccumulateGrad", 128, sequence=8)
    events = [inner, norm, node, view, linear, update, product, unknown]
    assert train.milliseconds_by_group(events) == {
        "norms": 3.0,
        "GEMM": 4.0 + 8.0 + 32.0 + 64.0,
        "optimizer": 16.0,
        "other": 128.0,
    }


def test_what_a_gpu_did_is_told_by_the_names_of_its_kernels() -> None:
    ran = [  # microseconds
        ("void fastgpt::(anonymous namespace)::layer_norm_forward_kernel<float>(fastgpt::Norm)", 0, 10),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopB_TNN", 20, 50),
        ("void flash_fwd_kernel<cutlass::bfloat16_t>()", 45, 60),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>()", 60, 62),
        ("void fastgpt::(anonymous namespace)::cross_entropy_forward_kernel<float>()", 55, 58),
        ("void fastgpt::(anonymous namespace)::adamw_kernel<float>()", 70, 71),
    ]
    events = [SimpleNamespace(name=n, time_range=SimpleNamespace(start=a, end=b)) for n, a, b in reversed(ran)]
    found = {group: round(1e3 * ms) for group, ms in train.milliseconds_by_kernel(events).items()}
    assert found == {"norms": 10, "GEMM": 30, "attention": 15, "other": 2, "loss": 3, "optimizer": 1, "idle": 18}


def test_a_profile_names_where_the_time_goes(folder: Path, monkeypatch, capfd) -> None:
    for names in train.GROUPS.values():
        for name in names:
            monkeypatch.setattr(ops, name, getattr(ops, name))  # undoes the labels in the end
    sent: list[dict[str, Any]] = []
    loop = train.Loop("fastgpt", "float32", arch="llama")
    train.profile(SimpleNamespace(send=sent.append), loop, SHAPE, CPU, folder)
    found = sent[0]["milliseconds"]
    assert set(found) == {"GEMM", *train.GROUPS, "other", "outside torch"}
    assert min(found.values()) > 0
    assert found["GEMM"] > found["other"] / 10  # its backward is not lost among the others


def fail(pipe: Any) -> None:
    raise ValueError("so\nmany words")


def vanish(pipe: Any) -> None:
    os._exit(3)


def test_a_worker_that_fails_says_so_in_one_line() -> None:
    ours, theirs = harness.SPAWN.Pipe()
    handler = signal.getsignal(signal.SIGINT)
    harness._run(theirs, fail, ())  # what a worker does, here
    signal.signal(signal.SIGINT, handler)
    assert str(ours.recv()) == "ValueError: so"
    with harness.Worker("mine", vanish) as worker, pytest.raises(harness.Failed, match="mine: .* with code 3"):
        worker.ask(1)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--nanogpt", "nowhere"], "no model.py there; expected a checkout"),
        (["--only", "plain"], "there are 'fastgpt', 'plain fp32'"),
        (["--out", "folder"], "expected a file in a folder that can be written to"),
        (["--out", "file/out.json"], "give another file"),
        (["--n_embd", "385"], "expected a multiple of n_head"),
        (["--vocab_size", "100"], "--vocab_size 100: expected 257 to 65536"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], words: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert train.main(["--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train: error: ") and words in error and error.count("\n") == 1


# ---- the ops -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["adamw", "cross_entropy", "embedding", "gelu", "norm", "rotary", "swiglu"])
def test_contenders_compute_the_same_and_no_fewer_bytes_could_do(op: str, monkeypatch) -> None:
    """Each op and direction in its smallest shape: ours on the emulator beside torch's."""
    built("emulated")
    monkeypatch.setattr(operations, "EMULATED_ROWS", rows := 8)
    cases: dict[tuple[str, str], operations.Case] = {}
    for case in importlib.import_module(f"bench_{op}").cases():
        if case.dtype == torch.float32:
            cases.setdefault((case.op, case.direction), case)
    for case in cases.values():
        assert 1 <= operations.count(case)["bytes_over_least"] < 3, case.name  # so few rows have as many partial sums
        if "eager" in case.contenders:
            theirs = case.contenders["eager"]("cpu", rows)()
            with native.emulated(checked=False):
                ours = case.contenders[operations.OURS]("cpu", rows)()
            for a, b in zip(*([y] if isinstance(y, Tensor) else y for y in (ours, theirs)), strict=True):
                torch.testing.assert_close(a, b, msg=lambda m, name=case.name: f"{name}: {m}")

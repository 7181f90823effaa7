"""Out of memory: what was used, and the micro-batch that keeps the global batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastgpt import TrainConfig, cli, memory
from fastgpt.train import Trainer
from tests.synthetic import text_ids, write_dataset

GPU_FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    data = write_dataset(tmp_path / "data", text_ids(4000), text_ids(600, seed=1))
    given = {
        "--data.path": data, "--out_dir": tmp_path / "run", "--steps": 4, "--batch_tokens": 384,
        "--micro_batch_size": 12, "--model.block_size": 16, "--model.n_layer": 1, "--model.n_head": 2,
        "--model.n_embd": 16, "--device": "cpu", "--precision": "float32", "--checkpoint.every": 2,
    }  # fmt: skip
    return ["train", *(str(word) for pair in given.items() for word in pair)]


def out_of_memory(monkeypatch: pytest.MonkeyPatch, error: Exception, at: int) -> None:
    """Step `at` cannot have its memory."""
    real = Trainer._step

    def step(self: Trainer) -> object:
        if self.progress.step == at:
            raise error
        return real(self)

    monkeypatch.setattr(Trainer, "_step", step)


@pytest.mark.parametrize("at", [0, 3])
def test_a_run_out_of_memory_says_what_to_do_and_that_works(at: int, argv: list[str], capsys) -> None:
    with pytest.MonkeyPatch.context() as patch:
        out_of_memory(patch, torch.OutOfMemoryError(GPU_FULL), at)
        assert cli.main(argv) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("fastgpt: error: out of memory on the CPU: ") and "iB in use at most, of " in said
    assert "with micro-batches of 12 x 16 tokens; --micro_batch_size 6 keeps the global batch of 384 tokens (4 " in said
    goes_on = at > 2  # after the first checkpoint
    assert said.endswith("--resume auto --allow-changes goes on from the last checkpoint" if goes_on else "a step)")
    remedy = ["--micro_batch_size", "6", *(["--resume", "auto", "--allow-changes"] if goes_on else [])]
    assert cli.main([*argv, *remedy]) == 0


def test_on_a_gpu_its_own_peak_is_told(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 78 << 30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 80 << 30))
    said = memory.explanation(TrainConfig(), torch.OutOfMemoryError(GPU_FULL))
    assert said.startswith("out of memory on NVIDIA X: 78.0 GiB in use at most, of 80.0 GiB, with micro-batches of")


def test_memory_of_the_cpu_that_cannot_be_had() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**55, dtype=torch.uint8)
    assert memory.is_out_of_memory(refused.value)
    with pytest.raises(RuntimeError, match="something else"), memory.out_of_memory_explained(TrainConfig()):
        raise RuntimeError("something else")


@pytest.mark.parametrize(
    ("rows", "now", "smaller"), [(24, 12, 6), (24, 8, 4), (24, 3, 1), (7, 7, 1), (24, 1, None), (30, 15, 6), (25, 5, 1)]
)
def test_the_next_smaller_micro_batch(rows: int, now: int, smaller: int | None) -> None:
    config = TrainConfig().replace(batch_tokens=rows * 1024, micro_batch_size=now)
    assert memory.smaller_micro_batch(config) == smaller
    said = memory.explanation(config, torch.OutOfMemoryError(GPU_FULL))
    if smaller is None:
        assert "choose a smaller model or a shorter --model.block_size, or --precision bfloat16" in said
    else:
        assert f"--micro_batch_size {smaller} keeps the global batch" in said

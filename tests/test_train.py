"""The trainer: it learns what there is to learn, stops and resumes bit for bit, and skips what is not finite."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgpt import ModelConfig, TrainConfig, Trainer, train
from fastgpt import checkpoint as ckpt
from fastgpt.config import CheckpointConfig, DataConfig, EvalConfig, OptimConfig
from fastgpt.data import Batches
from fastgpt.errors import UserError
from fastgpt.evaluate import evaluate
from fastgpt.metrics import read_metrics
from fastgpt.model import GPT
from fastgpt.optim import build_optimizer
from fastgpt.step import Step
from fastgpt.train import Callback
from tests.synthetic import VOCAB, text_ids, write_dataset

SHAPE = dict(vocab_size=VOCAB, block_size=16, n_layer=2, n_head=2, n_embd=16)
LLAMA = dict(SHAPE, norm="rmsnorm", activation="swiglu", positions="rope", linear_bias=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), text_ids(3000), text_ids(700, seed=1), shard_tokens=1000)


def config(data: Path, out: Path, **changes) -> TrainConfig:
    values = dict(
        model=ModelConfig(**LLAMA),
        data=DataConfig(path=str(data)),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        eval=EvalConfig(every=4, batch_size=4),
        checkpoint=CheckpointConfig(every=3, keep_last=3),
        out_dir=str(out),
        steps=10,
        batch_tokens=128,
        micro_batch_size=4,
        precision="float32",
        device="cpu",
        log_every=1,
    )
    return TrainConfig(**{**values, **changes})


class StopAt(Callback):
    """A signal to this process after a step, or during an evaluation."""

    def __init__(self, step: int, number=signal.SIGTERM):
        self.step, self.number = step, number

    def on_step(self, trainer, metrics):
        if metrics["step"] == self.step:
            os.kill(os.getpid(), self.number)


def curve(run: Path) -> list[dict]:
    """The metrics without what depends on the clock."""
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}
        for row in read_metrics(run / "metrics.jsonl")
    ]


def files(run: Path) -> dict[str, bytes]:
    newest = ckpt.steps_on_disk(run)[-1]
    return {name: (newest / name).read_bytes() for name in (ckpt.MODEL, ckpt.OPTIMIZER)}


# ---- it learns -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPE, LLAMA])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_batch_is_overfitted(shape, optimizer):
    model = GPT(ModelConfig(**{**shape, "n_embd": 32, "vocab_size": 64}), torch.Generator().manual_seed(0))
    options = build_optimizer(model, OptimConfig(optimizer=optimizer, lr=1e-2, weight_decay=0.0))
    idx = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(1))
    for _ in range(200):
        loss = model(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
        loss.backward()
        options.step()
        options.zero_grad()
    # the first tokens are four different ones, so everything after them can be known
    assert len(set(idx[:, 0].tolist())) == 4
    assert loss.item() < 0.05


def test_a_language_of_known_entropy_is_learned_to_within_five_percent(tmp_path):
    """A first-order Markov chain over 8 letters: no model can beat its entropy rate, and a good one comes near."""
    draw = np.random.default_rng(0)
    transitions = draw.dirichlet(np.full(8, 0.4), size=8)
    stationary = np.linalg.matrix_power(transitions, 200)[0]
    entropy = float(-(stationary[:, None] * transitions * np.log(transitions)).sum())

    def sample(n: int) -> np.ndarray:
        steps = draw.random(n)
        cumulative, state, ids = transitions.cumsum(1), 0, []
        for u in steps:
            state = min(int(np.searchsorted(cumulative[state], u)), 7)
            ids.append(97 + state)
        return np.array(ids)

    data = write_dataset(tmp_path / "data", sample(60_000), sample(20_000))
    run = config(
        data,
        tmp_path / "run",
        model=ModelConfig(**{**LLAMA, "n_layer": 1, "n_embd": 32}),
        optim=OptimConfig(lr=1e-2, warmup_steps=20, weight_decay=0.0, min_lr_fraction=0.0),
        eval=EvalConfig(every=0, batch_size=64),
        checkpoint=CheckpointConfig(every=0),
        steps=250,
        batch_tokens=1024,
        micro_batch_size=64,
    )
    Trainer(run).fit()
    last = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "val_loss" in row][-1]
    # the first letter of each window of 16 is predicted knowing the one before it: nothing is lost at the edges
    assert 0.98 * entropy < last["val_loss"] < 1.05 * entropy


def test_golden_curve(data, tmp_path):
    """20 steps in float64 on fixed data. A refactoring leaves these digits alone; a change of mathematics updates
    them knowingly (python -m tests.test_train prints them)."""
    losses = golden_losses(data, tmp_path)
    golden = json.loads((Path(__file__).parent / "golden_losses.json").read_text())
    torch.testing.assert_close(torch.tensor(losses, dtype=torch.float64), torch.tensor(golden, dtype=torch.float64))


def golden_losses(data: Path, out: Path) -> list[float]:
    trainer = Trainer(config(data, out, steps=20, eval=EvalConfig(every=0), checkpoint=CheckpointConfig(every=0)))
    trainer.model.double()
    trainer.fit()
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]


# ---- it stops and resumes --------------------------------------------------------------------------


def test_stop_and_resume_equals_not_stopping(data, tmp_path):
    """Weights, optimizer state and the whole curve bit for bit; test_chaos.py has the rest, in processes."""

    def run(name: str, **options) -> Trainer:
        trainer = Trainer(config(data, tmp_path / name, precision="bfloat16", steps=30), **options)
        trainer.fit()
        return trainer

    whole = run("whole")
    assert whole.config.batch_tokens * 30 > whole.data.tokens, "the run reads past the end of an epoch"
    for step in (1, 4, 13):
        stopped = run(f"stopped{step}", callbacks=[StopAt(step)])
        assert stopped.interrupted and stopped.progress.step == step
        resumed = run(f"stopped{step}", resume="auto")
        assert not resumed.interrupted
        assert files(tmp_path / f"stopped{step}") == files(tmp_path / "whole")
        assert curve(tmp_path / f"stopped{step}") == curve(tmp_path / "whole")


def test_the_next_step_is_read_before_the_loss_is_waited_for(data, tmp_path, monkeypatch):
    """So the host reads while a GPU works. No sample is read twice, nor for a step that never comes."""
    batch, update, events = Batches.batch, Step.update, []

    class Outcome:
        def __init__(self, values):
            self.values = values

        def tolist(self):
            events.append("wait")
            return self.values.tolist()

    def noted_batch(self, first):
        events.append(first)
        return batch(self, first)

    def noted_update(self, scale):
        events.append("queued")
        return Outcome(update(self, scale))

    monkeypatch.setattr(Batches, "batch", noted_batch)
    monkeypatch.setattr(Step, "update", noted_update)
    three = config(data, tmp_path / "run", steps=3)
    assert (three.accumulation, three.micro_batch_size) == (2, 4)
    Trainer(three).fit()
    assert events == [0, 4, "queued", 8, 12, "wait", "queued", 16, 20, "wait", "queued", "wait"]


def test_tokens_that_cannot_be_read_lose_no_step_before_theirs(data, tmp_path, monkeypatch):
    batch = Batches.batch

    def broken(self, first):
        if first >= 16:
            raise UserError("the third step's tokens are gone")
        return batch(self, first)

    monkeypatch.setattr(Batches, "batch", broken)
    trainer = Trainer(config(data, tmp_path / "run", steps=4))
    with pytest.raises(UserError, match="the third step's tokens are gone"):
        trainer.fit()
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert trainer.progress.step == 2 and steps == [1, 2]


def test_a_signal_between_two_micro_batches_drops_the_step(data, tmp_path, monkeypatch):
    """A long step is not waited for, and the run that goes on is the one that never stopped."""
    four = config(data, tmp_path / "run", micro_batch_size=2)
    assert four.accumulation == 4
    whole = Trainer(four.replace(out_dir=str(tmp_path / "whole")))
    whole.fit()
    trainer, accumulate, calls = Trainer(four), Step.accumulate, []

    def signalled(self, *arguments):
        calls.append(1)
        if len(calls) == 4 * 5 + 2:
            os.kill(os.getpid(), signal.SIGINT)
        accumulate(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "accumulate", signalled)
        assert trainer.fit().step == 5
    assert trainer.interrupted and len(calls) == 4 * 5 + 2
    assert all(p.grad is None for p in trainer.model.parameters())
    Trainer(four, resume="auto").fit()
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_a_signal_during_an_evaluation_saves_and_the_evaluation_is_made_up_for(data, tmp_path, monkeypatch):
    import fastgpt.data

    Trainer(config(data, tmp_path / "whole")).fit()
    original, calls = fastgpt.data.evaluation_batches, []

    def interrupted(*args, **kwargs):
        for batch in original(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(fastgpt.data, "evaluation_batches", interrupted)
        trainer = Trainer(config(data, tmp_path / "run"))
        trainer.fit()
    assert trainer.interrupted and trainer.progress.step == 4 and trainer.progress.evaluation_due
    assert len(calls) <= 3, "the rest of the evaluation was not waited for"
    Trainer(config(data, tmp_path / "run"), resume="auto").fit()
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_resume_needs_the_same_model_and_settings(data, tmp_path):
    first = Trainer(config(data, tmp_path / "run", steps=3))
    first.fit()
    with pytest.raises(UserError, match="has a run up to step-00000003; give --resume auto"):
        Trainer(config(data, tmp_path / "run"))
    with pytest.raises(UserError, match=r"holds another model: model.n_layer: 2 -> 3"):
        Trainer(config(data, tmp_path / "run", steps=3, model=ModelConfig(**{**LLAMA, "n_layer": 3})), resume="auto")
    changed = config(data, tmp_path / "run", steps=5, optim=OptimConfig(lr=5e-3, warmup_steps=2))
    with pytest.raises(UserError, match=r"otherwise: optim.lr: 0.01 -> 0.005; give --allow-changes"):
        Trainer(changed, resume="auto")
    trainer = Trainer(changed, resume="auto", allow_changes=True)
    trainer.fit()
    recorded = ckpt.latest(tmp_path / "run").state["changes"]
    assert recorded == [{"step": 3, "changes": ["optim.lr: 0.01 -> 0.005", "steps: 3 -> 5"]}]
    elsewhere = config(data, tmp_path / "other", steps=3)
    assert Trainer(elsewhere, resume=str(ckpt.steps_on_disk(tmp_path / "run")[0])).progress.step == 3


def test_resume_knows_its_data(data, tmp_path):
    """Moved, it is the same; replaced, it is not."""
    shutil.copytree(data, tmp_path / "data")
    here = config(tmp_path / "data", tmp_path / "run", steps=3)
    Trainer(here, callbacks=[StopAt(1)]).fit()
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = here.replace(data=DataConfig(path=str(tmp_path / "moved")))
    Trainer(moved, resume="auto", callbacks=[StopAt(2)]).fit()
    write_dataset(tmp_path / "data", text_ids(3000, seed=5), text_ids(700, seed=6))
    with pytest.raises(UserError, match="was trained otherwise: data: what was in"):
        Trainer(here, resume="auto")
    assert Trainer(here, resume="auto", allow_changes=True).progress.step == 2


def test_another_optimizer_can_take_over(data, tmp_path):
    first = config(data, tmp_path / "run", steps=4)
    Trainer(first, callbacks=[StopAt(2)]).fit()
    second = first.replace(optim=OptimConfig(optimizer="muon", lr=1e-2, warmup_steps=2))
    with pytest.raises(UserError, match="optim.optimizer: adamw -> muon"):
        Trainer(second, resume="auto")
    assert Trainer(second, resume="auto", allow_changes=True).fit().step == 4


def test_a_run_resumed_elsewhere_is_saved_there(data, tmp_path):
    Trainer(config(data, tmp_path / "run")).fit()
    trainer = Trainer(config(data, tmp_path / "other"), resume=str(tmp_path / "run"))
    trainer.fit()
    assert [p.name for p in ckpt.steps_on_disk(tmp_path / "other")] == ["step-00000010"]
    assert trainer.progress.best_step in (None, 10)


def test_without_a_validation_split_training_ends_well(tmp_path):
    data = write_dataset(tmp_path / "data", text_ids(3000), text_ids(0))
    trainer = Trainer(config(data, tmp_path / "run", checkpoint=CheckpointConfig(every=0)))
    trainer.fit()
    assert ckpt.steps_on_disk(tmp_path / "run") and trainer.progress.best_step is None


def test_a_damaged_newest_checkpoint_is_replaced_by_the_resumed_run(data, tmp_path):
    Trainer(config(data, tmp_path / "whole")).fit()
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    newest = ckpt.steps_on_disk(tmp_path / "run")[-1]
    (newest / ckpt.MODEL).write_bytes(b"")
    warnings = []
    Trainer(config(data, tmp_path / "run"), resume="auto", warn=warnings.append).fit()
    assert len(warnings) == 1 and "the one before it is tried" in warnings[0]
    assert files(tmp_path / "run") == files(tmp_path / "whole") and curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_a_refused_resume_leaves_no_folder(data, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Trainer(config(data, tmp_path / "new"), resume=str(tmp_path / "typo"))
    assert not (tmp_path / "new").exists()


def test_a_model_is_not_loaded_with_another_tokenizer(data, tmp_path):
    from fastgpt import Tokenizer

    Trainer(config(data, tmp_path / "run", steps=1)).fit()
    Tokenizer.train(texts=["abab"], vocab_size=258).save(tmp_path / "run" / "tokenizer.json")
    with pytest.raises(UserError, match="is not the tokenizer that"):
        ckpt.load_model(tmp_path / "run")


def test_precision_chosen_by_measuring_is_kept(data, tmp_path, monkeypatch):
    import fastgpt.train

    monkeypatch.setattr(fastgpt.train, "measure_precision", lambda *a: ("bfloat16", {"float32": 2.0, "bfloat16": 1.0}))
    first = Trainer(config(data, tmp_path / "run", precision="auto", steps=3), callbacks=[StopAt(2)])
    first.fit()
    monkeypatch.setattr(fastgpt.train, "measure_precision", lambda *a: pytest.fail("measured again"))
    second = Trainer(config(data, tmp_path / "run", precision="auto", steps=3), resume="auto")
    assert second.precision == "bfloat16" and second.model.dtype == torch.bfloat16


def test_measuring_names_one_of_the_two(data, tmp_path):
    from fastgpt.precision import measure_precision

    chosen, seconds = measure_precision(config(data, tmp_path), torch.device("cpu"), repeats=1)
    assert chosen == min(seconds, key=seconds.get) and set(seconds) == {"float32", "bfloat16"}


# ---- it refuses and it survives ------------------------------------------------------------------------


def test_two_runs_in_one_folder(data, tmp_path):
    first = Trainer(config(data, tmp_path / "run"))
    with pytest.raises(UserError, match="another run is training in"):
        Trainer(config(data, tmp_path / "run"))
    assert first.progress.step == 0


def test_a_run_that_ends_while_another_begins_loses_nothing(data, tmp_path, monkeypatch):
    """Whatever a run in the folder saves until the next one holds it, that one sees."""
    first, hold = config(data, tmp_path / "run", steps=6), train.hold

    def late(folder):
        monkeypatch.setattr(train, "hold", hold)
        Trainer(first).fit()
        return hold(folder)

    monkeypatch.setattr(train, "hold", late)
    with pytest.raises(UserError, match="has a run up to step-00000006"):
        Trainer(first)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) >= 6
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr(train, "hold", late)
    assert Trainer(first.replace(steps=8), resume="auto", allow_changes=True).progress.step == 6


def test_a_run_that_cannot_begin_lets_go_of_its_folder(data, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    trainer = Trainer(config(data, tmp_path / "run", steps=1))
    with monkeypatch.context() as patch:
        patch.setattr(train, "write_atomically", full)
        with pytest.raises(UserError, match="No space left on device; make room there and resume"):
            trainer.fit()
    assert Trainer(config(data, tmp_path / "run", steps=1)).fit().step == 1


def test_a_signal_while_the_first_files_are_written_is_none_too_early(data, tmp_path, monkeypatch):
    real = train.write_atomically
    monkeypatch.setattr(train, "write_atomically", lambda *a: os.kill(os.getpid(), signal.SIGINT) or real(*a))
    trainer = Trainer(config(data, tmp_path / "run"))
    assert trainer.fit().step == 0 and trainer.interrupted
    assert [path.name for path in ckpt.steps_on_disk(tmp_path / "run")] == ["step-00000000"]


def test_a_save_that_failed_is_tried_again_when_it_was_said(data, tmp_path, monkeypatch):
    tried, real = [], ckpt.save

    def full_at_first(run_dir, step, *rest):
        tried.append(step)
        if len(tried) < 3:
            raise OSError(28, "No space left on device")
        return real(run_dir, step, *rest)

    monkeypatch.setattr(ckpt, "save", full_at_first)
    monkeypatch.setattr(ckpt.Keeper, "RETRY_STEPS", 5)
    warnings: list[str] = []
    frequent = CheckpointConfig(every=1, keep_last=1)
    Trainer(config(data, tmp_path / "run", steps=13, checkpoint=frequent), warn=warnings.append).fit()
    assert tried == [1, 6, 11, 12, 13]
    assert [f"tried again at step {step}" in text for step, text in zip((6, 11), warnings, strict=True)] == [True, True]


def test_refusals_before_anything_is_built(data, tmp_path, monkeypatch):
    import fastgpt.train

    monkeypatch.setattr(fastgpt.train, "GPT", lambda *a: pytest.fail("the model was built"))
    wrong = config(data, tmp_path / "run", model=ModelConfig(**{**LLAMA, "vocab_size": 300}))
    with pytest.raises(UserError, match="has a vocabulary of 257, but model.vocab_size is 300"):
        Trainer(wrong)
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        Trainer(config(data, tmp_path / "file" / "run"))
    with pytest.raises(UserError, match="device 'tpu' cannot be used here"):
        Trainer(config(data, tmp_path / "run", device="tpu"))


def test_a_bad_step_changes_nothing_is_recorded_and_stops_the_run_when_it_repeats(data, tmp_path):
    class Poison(Callback):
        def on_start(self, trainer):
            accumulate, self.before = trainer.step.accumulate, None
            trainer.step.accumulate = lambda batch, n: accumulate(batch, math.nan if self.hit(trainer) else n)

        def hit(self, trainer):
            return trainer.progress.step in (2, *range(5, 99))

        def on_step(self, trainer, metrics):
            now = {k: v.clone() for k, v in trainer.model.state_dict().items()}
            if metrics["step"] == 3:
                assert all(torch.equal(now[k], self.before[k]) for k in now)
            self.before = now

    warnings = []
    trainer = Trainer(
        config(data, tmp_path / "run", steps=50, max_bad_steps=4), callbacks=[Poison()], warn=warnings.append
    )
    with pytest.raises(UserError, match=r"step 9 \(samples 64 to 71\).*4 such steps in a row: stopped"):
        trainer.fit()
    assert "step 3 (samples 16 to 23): loss nan" in warnings[0] and len(warnings) == 4
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert next((r["step"], r["samples"]) for r in rows if r.get("skipped")) == (3, [16, 24])
    assert trainer.progress.bad_steps == 5


def test_best_and_last_checkpoints_are_on_disk(data, tmp_path):
    trainer = Trainer(config(data, tmp_path / "run", steps=20, checkpoint=CheckpointConfig(every=2, keep_last=2)))
    trainer.fit()
    kept = {int(p.name[5:]) for p in ckpt.steps_on_disk(tmp_path / "run")}
    assert {18, 20, trainer.progress.best_step} == kept
    model, tokenizer = ckpt.load_model(tmp_path / "run")
    assert tokenizer.vocab_size == model.config.vocab_size == VOCAB


def test_zero_steps_is_an_evaluated_checkpoint_of_the_initial_weights(data, tmp_path):
    Trainer(config(data, tmp_path / "run", steps=0)).fit()
    assert [p.name for p in ckpt.steps_on_disk(tmp_path / "run")] == ["step-00000000"]


def test_dropout_masks_follow_from_the_step(data, tmp_path):
    model = ModelConfig(**{**LLAMA, "dropout": 0.2})
    Trainer(config(data, tmp_path / "whole", model=model)).fit()
    stopped = Trainer(config(data, tmp_path / "run", model=model), callbacks=[StopAt(5)])
    stopped.fit()
    torch.manual_seed(12345)
    Trainer(config(data, tmp_path / "run", model=model), resume="auto").fit()
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_micro_batch_size_changes_only_rounding(data, tmp_path):
    def losses(size: int) -> torch.Tensor:
        trainer = Trainer(config(data, tmp_path / f"run{size}", micro_batch_size=size, steps=5))
        trainer.model.double()
        trainer.fit()
        rows = read_metrics(tmp_path / f"run{size}" / "metrics.jsonl")
        return torch.tensor([row["loss"] for row in rows if "loss" in row], dtype=torch.float64)

    torch.testing.assert_close(losses(8), losses(2))


def test_documents_mode_trains(data, tmp_path):
    Trainer(config(data, tmp_path / "run").replace(data=DataConfig(path=str(data), documents=True))).fit()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(math.isfinite(row["loss"]) for row in rows if "loss" in row)


# ---- evaluation -------------------------------------------------------------------------------------------


def test_a_uniform_model_has_exactly_log2_v_bits_per_token(data):
    from fastgpt.data import Dataset

    stream = Dataset.open(data).split("val")
    model = GPT(ModelConfig(**LLAMA)).double()
    torch.nn.init.zeros_(model.token_embedding.weight)
    rounding = (700 + 4) * torch.finfo(torch.float64).eps / 2  # a sum of 700 terms, and four operations on it
    for batch_size in (1, 3, 64):
        result = evaluate(model, stream, batch_size=batch_size)
        assert result.complete and result.tokens == stream.tokens == 700
        assert result.bits_per_byte == pytest.approx(math.log2(VOCAB) * 700 / 700, rel=rounding)
    part = evaluate(model, stream, batch_size=4, batches=2)
    assert part.tokens == 2 * 4 * 16 and part.bits_per_byte == pytest.approx(math.log2(VOCAB), rel=rounding)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        made = write_dataset(Path(folder) / "data", text_ids(3000), text_ids(700, seed=1), shard_tokens=1000)
        print(json.dumps(golden_losses(made, Path(folder) / "run")))

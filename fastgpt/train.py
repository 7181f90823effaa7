"""The trainer: one loop over optimizer steps, with evaluation, checkpoints and exact resume around it.

A step is a pure function of the weights, the optimizer's state and the step's number: which samples it reads,
its learning rate and its dropout masks all follow from (seed, step). So a run that was stopped and resumed is the
run that was never stopped, bit for bit, on the same machine and number of threads.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import native
from .checkpoint import SAVE_AGAIN_SECONDS, Checkpoint, Keeper, hold, load_training_tensors, training_tensors
from .config import TrainConfig
from .errors import UserError
from .evaluate import Evaluation, evaluate
from .files import write_atomically
from .flops import flops_per_token, peak_flops
from .machine import keep_freed_memory
from .metrics import MetricsLog
from .model import GPT, ops_of
from .optim import build_optimizer
from .precision import (
    apply_precision,
    apply_weight_gradients,
    measure_precision,
    measure_weight_gradients,
    resolve_device,
)
from .resume import check_same_run, find_checkpoint, warn_of_new_run
from .schedule import learning_rate_scale
from .step import Step

if TYPE_CHECKING:
    from .data import Batch

EXIT_INTERRUPTED = 75  # a signal came, the run was saved, and `--resume auto` goes on


class Callback:
    """What can be hung on a run. Time spent here is not counted as training time."""

    def on_measure(self, trainer: Trainer) -> None:
        """Before the dtypes are timed, where precision is auto on a CPU; there is no model yet."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, the model built and a checkpoint, if any, loaded."""

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """After every optimizer step."""

    def on_eval(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """After every evaluation."""

    def on_end(self, trainer: Trainer) -> None:
        """When the run is over, also when it was interrupted."""


@dataclass
class Progress:
    """What changes during a run besides tensors; saved whole in every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    seconds: float = 0.0
    """Spent in steps, over all parts of the run."""
    bad_steps: int = 0
    """Steps whose loss or gradient was not finite, and which therefore changed nothing."""
    bad_in_a_row: int = 0
    best_loss: float | None = None
    """Lowest validation loss so far, in nats per token."""
    best_step: int | None = None
    evaluation_due: bool = False
    """An evaluation of this step was cut short by a signal and is made up for after a resume."""


class Trainer:
    """Trains one model as a TrainConfig says.

    resume:        None for a new run; "auto" for the newest intact checkpoint of out_dir, if any; or the path of a
                   run or a checkpoint.
    allow_changes: resume under a configuration that differs where it matters (recorded in the checkpoint).
    callbacks:     see Callback.

    Raises UserError, before anything is written, where the data, the folder or the checkpoint cannot be used.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        resume: str | None = None,
        allow_changes: bool = False,
        callbacks: Iterable[Callback] = (),
        warn: Callable[[str], None] | None = None,
    ):
        from .data import Dataset

        self.config, self.callbacks = config, list(callbacks)
        self.warn = warn or (lambda message: print(f"fastgpt: warning: {message}", file=sys.stderr))
        self.run_dir = Path(config.out_dir)
        warn_of_new_run(config, resume, self.warn)
        self.dataset = Dataset.open(config.data.path)
        self.dataset.check(config.model.vocab_size, config.model.block_size)
        self.data, self.validation = self.dataset.split("train"), self.dataset.split("val")
        self.device = resolve_device(config.device)
        native.require(self.device, ops_of(config.model))
        if self.device.type == "cpu":
            keep_freed_memory()
        self._lock = hold(self.run_dir)  # before its checkpoints are looked at: another run may be writing them
        try:
            self._build(resume, allow_changes)
        except BaseException:  # a Ctrl-C too
            self._lock.undo()
            raise

    def _build(self, resume: str | None, allow_changes: bool) -> None:
        """Model, optimizer, batches and progress: new ones, or those of the checkpoint to go on from."""
        from .data import Batches

        config = self.config
        checkpoint = self._checkpoint_to_go_on_from(resume, allow_changes)
        self.precision, self.precision_seconds = config.precision, {}
        if config.precision == "auto":
            if checkpoint is not None:
                self.precision = checkpoint.state["precision"]
            else:
                if self.device.type == "cpu":
                    self._call("on_measure")
                self.precision, self.precision_seconds = measure_precision(config, self.device)
        draw = torch.Generator().manual_seed(config.seed)
        self.model = apply_precision(GPT(config.model, draw).to(self.device), self.precision)
        if checkpoint is None:
            tokens = config.micro_batch_size * config.model.block_size
            self.weight_gradients, _ = measure_weight_gradients(self.model, tokens)
        else:  # another formulation would give other bits
            self.weight_gradients = checkpoint.state.get("weight_gradients", {})
        apply_weight_gradients(self.model, self.weight_gradients)
        self.optimizer = build_optimizer(
            self.model,
            config.optim,
            stochastic_rounding=self.precision == "bfloat16_stochastic",
            seed=config.seed,
        )
        if checkpoint is not None:
            other = checkpoint.state["config"]["optim"]["optimizer"] != config.optim.optimizer
            load_training_tensors(self.model, self.optimizer, checkpoint, other_optimizer=other)
        self.keeper.check_space(self.model, self.optimizer, config.checkpoint.keep_best)
        on_gpu = self.device.type == "cuda"
        self.batches = Batches(
            self.data,
            config.model.block_size,
            config.micro_batch_size,
            config.seed,
            documents=config.data.documents,
            pin_memory=on_gpu,
        )
        capture = config.cuda_graphs and on_gpu and native.serves(self.device, ops_of(config.model))
        self.step = Step(self.model, self.optimizer, config, capture=capture)
        self._prepared: dict[int, list[Batch]] = {}  # of the step to come, if it is known: its micro-batches
        self.log: MetricsLog | None = None
        self._stop: signal.Signals | None = None

    def abandon(self) -> None:
        """Instead of `fit`: let go of the run's folder, and remove it if it was made here and is empty."""
        self._lock.undo()

    # ---- the loop ------------------------------------------------------------------------------

    def fit(self) -> Progress:
        """Train to the last step, or until SIGINT or SIGTERM, then save. Returns the progress made; `interrupted`
        tells whether a signal left steps undone.

        Raises UserError after max_bad_steps steps in a row without a finite loss and gradient, or where checkpoints
        cannot be written."""
        config, progress = self.config, self.progress
        if not self._lock.held:
            self._lock = hold(self.run_dir)
        restore_handlers = self._catch_signals()
        try:
            write_atomically(self.run_dir / "config.toml", config.to_toml())
            self.dataset.save_tokenizer(self.run_dir / "tokenizer.json")
            self.log = MetricsLog(self.run_dir / "metrics.jsonl", progress.step, self.warn)
        except BaseException as error:
            restore_handlers()
            self._lock.release()
            if not isinstance(error, OSError):
                raise
            raise UserError(f"cannot write to {self.run_dir}: {error.strerror}; make room there and resume") from None
        try:
            self.model.train()
            self._call("on_start")
            while True:
                if progress.evaluation_due:
                    self._evaluate()
                if self._save_is_due():
                    self._save()
                if self._stop or progress.step >= config.steps:
                    break
                if (metrics := self._step()) is None:
                    break
                last = progress.step == config.steps
                evaluate_now = last or bool(config.eval.every and progress.step % config.eval.every == 0)
                progress.evaluation_due = evaluate_now and self.validation.tokens > 0
                if last or progress.step % config.log_every == 0:
                    self.log.write(metrics)
                self._call("on_step", metrics)
            while not self._save(leaving=True):  # each failure counts, and the last one raises
                time.sleep(SAVE_AGAIN_SECONDS)
            self._call("on_end")
        finally:
            restore_handlers()
            self.log.close()
            self._lock.release()
        return progress

    @property
    def interrupted(self) -> bool:
        """A signal ended fit() before the last step."""
        return self._stop is not None and self.progress.step < self.config.steps

    def _step(self) -> dict[str, Any] | None:
        """One optimizer step: gradients accumulated over the micro-batches, clipped as a whole, applied. None, with
        nothing changed, where a signal comes between two micro-batches."""
        config, progress, step = self.config, self.progress, self.progress.step
        began = time.perf_counter()
        micro_batches = self._prepared.pop(step, None) or self._read(step)
        # one divisor for the whole step: a mean of the micro-batches' means would weigh their tokens unequally
        targets = max(1, sum(batch.n_targets for batch in micro_batches))
        for number, batch in enumerate(micro_batches):
            if self._stop is not None:
                self.step.reset()
                return None
            if config.model.dropout:
                torch.manual_seed((config.seed * 1_000_003 + step * config.accumulation + number) % 2**63)
            self.step.accumulate(batch, targets)
        scale = learning_rate_scale(step, config.steps, config.optim)
        outcome = self.step.update(scale)
        if step + 1 < config.steps:  # while a GPU works through all that is queued
            with contextlib.suppress(Exception):  # which that step meets again, when this one is counted and saved
                self._prepared = {step + 1: self._read(step + 1)}
        loss_value, norm_value = outcome.tolist()  # the only wait for the device
        seconds = time.perf_counter() - began
        progress.step += 1
        progress.seconds += seconds
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self._note_bad_step(loss_value, norm_value)
        else:
            progress.bad_in_a_row = 0
        metrics = {
            "step": progress.step,
            "seconds": round(progress.seconds, 4),
            "loss": loss_value,
            "lr": config.optim.lr * scale,
            "grad_norm": norm_value,
            "tokens_per_second": round(config.batch_tokens / seconds, 1),
        }
        if peak := peak_flops(self.device):
            metrics["mfu"] = round(flops_per_token(config.model) * config.batch_tokens / seconds / peak, 4)
        return metrics

    def _samples(self, step: int) -> range:
        """The first sample of each micro-batch of the step; the range ends at the next step's first."""
        count = self.config.accumulation * self.config.micro_batch_size
        return range(step * count, (step + 1) * count, self.config.micro_batch_size)

    def _read(self, step: int) -> list[Batch]:
        return [self.batches.batch(first) for first in self._samples(step)]

    def _note_bad_step(self, loss: float, norm: float) -> None:
        progress = self.progress
        progress.bad_steps += 1
        progress.bad_in_a_row += 1
        samples = self._samples(progress.step - 1)
        text = (
            f"step {progress.step} (samples {samples.start} to {samples.stop - 1}): loss {loss}, gradient norm {norm}"
        )
        self.log.write({"step": progress.step, "skipped": True, "samples": [samples.start, samples.stop]})
        if progress.bad_in_a_row >= self.config.max_bad_steps:
            raise UserError(
                f"{text}; {progress.bad_in_a_row} such steps in a row: stopped. Lower the learning rate and resume "
                f"from the last checkpoint"
            )
        self.warn(f"{text}; no update was made")

    # ---- evaluation and checkpoints --------------------------------------------------------------

    def evaluate(self, should_stop: Callable[[], bool] = lambda: False) -> Evaluation:
        """The validation split (or the part that config.eval asks for) under the present weights."""
        return evaluate(
            self.model,
            self.validation,
            batch_size=self.config.eval.batch_size,
            batches=self.config.eval.batches,
            documents=self.config.data.documents,
            should_stop=should_stop,
        )

    def _evaluate(self) -> None:
        result = self.evaluate(should_stop=lambda: self._stop is not None)
        if not result.complete:
            return
        progress = self.progress
        progress.evaluation_due = False
        if math.isfinite(result.loss) and (progress.best_loss is None or result.loss < progress.best_loss):
            progress.best_loss, progress.best_step = result.loss, progress.step
        metrics = {
            "step": progress.step,
            "seconds": round(progress.seconds, 4),
            "val_loss": result.loss,
            "val_bits_per_byte": result.bits_per_byte,
            "val_tokens": result.tokens,
        }
        self.log.write(metrics)
        self._call("on_eval", metrics)

    def _save_is_due(self) -> bool:
        progress, every = self.progress, self.config.checkpoint.every
        if progress.step in (0, self.config.steps) or progress.evaluation_due:  # the end is saved by itself
            return False
        if self.keeper.retry_at is not None:
            return progress.step >= self.keeper.retry_at
        is_best = self.config.checkpoint.keep_best and progress.best_step == progress.step
        return is_best or bool(every and progress.step % every == 0)

    def _save(self, leaving: bool = False) -> bool:
        weights, moments = training_tensors(self.model, self.optimizer)
        state = {
            "config": self.config.to_dict(),
            "precision": self.precision,
            "weight_gradients": self.weight_gradients,
            "tokenizer_sha256": self.dataset.tokenizer_sha256,
            "dataset_sha256": self.dataset.meta["sha256"],
            "progress": vars(self.progress),
            "changes": self.changes,
        }
        best = self.progress.best_step if self.config.checkpoint.keep_best else None
        return self.keeper.save(self.progress.step, weights, moments, state, best, leaving)

    def _checkpoint_to_go_on_from(self, resume: str | None, allow_changes: bool) -> Checkpoint | None:
        """The checkpoint, if there is one: with it begin the progress and the folder's keeping."""
        checkpoint = find_checkpoint(self.config, resume, self.warn)
        self.progress, self.changes = Progress(), []
        if checkpoint is not None:
            self.changes = check_same_run(checkpoint, self.config, self.dataset, allow_changes, self.warn)
            self.progress = Progress(**checkpoint.state["progress"])
        self.keeper = Keeper(self.run_dir, self.config.checkpoint.keep_last, self.warn, self.config.steps)
        self.keeper.tidy(self.progress.step)
        if checkpoint is not None and checkpoint.path.parent.parent.resolve() == self.run_dir.resolve():
            self.keeper.last_saved, self.keeper.kept_best = self.progress.step, checkpoint.state.get("kept_best")
        else:  # the best so far lies in another folder
            self.progress.best_loss = self.progress.best_step = None
        return checkpoint

    # ---- signals and callbacks ---------------------------------------------------------------------

    def _catch_signals(self) -> Callable[[], None]:
        """SIGINT and SIGTERM end the run after the present step; a second one ends the process at once."""
        if threading.current_thread() is not threading.main_thread():
            return lambda: None

        def handler(number: int, frame: Any) -> None:
            if self._stop is not None:
                os._exit(128 + number)  # checkpoints are renamed into place: nothing can be half-written
            self._stop = signal.Signals(number)

        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, old in before.items():
                signal.signal(number, old)

        return restore

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)

"""fastgpt's trainer and a plain PyTorch loop in turns on one machine: whatever else slows it down slows both."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..config import TrainConfig
from ..train import Callback, Trainer

WARM_UP_STEPS = 3
WARM_UP_SECONDS = 4.0  # before steps are timed: memory is taken, and a processor's first burst of speed is over
LR = 1e-3  # of both loops: the speed does not depend on it as long as nothing overflows
MOST_SECONDS = 15.0  # that steps are timed for, however few they are
SLICE_SECONDS = 0.75


@dataclass
class Speed:
    """Tokens per second in each turn."""

    plain: list[float] = field(default_factory=list)
    fastgpt: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """The median, over the turns, of fastgpt's speed divided by the plain loop's."""
        return statistics.median(ours / theirs for ours, theirs in zip(self.fastgpt, self.plain, strict=True))


class Enough(Exception):
    """Leaves Trainer.fit() from a callback, without a checkpoint."""


class _StepTimer(Callback):
    """Times `steps` steps, or as many as end in MOST_SECONDS, as the trainer counts its seconds, once it has trained
    for `warm_up` of them."""

    def __init__(self, steps: int, warm_up: float):
        self.steps, self.warm_up = steps, warm_up
        self.first: int | None = None  # the last step that does not count

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        step, seconds = trainer.progress.step, trainer.progress.seconds
        if self.first is None:
            if step >= WARM_UP_STEPS and seconds >= self.warm_up:
                self.first, self.began = step, seconds
        elif step == self.first + self.steps or seconds - self.began >= MOST_SECONDS:
            self.mean = (seconds - self.began) / (step - self.first)
            raise Enough


def seconds_per_step(config: TrainConfig, steps: int, warm_up: float = WARM_UP_SECONDS) -> tuple[float, str]:
    """The mean of `steps` steps, or of fewer that take MOST_SECONDS, and the precision used.

    `warm_up` seconds of training before them do not count. Raises KeyboardInterrupt if the user interrupts it.
    """
    timer = _StepTimer(steps, warm_up)
    precision = _scratch_run(config, timer)
    return timer.mean, precision


class _Turns(Callback):
    """Whenever the trainer has had its turn, the other loop has one of the same length."""

    def __init__(self, seconds: float, tokens: int, plain: Any, show: Callable[[Speed], None]):
        self.seconds, self.tokens, self.plain, self.show = seconds, tokens, plain, show
        self.speed = Speed()

    def on_start(self, trainer: Trainer) -> None:
        for _ in range(WARM_UP_STEPS):
            self.plain.step()
        self.steps = -WARM_UP_STEPS

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        now = time.perf_counter()
        self.steps += 1
        if self.steps == 0:
            self.began = self.first = now
        elif self.steps > 0 and now - self.began >= SLICE_SECONDS:
            self.speed.fastgpt.append(self.steps * self.tokens / (now - self.began))
            self.speed.plain.append(self._plain_turn())
            self.show(self.speed)
            if time.perf_counter() - self.first >= self.seconds:
                raise Enough
            self.steps, self.began = 0, time.perf_counter()

    def _plain_turn(self) -> float:
        began, steps = time.perf_counter(), 0
        while (passed := time.perf_counter() - began) < SLICE_SECONDS:
            self.plain.step()
            steps += 1
        return steps * self.tokens / passed


def compare(config: TrainConfig, seconds: float, show: Callable[[Speed], None]) -> Speed:
    """Both loops for `seconds` in all: the same data, shape, batch and AdamW; `show` is called after each turn.

    The plain loop is fp32, as most begin; fastgpt trains in the precision that `config` says. Raises
    KeyboardInterrupt if the user interrupts it.
    """
    from ..data import Dataset
    from ..precision import resolve_device
    from .plain_gpt import PlainGPT, PlainLoop

    model = config.model
    stream = Dataset.open(config.data.path).split("train")
    plain = PlainGPT(model.vocab_size, model.block_size, model.n_layer, model.n_head, model.n_embd)
    loop = PlainLoop(
        plain.to(resolve_device(config.device)),
        stream.read(0, len(stream)),
        model.block_size,
        config.micro_batch_size * config.accumulation,
        lr=LR,
    )
    turns = _Turns(seconds, config.batch_tokens, loop, show)
    _scratch_run(config.replace(optim=config.optim.replace(optimizer="adamw", lr=LR)), turns)
    return turns.speed


def _scratch_run(config: TrainConfig, callback: Callback) -> str:
    """Train in a folder that is removed, until the callback has had Enough. Returns the precision used."""
    with tempfile.TemporaryDirectory(prefix="fastgpt-") as folder:
        trainer = Trainer(config.replace(out_dir=folder, steps=10**9), callbacks=[callback])
        try:
            trainer.fit()
        except Enough:
            return trainer.precision
    raise KeyboardInterrupt

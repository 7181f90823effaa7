"""What a running training shows: a live bar on a terminal, a plain line every so often elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from .linear import PLAIN
from .train import Callback, Trainer
from .units import duration, short_number


class ConsoleProgress(Callback):
    """A bar with step, loss, tokens/s and time left on a terminal; without one a line every `log_every` steps.

    Writes to stdout. A closed pipe ends the output, not the training.
    """

    def __init__(self, plain: bool | None = None):
        self.plain = not sys.stdout.isatty() if plain is None else plain
        self.bar: Any = None
        self.task: Any = None
        self.speed: float | None = None  # tokens/s, smoothed over about twenty steps

    def on_measure(self, trainer: Trainer) -> None:
        self._line("measuring whether float32 or bfloat16 is faster here ...")

    def on_start(self, trainer: Trainer) -> None:
        config, model = trainer.config, trainer.model
        measured = ", ".join(f"{name} {1000 * s:.0f} ms" for name, s in trainer.precision_seconds.items())
        self._line(
            f"{short_number(model.num_parameters())} parameters, {trainer.precision} on {trainer.device}"
            f"{f' (measured: {measured})' if measured else ''}, {short_number(trainer.data.tokens)} training tokens, "
            f"{short_number(config.batch_tokens)} a step"
        )
        others = {shape: way for shape, way in trainer.weight_gradients.items() if way != PLAIN}
        if others:
            ways = ", ".join(f"{shape} {way}" for shape, way in others.items())
            self._line(f"weight gradients in the fastest formulation here: {ways}; others as torch has them")
        if trainer.progress.step:
            self._line(f"resumed at step {trainer.progress.step}")
        if not self.plain:
            from rich.progress import BarColumn, Progress, TextColumn

            self.bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]} tok/s  {task.fields[left]} left"),
                refresh_per_second=4,
            )
            fields = dict(loss=float("nan"), speed="-", left="-")
            self.task = self.bar.add_task("", total=config.steps, completed=trainer.progress.step, **fields)
            self.bar.start()

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        config, step = trainer.config, metrics["step"]
        now = metrics["tokens_per_second"]
        self.speed = now if self.speed is None else self.speed + 0.1 * (now - self.speed)
        left = duration((config.steps - step) * config.batch_tokens / self.speed)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, loss=metrics["loss"], speed=short_number(self.speed), left=left)
        elif step % config.log_every == 0 or step == config.steps:
            mfu = f"  mfu {metrics['mfu']:.1%}" if "mfu" in metrics else ""
            self._line(
                f"step {step}/{config.steps}  loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  "
                f"{short_number(self.speed)} tok/s{mfu}  {left} left"
            )

    def on_eval(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self._line(
            f"step {metrics['step']}  validation loss {metrics['val_loss']:.4f}  "
            f"{metrics['val_bits_per_byte']:.4f} bits per byte"
        )

    def on_end(self, trainer: Trainer) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        name = trainer.keeper.last_saved
        how = "interrupted" if trainer.interrupted else "done"
        self._line(
            f"{how} at step {trainer.progress.step} after {duration(trainer.progress.seconds)}; "
            f"checkpoint {trainer.run_dir / 'checkpoints' / f'step-{name:08d}'}"
        )

    def _line(self, text: str) -> None:
        try:
            if self.bar is not None:
                self.bar.console.print(text, highlight=False)
            else:
                print(text, flush=True)
        except BrokenPipeError:
            # whoever read the output has gone: go on in silence
            sys.stdout = open("/dev/null", "w")  # noqa: SIM115 - for the rest of the process
            self.plain, self.bar = True, None

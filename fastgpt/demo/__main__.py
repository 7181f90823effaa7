"""The demo from beginning to end; `fastgpt demo`, and what `make demo` runs once everything is installed."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from ..config import PrepareConfig, TrainConfig, _Config, _number
from ..errors import UserError
from ..interrupts import exit_code
from ..units import duration, short_number

TIMED_STEPS = 20
SUSTAINED = 0.95  # of the speed of the timed steps, which five of six trainings on two cores did not keep up
WARM_UP_SHARE = 1 / 45  # of the training's seconds: a warm-up before the timed steps lasts no longer
SIGNATURES = 64
WATCH_TOKENS = 64  # of a completion while training
# Livelier than what is judged at the end: a single text must not go in circles.
WATCH_TEMPERATURE, WATCH_TOP_K = 0.7, 50
WATCH_LINES = 7  # of it on the screen; samples.txt has it whole
BYTES_PER_VOCABULARY_ENTRY = 500  # a small text gets a small vocabulary


@dataclass(frozen=True)
class DemoConfig(_Config):
    """What the demo can be told."""

    corpus: Optional[str] = None
    """A text file, or a folder of them; Python's standard library when not given."""
    seconds: Optional[float] = _number(None, 0.0, low_open=True)
    """Length of the training."""
    speed_seconds: float = _number(15.0, 0.0)
    """Length of the comparison with a plain PyTorch loop; 0 leaves it out."""
    kernel_seconds: float = _number(15.0, 0.0)
    """The most that the CUDA kernels are shown for, on this CPU; 0 leaves them out."""
    out: str = "runs"
    """Where the run's folder, demo-DATE-TIME, is made."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU if there is one."""


def main(argv: Optional[list[str]] = None) -> int:
    """Runs the demo with command-line arguments. Returns the exit code; raises UserError and KeyboardInterrupt."""
    from ..arguments import parse

    (config,), _ = parse(
        sys.argv[1:] if argv is None else argv,
        [DemoConfig()],
        prog="fastgpt demo",
        description="Train a small GPT on real text in minutes, and show how good it became.",
    )
    return Demo(config).run()


class Demo:
    """One run of the demo; each method is one step of it."""

    def __init__(self, config: DemoConfig, settings: Any = None):
        from ..precision import resolve_device
        from . import settings as presets
        from .screen import Screen

        self.began = time.monotonic()
        self.config = config
        self.device = resolve_device(config.device)
        self.settings = settings or (presets.CPU if self.device.type == "cpu" else presets.GPU)
        self.seconds = config.seconds or self.settings.seconds
        self.screen = Screen()

    def run(self) -> int:
        from ..train import EXIT_INTERRUPTED

        # before the folder is made: a refused CORPUS leaves nothing behind
        with self.screen.busy("reading the text"):
            self.read_corpus()
        self.folder = new_folder(Path(self.config.out))
        self.say_hello()
        try:
            self.prepare_tokens()
            self.plan()
            if not self.train():
                self.say_interrupted()
                return EXIT_INTERRUPTED
            self.climb_ladder()
            self.judge_functions()
            if self.config.speed_seconds:
                self.compare_speed()
            if self.config.kernel_seconds and self.device.type == "cpu":
                self.show_kernels()
        except KeyboardInterrupt as interrupt:
            self.screen.line("stopped", f"{self.folder} holds what there is so far")
            return exit_code(interrupt)
        self.say_goodbye()
        return 0

    # ---- text and tokens -------------------------------------------------------------------------

    def read_corpus(self) -> None:
        from .completions import signatures, to_watch
        from .corpus import own_files, standard_library

        path = self.config.corpus
        self.corpus = own_files(Path(path)) if path else standard_library()
        self.training_text = "\0".join(document.text for document in self.corpus.train)
        lines = signatures(self.corpus.val, self.training_text)
        self.signatures, watched = lines[:SIGNATURES], to_watch(lines)
        self.lexer = "python" if watched else "text"
        self.watched = watched + "\n" if watched else opening(self.corpus.val[0].text)

    def say_hello(self) -> None:
        import torch
        from rich.text import Text

        from ..machine import cores, cpu_name
        from .screen import HEAD, MUTED

        screen, corpus = self.screen, self.corpus
        machine = f"{cpu_name()}, {cores()} cores"
        if self.device.type == "cuda":
            machine = torch.cuda.get_device_name(self.device)
        versions = f"Python {platform.python_version()}, torch {torch.__version__}"
        screen.print()
        screen.print(Text.assemble(("fastgpt", HEAD), "  from text to a GPT, on this machine"))
        screen.print(Text(f"{machine}; {versions}; {self.folder}", style=MUTED))
        screen.print()
        from .corpus import size

        every, held = corpus.train + corpus.val, size(corpus.val)
        notes = [f"{corpus.duplicates} duplicates dropped"] * bool(corpus.duplicates)
        notes += [f"{corpus.skipped} files left out"] * bool(corpus.skipped)
        names = {document.name.removesuffix(" (end)") for document in every}
        screen.line(
            "text", "; ".join([f"{corpus.title}: {megabytes(size(every))} in {plural(len(names), 'file')}", *notes])
        )
        screen.line("", f"sha256 {corpus.sha256}")
        shown = corpus.held_out[:8]
        more = len(corpus.held_out) - len(shown)
        screen.line("", f"held out, {megabytes(held)}: {', '.join(shown)}{f' and {more} more' if more else ''}")

    def prepare_tokens(self) -> None:
        from ..data import Dataset, prepare
        from .compressors import counted_bytes
        from .corpus import size

        began = time.monotonic()
        most = self.settings.train.model.vocab_size
        vocabulary = min(most, max(512, size(self.corpus.train) // BYTES_PER_VOCABULARY_ENTRY // 128 * 128))
        train, val = self.corpus.write(self.folder / "text")
        with self.screen.busy("learning a tokenizer, writing shards"):
            prepare(
                PrepareConfig(
                    inputs=(str(train),),
                    val_inputs=(str(val),),
                    out_dir=str(self.folder / "data"),
                    vocab_size=vocabulary,
                ),
                progress=False,
            )
        self.dataset = Dataset.open(self.folder / "data")
        self.tokenizer = self.dataset.tokenizer()
        train, val = self.dataset.split("train"), self.dataset.split("val")
        self.val_bytes = counted_bytes([document.text for document in self.corpus.val])
        if val.text_bytes + val.documents != self.val_bytes:
            raise RuntimeError(f"the shards hold {val.text_bytes + val.documents} bytes, the text {self.val_bytes}")
        per_token = (train.text_bytes + train.documents) / train.tokens
        self.screen.line(
            "tokens",
            f"byte-level BPE, {self.dataset.vocab_size:,} in the vocabulary, {per_token:.2f} bytes each; "
            f"{short_number(train.tokens)} to train on, {short_number(val.tokens)} held out "
            f"({time.monotonic() - began:.1f} s)",
        )

    # ---- training --------------------------------------------------------------------------------

    def plan(self) -> None:
        """Times a few steps and fixes the number of all of them."""
        from ..estimate import load_warning
        from ..machine import OtherLoad
        from .speed import WARM_UP_SECONDS, seconds_per_step

        train = self.settings.train
        self.train_config = train.replace(
            model=train.model.replace(vocab_size=self.dataset.vocab_size),
            data=train.data.replace(path=str(self.folder / "data")),
            out_dir=str(self.folder),
            device=str(self.device),
        )
        others = OtherLoad()
        with self.screen.busy(f"timing {TIMED_STEPS} steps"):
            warm_up = min(WARM_UP_SECONDS, WARM_UP_SHARE * self.seconds)
            timed, precision = seconds_per_step(self.train_config, TIMED_STEPS, warm_up)
        for warning in load_warning(self.device, others.cores()):
            self.screen.line("warning", warning)
        each = timed / SUSTAINED
        tokens = self.dataset.split("train").tokens
        passes = math.ceil(self.settings.most_passes * tokens / train.batch_tokens)
        steps = max(1, min(round(self.seconds / each), passes))
        self.expected = steps * each
        self.train_config = self.train_config.replace(steps=steps, precision=precision)
        c = self.train_config.model.resolved()
        from ..model import GPT

        count = GPT(self.train_config.model).num_parameters()
        self.screen.line(
            "model",
            f"{short_number(count)} parameters: {c.n_layer} layers, {c.n_head} heads, width {c.n_embd}; "
            f"{describe(self.train_config)}",
        )
        reason = (
            f"end at {self.expected:.0f} s"
            if steps < passes
            else f"are {self.settings.most_passes} passes over the text"
        )
        self.screen.line(
            "plan",
            f"steps took {1000 * timed:.1f} ms each, {1000 * each:.1f} are reckoned with: {steps:,} of "
            f"{train.batch_tokens:,} tokens {reason}",
        )

    def train(self) -> bool:
        """False if the user interrupted it."""
        from ..train import Trainer

        self.screen.print()
        watch = Watch(self)
        trainer = Trainer(self.train_config, callbacks=[watch], warn=lambda text: self.screen.line("warning", text))
        try:
            progress = trainer.fit()
        finally:
            watch.close()
        if trainer.interrupted:
            self.stopped_at = progress.step
            return False
        self.model, self.rungs, self.trained = trainer.model, watch.rungs, progress.seconds
        self.screen.line(
            "trained",
            f"{progress.step:,} steps in {progress.seconds:.0f} s (planned: {self.expected:.0f} s), "
            f"{short_number(progress.step * self.train_config.batch_tokens / progress.seconds)} tokens/s; "
            f"{watch.paused:.0f} s more to evaluate",
        )
        return True

    # ---- how good it became ------------------------------------------------------------------------

    def climb_ladder(self) -> None:
        from ..plot import plot
        from . import compressors

        val = self.dataset.split("val")
        with self.screen.busy("compressing the held-out text with gzip and xz"):
            others = {compressors.UNIFORM: compressors.uniform(self.dataset.vocab_size, val.tokens, self.val_bytes)}
            others |= compressors.compress([d.text for d in self.corpus.val], [d.text for d in self.corpus.train])
        ours = {f"fastgpt after {rung['at']} s": rung["bits_per_byte"] for rung in self.rungs}
        content = {"bytes": self.val_bytes, "others": others, "fastgpt": self.rungs}
        (self.folder / "ladder.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        screen = self.screen
        screen.print()
        screen.line(
            "ladder",
            f"bits per byte of the {self.val_bytes:,} held-out bytes (one for each end of a file); less is better",
        )
        screen.print()
        screen.ladder([*((n, v, False) for n, v in others.items()), *((n, v, True) for n, v in ours.items())])
        screen.print()
        for sentence in verdict(self.rungs[-1], others):
            screen.line("", sentence)
        try:
            plot(self.folder)
        except UserError as error:  # matplotlib is an extra
            screen.line("", f"no loss.png: {error}")

    def judge_functions(self) -> None:
        from .completions import COPY_LENGTH, complete, function_body, judge

        if not self.signatures:
            return
        with self.screen.busy(f"completing {len(self.signatures)} functions"):
            prompts = [line + "\n" for line in self.signatures]
            written = complete(self.model, self.tokenizer, prompts)
            bodies = [
                function_body(line, text, finished=ended)
                for line, (text, ended) in zip(self.signatures, written, strict=True)
            ]
            result = judge(self.signatures, bodies, self.training_text)
        with open(self.folder / "samples.txt", "a", encoding="utf-8") as file:
            file.write(f"==== {result.total} held-out signatures, completed at the end ====\n\n")
            for line, body in zip(self.signatures, bodies, strict=True):
                file.write(f"{line}\n{body.rstrip()}\n\n")
        self.screen.print()
        self.screen.line(
            "functions",
            f"of {result.total} held-out signatures it completed {result.parses} to valid Python; "
            f"{result.does_something} of these do more than pass, and {result.good} of those copy no {COPY_LENGTH} "
            f"characters of the training text: {result.good / result.total:.0%}",
        )

    def compare_speed(self) -> None:
        from rich.text import Text

        from .screen import OURS, Redrawn
        from .speed import Speed, compare

        screen, shape = self.screen, self.train_config
        screen.print()
        screen.line(
            "speed",
            f"the same shape, AdamW and {shape.batch_tokens:,} tokens a step, in turns for "
            f"{self.config.speed_seconds:.0f} s",
        )

        def lines(speed: Speed) -> list[Text]:
            plain, ours = statistics.median(speed.plain), statistics.median(speed.fastgpt)
            faster = "faster" if speed.ratio >= 1 else "slower"
            amount = speed.ratio if speed.ratio >= 1 else 1 / speed.ratio
            return [
                Text(f"plain eager PyTorch loop  {plain:>10,.0f} tokens/s"),
                Text.assemble((f"fastgpt ({shape.precision})".ljust(26) + f"{ours:>10,.0f} tokens/s", OURS),
                              f"  {amount:.2f} times {faster} (median of {plural(len(speed.plain), 'pair')})"),
            ]  # fmt: skip

        with Redrawn(screen) as redrawn:
            speed = compare(self.train_config, self.config.speed_seconds, lambda speed: redrawn.show(lines(speed)))
        content = {"plain": speed.plain, "fastgpt": speed.fastgpt, "ratio": speed.ratio}
        (self.folder / "speed.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def show_kernels(self) -> None:
        from . import kernels

        kernels.show(self.screen, self.config.kernel_seconds)

    # ---- last words ------------------------------------------------------------------------------

    def say_goodbye(self) -> None:
        screen, command = self.screen, program()
        screen.print()
        screen.line("kept", f"{self.folder}: text, tokenizer, shards, checkpoint, metrics, samples.txt, loss.png")
        screen.line(
            "took", f"{duration(time.monotonic() - self.began)} minutes, {duration(self.trained)} of them training"
        )
        screen.print()
        folder = shlex.quote(str(self.folder))
        screen.command("next", f"{command} sample {folder} --prompt {shlex.quote(self.watched.strip())}")
        screen.command("", f"{command} plot {folder}")
        screen.command("", "make demo CORPUS=path/to/your/text")

    def say_interrupted(self) -> None:
        self.screen.line("stopped", f"at step {self.stopped_at:,}; all is saved, and this goes on:")
        self.screen.command("", f"{program()} train --resume auto --out_dir {shlex.quote(str(self.folder))}")


class Watch:
    """Draws the bar, and samples and evaluates the model at the times that the settings name. None of that counts
    as training time."""

    def __init__(self, demo: Demo):
        self.demo = demo
        settings = demo.settings
        self.times = [share * demo.seconds for share in settings.sample_at if share * demo.seconds < demo.expected]
        self.rungs: list[dict[str, Any]] = []
        self.paused = 0.0  # seconds spent evaluating and sampling
        self.bar: Any = None

    def on_start(self, trainer: Any) -> None:
        from .screen import TrainingBar

        self.bar = TrainingBar(self.demo.screen, trainer.config.steps, trainer.config.batch_tokens)
        if self.times and self.times[0] == 0.0:
            self.times.pop(0)
            self.pause(trainer)

    def on_step(self, trainer: Any, metrics: dict[str, Any]) -> None:
        self.bar.update(metrics["step"], metrics["loss"], metrics["tokens_per_second"])
        due = [at for at in self.times if trainer.progress.seconds >= at]
        if due and metrics["step"] < trainer.config.steps:
            self.times = self.times[len(due) :]
            self.pause(trainer)

    def on_eval(self, trainer: Any, metrics: dict[str, Any]) -> None:
        self.show(trainer, metrics["val_bits_per_byte"])

    def on_end(self, trainer: Any) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def pause(self, trainer: Any) -> None:
        """Evaluate the whole held-out split, and show what the model writes now."""
        began = time.monotonic()
        self.bar.note("evaluating (this does not count as training time)")
        result = trainer.evaluate(should_stop=lambda: trainer.interrupted)
        if not result.complete:
            return
        progress = trainer.progress
        trainer.log.write(
            {
                "step": progress.step,
                "seconds": round(progress.seconds, 4),
                "val_loss": result.loss,
                "val_bits_per_byte": result.bits_per_byte,
                "val_tokens": result.tokens,
            }
        )
        self.show(trainer, result.bits_per_byte)
        self.paused += time.monotonic() - began

    def show(self, trainer: Any, bits_per_byte: float) -> None:
        from .completions import complete, function_body

        demo, step, at = self.demo, trainer.progress.step, trainer.progress.seconds
        label = f"{at:.0f}" if demo.seconds >= 60 else f"{at:.1f}".removesuffix(".0")
        ((text, ended),) = complete(
            trainer.model,
            demo.tokenizer,
            [demo.watched],
            WATCH_TOKENS,
            temperature=WATCH_TEMPERATURE,
            top_k=WATCH_TOP_K,
        )
        if demo.lexer == "python":
            text = function_body(demo.watched, text, finished=ended) or text.split("\n")[0]
        self.rungs.append(
            {"at": label, "step": step, "seconds": trainer.progress.seconds, "bits_per_byte": bits_per_byte}
        )
        with open(demo.folder / "samples.txt", "a", encoding="utf-8") as file:
            file.write(
                f"==== {label} s, step {step}, {bits_per_byte:.4f} bits per byte ====\n\n{demo.watched}{text}\n\n"
            )
        demo.screen.line(f"{label} s", f"step {step:,}, {bits_per_byte:.2f} bits per byte of held-out text")
        demo.screen.code(demo.watched + text, WATCH_LINES, demo.lexer)


# ---- words ---------------------------------------------------------------------------------------


def new_folder(parent: Path) -> Path:
    """parent/demo-DATE-TIME, made now and never one that was there. Raises UserError where it cannot be made."""
    name = datetime.datetime.now().strftime("demo-%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{n}" for n in range(2, 100))):
        try:
            (parent / (name + suffix)).mkdir(parents=True)
            return parent / (name + suffix)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot make a folder in {parent}: {error.strerror}; give another with --out") from None
    raise UserError(f"{parent / name} and a hundred like it exist; give another folder with --out")


def opening(text: str) -> str:
    """The beginning of a text that is no Python: its first line that is neither short nor long, or its start."""
    lines = (line.strip() for line in text.splitlines())
    return next((line for line in lines if 20 <= len(line) <= 80), text.strip()[:60])


def describe(config: TrainConfig) -> str:
    """RoPE, RMSNorm, SwiGLU, tied embeddings; Muon; fp32."""
    c = config.model
    names = {"rope": "RoPE", "learned": "learned positions", "rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}
    names |= {"swiglu": "SwiGLU", "gelu": "GELU", "gelu_tanh": "GELU", "relu": "ReLU", "muon": "Muon", "adamw": "AdamW"}
    parts = [names[c.positions], names[c.norm], names[c.activation], *["tied"] * c.tied_embeddings]
    return f"{', '.join(parts)}; {names[config.optim.optimizer]}; {config.precision}"


def verdict(last: dict[str, Any], others: dict[str, float]) -> list[str]:
    """Which of the others the model beats at the end, and which it does not: one sentence each."""
    beaten = [name for name, value in others.items() if last["bits_per_byte"] < value]
    lost = [f"{name} ({value:.2f})" for name, value in others.items() if last["bits_per_byte"] >= value]
    first = f"After {last['at']} s fastgpt ({last['bits_per_byte']:.2f}) beats {listing(beaten) or 'none of them'}."
    return [first, *([f"It does not beat {listing(lost)}."] if lost else [])]


def listing(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def program() -> str:
    """How the user can call fastgpt: the script beside this interpreter, as seen from the working folder."""
    script = Path(sys.executable).parent / "fastgpt"
    if script.exists():
        relative = os.path.relpath(script)
        return relative if not relative.startswith("..") else str(script)
    return f"{sys.executable} -m fastgpt"


if __name__ == "__main__":
    from ..cli import main as cli

    sys.argv.insert(1, "demo")
    sys.exit(cli())

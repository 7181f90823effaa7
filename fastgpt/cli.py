"""The command line: `fastgpt COMMAND ...`, also `python -m fastgpt`.

Exit codes: 0 done; 1 the thing looked at is not in order (`data verify`, `doctor`); 2 refused, with one line on
stderr; 75 a signal came, training was saved and `--resume auto` goes on; 130 interrupted; 143 terminated; 141 the
reader of stdout has gone. FASTGPT_DEBUG=1 shows the traceback behind a refusal.

Everything heavy is imported inside the command that needs it: the help answers without torch.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import errno
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

from . import __version__, arguments
from .arguments import HELP, Positional
from .config import (
    PRESETS,
    ConfigError,
    ModelConfig,
    PrepareConfig,
    TrainConfig,
    _Config,
    _number,
    read_table,
)
from .errors import UserError
from .interrupts import answer, catch_sigterm, let_go, whole_imports

EXIT_NOT_IN_ORDER, EXIT_REFUSED, EXIT_SIGPIPE = 1, 2, 141

# Where a command needs a package that is not there.
REMEDIES = {"torch": "pip install torch", "tomli_w": "pip install tomli-w"}


# ---- options that belong to the command line alone ------------------------------------------------


@dataclass(frozen=True)
class PrepareOptions(_Config):
    """What `fastgpt prepare` takes besides PrepareConfig's fields."""

    config: Optional[str] = None
    """A .toml or .json file with PrepareConfig's fields: the base that the other options change."""
    dry_run: bool = False
    """Show files, what is dropped, tokens, disk and time, from a sample of the inputs; write nothing."""
    print_config: bool = False
    """Print the whole configuration as TOML, fit for --config, and do nothing else."""


@dataclass(frozen=True)
class TrainOptions(_Config):
    """What `fastgpt train` takes besides TrainConfig's fields."""

    config: Optional[str] = None
    """A .toml or .json file with TrainConfig's fields: the base that the other options change."""
    preset: Optional[Literal[tuple(PRESETS)]] = None  # type: ignore[valid-type]
    """A named shape as the base of the model."""
    resume: Optional[str] = None
    """auto: go on from the newest intact checkpoint of out_dir, or start if there is none. Or the folder of a run
    or of a checkpoint. Without --config and --preset the run's own config.toml is the base. With a larger --steps a
    run that has ended is trained longer."""
    allow_changes: bool = False
    """Resume although the learning rate, data or another setting that matters has changed; it is recorded. More
    --steps need no such word."""
    dry_run: bool = False
    """Show parameters, memory, disk, tokens and time, with --resume of what is left; train nothing, write nothing."""
    print_config: bool = False
    """Print the whole configuration as TOML, fit for --config, and do nothing else."""


@dataclass(frozen=True)
class SampleConfig(_Config):
    """What `fastgpt sample` writes."""

    prompt: str = ""
    """The text to continue; - reads it from stdin; when empty a new document begins."""
    tokens: int = _number(200, 1)
    """The most tokens to write; it ends earlier where the document does."""
    temperature: float = _number(0.8, 0.0)
    """Below 1 likelier tokens are preferred; 0 always takes the likeliest."""
    top_k: Optional[int] = _number(None, 1)
    """Only the k likeliest tokens may be drawn; all when not given."""
    top_p: Optional[float] = _number(None, 0.0, 1.0, low_open=True)
    """Only the fewest likeliest tokens that reach this probability together may be drawn; all when not given."""
    n: int = _number(1, 1)
    """Samples, one after the other."""
    seed: int = _number(1337, 0, 2**63 - 1)
    """The same seed gives the same samples."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU if there is one."""


@dataclass(frozen=True)
class PlotConfig(_Config):
    """What `fastgpt plot` draws."""

    out: Optional[str] = None
    """The picture (.png, .svg, .pdf). If not given: RUN/loss.png, or of several runs loss-N-runs.png beside them."""


@dataclass(frozen=True)
class DoctorConfig(_Config):
    """What `fastgpt doctor` prints."""

    json: bool = False
    """Print everything as one JSON object."""


@dataclass(frozen=True)
class NoConfig(_Config):
    """A command without options."""


# ---- commands -------------------------------------------------------------------------------------


def prepare(argv: list[str], prog: str) -> int:
    """Text in, a folder with a tokenizer and shards of token ids out."""
    given = {} if HELP & set(argv) else arguments.given(argv, [PrepareOptions, PrepareConfig], prog)
    base = PrepareConfig.load(given["--config"]) if "--config" in given else PrepareConfig()
    (options, config), words = arguments.parse(
        argv,
        [PrepareOptions(), base],
        prog=prog,
        description="Turn texts into a folder with a tokenizer and shards of token ids.",
        positional=Positional("INPUT", "Files and folders: .txt, .jsonl(.gz|.zst), .parquet, source code.", many=True),
    )
    if words:
        config = config.replace(inputs=(*words, *(config.inputs if "--inputs" in given else ())))
    if options.print_config:
        return _print(config.to_toml())
    if not config.inputs:
        raise UserError(f"{prog} needs files or folders to read: {prog} INPUT... --out_dir {config.out_dir}")
    with whole_imports():
        from .data import prepare as prepare_data

    if options.dry_run:
        from .data.plan import plan, report

        return _print(report(plan(config), config) + "\n")
    folder = Path(config.out_dir)
    before = _stamp(folder / "dataset.json")
    try:
        prepare_data(config)
    except KeyboardInterrupt as interrupt:
        if _stamp(folder / "dataset.json") not in (None, before):  # the last thing that is written
            what = f"{folder} is prepared, nothing is missing"
        elif (folder / "prepare.json").exists():
            what = "the same command goes on from here"
        else:
            what = "nothing was written"
        raise type(interrupt)(what) from None
    with contextlib.suppress(OSError):  # a closed stderr is no matter
        data = shlex.quote(config.out_dir)
        command = f"{_program()} train --preset tiny --data.path {data} --batch_tokens 4096 --out_dir runs/first"
        print(f"next: {command}", file=sys.stderr)
    return 0


def _stamp(path: Path) -> tuple[int, int] | None:
    """Differs when a file has been replaced; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _resumed_config(given: dict[str, str]) -> dict[str, Any] | None:
    """The config.toml of the run that --resume names, as a table, if it is there."""
    if given.get("--resume") in (None, "None"):
        return None
    place = Path(given["--resume"])
    if given["--resume"] == "auto":
        place = Path(given.get("--out_dir", TrainConfig().out_dir))
    for folder in (place, place.parent.parent):  # of a run, or of runs/NAME/checkpoints/step-N
        if (folder / "config.toml").is_file():
            return read_table(folder / "config.toml")
    return None


def _dataset_vocab_size(path: str) -> int | None:
    """The vocabulary of a prepared folder, read without loading anything else; None where it cannot be told."""
    try:
        size = json.loads((Path(path) / "dataset.json").read_text(encoding="utf-8"))["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no dataset yet, or a broken one: the trainer says which
    return size if type(size) is int and size > 0 else None


def _train_config(argv: list[str], prog: str) -> tuple[TrainOptions, TrainConfig]:
    """The configuration that a command line means: --config, --preset or a resumed run, then the other flags."""
    given = {} if HELP & set(argv) else arguments.given(argv, [TrainOptions, TrainConfig], prog)
    file, preset = given.get("--config"), given.get("--preset")
    table: dict[str, Any] = {}
    base = TrainConfig()
    if file is not None:
        base, table = TrainConfig.load(file), read_table(file)
    elif preset is None and (own := _resumed_config(given)) is not None:
        base, table = TrainConfig.from_dict(own), own
    if preset is not None:
        if "model" in table:
            raise UserError(f"--preset {preset} and [model] in {file} both give the model's shape: keep one of them")
        base = base.replace(model=ModelConfig.preset(preset))
    (options, config), _ = arguments.parse(
        argv, [TrainOptions(), base], prog=prog, description="Train a model on a folder that `fastgpt prepare` wrote."
    )
    # The vocabulary is the tokenizer's, so it follows the dataset wherever nobody has said otherwise.
    if "--model.vocab_size" not in given and "vocab_size" not in table.get("model", {}):
        size = _dataset_vocab_size(config.data.path)
        if size is not None:
            config = config.replace(model=config.model.replace(vocab_size=size))
    return options, config


def train(argv: list[str], prog: str) -> int:
    """Train a model, or look at what that would take."""
    options, config = _train_config(argv, prog)
    if options.print_config:
        return _print(config.to_toml())
    if options.dry_run:
        return _train_dry_run(config, options)
    from .memory import out_of_memory_explained

    with _output_may_fail(), out_of_memory_explained(config):
        from .machine import OtherLoad

        others, trainer = OtherLoad(), None
        try:
            with whole_imports():
                from .estimate import load_warning, plan_warnings
                from .progress import ConsoleProgress
                from .train import EXIT_INTERRUPTED, Trainer
            load = others.cores()

            trainer = Trainer(
                config, resume=options.resume, allow_changes=options.allow_changes, callbacks=[ConsoleProgress()]
            )
            for warning in [*plan_warnings(config, trainer.data.tokens), *load_warning(trainer.device, load)]:
                trainer.warn(warning)
        except KeyboardInterrupt as interrupt:
            if trainer is not None:
                trainer.abandon()
            raise type(interrupt)("nothing was trained, and nothing written") from None
        begun = trainer.progress.step
        trainer.fit()
        command = f"{_program()} train --resume auto --out_dir {shlex.quote(config.out_dir)}"
        if trainer.interrupted:
            print(f"fastgpt: all is saved, and this goes on: {command}", file=sys.stderr)
            return EXIT_INTERRUPTED
        if begun >= config.steps > 0:
            print(f"fastgpt: {_is_over(begun, config.steps, command)}", file=sys.stderr)
        return 0


def _is_over(step: int, steps: int, command: str) -> str:
    return (
        f"nothing was left to train, as all {steps:,} steps of this run are done; with more --steps it goes on: "
        f"{command} --steps {step + steps}"
    )


def _train_dry_run(config: TrainConfig, options: TrainOptions) -> int:
    """What a run would take, or what is left of the one that would be resumed, which is refused as it would be."""
    with whole_imports():
        from .data import Dataset
        from .estimate import estimate, report
        from .resume import check_same_run, find_checkpoint, warn_of_new_run
    warn_of_new_run(config, options.resume, _warn)
    state = None
    if options.resume is not None and (found := find_checkpoint(config, options.resume, _warn)) is not None:
        state = found.state
        check_same_run(found, config, Dataset.open(config.data.path), options.allow_changes, _warn)
        del found  # its tensors are not to be counted as memory in use
        if state["step"] >= config.steps:
            command = f"{_program()} train --resume auto --out_dir {shlex.quote(config.out_dir)}"
            return _print(_is_over(state["step"], config.steps, command) + "\n")
    with contextlib.suppress(OSError):
        print("fastgpt: timing a few steps ...", file=sys.stderr)
    return _print(report(estimate(config, state), config) + "\n")


def _warn(message: str) -> None:
    print(f"fastgpt: warning: {message}", file=sys.stderr)


def sample(argv: list[str], prog: str) -> int:
    """Continue a prompt with a trained model, as it is written."""
    (config,), (run,) = arguments.parse(
        argv,
        [SampleConfig()],
        prog=prog,
        description="Write text with a trained model.",
        positional=Positional("RUN", "the folder of a run, or of one of its checkpoints"),
    )
    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    with whole_imports():
        import torch

        from .checkpoint import load_model
        from .precision import resolve_device

    device = resolve_device(config.device)
    model, tokenizer = load_model(run, device)
    if tokenizer is None:
        raise UserError(f"{run} has no tokenizer.json, so its tokens cannot be read as text")
    ids = torch.tensor([tokenizer.encode(prompt) or [tokenizer.eot_id]], device=device)
    generator = torch.Generator(device).manual_seed(config.seed)
    for number in range(1, config.n + 1):
        if config.n > 1:
            _print(f"---- sample {number} of {config.n} ----\n")
        _print(prompt)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span several tokens

        def show(new: torch.Tensor, decoder: codecs.IncrementalDecoder = decoder) -> None:
            token = int(new[0])
            if token != tokenizer.eot_id:
                _print(decoder.decode(tokenizer.decode_bytes([token])))

        model.generate(
            ids,
            config.tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            generator=generator,
            stop_ids=[tokenizer.eot_id],
            on_token=show,
        )
        _print(decoder.decode(b"", final=True) + "\n")
    return 0


def plot(argv: list[str], prog: str) -> int:
    """Draw the loss curves of one run or several."""
    (config,), runs = arguments.parse(
        argv,
        [PlotConfig()],
        prog=prog,
        description="Draw the loss curves of runs into one picture.",
        positional=Positional("RUN", "Folders of runs.", many=True),
    )
    if not runs:
        raise UserError(f"{prog} needs the folder of a run: {prog} runs/NAME")
    from .plot import plot_runs

    picture = plot_runs(runs, config.out)
    return _print(f"{picture}\n")


def data_verify(argv: list[str], prog: str) -> int:
    """Read every byte of a prepared folder and compare the checksums. Exit code 1 where something is damaged."""
    _, (folder,) = arguments.parse(
        argv,
        [NoConfig()],
        prog=prog,
        description="Read every byte of a prepared folder and compare it with the checksums.",
        positional=Positional("DIR", "the folder that `fastgpt prepare` wrote"),
    )
    from .data import verify

    problems = verify(folder)
    for problem in problems:
        _print(f"{problem}\n")
    _print(f"{folder}: {len(problems)} problem(s)\n" if problems else f"{folder}: every block is intact\n")
    return EXIT_NOT_IN_ORDER if problems else 0


def doctor(argv: list[str], prog: str) -> int:
    """Say what this machine has and how each op runs. Exit code 1 where fastgpt cannot train as things are."""
    (config,), _ = arguments.parse(
        argv, [DoctorConfig()], prog=prog, description="What this machine has, and which implementation each op uses."
    )
    from .doctor import examine, report

    facts = examine()
    _print((json.dumps(facts, indent=2) if config.json else report(facts)) + "\n")
    return EXIT_NOT_IN_ORDER if any(problem["fatal"] for problem in facts["problems"]) else 0


def demo(argv: list[str], prog: str) -> int:
    """Train on real text in minutes and show how good it became."""
    from .demo.__main__ import main as run_demo

    return run_demo(argv) or 0


@dataclass(frozen=True)
class Command:
    """A line of the help, and what it runs."""

    run: Callable[[list[str], str], int]
    arguments: str
    about: str


COMMANDS = {
    "prepare": Command(prepare, "INPUT...", "turn texts into a tokenizer and shards of token ids"),
    "train": Command(train, "", "train a model on a prepared folder"),
    "sample": Command(sample, "RUN", "write text with a trained model"),
    "plot": Command(plot, "RUN...", "draw the loss curves of runs"),
    "data verify": Command(data_verify, "DIR", "check every byte of a prepared folder"),
    "doctor": Command(doctor, "", "what this machine has, and how each op runs here"),
    "demo": Command(demo, "", "from nothing to a GPT trained on real text, in minutes"),
}


def usage() -> str:
    """The help of `fastgpt` itself."""
    names = {name: f"{name} {command.arguments}" for name, command in COMMANDS.items()}
    width = max(map(len, names.values()))
    lines = [f"  {names[name]:{width}}  {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastgpt COMMAND [options]",
            "",
            *lines,
            "",
            "`fastgpt COMMAND --help` lists the options of a command, `fastgpt --version` tells the version.",
            "",
            "A first run:",
            "  fastgpt prepare texts/ --out_dir data",
            "  fastgpt train --preset tiny --batch_tokens 4096 --dry_run",
            "  fastgpt train --preset tiny --batch_tokens 4096 --out_dir runs/first",
            '  fastgpt sample runs/first --prompt "Once"',
            "",
        ]
    )


# ---- output, refusals, and where it all begins -------------------------------------------------------


def _program() -> str:
    """How this process was called, for commands to be copied: `fastgpt`, or `python -m fastgpt`."""
    as_module = Path(sys.argv[0]).parts[-2:] == ("fastgpt", "__main__.py")
    return f"{shlex.quote(sys.orig_argv[0])} -m fastgpt" if as_module else "fastgpt"


def _print(text: str) -> int:
    sys.stdout.write(text)
    sys.stdout.flush()
    return 0


class _Forgiving:
    """A text stream that never fails: what its reader no longer takes, or its disk cannot hold, is lost."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _silence(stream: Any) -> None:
    """Point the stream's descriptor at nothing, so that what its buffer still holds can be flushed at the exit."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def _output_may_fail() -> Iterator[None]:
    """Training goes on where its output does not: `fastgpt train | head`, or a log on a full disk."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Forgiving(sys.stdout), _Forgiving(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            try:
                stream.flush()
            except OSError:
                _silence(stream)


def _refuse(message: str) -> int:
    if os.environ.get("FASTGPT_DEBUG") == "1":
        traceback.print_exc()
    print(f"fastgpt: error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_REFUSED


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in HELP:
        return _print(usage())
    if argv[0] == "--version":
        return _print(f"fastgpt {__version__}\n")
    for length in (2, 1):
        name = " ".join(argv[:length])
        if name in COMMANDS:
            return COMMANDS[name].run(argv[length:], f"fastgpt {name}")
    groups = {name.split()[0] for name in COMMANDS if " " in name}
    if argv[0] in groups and (len(argv) == 1 or argv[1] in HELP):
        members = [
            f"fastgpt {name} {c.arguments}: {c.about}" for name, c in COMMANDS.items() if name.split()[0] == argv[0]
        ]
        if len(argv) == 1:
            raise UserError(f"fastgpt {argv[0]} needs a command; there is {'; '.join(members)}")
        return _print("\n".join(members) + "\n")
    asked = " ".join(argv[: 2 if argv[0] in groups else 1])
    near = difflib.get_close_matches(asked, COMMANDS, n=1)
    hint = f"did you mean `fastgpt {near[0]}`?" if near else f"the commands are {', '.join(COMMANDS)}"
    raise UserError(f"there is no command {asked!r}; {hint}")


def main(argv: list[str] | None = None) -> int:
    """Run one command line (sys.argv when not given) and return its exit code."""
    if argv is not None:  # called by a program, whose signals are its own
        return _main(list(argv))
    catch_sigterm()
    code = _main(sys.argv[1:])
    let_go()
    return code


def _main(argv: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows another
    try:
        try:
            code = _run(argv)
        except SystemExit as exit:
            if exit.code:
                raise
            code = 0  # a help page was shown
        sys.stdout.flush()
        return code
    except (UserError, ConfigError) as error:
        return _refuse(str(error))
    except BrokenPipeError:
        _silence(sys.stdout)
        return EXIT_SIGPIPE
    except KeyboardInterrupt as interrupt:
        return answer(interrupt)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in ("", "fastgpt"):
            raise
        return _refuse(f"the package {package} is missing; {REMEDIES.get(package, f'pip install {package}')}")
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        if error.filename is None:
            _silence(sys.stdout)
        return _refuse(f"{error.filename or 'the output could not be written'}: {error.strerror}")


if __name__ == "__main__":
    sys.exit(main())

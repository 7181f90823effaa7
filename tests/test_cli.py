"""The command line: help without torch, refusals of one line, configuration by file and flag, and a run end to end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastgpt import arguments, cli
from fastgpt.config import ConfigError, DataConfig, ModelConfig, OptimConfig, PrepareConfig, RopeScaling, TrainConfig
from fastgpt.errors import UserError
from fastgpt.estimate import Estimate, activation_bytes, estimate, report, state_bytes
from fastgpt.files import FolderLock
from fastgpt.interrupts import Terminated
from tests.conftest import processor_seconds

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("PYTHONUNBUFFERED", None)  # output goes through buffers, as for everybody
TINY = [
    *("--model.n_layer", "1", "--model.n_embd", "32", "--model.n_head", "2", "--model.block_size", "32"),
    *("--micro_batch_size", "2", "--batch_tokens", "128", "--precision", "float32"),
    *("--optim.warmup_steps", "0", "--log_every", "1", "--eval.every", "0", "--checkpoint.every", "0"),
]


def run(*argv: str) -> int:
    """`main` in this process: quicker than a new one."""
    return cli.main([str(word) for word in argv])


def start(*argv: object, **options) -> subprocess.Popen:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT} | options
    return subprocess.Popen([sys.executable, "-m", "fastgpt", *map(str, argv)], **options)


def refusal(capsys, *argv: str) -> str:
    """What a refused command says: exit code 2, one line on stderr, nothing on stdout."""
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastgpt: error: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err.removeprefix("fastgpt: error: ").strip()


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- help ------------------------------------------------------------------------------------------


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from fastgpt.cli import main; codes = [main([]), main(['--help']), main(['--version'])]\n"
        "heavy = {'torch', 'numpy', 'tyro', 'rich'} & set(sys.modules); print(codes, sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout.splitlines()[-1] == "[0, 0, 0] []", done.stderr
    seconds = []
    for _ in range(3):  # of a processor, and the quickest: other programs may be running
        before = processor_seconds()
        assert start().wait() == 0
        seconds.append(processor_seconds() - before)
    assert min(seconds) < 0.5


def test_no_help_page_imports_torch(here):
    """Nor does a refusal, or printing the configuration."""
    lines = [f"{name} --help" for name in cli.COMMANDS] + ["train --preset tiny --print-config", "train --stepz 3"]
    code = (
        f"import sys; from fastgpt.cli import main; codes = [main(line.split()) for line in {lines}]\n"
        "print(codes, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout.splitlines()[-1] == f"{[0] * (len(lines) - 1) + [2]} False", done.stderr
    for words in ("--model.n_embd", "--prompt", "--vocab_size", "--json", "INPUT", "RUN", "DIR", "rotary"):
        assert words.lower() in done.stdout.lower()


def test_the_help_lists_every_command(capsys):
    assert run() == run("--help") == run("-h") == 0
    out = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"  {name}" in out
    assert run("data", "--help") == 0
    assert "verify DIR" in capsys.readouterr().out


# ---- refusals ----------------------------------------------------------------------------------------

REFUSED = {
    # a typo
    "trian": "there is no command 'trian'; did you mean `fastgpt train`?",
    "data verfy x": "there is no command 'data verfy'; did you mean `fastgpt data verify`?",
    "zzz": "there is no command 'zzz'; the commands are prepare, train",
    "data": "fastgpt data needs a command; there is fastgpt data verify DIR: check every byte",
    "--verbose": "there is no command '--verbose'",
    "train --model.n_embdd 3": "fastgpt train has no option --model.n_embdd; did you mean --model.n_embd?",
    "train --n_embd 3": "has no option --n_embd; did you mean --model.n_embd?",
    "train --n-hed=3": "has no option --n-hed; did you mean --model.n_head?",
    "train --every 3": "did you mean --eval.every or --checkpoint.every?",
    "train --zzzzzzzz": "has no option --zzzzzzzz; `fastgpt train --help` lists the options",
    "train -x": "has no option -x; `fastgpt train --help`",
    "train --optim.optimizer adam": "--optim.optimizer = 'adam': expected one of adamw, muon; did you mean 'adamw'?",
    "train --preset gtp2": "--preset = 'gtp2': expected one of gpt2,",
    "sample runs/x --temprature 1": "fastgpt sample has no option --temprature; did you mean --temperature?",
    "prepare a.txt --vocabsize 300": "fastgpt prepare has no option --vocabsize; did you mean --vocab_size?",
    "doctor --jsn": "fastgpt doctor has no option --jsn; did you mean --json?",
    # a bad type
    "train --model.n_embd x": "--model.n_embd = 'x': expected a whole number, at least 1",
    "train --model.n_embd=1.5": "--model.n_embd = '1.5': expected a whole number, at least 1",
    "train --optim.lr fast": "--optim.lr = 'fast': expected a finite number, at least 0",
    "train --data.documents=maybe": "--data.documents = 'maybe': expected true or false",
    "train --model.n_kv_head x": "--model.n_kv_head = 'x': expected a whole number, at least 1 (or nothing)",
    # a bad range
    "train --model.n_embd -3": "--model.n_embd = -3: expected a whole number, at least 1",
    "train --optim.lr nan": "--optim.lr = nan: expected a finite number",
    "train --optim.beta2=1": "expected a finite number, at least 0 and less than 1",
    "sample runs/x --top_p 0": "--top_p = 0.0: expected a finite number, more than 0 and at most 1 (or nothing)",
    "prepare a.txt --vocab_size 3": "--vocab_size = 3: expected a whole number, at least 257",
    # several fields
    "train --model.n_embd 770": "--model.n_embd = 770: expected a multiple of n_head (12), or head_dim given",
    "train --model.n_kv_head 5": "--model.n_kv_head = 5: expected a divisor of n_head (12)",
    "train --micro_batch_size 7": "a multiple of micro_batch_size * block_size (7 * 1024); the nearest is 523264",
    "train --model.rope_scaling.kind llama3 --model.rope_scaling.high_freq_factor 1": "--model.rope_scaling.high_freq_",
    # a value or a word too few or too many
    "train --steps": "--steps needs a value: expected a whole number, at least 0",
    "train --steps --seed 3": "--steps needs a value",
    "train data": "fastgpt train does not know what 'data' is for",
    "sample": "fastgpt sample needs RUN: the folder of a run",
    "sample a b": "fastgpt sample does not know what 'b' is for",
    "plot": "fastgpt plot needs the folder of a run",
    "prepare": "fastgpt prepare needs files or folders to read",
    "data verify": "fastgpt data verify needs DIR: the folder that `fastgpt prepare` wrote",
    # something that is not there
    "train --config missing.toml": "cannot read the configuration missing.toml: No such file or directory",
    "prepare missing.txt": "missing.txt",
    "sample missing": "missing does not exist; expected a run's folder",
    "plot missing": "missing",
    "data verify missing": "missing",
    "train": "data",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refusals_are_one_line(line, capsys, here):
    assert REFUSED[line] in refusal(capsys, *line.split())
    assert not list(here.iterdir())


def test_the_traceback_is_there_for_those_who_ask(monkeypatch, capsys):
    monkeypatch.setenv("FASTGPT_DEBUG", "1")
    assert run("train", "--model.n_embd", "x") == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "fastgpt: interrupted\n"),
        (KeyboardInterrupt("nothing was written"), 130, "fastgpt: interrupted; nothing was written\n"),
        (Terminated("nothing was written"), 143, "fastgpt: terminated; nothing was written\n"),
        (BrokenPipeError(), 141, ""),
        (PermissionError(13, "Permission denied", "runs/x"), 2, "fastgpt: error: runs/x: Permission denied\n"),
        (UserError("first\n  second"), 2, "fastgpt: error: first second\n"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "torch is missing; pip install torch\n"),
        (ModuleNotFoundError("No module named 'rich.x'", name="rich.x"), 2, "rich is missing; pip install rich\n"),
        (SystemExit(0), 0, ""),
    ],
)
def test_exit_codes(error, code, words, monkeypatch, capsys):
    def fail(argv, prog):
        raise error

    monkeypatch.setattr(cli, "_silence", lambda stream: None)  # the stream is pytest's
    monkeypatch.setitem(cli.COMMANDS, "doctor", cli.Command(fail, "", ""))
    assert run("doctor") == code
    err = capsys.readouterr().err
    assert err.endswith(words) if words else err == ""


def test_kernels_that_are_required_and_missing_are_one_line(monkeypatch, capsys):
    from fastgpt import native

    monkeypatch.setenv("FASTGPT_REQUIRE_KERNELS", "1")
    on_gpu = SimpleNamespace(is_cuda=True)
    monkeypatch.setitem(cli.COMMANDS, "doctor", cli.Command(lambda argv, prog: native.select(on_gpu), "", ""))
    assert "no CUDA kernels built; unset FASTGPT_REQUIRE_KERNELS" in refusal(capsys, "doctor")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ModuleNotFoundError("x", name="fastgpt.x"), SystemExit(3)])
def test_what_is_no_fault_of_the_user_is_not_hidden(error, monkeypatch):
    def fail(argv, prog):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "doctor", cli.Command(fail, "", ""))
    with pytest.raises(type(error)):
        run("doctor")


# ---- flags, files, presets ---------------------------------------------------------------------------


def printed_config(capsys, *argv: str) -> TrainConfig:
    assert run("train", *argv, "--print-config") == 0
    return TrainConfig.from_toml(capsys.readouterr().out)


def other_value(flag: arguments.Flag, default: object) -> tuple[str, object]:
    """A value of this field that is not its default, as the user writes it and as the field holds it."""
    if bool in flag.arms:
        return str(not default).lower(), not default
    choices = [a for a in getattr(flag.hint, "__args__", ()) if isinstance(a, str)]
    if choices:
        value = next(choice for choice in choices if choice != default)
        return value, value
    if flag.takes_many:
        return "x", ("x",)
    for kind in (float, int):
        if kind.__name__ in str(flag.hint):
            for text in ("0.75", "1.5") if kind is float else ("3", "300"):
                with contextlib.suppress(ConfigError):
                    flag.check(text)
                    return text, kind(text)
    return "some text", "some text"


@pytest.mark.parametrize("cls", [TrainConfig, PrepareConfig, cli.SampleConfig, RopeScaling])
def test_every_field_is_a_flag(cls):
    """Spelled as the field or with hyphens; checked and converted as its class does."""
    known = arguments.flags(cls)
    for name, flag in known.items():
        section, _, field = name[2:].rpartition(".")
        holder = cls()
        for part in filter(None, section.split(".")):
            holder = getattr(holder, part) if getattr(holder, part) is not None else RopeScaling()
        text, value = other_value(flag, getattr(holder, field))
        hyphens = "--" + name[2:].replace("_", "-")
        assert arguments.check([hyphens, text], known, "x") == arguments.check([name, text], known, "x")
        try:
            (config,), _ = arguments.parse([hyphens, text], [cls()], prog="x", description="")
        except ValueError as error:  # right by itself, but not beside the other fields' defaults
            assert any(w in str(error) for w in ("multiple", "divisor", "even whole")), name
            continue
        for part in filter(None, section.split(".")):
            config = getattr(config, part)
        assert getattr(config, field) == value, name


def test_spellings_of_a_switch(capsys):
    for words, expected in {
        "--data.documents": True,
        "--data.documents true": True,
        "--data.documents=True": True,
        "--data.documents false": False,
        "--data.no-documents": False,
        "--data.documents --data.no_documents": False,
    }.items():
        assert printed_config(capsys, *words.split()).data.documents is expected, words
    assert printed_config(capsys, "--model.no_tied_embeddings").model.tied_embeddings is False


def test_the_last_of_a_repeated_flag_counts_and_equals_binds(capsys):
    config = printed_config(capsys, "--steps=5", "--steps", "6", "--out_dir=a=b --c", "--model.n_kv_head", "None")
    assert (config.steps, config.out_dir, config.model.n_kv_head) == (6, "a=b --c", None)


def test_a_nested_table_that_is_absent_by_default_has_flags_too(capsys):
    assert printed_config(capsys).model.rope_scaling is None
    assert printed_config(capsys, "--model.rope_scaling.factor", "2").model.rope_scaling == RopeScaling(factor=2.0)
    scaled = printed_config(capsys, "--preset", "llama-1b", "--model.rope_scaling.factor", "2")
    assert scaled.model.rope_scaling == RopeScaling(kind="llama3", factor=2.0)


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_print_config_and_config_are_inverse(suffix, capsys, here):
    flags = [
        "--preset",
        "llama-8b",
        "--model.window",
        "0",
        "--data.path",
        'a "b" ü',
        "--optim.lr",
        "1e-3",
        "--seed",
        "7",
    ]
    config = printed_config(capsys, *flags)
    assert config.model == ModelConfig.preset("llama-8b", window=0)
    assert (config.data, config.optim.lr, config.seed) == (DataConfig(path='a "b" ü'), 1e-3, 7)
    file = here / f"c.{suffix}"
    file.write_text(getattr(config, f"to_{suffix}")(), encoding="utf-8")
    assert printed_config(capsys, "--config", str(file)) == config
    assert printed_config(capsys, "--config", str(file), "--steps", "3") == config.replace(steps=3)


def test_prepare_takes_its_inputs_as_words_or_from_a_file(capsys, here):
    (here / "p.toml").write_text('inputs = ["x.txt"]\nvocab_size = 300\n')

    def printed(*argv):
        assert run("prepare", *argv, "--print-config") == 0
        return PrepareConfig.from_toml(capsys.readouterr().out)

    assert printed("--config", "p.toml") == PrepareConfig(inputs=("x.txt",), vocab_size=300)
    assert printed("a", "--out_dir", "o", "b") == PrepareConfig(inputs=("a", "b"), out_dir="o")
    assert printed("--config", "p.toml", "a").inputs == ("a",)
    assert printed("a", "--inputs", "b", "c", "--val_inputs", "v", "w").val_inputs == ("v", "w")
    assert printed("a", "--inputs", "b", "c").inputs == ("a", "b", "c")


def test_a_preset_and_a_file_may_not_both_give_the_model(capsys, here):
    (here / "m.toml").write_text("[model]\nn_layer = 3\n")
    (here / "o.toml").write_text("steps = 3\n")
    assert "keep one of them" in refusal(capsys, "train", "--preset", "tiny", "--config", "m.toml")
    config = printed_config(capsys, "--preset", "tiny", "--config", "o.toml")
    assert config == TrainConfig(steps=3, model=ModelConfig.preset("tiny"))


def test_the_vocabulary_follows_the_dataset_unless_given(capsys, here):
    (here / "data").mkdir()
    (here / "data" / "dataset.json").write_text(json.dumps({"vocab_size": 777}))
    (here / "m.toml").write_text("[model]\nvocab_size = 555\n")
    assert printed_config(capsys).model.vocab_size == 777
    assert printed_config(capsys, "--preset", "tiny").model.vocab_size == 777
    assert printed_config(capsys, "--model.vocab-size", "444").model.vocab_size == 444
    assert printed_config(capsys, "--config", "m.toml").model.vocab_size == 555
    assert printed_config(capsys, "--data.path", "elsewhere").model.vocab_size == ModelConfig().vocab_size
    (here / "data" / "dataset.json").write_text('{"vocab_size": "many"}')
    assert printed_config(capsys).model.vocab_size == ModelConfig().vocab_size


def test_a_resumed_run_brings_its_own_configuration(capsys, here):
    config = TrainConfig(steps=11, out_dir="runs/a", model=ModelConfig(n_layer=3, vocab_size=500))
    step = here / "runs" / "a" / "checkpoints" / "step-00000001"
    step.mkdir(parents=True)
    (here / "runs" / "a" / "config.toml").write_text(config.to_toml())
    assert printed_config(capsys, "--resume", "runs/a") == config
    assert printed_config(capsys, "--resume", str(step), "--steps", "12") == config.replace(steps=12)
    assert printed_config(capsys, "--resume", "auto", "--out_dir", "runs/a") == config
    assert printed_config(capsys, "--resume", "auto") == TrainConfig()  # runs/default is not there


def test_what_tyro_prints_is_the_last_resort():
    """Refusals are found before tyro sees them; should one slip through, its box becomes a line."""
    box = "\x1b[31m╭─ Value error ───╮\x1b[0m\n│ Error parsing   │\n│ --x: too blue   │\n╰─────────────────╯\n"
    assert arguments._reason(SystemExit(2), box) == "Value error Error parsing --x: too blue"


# ---- dry run -------------------------------------------------------------------------------------------


def test_dry_run_measures_and_writes_nothing(capsys, here):
    assert run("train", *TINY, "--steps", "1000", "--dry-run", "--model.vocab_size", "100") == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines()}
    expected = (100 + 32 + 12 * 32 + 13) * 32  # embeddings, positions, one block's matrices and vectors, ...
    assert lines["parameters"] == f"{expected + 2 * 32:,}"  # ... and the last norm
    assert "128,000 in 1,000 steps of 128 (no dataset in data yet)" in lines["tokens"]
    assert "2 a step, 2 x 32 tokens" in lines["micro-batches"]
    assert "(measured: " in lines["time"]
    assert not list(here.iterdir())


def test_dry_run_says_when_it_only_estimates(here):
    config = TrainConfig(model=ModelConfig.preset("llama-8b"))
    found = estimate(config)
    assert found.parameters == 8_030_261_248 and not found.timed
    text = report(found, config)
    assert "estimated, since " in text and "It does not fit" in text
    # gpt2 has 124,439,808 parameters: fp32 weights, gradients and two moments, the vocabulary padded
    small = estimate(TrainConfig(precision="float32"))
    assert small.parameters == 124_439_808
    assert small.state_bytes == 16 * (124_439_808 + 47 * 768)
    assert small.checkpoint_bytes == 12 * 124_439_808  # without the padding
    assert small.tokens == 5000 * 524288


ESTIMATE = Estimate(
    parameters=1,
    precision="float32",
    device="cpu",
    steps=200,
    tokens=200 * 524288,
    dataset_tokens=10**7,
    state_bytes=1,
    activation_bytes=1,
    available_bytes=10,
    checkpoint_bytes=1,
    checkpoints=1,
    disk_bytes=10,
    seconds=86400.0,
    timed=True,
    how="measured",
)


@pytest.mark.parametrize(
    ("found", "config", "words"),
    [
        ({}, {}, []),
        ({"dataset_tokens": 10**6}, {}, ["reads the 1,000,000 training tokens 105 times over", "--batch_tokens"]),
        ({"dataset_tokens": None}, {}, []),
        ({"seconds": 86401.0}, {}, ["longer than a day here: try --preset tiny, fewer --steps or", "--batch_tokens"]),
        ({"seconds": 86401.0}, {"model": ModelConfig.preset("tiny")}, ["longer than a day here: try fewer --steps"]),
        ({}, {"steps": 101}, []),  # the last step is at the peak
        ({}, {"steps": 100}, ["never reaches its peak: the warm-up takes 100 steps, the run 100;", "warmup_steps"]),
        ({}, {"steps": 0}, []),
    ],
)
def test_a_dry_run_warns_of_what_nobody_wants(found, config, words):
    config = TrainConfig(**{"steps": 200, **config})
    lines = report(dataclasses.replace(ESTIMATE, **found), config).splitlines()
    warnings = lines[[line.split()[0] for line in lines].index("time") + 1 :]
    assert len(warnings) == bool(words)
    assert all(word in warnings[0] for word in words)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "bfloat16_stochastic"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_state_is_known_to_the_byte(precision, kind):
    """Against every tensor that is there after a step; of those that parameters share, the step counts, nothing."""
    import torch

    from fastgpt.model import GPT
    from fastgpt.optim import build_optimizer
    from fastgpt.precision import apply_precision

    config = ModelConfig.preset("tiny", n_layer=2, n_head=2, n_embd=32, vocab_size=100, block_size=16)
    model = apply_precision(GPT(config), precision)
    optimizer = build_optimizer(
        model, OptimConfig(optimizer=kind), stochastic_rounding=precision == "bfloat16_stochastic"
    )
    expected = state_bytes(optimizer)
    idx = torch.randint(100, (1, 16))
    model(idx, idx).backward()
    optimizer.step()
    tensors = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values())]
    assert expected == sum(t.numel() * t.element_size() for t in tensors if t.dim())


@pytest.mark.parametrize("preset", ["tiny", "gpt2"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_are_estimated_within_a_third(preset, precision):
    """Against the bytes of every tensor that autograd really keeps between forward and backward."""
    import torch

    from fastgpt.model import GPT

    config = ModelConfig.preset(preset, n_layer=3, n_head=4, n_embd=128, vocab_size=500, block_size=128)
    model = GPT(config).to(getattr(torch, precision))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}  # by address; the tensors stay alive, so no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    idx = torch.randint(500, (4, 128))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(idx, idx)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert 2 / 3 < activation_bytes(config, idx.numel(), precision) / measured < 4 / 3


# ---- from text to picture ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with prepared data and a trained run: texts/, data/, runs/a."""
    folder = tmp_path_factory.mktemp("world")
    draw = random.Random(0)
    (folder / "texts").mkdir()
    for i in range(20):
        words = draw.choices(["the", "cat", "sat", "on", "a", "mat", "and", "then", "not", "ü"], k=300)
        (folder / "texts" / f"{i}.txt").write_text(" ".join(words), encoding="utf-8")
    with contextlib.chdir(folder) if hasattr(contextlib, "chdir") else _chdir(folder):
        assert run("prepare", "texts", "--vocab_size", "300", "--val_fraction", "0.3", "--workers", "1") == 0
        assert run("train", *TINY, "--steps", "5", "--out_dir", "runs/a") == 0
    return folder


@contextlib.contextmanager
def _chdir(folder: Path):  # contextlib has it from Python 3.11
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture
def inside(world, monkeypatch) -> Path:
    monkeypatch.chdir(world)
    return world


def test_a_run_leaves_what_it_should(inside):
    assert {p.name for p in (inside / "runs/a").iterdir()} >= {
        "config.toml",
        "metrics.jsonl",
        "tokenizer.json",
        "checkpoints",
    }
    config = TrainConfig.load(inside / "runs/a/config.toml")
    vocab_size = json.loads((inside / "data/dataset.json").read_text())["vocab_size"]
    assert config.model.vocab_size == vocab_size != ModelConfig().vocab_size
    assert config.steps == 5
    rows = [json.loads(line) for line in (inside / "runs/a/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5]


def test_training_prints_plain_lines_where_there_is_no_terminal(inside, capsys, tmp_path):
    assert run("train", *TINY, "--steps", "2", "--out_dir", str(tmp_path / "b")) == 0
    out = capsys.readouterr().out
    assert "step 1/2  loss " in out and "step 2/2  loss " in out and "\x1b" not in out and "\r" not in out


def test_a_run_that_never_reaches_its_learning_rate_says_so(inside, capsys, tmp_path):
    words = ["train", *TINY, "--steps", "1", "--optim.warmup_steps", "1"]
    assert run(*words, "--out_dir", str(tmp_path / "w")) == 0
    err = capsys.readouterr().err
    assert err.startswith("fastgpt: warning: The learning rate never reaches its peak") and err.count("\n") == 1
    assert "another --out_dir" in refusal(capsys, *words, "--out_dir", "runs/a")  # which takes one line alone


def test_a_second_run_in_the_same_folder_is_refused(inside, capsys, tmp_path):
    assert "runs/a" in refusal(capsys, "train", *TINY, "--out_dir", "runs/a", "--steps", "1")
    held = tmp_path / "held"
    held.mkdir()
    lock = FolderLock(held)
    assert "another run is training in" in refusal(capsys, "train", *TINY, "--out_dir", str(held), "--steps", "1")
    lock.release()


def test_a_mistyped_run_is_told_of_first(inside, capsys, tmp_path, monkeypatch):
    """A new run begins there, for the first start of a job and the next ones are one command; but not unnoticed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/first/checkpoints/step-00000001").mkdir(parents=True)
    (tmp_path / "runs/frost").mkdir()
    for folder, hint in (("runs/frist", "; did you mean runs/first?"), ("runs/other", ""), ("new/frist", "")):
        assert run("train", "--resume", "auto", "--out_dir", folder, "--data.path", "nowhere") == 2
        warning, refused = capsys.readouterr().err.splitlines()
        assert warning == f"fastgpt: warning: nothing to resume in {folder}: a new run begins there{hint}"
        assert refused.startswith("fastgpt: error: nowhere")


def test_resuming_under_other_settings_needs_a_word(inside, capsys, tmp_path):
    words = ["train", *TINY, "--out_dir", str(tmp_path / "r")]
    assert run(*words, "--steps", "2") == 0
    capsys.readouterr()
    again = ["train", "--resume", "auto", "--out_dir", str(tmp_path / "r"), "--steps", "1", "--optim.lr", "0.001"]
    assert "otherwise: optim.lr: 0.0006 -> 0.001; steps: 2 -> 1; give --allow-changes" in refusal(capsys, *again)
    again[again.index("1")] = "3"  # more steps are as good as said
    for dry in ([], ["--dry_run"]):
        assert "otherwise: optim.lr: 0.0006 -> 0.001; give --allow-changes" in refusal(capsys, *again, *dry)
    assert run(*again, "--allow-changes") == 0
    assert "done at step 3" in capsys.readouterr().out


def test_a_run_that_has_ended_says_how_to_go_on_and_does(inside, capsys, tmp_path):
    folder = tmp_path / "a run"
    assert run("train", *TINY, "--steps", "10", "--out_dir", str(folder)) == 0
    again = ["train", "--resume", "auto", "--out_dir", str(folder)]
    capsys.readouterr()
    hint = (
        "nothing was left to train, as all 10 steps of this run are done; with more --steps it goes on: fastgpt train "
        f"--resume auto --out_dir {shlex.quote(str(folder))} --steps 20"
    )
    assert run(*again, "--dry_run") == 0
    assert capsys.readouterr().out == hint + "\n"
    assert run(*again) == 0
    assert capsys.readouterr().err == f"fastgpt: {hint}\n"
    assert run(*shlex.split(hint.partition("goes on: fastgpt ")[2])) == 0
    out, err = capsys.readouterr()
    assert "resumed at step 10" in out and "done at step 20" in out
    # the last step of the short run was at a tenth of the peak, the next one is in the middle of the long one's cosine
    assert err == (
        "fastgpt: warning: the planned steps went from 10 to 20: after step 10 the learning rate goes from 6.0e-05 to "
        "3.1e-04, where the cosine of the longer run is\n"
    )
    rates = [json.loads(line).get("lr") for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [rate for rate in rates if rate is not None]
    assert len(rates) == 20 and rates[10] == pytest.approx(3.08e-4, rel=0.01) and rates[-1] == pytest.approx(6e-5)
    state = json.loads(next(folder.glob("checkpoints/step-00000020/state.json")).read_text())
    assert state["changes"] == [{"step": 10, "changes": ["steps: 10 -> 20"]}]


@pytest.mark.parametrize(("schedule", "warned"), [("constant", False), ("wsd", True)])
def test_more_steps_are_remarked_upon_where_the_rate_jumps(inside, capsys, tmp_path, schedule, warned):
    words = [*TINY, "--optim.schedule", schedule, "--optim.decay_fraction", "1", "--out_dir", str(tmp_path / "r")]
    assert run("train", *words, "--steps", "2") == 0
    capsys.readouterr()
    assert run("train", "--resume", "auto", "--out_dir", str(tmp_path / "r"), "--steps", "8") == 0
    assert ("the learning rate goes from" in capsys.readouterr().err) == warned


def test_a_dry_run_of_a_resume_is_about_what_is_left(inside, capsys, tmp_path, monkeypatch):
    from fastgpt import estimate as module

    monkeypatch.setattr(module, "_flops_per_second", lambda device, precision: 1e12)
    monkeypatch.setattr(module, "_time_steps", lambda config, device, precision: (0.5, 0.25))
    folder = tmp_path / "r"
    assert run("train", *TINY, "--steps", "4", "--out_dir", str(folder)) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run("train", "--resume", "auto", "--out_dir", str(folder), "--steps", "10", "--dry_run") == 0
    out = capsys.readouterr().out
    assert "tokens         768 in 6 steps of 128, after 4 of 10 that are done (" in out
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    config = TrainConfig.load(folder / "config.toml")
    whole, rest = estimate(config), estimate(config, {"step": 3, "precision": "bfloat16"})
    assert (whole.steps, rest.steps, rest.done, rest.tokens) == (4, 1, 3, 128)
    assert (whole.seconds, rest.seconds) == (4 * 1.25, 1.25)  # two micro-batches and an update
    assert estimate(config.replace(precision="auto"), {"step": 3, "precision": "bfloat16"}).precision == "bfloat16"
    assert run("train", "--resume", "auto", "--out_dir", str(tmp_path / "new"), *TINY, "--dry_run") == 0
    out, err = capsys.readouterr()
    assert "640,000 in 5,000 steps of 128 (" in out and err.startswith("fastgpt: warning: nothing to resume")


def test_it_is_said_that_the_precision_is_measured_before_it_is(inside, capsys, tmp_path, monkeypatch):
    from fastgpt import train

    def measure(config, device):
        assert capsys.readouterr().out == "measuring whether float32 or bfloat16 is faster here ...\n"
        return "float32", {}

    monkeypatch.setattr(train, "measure_precision", measure)
    words = ["train", *TINY, "--precision", "auto", "--steps", "1", "--out_dir", str(tmp_path / "m")]
    assert run(*words) == 0
    assert capsys.readouterr().out.startswith("22.7k parameters, float32 on cpu, ")
    assert run(*words, "--resume", "auto") == 0
    assert "measuring" not in capsys.readouterr().out


def test_kernels_that_are_required_and_missing_are_refused_before_anything_is_written(
    inside, capsys, tmp_path, monkeypatch
):
    import torch

    from fastgpt import native, train

    monkeypatch.setenv("FASTGPT_REQUIRE_KERNELS", "1")
    monkeypatch.setattr(train, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(native, "cuda_ops", lambda: frozenset(native.OPS) - {"attention"})
    words = ["train", *TINY, "--steps", "1", "--out_dir", str(tmp_path / "run")]
    assert "for attention there are no CUDA kernels built; unset FASTGPT_REQUIRE_KERNELS" in refusal(capsys, *words)
    assert not list(tmp_path.iterdir())


def test_a_resume_that_cannot_be_is_refused_and_changes_nothing(inside, capsys, tmp_path, monkeypatch):
    """A damaged checkpoint that was named, another model, another tokenizer."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(inside / "runs", "runs")
    shutil.copytree(inside / "data", "data")
    (tmp_path / "other").mkdir()
    for text in (inside / "texts").iterdir():  # a vocabulary of the same size, of other tokens
        swapped = text.read_text(encoding="utf-8").translate(str.maketrans("acehnost", "tsonheca"))
        (tmp_path / "other" / text.name).write_text(swapped, encoding="utf-8")
    vocab_size = json.loads(Path("data/dataset.json").read_text())["vocab_size"]
    words = ["prepare", "other", "--vocab_size", str(vocab_size), "--workers", "1", "--out_dir", "other data"]
    assert run(*words) == 0
    assert json.loads(Path("other data/dataset.json").read_text())["vocab_size"] == vocab_size
    capsys.readouterr()
    found = Path("runs/a/checkpoints/step-00000005")
    shutil.copytree("runs/a", "runs/b")
    newest = Path("runs/b/checkpoints/step-00000005")
    shutil.copytree(newest, newest.with_name("step-00000004"))  # to which nobody who named the newest may be led
    damaged = newest / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)

    def everything() -> dict[Path, bytes | None]:
        return {path: path.read_bytes() if path.is_file() else None for path in sorted(tmp_path.rglob("*"))}

    before = everything()
    for words, reason in {
        (newest, "--out_dir", "new"): f"{damaged} is damaged (its checksum does not match",
        (found, "--out_dir", "new", "--model.n_layer", "2"): f"{found} holds another model: model.n_layer: 1 -> 2",
        (found, "--out_dir", "new", "--data.path", "other data"): f"{found} has another tokenizer (sha256 ",
        ("auto", "--out_dir", "runs/a", "--model.n_head", "1"): "holds another model: model.n_head: 2 -> 1",
        ("auto", "--out_dir", "runs/a", "--data.path", "other data"): "has another tokenizer (sha256 ",
    }.items():
        for more in ((), ("--allow-changes",)):
            assert reason in refusal(capsys, "train", "--resume", *words, *more), words
        assert everything() == before, words


def test_a_dry_run_of_prepare_tells_what_it_would_do(inside, capsys, tmp_path, monkeypatch):
    """Of a small corpus everything is read, and what prepare then does is what was said."""
    from fastgpt.data import plan

    monkeypatch.chdir(tmp_path)
    shutil.copytree(inside / "texts", "texts")
    shutil.copy("texts/0.txt", "texts/again.txt")
    Path("texts/none.txt").touch()
    Path("texts/bad.txt").write_bytes(b"a mat \xff\xff")
    Path("texts/picture.png").touch()
    words = ["prepare", "texts", "--vocab_size", "300", "--workers", "1", "--val_fraction", "0"]
    before = sorted(tmp_path.rglob("*"))

    def told(*more: str) -> dict[str, str]:
        assert run(*words, *more, "--dry_run") == 0
        return {line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()}

    assert "texts/bad.txt is not UTF-8" in refusal(capsys, *words, "--dry_run")
    words += ["--errors", "replace"]
    rows = told()
    assert sorted(tmp_path.rglob("*")) == before
    assert rows["files"].startswith("23, 1 of them empty, ")
    assert rows["skipped"] == "1 file of another kind: texts/picture.png; name a file itself to read it"
    assert rows["sample"] == "all of it was read: 1 duplicates, 2 invalid UTF-8 sequences to be replaced"
    assert "1 worker, 0:0" in rows["time"] and "out_dir" not in rows
    assert run(*words) == 0
    split = json.loads(Path("data/dataset.json").read_text())["splits"]["train"]
    assert rows["tokens"].startswith(f"{split['tokens']:,} of a vocabulary of ")
    assert rows["text"].endswith(f" in {split['documents']} documents")
    assert sum(shard["tokens"] for shard in split["shards"]) == split["tokens"]
    capsys.readouterr()
    assert told()["out_dir"] == "holds this very dataset: there is nothing to do"
    assert "prepared otherwise (val_fraction was 0.0 and now is 0.5)" in refusal(
        capsys, *words, "--val_fraction", "0.5", "--dry_run"
    )
    # of a larger one a part is read, and the rest follows from it
    monkeypatch.setattr(plan, "SAMPLE_BYTES", 8000)
    rows = told("--out_dir", "other", "--tokenizer", "data")
    assert rows["sample"].split(" of it ")[0] not in ("all", rows["files"].split(", ")[-1])
    about = int(rows["tokens"].split()[1].replace(",", ""))
    assert rows["tokens"].startswith("about ") and 0.8 < about / split["tokens"] < 1.3


def test_dry_run_knows_the_dataset(inside, capsys):
    assert run("train", *TINY, "--dry_run") == 0
    tokens = json.loads((inside / "data/dataset.json").read_text())["splits"]["train"]["tokens"]
    assert f"times the {tokens:,} in data" in capsys.readouterr().out


def test_sample_continues_the_prompt(inside, capsys, monkeypatch):
    def sampled(*options: str) -> str:
        assert run("sample", "runs/a", *options) == 0
        return capsys.readouterr().out

    text = sampled("--prompt", "the cat", "--tokens", "20", "--seed", "3")
    assert text.startswith("the cat") and len(text) > len("the cat\n")
    assert text == sampled("--prompt", "the cat", "--tokens", "20", "--seed", "3")
    assert text != sampled("--prompt", "the cat", "--tokens", "20", "--seed", "4")
    greedy = sampled("--prompt", "the", "--tokens", "3", "--temperature", "0", "--top_k", "5", "--top_p", "0.9")
    assert greedy == sampled("--prompt", "the", "--tokens", "3", "--temperature", "0")
    two = sampled("--prompt", "a", "--n", "2", "--tokens", "4").split("---- sample ")
    assert two[1].startswith("1 of 2 ----\na") and two[2].startswith("2 of 2 ----\na")
    assert sampled("--tokens", "1").endswith("\n")  # without a prompt a document begins
    with open(inside / "prompt.txt", "w+") as prompt:
        prompt.write("on a mat")
        prompt.seek(0)
        monkeypatch.setattr(sys, "stdin", prompt)
        assert sampled("--prompt", "-", "--tokens", "1").startswith("on a mat")


def test_sample_shows_a_character_when_it_is_whole(inside, capsys, monkeypatch):
    """ü is two bytes and may be two tokens: nothing but ü may ever be shown."""
    from fastgpt.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(inside / "runs/a/tokenizer.json")
    ids = [i for byte in "üa€".encode() for i in range(256) if tokenizer.decode_bytes([i]) == bytes([byte])]
    assert len(ids) == 6

    def scripted(self, idx, max_new_tokens, *, on_token, **options):
        for i in ids:
            on_token(__import__("torch").tensor([i]))

    monkeypatch.setattr("fastgpt.model.GPT.generate", scripted)
    shown = []
    monkeypatch.setattr(cli, "_print", lambda text: shown.append(text) or 0)
    assert run("sample", "runs/a", "--prompt", "x") == 0
    assert shown == ["x", "", "ü", "a", "", "", "€", "\n"]


def test_plot_draws_one_run_and_several(inside, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert run("plot", "runs/a") == 0
    assert capsys.readouterr().out == "runs/a/loss.png\n"
    png = (inside / "runs/a/loss.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert run("plot", "runs/a", "runs/a", "--out", str(tmp_path / "both.png")) == 0
    both = (tmp_path / "both.png").read_bytes()
    assert both.startswith(b"\x89PNG") and both != png


def test_plot_leaves_out_what_cannot_be_drawn(inside, capsys, tmp_path):
    """As in `fastgpt plot runs/*`: an empty run, one without a loss, a damaged one, and the picture of last time."""
    pytest.importorskip("matplotlib")
    for name in ("a", "b", "empty", "new", "damaged"):
        (tmp_path / name).mkdir()
        if name != "empty":
            (tmp_path / name / "metrics.jsonl").write_bytes((inside / "runs/a/metrics.jsonl").read_bytes())
    (tmp_path / "new" / "metrics.jsonl").write_text("")
    (tmp_path / "damaged" / "metrics.jsonl").write_text("{\n")
    (tmp_path / "old.png").write_text("")
    assert run("plot", *sorted(map(str, tmp_path.iterdir()))) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path}/loss-2-runs.png\n"
    for name, reason in {
        "damaged": "metrics.jsonl: 1 line is damaged",
        "empty": "holds no metrics.jsonl",
        "new": "metrics.jsonl has no losses yet",
        "old.png": "holds no metrics.jsonl",
    }.items():
        assert any(f"left out: {tmp_path}/{name}" in line and reason in line for line in err.splitlines()), name
    assert len(err.splitlines()) == 4
    nothing = refusal(capsys, "plot", f"{tmp_path}/empty", f"{tmp_path}/new")
    assert nothing.startswith(f"{tmp_path}/empty holds no metrics.jsonl") and nothing.endswith(
        "none of the 2 can be drawn"
    )


def test_help_shows_what_may_be_given_several_times(capsys):
    for command, word in {"plot": "RUN...", "prepare": "INPUT...", "sample": "RUN"}.items():
        assert run(command, "--help") == 0
        usage, *rest = capsys.readouterr().out.splitlines()
        assert word in usage.replace("]", " ").split()
        assert any(line.strip("│ ").split()[:1] == [word] for line in rest), command


def test_verify_names_shard_and_block(inside, capsys, tmp_path):
    assert run("data", "verify", "data") == 0
    assert capsys.readouterr().out == "data: every block is intact\n"
    for file in (inside / "data").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = next(tmp_path.glob("train*.bin"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert run("data", "verify", str(tmp_path)) == 1
    out = capsys.readouterr().out
    assert shard.name in out and "block 0" in out and "1 problem" in out


# ---- real processes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["train", "--print-config"], ["train", "--help"], []])
def test_a_closed_pipe_ends_a_command_quietly(argv, here):
    read, write = os.pipe()
    os.close(read)
    process = start(*argv, stdout=write)
    os.close(write)
    assert process.communicate()[1] == ""
    assert process.returncode == 141


@pytest.mark.parametrize("argv", [["train", "--print-config"], ["train", "--help"], []])
def test_a_full_disk_under_the_output_is_one_line(argv, here):
    with open("/dev/full", "w") as full:
        process = start(*argv, stdout=full)
    assert process.communicate()[1] == "fastgpt: error: the output could not be written: No space left on device\n"
    assert process.returncode == 2


def test_output_that_a_command_did_not_flush_counts_as_well(here):
    code = (
        "import sys; from fastgpt import cli\n"
        "cli.COMMANDS['doctor'] = cli.Command(lambda argv, prog: print('x') or 0, '', '')\n"
        "sys.exit(cli.main(['doctor']))"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert done.returncode == 2 and done.stderr.startswith(b"fastgpt: error: the output could not be written")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("end", ["closed pipe", "full disk"])
def test_training_may_write_where_nothing_is_taken(name, end, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe, open("/dev/full", "w") as full:
        stream = {"closed pipe": pipe, "full disk": full}[end]
        monkeypatch.setattr(sys, name, stream)
        with cli._output_may_fail():
            for _ in range(3):
                print("x" * 100_000, file=getattr(sys, name), flush=True)
        assert getattr(sys, name) is stream
        stream.flush()  # nothing is left that could fail when the process ends


def test_training_survives_a_closed_pipe_and_a_signal_saves(inside, capsys, tmp_path):
    """As in `fastgpt train | head`: the reader goes, the run goes on; until SIGINT, after which it can be resumed."""
    folder = tmp_path / "a run"
    words = ["train", *TINY, "--out_dir", str(folder)]
    process = start(*words, "--steps", "1000000", cwd=inside)
    while "step 3/" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    process.stdout.close()

    def steps() -> int:
        return len((folder / "metrics.jsonl").read_text().splitlines())

    gone = steps()
    while steps() < gone + 20:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    command = f"{sys.executable} -m fastgpt train --resume auto --out_dir {shlex.quote(str(folder))}"
    warning, said = process.stderr.read().splitlines()
    assert "times over" in warning and said == f"fastgpt: all is saved, and this goes on: {command}"
    assert process.wait() == 75
    step = int(max(p.name for p in (folder / "checkpoints").iterdir()).removeprefix("step-"))
    assert step >= gone + 20
    assert run(*words, "--steps", str(step + 1), "--resume", "auto", "--allow_changes") == 0
    assert f"resumed at step {step}" in capsys.readouterr().out


INTERRUPTED = """
import os, runpy, sys, time
from importlib.machinery import ModuleSpec

place, number = sys.argv.pop(1), int(sys.argv.pop(1))

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == place == "fastgpt.cli":
            os.kill(os.getpid(), number)
        if name in ("fastgpt.estimate", "fastgpt.progress", "fastgpt.train"):  # quick ones in their place
            return ModuleSpec(name, self)

    def create_module(self, spec):
        pass

    def exec_module(self, module):
        vars(module).update(dict.fromkeys(
            ("load_warning", "plan_warnings", "ConsoleProgress", "EXIT_INTERRUPTED", "Trainer")))
        if module.__name__ == place:
            try:
                os.kill(os.getpid(), number)
                time.sleep(0.01)
            except BaseException:
                print("cut short", file=sys.stderr)

sys.meta_path.insert(0, Finder())
runpy.run_module("fastgpt", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
@pytest.mark.parametrize("place", ["fastgpt.cli", "fastgpt.estimate", "fastgpt.train"])
def test_a_signal_in_the_first_seconds_is_one_line(inside, tmp_path, place, number, word):
    """Before the command is known, and inside an import, which is not cut short. test_chaos.py has what comes then."""
    words = ["train", *TINY, "--out_dir", str(tmp_path / "run")]
    command = [sys.executable, "-c", INTERRUPTED, place, str(int(number)), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=inside, timeout=60)
    what = "" if place == "fastgpt.cli" else "; nothing was trained, and nothing written"
    assert (done.stderr, done.returncode) == (f"fastgpt: {word}{what}\n", 128 + number)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_prepare_says_how_to_go_on(inside, capsys, tmp_path, monkeypatch):
    from fastgpt.data import preparation
    from fastgpt.data.preparation import Preparation

    started, other = tmp_path / "data", tmp_path / "other"
    for folder, owner, name, what, said in (
        (started, preparation, "find_files", KeyboardInterrupt, "nothing was written"),
        (started, preparation, "read_pieces", Terminated, "the same command goes on from here"),
        (started, Preparation, "_remove_temporaries", Terminated, f"{started} is prepared, nothing is missing"),
        (other, Preparation, "_summary", KeyboardInterrupt, f"{other} is prepared, nothing is missing"),
        (other, preparation, "find_files", KeyboardInterrupt, "nothing was written"),  # what is there was before
    ):

        def stop(*_, what=what):
            raise what

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop)
            code = run("prepare", "texts", "--vocab_size", "300", "--workers", "1", "--out_dir", str(folder))
        assert code == (143 if what is Terminated else 130)
        word = "terminated" if what is Terminated else "interrupted"
        assert capsys.readouterr().err.splitlines()[-1] == f"fastgpt: {word}; {said}"


@pytest.mark.parametrize(("code", "number"), [(75, signal.SIGINT), (130, signal.SIGINT), (130, signal.SIGTERM)])
def test_another_signal_while_python_ends_is_quiet(code, number):
    """atexit stands for the threads and libraries that take their time to end."""
    script = (
        "import atexit, sys, time; from fastgpt import cli\n"
        "def interrupted(argv, prog):\n    if %d == 75: return 75\n    raise KeyboardInterrupt\n"
        "cli.COMMANDS['doctor'] = cli.Command(interrupted, '', '')\n"
        "atexit.register(lambda: (print('leaving', flush=True), time.sleep(60)))\n"
        "sys.argv = ['fastgpt', 'doctor']; sys.exit(cli.main())"
    )
    command = [sys.executable, "-c", script % code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout.readline() == "leaving\n"
    process.send_signal(number)
    assert process.communicate(timeout=30)[1] == {75: "", 130: "fastgpt: interrupted\n"}[code]
    assert process.returncode == -number


def test_main_as_a_function_leaves_the_signals_alone():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run("--version") == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("line", ["", "--version", "data", "train --help", "train --stepz 3", "plot missing"])
def test_the_module_and_the_script_are_one(line, here):
    """The script calls `fastgpt.cli.main` and exits with what it returns."""
    script = "import sys; from fastgpt.cli import main; sys.argv[0] = 'fastgpt'; sys.exit(main())"
    results = [
        subprocess.run([sys.executable, *how, *line.split()], capture_output=True, env=ENVIRONMENT)
        for how in (["-c", script], ["-m", "fastgpt"])
    ]
    first, second = ((done.returncode, done.stdout, done.stderr) for done in results)
    assert first == second


def test_prepare_names_the_next_step(inside, capsys, tmp_path):
    folder = tmp_path / "new data"
    assert run("prepare", "texts", "--vocab_size", "300", "--workers", "1", "--out_dir", str(folder)) == 0
    out, err = capsys.readouterr()
    before, words = err.splitlines()[-1].split(" train ")
    assert (out, before) == ("", "next: fastgpt")
    config = printed_config(capsys, *shlex.split(words))
    assert config.data.path == str(folder) and config.model.n_layer == ModelConfig.preset("tiny").n_layer


def test_dataclass_options_have_help():
    """Every option explains itself: a docstring under the field."""
    import inspect

    for cls in (cli.PrepareOptions, cli.TrainOptions, cli.SampleConfig, cli.PlotConfig, cli.DoctorConfig):
        source = inspect.getsource(cls)
        for f in dataclasses.fields(cls):
            after = source.partition(f"    {f.name}: ")[2].splitlines()[1]
            assert after.strip().startswith('"""'), f"{cls.__name__}.{f.name}"

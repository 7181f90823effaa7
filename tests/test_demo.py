"""The demo: its corpus, the compressors, how completions are judged, and a whole demo in miniature."""

from __future__ import annotations

import ast
import gzip
import io
import json
import lzma
import math
import os
import random
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.config import CheckpointConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig
from fastgpt.demo import completions, compressors, kernels, speed
from fastgpt.demo import settings as presets
from fastgpt.demo.__main__ import (
    SUSTAINED,
    WATCH_TEMPERATURE,
    WATCH_TOP_K,
    Demo,
    DemoConfig,
    Watch,
    listing,
    new_folder,
    opening,
    verdict,
)
from fastgpt.demo.completions import copied, does_something, function_body, judge, signatures, to_watch
from fastgpt.demo.corpus import HELD_OUT_SHARE, Document, own_files, size, standard_library
from fastgpt.demo.plain_gpt import PlainGPT, PlainLoop
from fastgpt.demo.screen import LastingStream, Screen, bar_of
from fastgpt.demo.speed import Enough, Speed, _StepTimer
from fastgpt.errors import UserError
from fastgpt.train import Progress

ROOT = Path(__file__).resolve().parents[1]
STDLIB = Path(sysconfig.get_path("stdlib"))


# ---- corpus ----------------------------------------------------------------------------------


def fake_library(root: Path) -> Path:
    """A library of 40 modules and a package, and everything that is to be left out of it."""
    draw = random.Random(0)
    for number in range(40):
        lines = "".join(f"value_{draw.randrange(10**9)} = {draw.random()}\n" for _ in range(60))
        (root / f"module{number}.py").write_text(lines)
    for name in (
        "package/__init__.py",
        "package/a.py",
        "package/deep/b.py",
        "test/test_x.py",
        "package/tests/test_y.py",
        "idlelib/editor.py",
        "pydoc_data/topics.py",
        "encodings/cp037.py",
        "site-packages/other.py",
        "config-3.11-x86_64-linux-gnu/python-config.py",
        "_sysconfigdata__linux_.py",
        "package/__pycache__/c.py",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n" * 100)
    (root / "twin.py").write_text((root / "module0.py").read_text())
    (root / "empty.py").write_text("\n")
    (root / "notes.txt").write_text("no Python\n" * 100)
    return root


def test_standard_library_rules(tmp_path):
    found = standard_library(fake_library(tmp_path))
    names = {d.name for d in found.train + found.val}
    assert names == {*(f"module{n}.py" for n in range(40)), "package/__init__.py", "package/a.py", "package/deep/b.py"}
    assert found.duplicates == 1  # twin.py; the empty file is no duplicate
    assert not {d.text for d in found.train} & {d.text for d in found.val}
    top = [{d.name.split("/")[0].removesuffix(".py") for d in part} for part in (found.train, found.val)]
    assert not top[0] & top[1] and top[1] == set(found.held_out)


def test_corpus_hash_and_split_depend_on_names_and_contents_only(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    one = standard_library(fake_library(first))
    two = standard_library(fake_library(second))
    assert (one.sha256, one.held_out) == (two.sha256, two.held_out)
    (second / "module7.py").write_text("changed = 1\n" * 200)
    assert standard_library(second).sha256 != one.sha256


def test_the_real_standard_library():
    found = standard_library()
    held_out = size(found.val) / size(found.train + found.val)
    assert HELD_OUT_SHARE <= held_out < 2 * HELD_OUT_SHARE
    assert size(found.train) > 5e6
    assert len(signatures(found.val, "\0".join(d.text for d in found.train))) >= 64


def test_no_sources_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(UserError, match=r"CORPUS=path"):
        standard_library(tmp_path)
    with pytest.raises(UserError, match=r"no sources"):
        standard_library(tmp_path / "python311.zip")


def test_one_file_is_cut_at_a_line(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(f"line {n} of the book, which is long\n" for n in range(4000)), encoding="utf-8")
    found = own_files(file)
    ((train,), (val,)) = found.train, found.val
    assert train.text + val.text == file.read_text()
    assert train.text.endswith("\n") and 0 <= val.size / size([train, val]) - HELD_OUT_SHARE < 0.01


def test_a_folder_gives_its_texts_and_counts_the_rest(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.md").write_text(f"text {number}\n" * 300)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe" * 100)
    (tmp_path / "zeros.bin").write_bytes(b"\0" * 100)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref\n" * 100)
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": f"line {n} " * 40}) + "\n" for n in range(5)))
    (tmp_path / "marks.txt").write_text("one<|endoftext|>\ntwo<|endoftext|>\n")
    found = own_files(tmp_path)
    names = sorted(d.name for d in found.train + found.val)
    expected = [f"{n}.md" for n in range(30)] + [f"lines.jsonl:{n}" for n in range(1, 6)]
    assert names == sorted([*expected, "marks.txt:1", "marks.txt:2"])
    assert found.skipped == 2
    assert {d.text for d in found.train + found.val} >= {"one", "two"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, "does not exist"),
        ("small.txt", b"few words\n", "10 bytes of text"),
        ("bad.txt", b"a" * 60000 + b"\xff" + b"b" * 60000, "not UTF-8 at byte 60,000"),
        ("table.parquet", b"PAR1", "fastgpt prepare"),
        ("lines.jsonl", b'{"texts": "x"}\n' * 9999, 'no object with a "text"'),
        ("cut.txt.gz", gzip.compress(b"text" * 99999)[:-20], "cannot read"),
    ],
)
def test_unusable_text_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        own_files(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


# ---- the ladder --------------------------------------------------------------------------------

TEXTS = ["the quick brown fox\n" * 20, "jumps over\n" * 30, "é" * 50]


def test_bytes_count_the_text_and_one_end_for_each_document():
    assert compressors.counted_bytes(TEXTS) == len("".join(TEXTS).encode()) + 3
    assert len(compressors.joined(TEXTS)) == compressors.counted_bytes(TEXTS)


def test_compressors_account_for_every_byte():
    draw = random.Random(0)
    train = ["".join(draw.choices("abcdefgh \n", k=3000)) for _ in range(5)]
    val = [*TEXTS, train[0][:2000], train[3][500:2500]]
    result = compressors.compress(val, train)
    total = compressors.counted_bytes(val)
    files = [text.encode() + b"\0" for text in val]
    assert result[compressors.GZIP_FILES] == 8 * sum(len(gzip.compress(f, 9)) for f in files) / total
    assert (
        result[compressors.XZ_FILES]
        == 8 * sum(len(lzma.compress(f, preset=9 | lzma.PRESET_EXTREME)) for f in files) / total
    )
    assert (
        result[compressors.XZ_STREAM] == 8 * len(lzma.compress(b"".join(files), preset=9 | lzma.PRESET_EXTREME)) / total
    )
    # two of the documents are in the training text: read first, they cost next to nothing
    assert result[compressors.XZ_PRIMED] < 0.5 * result[compressors.XZ_STREAM]


def test_no_compressor_beats_noise():
    noise = random.Random(1).randbytes(20000).decode("latin-1")  # 1.5 bytes of UTF-8 for 1 of entropy
    result = compressors.compress([noise], ["unrelated " * 50])
    least = 8 * 20000 / compressors.counted_bytes([noise])
    assert all(value > least for value in result.values())


def test_a_uniform_model_stands_on_the_uniform_rung():
    """Through the evaluation that ours goes through: a model of zeros predicts every token with 1 / V."""
    from fastgpt import GPT
    from fastgpt.data import TokenStream
    from fastgpt.evaluate import evaluate

    V = 300
    config = ModelConfig(vocab_size=V, block_size=16, n_layer=1, n_head=2, n_embd=8)
    model = GPT(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    ids = np.random.default_rng(0).integers(0, V, 1000).astype("<u2")
    stream = TokenStream([ids], 0, documents=7, text_bytes=3210)
    result = evaluate(model, stream, batch_size=4)
    assert result.tokens == 1000 and result.bytes == 3217
    assert compressors.uniform(V, 1000, 3217) == math.log2(V) * 1000 / 3217
    # Each of 1000 sums in float64 errs by half its spacing, and so do the few operations after them.
    assert result.bits_per_byte == pytest.approx(math.log2(V) * 1000 / 3217, rel=1004 * sys.float_info.epsilon / 2)


# ---- completions -------------------------------------------------------------------------------

SOURCE = """
import os

def plain(a, b):
    return a + b

class Thing:
    @property
    def name(self):
        return 1

    def long_one(self,
                 second):
        return 2

    async def waits(self):
        pass

def one_line(x): return x

def known(y):
    return y
"""


def test_signatures_are_whole_lines_that_the_training_text_lacks():
    documents = [Document("a.py", SOURCE), Document("broken.py", "def broken(:\n    pass\n")]
    assert sorted(signatures(documents)) == ["    def name(self):", "def known(y):", "def plain(a, b):"]
    assert sorted(signatures(documents, training="x\ndef known(y):\n")) == [
        "    def name(self):",
        "def plain(a, b):",
    ]
    assert signatures(documents) == signatures(list(reversed(documents)))


def test_the_watched_line_is_a_function_with_arguments():
    assert (
        to_watch(["    def f(self, some, thing):", "def g(x):", "def lower(text, table=None):"])
        == "def lower(text, table=None):"
    )
    assert to_watch([]) is None


@pytest.mark.parametrize(
    ("text", "finished", "body"),
    [
        ("        return 1\n    def g():\n", False, "        return 1\n    def g():\n"),
        ("    return 1\n\ndef g():\n", False, "    return 1\n\n"),
        ("    return 1\n    x = ", False, "    return 1\n"),  # cut off by the length: the last line may be half
        ("    return 1", True, "    return 1"),  # the model ended it
        ("\n    return 1\n)", False, "\n    return 1\n"),
        ("class X:", False, ""),
        ("", True, ""),
    ],
)
def test_a_body_ends_where_the_signature_was_indented(text, finished, body):
    assert function_body("def f(x):", text, finished=finished) == body
    indented = "".join("    " + line if line.strip() else line for line in text.splitlines(keepends=True))
    assert function_body("    def f(x):", indented, finished=finished).replace("    ", "") == body.replace("    ", "")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("    return x\n", True),
        ("    pass\n", False),
        ('    """Only words."""\n', False),
        ('    """Words."""\n    x = 1\n', True),
        ("    ...\n", False),
        ("    x\n", False),
        ("    if x:\n", False),
        ("    return (\n", False),
        ("", False),
    ],
)
def test_what_does_something(body, expected):
    assert does_something("def f(x):\n" + body) is expected


def brute_force(text: str, training: str, length: int) -> bool:
    return any(text[i : i + length] in training for i in range(len(text) - length + 1))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9), st.integers(2, 11))
def test_copies_are_found_exactly(seed, length):
    draw = random.Random(seed)
    training = "".join(draw.choices("ab", k=200))
    texts = []
    for _ in range(6):
        start, count = draw.randrange(190), draw.randrange(length - 1, length + 2)
        texts.append(
            "".join(draw.choices("abc", k=9)) + training[start : start + count] + "".join(draw.choices("bc", k=5))
        )
    assert copied(texts, training, length) == [brute_force(text, training, length) for text in texts]


def test_judging():
    training = "def old(a):\n" + "    total = compute_the_total(a, rounding=True, scale=3)\n    return total\n"
    bodies = [
        "    return x + 1\n",
        "    pass\n",
        "    return (\n",
        "    total = compute_the_total(a, rounding=True, scale=3)\n",
        "",
    ]
    result = judge(["def f(x):"] * 5, bodies, training)
    assert (result.total, result.parses, result.does_something, result.good) == (5, 3, 2, 1)
    method = judge(["    def f(self):"], ["        return 1\n"], training)
    assert (method.parses, method.good) == (1, 1)


@pytest.fixture(scope="module")
def little_tokenizer(tmp_path_factory):
    from fastgpt import Tokenizer

    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_text((STDLIB / "textwrap.py").read_text(encoding="utf-8"), encoding="utf-8")
    return Tokenizer.train([file], 400)


def test_completing_many_prompts_is_completing_each(little_tokenizer):
    from fastgpt import GPT

    torch.manual_seed(0)
    model = GPT(ModelConfig.preset("tiny", vocab_size=little_tokenizer.vocab_size, block_size=64, n_layer=1)).double()
    prompts = ["def f(x):\n", "def a_longer_name(first, second):\n", "x"]
    together = completions.complete(model, little_tokenizer, prompts, 12, temperature=0.0)
    assert together == [completions.complete(model, little_tokenizer, [p], 12, temperature=0.0)[0] for p in prompts]
    seeded = [completions.complete(model, little_tokenizer, prompts, 12) for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert completions.complete(model, little_tokenizer, prompts, 12, temperature=9.0, top_k=1) == together
    assert completions.complete(model, little_tokenizer, prompts, 12, temperature=9.0) != together


# ---- the plain loop ----------------------------------------------------------------------------


def test_the_plain_loop_learns():
    torch.manual_seed(0)
    data = np.tile(np.arange(16, dtype=np.uint16), 40)
    loop = PlainLoop(PlainGPT(16, 16, 1, 2, 32), data, 16, 4, lr=1e-2)
    first = loop.step()
    assert first == pytest.approx(math.log(16), abs=0.2)  # it begins by knowing nothing
    for _ in range(40):
        last = loop.step()
    assert last < 0.1


def test_the_plain_model_does_not_look_ahead():
    torch.manual_seed(0)
    model = PlainGPT(50, 8, 2, 2, 16).double()
    idx = torch.randint(50, (1, 8))
    changed = idx.clone()
    changed[0, 5] = (idx[0, 5] + 1) % 50
    difference = (model(idx) - model(changed)).abs().amax(-1)[0]
    assert torch.all(difference[:5] == 0) and torch.all(difference[5:] > 0)


def test_speed_is_the_median_of_the_turns():
    assert Speed(plain=[100.0, 50.0, 100.0], fastgpt=[120.0, 100.0, 50.0]).ratio == 1.2


def test_steps_are_timed_when_the_machine_has_warmed_up():
    """A clock that says 0.01 s for a step at first and 0.25 s later on; 2.0 s of warm-up."""
    timer, progress = _StepTimer(steps=4, warm_up=2.0), Progress()
    with pytest.raises(Enough):
        for _ in range(1000):
            progress.step += 1
            progress.seconds += 0.01 if progress.seconds < 1.5 else 0.25
            timer.on_step(SimpleNamespace(progress=progress), {})
    assert timer.mean == 0.25
    assert progress.step == timer.first + 4 and progress.seconds - 1.0 >= 2.0


def test_steps_on_a_busy_machine_are_not_timed_for_minutes():
    timer, progress = _StepTimer(steps=20, warm_up=2.0), Progress()
    with pytest.raises(Enough):
        for _ in range(1000):
            progress.step += 1
            progress.seconds += 8.0
            timer.on_step(SimpleNamespace(progress=progress), {})
    assert timer.mean == 8.0 and progress.step == timer.first + 2


# ---- the terminal ------------------------------------------------------------------------------


def test_a_bar_is_exact_to_an_eighth():
    assert [bar_of(n) for n in (0, 0.125, 1, 2.5)] == ["", "▏", "█", "██▌"]


def test_output_outlives_its_reader():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        lasting = LastingStream(stream)
        for _ in range(3):
            lasting.write("words " * 5000)
            lasting.flush()


def test_a_terminal_without_unicode_gets_what_it_can_show():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    Screen(stream).ladder([("ours", 2.0, True)])
    assert b"ours  2.00" in raw.getvalue()


def test_plain_output_has_no_codes_and_fits():
    out = io.StringIO()
    screen = Screen(out)
    screen.line("text", "word " * 60)
    screen.code("def f(x):\n    " + "y" * 200 + "\n" * 20, 4, "python")
    screen.ladder([("gzip", 2.5, False), ("ours", 1.25, True)])
    text = out.getvalue()
    assert "\x1b" not in text
    assert all(len(line) <= 96 and line == line.rstrip() for line in text.splitlines())
    assert text.index("gzip") < text.index("ours  1.25")  # from the worst to the best


def test_the_verdict_names_both_sides():
    won, lost = verdict({"at": "180", "bits_per_byte": 1.9}, {"gzip": 2.1, "xz": 1.9, "primed": 1.4})
    assert won == "After 180 s fastgpt (1.90) beats gzip."
    assert lost == "It does not beat xz (1.90) and primed (1.40)."
    assert verdict({"at": "180", "bits_per_byte": 1.0}, {"gzip": 2.1}) == ["After 180 s fastgpt (1.00) beats gzip."]
    assert listing(["a", "b", "c"]) == "a, b and c"


def test_an_opening_is_a_line_of_the_text():
    assert opening("short\n\n  a line of a fitting length\nmore") == "a line of a fitting length"
    assert opening("x" * 500) == "x" * 60


def test_a_folder_is_never_used_twice(tmp_path):
    folders = [new_folder(tmp_path) for _ in range(3)]
    assert len(set(folders)) == 3
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        new_folder(tmp_path / "file")


# ---- a whole demo, in miniature ------------------------------------------------------------------

MODULES = """textwrap bisect heapq shlex string calendar copy csv difflib dis fnmatch fractions functools glob keyword
linecache numbers opcode pprint queue random reprlib sched stat statistics tabnanny token"""


@pytest.fixture(scope="module")
def small_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name in MODULES.split():
        (folder / f"{name}.py").write_text((STDLIB / f"{name}.py").read_text(encoding="utf-8"), encoding="utf-8")
    return folder


MINIATURE = presets.Settings(
    train=TrainConfig(
        model=ModelConfig.preset("tiny", vocab_size=1024, block_size=32, n_layer=1, n_head=2, n_embd=32),
        optim=OptimConfig(optimizer="muon", warmup_steps=2),
        eval=EvalConfig(every=0, batch_size=64),
        checkpoint=CheckpointConfig(every=0, keep_last=1, keep_best=False),
        batch_tokens=256,
        micro_batch_size=8,
        precision="float32",
    ),
    seconds=3.0,
    sample_at=(0.0, 0.3, 0.6),
    most_passes=1000,
)


STEPS = 400


@pytest.fixture(scope="module")
def finished(small_text, tmp_path_factory):
    """(demo, exit code, what it printed). However busy the machine, the steps are STEPS: only their timing is not
    what the demo measured."""
    out = tmp_path_factory.mktemp("runs")
    config = DemoConfig(corpus=str(small_text), speed_seconds=1.0, kernel_seconds=2.0, out=str(out), device="cpu")
    demo = Demo(config, MINIATURE)
    demo.screen = Screen(io.StringIO())
    measured = speed.seconds_per_step

    def as_if(*arguments):
        each, precision = measured(*arguments)
        assert each > 0
        return SUSTAINED * MINIATURE.seconds / STEPS, precision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "seconds_per_step", as_if)
        patch.setattr(kernels, "show", lambda screen, seconds: screen.line("kernels", f"for {seconds} s"))
        code = demo.run()
    return demo, code, demo.screen.console.file.stream.getvalue()


def test_the_demo_takes_the_steps_that_fill_its_time(finished):
    demo, code, _ = finished
    assert code == 0
    assert demo.train_config.steps == demo.rungs[-1]["step"] == STEPS


def test_the_demo_keeps_what_it_promises(finished):
    demo, _, _ = finished
    for name in ("tokenizer.json", "data/dataset.json", "metrics.jsonl", "samples.txt", "loss.png", "ladder.json"):
        assert (demo.folder / name).stat().st_size > 0, name
    assert list((demo.folder / "data").glob("*.bin"))
    from fastgpt.checkpoint import load_model

    model, tokenizer = load_model(demo.folder)
    assert tokenizer.decode(tokenizer.encode("def f(x):")) == "def f(x):"
    assert torch.equal(next(iter(model.parameters())), next(iter(demo.model.parameters())))


def test_the_demo_evaluates_at_every_sample_time(finished):
    demo, _, _ = finished
    rows = [json.loads(line) for line in (demo.folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if "val_bits_per_byte" in row]
    assert [row["step"] for row in evaluated] == [rung["step"] for rung in demo.rungs]
    assert evaluated[0]["step"] == 0 and evaluated[-1]["step"] == demo.train_config.steps and len(evaluated) >= 3
    assert all(rung["seconds"] >= float(rung["at"]) - 0.06 for rung in demo.rungs)
    bits = [row["val_bits_per_byte"] for row in evaluated]
    assert bits[-1] < bits[0] - 0.5  # it learned
    assert (demo.folder / "samples.txt").read_text().count(demo.watched) >= 4
    ladder = json.loads((demo.folder / "ladder.json").read_text())
    assert set(ladder["others"]) == {
        compressors.UNIFORM,
        compressors.GZIP_FILES,
        compressors.XZ_FILES,
        compressors.XZ_STREAM,
        compressors.XZ_PRIMED,
    }
    assert bits[0] == pytest.approx(ladder["others"][compressors.UNIFORM], rel=0.02)  # untrained knows nothing


def test_the_demo_says_what_it_did(finished):
    demo, _, text = finished
    for words in (demo.corpus.sha256, "bits per byte", "uniform", "plain eager PyTorch loop", "held-out signatures"):
        assert words in text
    assert text.index("plain eager") < text.index("kernels    for 2.0 s\n") < text.index("\ntook ")
    assert f"sample {demo.folder} --prompt" in text
    assert "\x1b" not in text and "Traceback" not in text
    ast.parse(demo.watched + "    pass\n")


def test_what_is_watched_is_drawn_more_freely_than_what_is_judged(finished, monkeypatch):
    demo, _, _ = finished
    how = []
    monkeypatch.setattr(completions, "complete", lambda *_, **options: how.append(options) or [("    x\n", True)])
    trainer = SimpleNamespace(model=demo.model, progress=SimpleNamespace(step=1, seconds=1.0))
    Watch(demo).show(trainer, 2.0)
    assert how == [{"temperature": WATCH_TEMPERATURE, "top_k": WATCH_TOP_K}]
    assert WATCH_TEMPERATURE > completions.TEMPERATURE


def test_a_small_text_ends_the_training_after_some_passes(small_text, tmp_path):
    few = presets.Settings(MINIATURE.train, 60.0, (0.0, 0.5), most_passes=1)
    demo = Demo(DemoConfig(corpus=str(small_text), speed_seconds=0.0, out=str(tmp_path), device="cpu"), few)
    demo.screen = Screen(io.StringIO())
    demo.read_corpus()
    demo.folder = new_folder(tmp_path)
    demo.prepare_tokens()
    demo.plan()
    assert demo.train_config.steps == math.ceil(demo.dataset.split("train").tokens / 256)
    assert "1 passes over the text" in " ".join(demo.screen.console.file.stream.getvalue().split())


def test_a_reader_that_goes_and_an_interrupt(small_text, tmp_path):
    """`make demo | head -1`, and then Ctrl-C: the run goes on without a reader, and is saved when interrupted."""
    command = [
        sys.executable,
        "-m",
        "fastgpt",
        "demo",
        "--corpus",
        str(small_text),
        "--seconds",
        "100",
        "--out",
        str(tmp_path),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.readline()
    process.stdout.close()
    deadline = time.monotonic() + 240
    while not any(tmp_path.glob("*/metrics.jsonl")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(30) == 75, errors
    assert errors == ""
    (folder,) = tmp_path.iterdir()
    assert list((folder / "checkpoints").iterdir())


def test_a_refused_corpus_leaves_nothing_behind(tmp_path):
    command = [sys.executable, "-m", "fastgpt", "demo", "--corpus", "nowhere", "--out", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("fastgpt: error: nowhere does not exist") and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()

"""Faults put in for real: through the command line, on the disk, and in sizes that tell linear from quadratic."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import cli
from fastgpt.data import Dataset, prepare, read_shard
from fastgpt.data.shards import HEADER_BYTES, UINT16, UINT32
from fastgpt.errors import UserError
from fastgpt.tokenizer import Tokenizer

from .data_cases import config, corpus, small_tokenizer, text

ROOT = Path(__file__).resolve().parents[1]


def refusal(capsys, *argv) -> str:
    """What a refused command says: exit code 2, and one line on stderr."""
    assert cli.main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fastgpt: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


# ---- prepare ---------------------------------------------------------------------------------


INPUTS = {
    # name: (its content, None for none; what the refusal says)
    "missing.txt": (None, "cannot read the input missing.txt: No such file or directory; expected a file or a folder"),
    "empty.txt": (b"", "the input empty.txt is empty; expected a file with text"),
    "bad.txt": (b"one\xfftwo", "bad.txt is not UTF-8: byte 0xff at byte 3 (invalid start byte); convert it to UTF-8, "),
    "cut.txt.gz": (gzip.compress(b"one two" * 99)[:-9], "cut.txt.gz ends too soon: the compressed file is truncated"),
    "bomb.txt.gz": (
        gzip.compress(bytes(33 << 20), 1),
        "the document at byte 0 is longer than 32 MiB, the most in a co",
    ),
    "bomb.jsonl.gz": (gzip.compress(bytes(33 << 20), 1), "line 1 is longer than 32 MiB, the most for a document in .j"),
    "long.jsonl": (
        b'{"text": "' + b"x" * (33 << 20),
        "line 1 is longer than 32 MiB, the most for a document in .jsonl",
    ),
    "other.jsonl": (b'{"body": "one"}', "other.jsonl, line 1: no text in the field 'text' (found body); choose the fi"),
    "cut.jsonl": (b'{"text": "one"}\n{"tex', "cut.jsonl, line 2: not JSON"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_a_bad_input_is_refused_in_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    corpus(Path("corpus"), documents=3)
    small_tokenizer().save("small.json")
    content, message = INPUTS[name]
    if content is not None:
        Path(name).write_bytes(content)
    before = sorted(Path().rglob("*"))
    options = ("--out_dir", "data", "--tokenizer", "small.json", "--workers", 1)
    assert message in refusal(capsys, "prepare", "corpus", name, *options)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tokenizer", "corpus"), "cannot read the tokenizer corpus/tokenizer.json: No such file or directory"),
        (("--tokenizer", "corpus/0000.txt"), "corpus/0000.txt cannot be used as a tokenizer: it is not JSON"),
        (("--out_dir", "corpus/0000.txt"), "cannot write to corpus/0000.txt: File exists"),
        (("--out_dir", "/proc/data"), "cannot write to /proc/data: No such file or directory"),
        (("--val_inputs", "nowhere"), "cannot read the input nowhere: No such file or directory"),
        (("--shard_tokens", 2**31), "--shard_tokens = 2147483648: expected at most 2147483647"),
    ],
)
def test_a_bad_option_is_refused_in_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    corpus(Path("corpus"), documents=3)
    before = sorted(Path().rglob("*"))
    assert message in refusal(capsys, "prepare", "corpus", "--workers", 1, *options)
    assert sorted(Path().rglob("*")) == before


def test_invalid_text_is_replaced_and_counted_when_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("bad.txt").write_bytes(b"one\xff\xfetwo " * 30)
    assert cli.main(["prepare", "bad.txt", "--errors", "replace", "--vocab_size", "257", "--workers", "1"]) == 0
    assert "; 60 invalid UTF-8 sequences replaced, in bad.txt\n" in capsys.readouterr().err


# ---- what training finds ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    corpus(root / "corpus")
    prepare(config(root), progress=False)
    return root / "data"


def poke(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def cut_off(path, size):
    path.write_bytes(path.read_bytes()[:-size])


DAMAGE = {
    "truncated by an odd number of bytes": (lambda f: cut_off(f / "train-00001.bin", 3), "the file is truncated or"),
    "truncated by an even number of bytes": (lambda f: cut_off(f / "train-00001.bin", 4), "the file is truncated or"),
    "truncated in its header": (lambda f: cut_off(f / "val-00000.bin", 10**9), "shorter than the 1024 bytes of a hea"),
    "another magic": (lambda f: poke(f / "train-00001.bin", 0, b"\1"), "expected magic 20240520, version 1 (uint16)"),
    "another version": (lambda f: poke(f / "train-00001.bin", 4, b"\2"), "found magic 20240520, version 2; expected"),
    "another dtype": (
        lambda f: poke(f / "train-00001.bin", 0, struct.pack("<ii", 20240801, 7)),
        "found magic 20240801, version 7 (uint32); expected magic 20240520, version 1 (uint16)",
    ),
    "a bit of the header flipped": (lambda f: poke(f / "train-00001.bin", 700, b"\x10"), "the header is damaged"),
    "an id that is none": (
        lambda f: poke(f / "train-00001.bin", HEADER_BYTES + 2 * 77, b"\xff\xff"),
        "train-00001.bin: token 77 has id 65535; a vocabulary of 300 ends at 299",
    ),
    "an id that is none, in the validation split": (
        lambda f: poke(f / "val-00000.bin", HEADER_BYTES + 2 * 7, b"\xff\xff"),
        "val-00000.bin: token 7 has id 65535; a vocabulary of 300 ends at 299",
    ),
    "no shard": (lambda f: (f / "train-00001.bin").unlink(), "train-00001.bin: No such file or directory"),
    "no dataset.json": (
        lambda f: (f / "dataset.json").unlink(),
        "holds no dataset.json: not prepared, or not to the e",
    ),
    "a damaged dataset.json": (lambda f: poke(f / "dataset.json", 40, b"#"), "dataset.json"),
    "another tokenizer": (
        lambda f: Tokenizer.train(texts=[text(9, 500)], vocab_size=290).save(f),
        "is not the tokenizer that made this dataset",
    ),
}
SHAPE = ("--model.n_layer", 1, "--model.n_embd", 32, "--model.n_head", 2, "--steps", 1, "--precision", "float32")


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_data_is_refused_before_the_first_step(prepared, tmp_path, capsys, damage):
    shutil.copytree(prepared, tmp_path / "data")
    change, message = DAMAGE[damage]
    change(tmp_path / "data")
    data = ("--data.path", tmp_path / "data", "--out_dir", tmp_path / "run")
    assert message in refusal(capsys, "train", *data, *SHAPE, "--model.block_size", 32, "--batch_tokens", 512)
    assert not (tmp_path / "run").exists()


def test_a_window_longer_than_the_data_is_refused(prepared, tmp_path, capsys):
    tokens = len(Dataset.open(prepared).split("train"))
    data = ("--data.path", prepared, "--out_dir", tmp_path / "run", "--micro_batch_size", 1)
    size = ("--model.block_size", tokens, "--batch_tokens", tokens)
    assert f"a block_size of {tokens} needs at least {tokens + 1}; prepare more text" in refusal(
        capsys, "train", *data, *SHAPE, *size
    )
    assert not (tmp_path / "run").exists()


@settings(max_examples=150, deadline=None)
@given(
    words=st.lists(st.sampled_from([20240520, 20240801, 1, 7, 0, -1, 2, 3, 2**31 - 1]) | st.integers(0, 9), max_size=5),
    size=st.integers(0, 40),
    rest=st.binary(max_size=2),
    dtype=st.sampled_from([None, UINT16, UINT32]),
    headerless=st.booleans(),
)
def test_any_bytes_are_a_shard_or_refused(tmp_path_factory, words, size, rest, dtype, headerless):
    """A reader that takes them takes all of them, as they are."""
    path = tmp_path_factory.mktemp("shard") / "a.bin"
    content = (struct.pack(f"<{len(words)}i", *words).ljust(HEADER_BYTES, b"\0") + bytes(range(size)) + rest)[:1080]
    path.write_bytes(content)
    try:
        ids = read_shard(path, dtype=dtype, headerless=headerless)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    assert ids.dtype == (dtype or ids.dtype) and ids.tobytes() == content[0 if headerless else HEADER_BYTES :]


# ---- sizes -----------------------------------------------------------------------------------

MEASURED = """
import os, sys, time
import numpy, tiktoken
from fastgpt.config import PrepareConfig
from fastgpt.data import prepare
os.fsync = lambda handle: None  # what others write is not to be waited for
began = time.process_time()
prepare(PrepareConfig.from_json(sys.argv[1]), progress=False)
seconds = time.process_time() - began
with open("/proc/self/status") as file:
    print(seconds, next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM")))
"""


def cost(settings):
    """Processor seconds and the most memory, in bytes, of a prepare in a process of its own."""
    command = [sys.executable, "-c", MEASURED, settings.to_json()]
    out = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return tuple(map(float, out.split()))


def assert_linear(small, large, least=0.0):
    """Of four times the size: nearer to four times the time than to sixteen times. `least` is what any size takes."""
    assert large - least < 8 * (small - least)


ENDLESS = {"one character": "a", "no white space": "abcdefghij日本0123.", "NUL": "\0", "blanks": " "}


@pytest.mark.parametrize(
    ("kind", "megabytes"),
    [
        ("one character", 24),
        ("no white space", 24),
        *(pytest.param(kind, 200, marks=pytest.mark.slow) for kind in ENDLESS),
    ],
)
def test_one_endless_line_takes_linear_time_and_bounded_memory(tmp_path, kind, megabytes):
    unit, costs = ENDLESS[kind], []
    for size in (megabytes * 250_000, megabytes * 1_000_000):
        written = unit * (size // len(unit.encode()))
        (tmp_path / "a.txt").write_text(written)
        out = tmp_path / str(size)
        settings = config(tmp_path, inputs=(str(tmp_path / "a.txt"),), out_dir=str(out), shard_tokens=10**8)
        costs.append(cost(settings))
    (small_time, small_memory), (large_time, large_memory) = costs
    assert_linear(small_time, large_time)
    assert large_memory - small_memory < megabytes * 750_000  # of what is longer, not even the text itself is held
    dataset = Dataset.open(out)
    tokenizer, found = dataset.tokenizer(), hashlib.sha256()
    for split in map(dataset.split, ("train", "val")):
        for start in range(0, len(split), 1 << 20):
            ids = split.read(start, min(start + (1 << 20), len(split)))
            found.update(tokenizer.decode_bytes(ids[ids != dataset.eot_id]))
    assert found.hexdigest() == hashlib.sha256(written.encode()).hexdigest()


TIMED = """
import json, os, resource, sys, time
from fastgpt.config import PrepareConfig
from fastgpt.data import prepare
os.fsync = lambda handle: None  # what others write is not to be waited for
found = []
for settings, repeats in json.loads(sys.argv[1]):
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        prepare(PrepareConfig.from_dict({**settings, "overwrite": True}), progress=False)
        seconds.append(time.process_time() - began)
    found.append((min(seconds), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10))
print(json.dumps(found))
"""


@pytest.mark.parametrize("files", [16_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_tiny_files_take_linear_time_and_little_memory(tmp_path, files):
    """What one file costs does not depend on how many there are. A file takes some 60 microseconds and a look at
    each of the others about 0.01, so a scan for every file would more than double the cost of one; a ratio of totals,
    which may be four or sixteen, hides that in what a file costs anyway."""
    counts = {1: 6, files // 16: 6, files: 2}  # and how often each is timed: the quickest counts
    asked = []
    for count, repeats in counts.items():
        folder = tmp_path / f"files{count}"
        folder.mkdir()
        for i in range(count):
            (folder / f"{i}.txt").write_text(str(i))
        options = dict(out_dir=str(tmp_path / f"data{count}"), val_fraction=0.0, shard_tokens=10**6)
        asked.append((config(tmp_path, inputs=(str(folder),), **options).to_dict(), repeats))
    command = [sys.executable, "-c", TIMED, json.dumps(asked)]
    out = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    for count in counts:
        meta = json.loads((tmp_path / f"data{count}" / "dataset.json").read_text())
        assert sum(split["documents"] for split in meta["splits"].values()) == count
    (least, _), (small_time, small_memory), (large_time, large_memory) = json.loads(out)
    each_of_few, each_of_many = (small_time - least) / (files // 16), (large_time - least) / files
    assert each_of_many < 1.6 * each_of_few, f"{1e6 * each_of_few:.0f} and {1e6 * each_of_many:.0f} microseconds"
    assert large_memory - small_memory < 4096 * (files - files // 16)  # below the least that a file takes on a disk

"""prepare: what it writes, and that it is the same however it came about; kills, full disks and wrong inputs."""

from __future__ import annotations

import gc
import gzip
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data import Dataset, adopt_shards, documents, preparation, prepare, shards, verify
from fastgpt.data.encode import Encoder
from fastgpt.data.plan import plan
from fastgpt.data.pool import WorkerPool
from fastgpt.data.shards import UINT16
from fastgpt.errors import UserError
from fastgpt.tokenizer import Tokenizer

from .data_cases import config, contents, corpus, large_tokenizer, small_tokenizer, text

ROOT = Path(__file__).resolve().parents[1]
TEMPORARY = ("prepare.json", "prepare.digests", "*.partial")


def decoded(dataset, split):
    """The documents of a split, from its shards."""
    tokens, tokenizer = dataset.split(split), dataset.tokenizer()
    ids = tokens.read(0, len(tokens))
    ends = np.flatnonzero(ids == tokenizer.eot_id)
    assert len(ids) == 0 or ends[-1] == len(ids) - 1, "every document is followed by an end of text"
    return [tokenizer.decode(part[:-1]) for part in np.split(ids, ends + 1)[:-1]]


def leftovers(folder):
    return [path.name for pattern in TEMPORARY for path in folder.glob(pattern)]


def in_child(action, expected=0):
    """Run `action` in a process of its own; `expected` is its exit code, or minus the signal that ends it."""
    child = os.fork()
    if child == 0:
        try:
            gc.disable()  # it would copy every page that parent and child share
            signal.alarm(60)
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not in the child
            action()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (expected if isinstance(expected, tuple) else (expected,))
    return status


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Syncing matters when the power fails; a killed process's writes are safe with the kernel."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def small_pieces(monkeypatch):
    """Many pieces, the state saved after each."""
    patch_small(monkeypatch)


def patch_small(patch):
    """Pieces, and blocks with a checksum of their own."""
    patch.setattr(documents, "PIECE_BYTES", 600)
    patch.setattr(documents, "PART_BYTES", 500)
    patch.setattr(documents, "SEARCH_BYTES", 100)
    patch.setattr(documents, "LONG_DOCUMENT", 1500)
    patch.setattr(shards, "BLOCK_BYTES", 256)
    patch.setattr(preparation, "BLOCK_BYTES", 256)
    patch.setattr(preparation, "STATE_SECONDS", 0.0)


# ---- what it writes --------------------------------------------------------------------------


def test_every_document_comes_back_in_order(tmp_path):
    expected = corpus(tmp_path / "corpus")
    meta = prepare(config(tmp_path), progress=False)
    dataset = Dataset.open(tmp_path / "data")
    train, val = decoded(dataset, "train"), decoded(dataset, "val")
    assert sorted(train + val) == sorted(expected)
    assert train == [t for t in expected if t in train] and val == [t for t in expected if t in val]
    assert 0 < len(val) < len(train)
    for split, found in (("train", train), ("val", val)):
        tokens = dataset.split(split)
        assert tokens.documents == meta["splits"][split]["documents"] == len(found)
        assert tokens.text_bytes == sum(len(t.encode()) for t in found)
        assert meta["splits"][split]["tokens"] == len(tokens)
    assert [s["tokens"] for s in meta["splits"]["train"]["shards"][:-1]] == [1000] * (
        len(dataset.split("train")) // 1000
    )
    assert {k: v for k, v in meta.items() if k != "run"} == json.loads((tmp_path / "data/dataset.json").read_text())
    assert meta["run"]["mb_per_second"] > 0
    assert verify(tmp_path / "data") == [] and leftovers(tmp_path / "data") == []


def test_the_bytes_do_not_depend_on_the_workers(tmp_path):
    corpus(tmp_path / "corpus")
    (tmp_path / "corpus" / "long.txt").write_text(text(77, 20_000) * 12)
    (tmp_path / "corpus" / "rows.jsonl").write_text("".join(json.dumps({"text": text(i, 9)}) + "\n" for i in range(99)))
    for workers in (1, 3):
        prepare(
            config(tmp_path, out_dir=str(tmp_path / f"by{workers}"), workers=workers, shard_tokens=100_000),
            progress=False,
        )
    assert contents(tmp_path / "by1") == contents(tmp_path / "by3")


def jsonl(first, end):
    return "".join(json.dumps({"text": text(i, 20)}) + "\n\n" * (i % 2) + "\n" for i in range(first, end))


@pytest.mark.parametrize("tokenizer", ["small", "train"])
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_a_bad_line_is_told_by_its_number_in_the_file(tmp_path, small_pieces, monkeypatch, ending, tokenizer):
    """However many pieces are before it: who encodes a piece counts its lines only."""
    monkeypatch.setattr(documents, "_BLOCK", 600)
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_text(jsonl(0, 30))
    content = jsonl(30, 150)
    number = content.count("\n") + 1
    content += "{}\n" + jsonl(150, 160)
    (folder / f"b{ending}").write_bytes(gzip.compress(content.encode()) if ending[-1] == "z" else content.encode())
    options = {"tokenizer": "train", "vocab_size": 300} if tokenizer == "train" else {}
    for workers in (1, 2):
        with pytest.raises(UserError, match=f"b{ending}, line {number}: no text in the field"):
            prepare(config(tmp_path, workers=workers, **options), progress=False)
    with pytest.raises(UserError, match=f"b{ending}, line {number}: no text in the field"):
        plan(config(tmp_path, **options))
    assert not (tmp_path / "data").exists()


def test_a_bad_line_is_told_by_its_number_after_a_kill(tmp_path, small_pieces):
    (tmp_path / "corpus").mkdir()
    content = jsonl(0, 150)
    (tmp_path / "corpus" / "a.jsonl").write_text(content + "{}\n")
    in_child(lambda: (kill_at(40), prepare(config(tmp_path), progress=False)), -signal.SIGKILL)
    state = json.loads((tmp_path / "data" / "prepare.json").read_text())
    read = content[: state["position"]["offset"]].count("\n")
    assert 0 < state["position"]["line"] == read < content.count("\n")
    with pytest.raises(UserError, match=rf"a\.jsonl, line {content.count(chr(10)) + 1}: no text in the field"):
        prepare(config(tmp_path), progress=False)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path, small_pieces):
    (tmp_path / "corpus").mkdir()
    path = tmp_path / "corpus" / "a.jsonl"
    path.write_text(jsonl(0, 50))
    pieces = documents.read_pieces(documents.find_files([str(path)])[0], documents.Position(), "text")
    first, *_, last = pieces
    os.truncate(path, first.size)
    assert b"\n".join(line for _, line in first.lines()) == path.read_bytes()
    with pytest.raises(UserError, match=r"a\.jsonl became shorter while it was read"):
        list(last.lines())


def test_exact_duplicates_are_dropped(tmp_path, small_pieces):
    long = text(5, 900)
    for name, content in (
        ("a", "one"),
        ("b", "one"),
        ("c", "two"),
        ("d", long),
        ("e", "one "),
        ("f", long),
        ("g", "two"),
    ):
        (tmp_path / "corpus").mkdir(exist_ok=True)
        (tmp_path / "corpus" / f"{name}.txt").write_bytes(content.encode())
    meta = prepare(config(tmp_path, val_fraction=0.0), progress=False)
    assert decoded(Dataset.open(tmp_path / "data"), "train") == ["one", "two", long, "one "]
    assert meta["duplicates"] == 3 and meta["splits"]["train"]["documents"] == 4


def test_validation_inputs_are_kept_out_of_training(tmp_path):
    corpus(tmp_path / "corpus", documents=4)
    held_out = tmp_path / "held.txt"
    held_out.write_bytes((tmp_path / "corpus" / "0001.txt").read_bytes() + b"<|endoftext|>more")
    prepare(config(tmp_path, val_inputs=(str(held_out),)), progress=False)
    dataset = Dataset.open(tmp_path / "data")
    assert decoded(dataset, "val") == [text(2, 60), "more"]
    assert decoded(dataset, "train") == [text(1, 60), text(3, 60), text(4, 60)]


@pytest.mark.parametrize("files", [1, 2])
def test_a_corpus_of_few_documents_gives_its_end_to_validation(tmp_path, files):
    expected = corpus(tmp_path / "corpus", documents=files, words=2000)
    meta = prepare(config(tmp_path, val_fraction=0.01), progress=False)
    dataset = Dataset.open(tmp_path / "data")
    train, val = dataset.split("train"), dataset.split("val")
    found = decoded(dataset, "train")
    whole = b"".join(dataset.tokenizer().decode_bytes(s.read(0, len(s) - 1)) for s in (train, val))
    joined = "<|endoftext|>".join(expected).encode()
    at = len("<|endoftext|>".join(found).encode())
    assert whole == joined
    share = math.ceil(0.01 * (len(train) + len(val) - 1))  # without the end of text where the cut is
    assert 0 <= len(val) - share <= 3  # the tokens of the character that the cut would have parted
    assert (train.documents, val.documents) == (files, 1)
    assert meta["splits"]["val"]["text_bytes"] == len(joined) - at
    assert train.text_bytes + val.text_bytes == sum(len(t.encode()) for t in expected)


@pytest.mark.parametrize("fraction", [0.3, 0.9])
def test_training_is_never_left_without_text(tmp_path, fraction):
    """One long document and a short one: by their hashes, validation would get the long one, or both."""
    (tmp_path / "corpus").mkdir()
    contents = ["x y " * 300, "short"]
    for seed in range(6):
        contents[0] += "z"
        for number, content in enumerate(contents):
            (tmp_path / "corpus" / f"{number}.txt").write_text(content)
        out = tmp_path / str(seed)
        meta = prepare(config(tmp_path, out_dir=str(out), val_fraction=fraction), progress=False)
        dataset = Dataset.open(out)
        sizes = {split: len(dataset.split(split)) for split in ("train", "val")}
        assert min(sizes.values()) > 0
        if fraction < 0.5:
            assert sizes["train"] > sizes["val"]
        found = decoded(dataset, "train") + decoded(dataset, "val")
        assert sum(map(len, found)) == sum(map(len, contents))
        for split in ("train", "val"):
            assert meta["splits"][split]["documents"] == len(decoded(dataset, split))
            assert meta["splits"][split]["text_bytes"] == len("".join(decoded(dataset, split)))


@pytest.mark.parametrize("length", [400, 404, 407])
def test_a_character_is_not_cut_in_two(tmp_path, length):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_bytes(("漢" * length).encode())  # three tokens to a character
    prepare(config(tmp_path, val_fraction=0.1), progress=False)
    dataset = Dataset.open(tmp_path / "data")
    (train,), (val,) = decoded(dataset, "train"), decoded(dataset, "val")
    assert train + val == "漢" * length and len(val) > length / 10 - 2


def test_a_tokenizer_is_trained_on_the_training_split_alone(tmp_path, monkeypatch):
    expected = corpus(tmp_path / "corpus")
    small_tokenizer()  # trained before training is watched
    seen = []
    train = Tokenizer.train.__func__

    def spy(cls, *args, texts, **options):
        seen.extend(texts)
        return train(cls, *args, texts=seen, **options)

    monkeypatch.setattr(Tokenizer, "train", classmethod(spy))
    meta = prepare(config(tmp_path, tokenizer="train", vocab_size=300), progress=False)
    dataset = Dataset.open(tmp_path / "data")
    assert seen == decoded(dataset, "train") != expected
    assert meta["vocab_size"] == 300 and meta["run"]["tokenizer_seconds"] > 0
    # without validation documents the end of the text is what validation gets
    del seen[:]
    (tmp_path / "one.txt").write_text(text(8, 3000), newline="")
    settings = dict(inputs=(str(tmp_path / "one.txt"),), out_dir=str(tmp_path / "one"), val_fraction=0.1)
    prepare(config(tmp_path, tokenizer="train", vocab_size=300, **settings), progress=False)
    assert text(8, 3000).startswith("".join(seen))
    whole, part = (len(content.encode()) for content in (text(8, 3000), "".join(seen)))
    assert 0 <= whole - int(0.1 * whole) - part <= 3  # the bytes of a character that is parted
    # and of a corpus beyond the bound an even part
    del seen[:]
    monkeypatch.setattr(preparation, "TRAINING_BYTES", 4000)
    whole = prepare(config(tmp_path, tokenizer="train", vocab_size=300, out_dir=str(tmp_path / "part")), progress=False)
    longest = max(len(t.encode()) for t in expected)  # every text is taken whole, also the one that reaches the bound
    held_out = whole["splits"]["val"]["text_bytes"]
    assert 4000 - held_out <= len("".join(seen).encode()) < 4000 + longest
    assert expected.index(seen[-1]) > 20


def test_a_large_vocabulary_takes_uint32(tmp_path):
    corpus(tmp_path / "corpus", documents=3)
    large_tokenizer().save(tmp_path / "large.json")
    settings = config(tmp_path, tokenizer=str(tmp_path / "large.json"), val_fraction=0.0)
    meta = prepare(settings, progress=False)
    assert meta["dtype"] == "uint32"
    dataset = Dataset.open(tmp_path / "data")
    tokens = dataset.split("train")
    assert tokens.read(0, len(tokens)).max() == dataset.eot_id > 65535
    assert decoded(dataset, "train") == [text(i, 60) for i in (1, 2, 3)]


def test_invalid_utf8_can_be_replaced(tmp_path):
    corpus(tmp_path / "corpus", documents=2)
    (tmp_path / "corpus" / "bad.txt").write_bytes(b"a\xff\xffb")
    with pytest.raises(UserError, match=r"bad\.txt is not UTF-8: byte 0xff at byte 1"):
        prepare(config(tmp_path), progress=False)
    assert not (tmp_path / "data").exists()
    meta = prepare(config(tmp_path, errors="replace", val_fraction=0.0), progress=False)
    assert meta["replaced"] == 2
    assert decoded(Dataset.open(tmp_path / "data"), "train")[-1] == "a\ufffd\ufffdb"


# ---- again, and elsewhere --------------------------------------------------------------------


def test_a_finished_folder_is_left_alone(tmp_path, capsys):
    corpus(tmp_path / "corpus")
    prepare(config(tmp_path))
    assert "MB/s" in capsys.readouterr().err
    before = contents(tmp_path / "data")
    meta = prepare(config(tmp_path, workers=2))
    assert meta["run"]["already_done"]
    assert "already prepared" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"val_fraction was 0\.2 and now is 0\.1"):
        prepare(config(tmp_path, val_fraction=0.1), progress=False)
    (tmp_path / "corpus" / "0003.txt").write_text("changed")
    with pytest.raises(UserError, match="the input files have changed since"):
        prepare(config(tmp_path), progress=False)
    assert contents(tmp_path / "data") == before
    (tmp_path / "data" / "train-00000.bin").unlink()


def test_files_of_others_are_not_touched(tmp_path):
    corpus(tmp_path / "corpus")
    for name, change in (("train-00000.bin", {}), ("tokenizer.json", {"tokenizer": "train"}), ("tokenizer.json", {})):
        (tmp_path / "data").mkdir()
        Tokenizer.train(texts=["abab"], vocab_size=257).save(tmp_path / "data" / name)
        before = contents(tmp_path / "data")
        with pytest.raises(UserError, match="choose another --out_dir"):
            prepare(config(tmp_path, **change), progress=False)
        assert contents(tmp_path / "data").items() >= before.items()
        for path in (tmp_path / "data").iterdir():
            path.unlink()
        (tmp_path / "data").rmdir()


def test_the_tokenizer_in_the_folder_can_be_the_one_to_use(tmp_path):
    corpus(tmp_path / "corpus")
    (tmp_path / "data").mkdir()
    path = small_tokenizer().save(tmp_path / "data")
    (tmp_path / "corpus" / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="UTF-8"):
        prepare(config(tmp_path, tokenizer=str(path)), progress=False)
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["tokenizer.json"]
    prepare(config(tmp_path, tokenizer=str(path), errors="replace"), progress=False)
    assert verify(tmp_path / "data") == []


def test_the_tokenizer_of_the_dataset_to_overwrite_stays_where_it_is_an_input(tmp_path):
    corpus(tmp_path / "corpus")
    prepare(config(tmp_path), progress=False)
    (tmp_path / "corpus" / "bad.txt").write_bytes(b"\xff")
    for tokenizer in (tmp_path / "data", tmp_path / "data" / "tokenizer.json"):
        with pytest.raises(UserError, match="UTF-8"):
            prepare(config(tmp_path, tokenizer=str(tokenizer), overwrite=True), progress=False)
        assert [p.name for p in (tmp_path / "data").iterdir()] == ["tokenizer.json"]


def test_a_second_prepare_in_the_folder_is_refused(tmp_path):
    corpus(tmp_path / "corpus")
    refused = []

    def second(*_):
        if not refused:
            with pytest.raises(UserError, match="another prepare is at work"):
                prepare(config(tmp_path), progress=False)
            refused.append(True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation._Progress, "update", second)
        prepare(config(tmp_path), progress=False)
    assert refused and verify(tmp_path / "data") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": ()}, "inputs is empty"),
        ({"inputs": ("nowhere.txt",)}, "cannot read the input nowhere.txt"),
        ({"shard_tokens": 2**31}, "expected at most 2147483647"),
        ({"out_dir": "{}/corpus/0000.txt"}, "File exists"),
        ({"tokenizer": "gpt22"}, "did you mean 'gpt2'"),
    ],
)
def test_what_cannot_be_prepared_is_refused(tmp_path, changes, message):
    corpus(tmp_path / "corpus")
    changes = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(UserError, match=message):
        prepare(config(tmp_path, **changes), progress=False)
    assert not (tmp_path / "data").exists()


def test_inputs_without_text_are_refused(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text('{"text": ""}\n')
    for tokenizer in ({}, {"tokenizer": "train"}):
        with pytest.raises(UserError, match="no text"):
            prepare(config(tmp_path, **tokenizer), progress=False)
        assert not (tmp_path / "data").exists()


# ---- what it tells ---------------------------------------------------------------------------


def test_files_that_are_skipped_are_named_and_counted(tmp_path, capsys):
    corpus(tmp_path / "corpus")
    for name in ("LICENSE", "Makefile"):
        (tmp_path / "corpus" / name).write_text("text")
    folder = str(tmp_path / "corpus")
    assert prepare(config(tmp_path))["sources"]["skipped"] == 2
    told = f"skipped 2 files of other kinds: {folder}/LICENSE, {folder}/Makefile; name a file itself to read it\n"
    assert told in capsys.readouterr().err
    for name in ("a.png", "b.png"):
        (tmp_path / "corpus" / name).write_text("text")
    assert prepare(config(tmp_path, val_inputs=(folder,), out_dir=str(tmp_path / "b")))["sources"]["skipped"] == 8
    assert f"skipped 8 files of other kinds: {folder}/LICENSE, {folder}/Makefile, {folder}/a.png, ...;" in (
        capsys.readouterr().err
    )
    named = config(tmp_path, inputs=(f"{folder}/LICENSE",), out_dir=str(tmp_path / "c"))
    assert prepare(named)["sources"]["skipped"] == 0 and "skipped" not in capsys.readouterr().err


def test_a_small_validation_split_is_warned_of(tmp_path, capsys):
    corpus(tmp_path / "corpus", words=200)
    warning = "tokens are too few for a validation loss to rely on; give "
    tokens = prepare(config(tmp_path, val_fraction=0.05))["splits"]["val"]["tokens"]
    assert f"warning: {tokens} {warning}a larger --val_fraction, or --val_inputs\n" in capsys.readouterr().err
    (tmp_path / "val.txt").write_text("one fox")
    prepare(config(tmp_path, val_inputs=(str(tmp_path / "val.txt"),), out_dir=str(tmp_path / "b")))
    assert f"{warning}more --val_inputs\n" in capsys.readouterr().err
    for enough in ({"val_fraction": 0.5}, {"val_fraction": 0.0}):
        prepare(config(tmp_path, overwrite=True, **enough))
        assert "warning" not in capsys.readouterr().err


def test_files_with_invalid_utf8_are_named(tmp_path, capsys, small_pieces):
    """Also where the run that met them was interrupted and another one ends."""
    corpus(tmp_path / "corpus", documents=12)
    for number in (2, 3, 5, 8, 9):
        (tmp_path / "corpus" / f"{number:04d}.txt").write_bytes(b"\xff " + text(number, 60).encode() + b"\xff")
    (tmp_path / "corpus" / "rows.jsonl").write_text('{"text": "a \\ud800 b"}\n' + 2 * '{"text": "c"}\n')
    folder = tmp_path / "corpus"
    told = (
        f"; 11 invalid UTF-8 sequences replaced, in {folder}/0002.txt, {folder}/0003.txt, {folder}/0005.txt and 3 more "
        f"files\n"
    )
    prepare(config(tmp_path, errors="replace", val_fraction=0.0))
    assert told in capsys.readouterr().err
    left = 5

    def interrupt_later(*_):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    new = config(tmp_path, errors="replace", val_fraction=0.0, out_dir=str(tmp_path / "other"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation._Progress, "update", interrupt_later)
        with pytest.raises(KeyboardInterrupt):
            prepare(new, progress=False)
    assert prepare(new)["run"]["resumed"] and told in capsys.readouterr().err


def test_a_validation_split_of_few_documents_is_named(tmp_path, capsys):
    corpus(tmp_path / "corpus", documents=40, words=400)
    warning = "warning: validation is "
    meta = prepare(config(tmp_path, val_fraction=0.1))
    count = meta["splits"]["val"]["documents"]
    err = capsys.readouterr().err
    assert 1 < count < preparation.FEW_DOCUMENTS and f"{warning}{count} documents alone, from " in err
    dataset = Dataset.open(tmp_path / "data")
    names = []
    for held_out in decoded(dataset, "val"):
        names += [str(p) for p in (tmp_path / "corpus").iterdir() if p.read_bytes() == held_out.encode()]
    assert len(names) == count == 4 and f"from {', '.join(names[:3])} and 1 more file, and its loss" in err
    assert err.endswith("and its loss depends on what is in there; give a larger --val_fraction, or --val_inputs\n")
    prepare(config(tmp_path, val_fraction=0.4, overwrite=True))  # enough
    assert warning not in capsys.readouterr().err
    prepare(config(tmp_path, val_inputs=(str(tmp_path / "corpus" / "0000.txt"),), overwrite=True))  # as asked for
    assert warning not in capsys.readouterr().err
    for files in (1, 2):  # too few for a split by documents; of a single file there are no others
        folder = tmp_path / f"few{files}"
        corpus(folder, documents=files, words=4000)
        out = dict(inputs=(str(folder),), out_dir=str(tmp_path / f"out{files}"), val_fraction=0.1)
        meta = prepare(config(tmp_path, **out))
        last = f"{warning}the end of the text, in {folder}/0001.txt, so its loss tells little of the other files; give"
        assert (last in capsys.readouterr().err) == (files == 2)


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_text_whose_end_is_held_out_is_one_document(tmp_path, capsys, small_pieces):
    corpus(tmp_path / "corpus", documents=1, words=2000)
    prepare(config(tmp_path))
    told = capsys.readouterr().err
    assert told.startswith("1 document, ") and "; the end of the text became the validation split\n" in told
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "write_meta", interrupt)  # when it has been cut
        with pytest.raises(KeyboardInterrupt):
            prepare(config(tmp_path, overwrite=True), progress=False)
    prepare(config(tmp_path, overwrite=True))
    assert "; the end of the text became the validation split\n" in capsys.readouterr().err
    corpus(tmp_path / "corpus")
    prepare(config(tmp_path, overwrite=True))
    told = capsys.readouterr().err
    assert told.startswith("40 documents, ") and "the end of the text" not in told


def test_a_vocabulary_smaller_than_asked_for_is_explained(tmp_path, capsys):
    corpus(tmp_path / "corpus", documents=3)
    size = prepare(config(tmp_path, tokenizer="train", vocab_size=5000))["vocab_size"]
    told = capsys.readouterr().err
    assert size < 5000 and f"trained a tokenizer of {size} tokens" in told
    assert "the text is too short for the 5000 asked for: no other pair occurs twice\n" in told
    prepare(config(tmp_path, tokenizer="train", vocab_size=size, overwrite=True))
    assert "too short" not in capsys.readouterr().err


# ---- another dataset in its place ------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["corpus/", "./corpus", ".//corpus/."])
def test_the_spelling_of_a_path_does_not_matter(tmp_path, monkeypatch, spelling):
    corpus(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    changes = {"val_fraction": 0.2}
    for inputs in ({"inputs": ("{}",)}, {"inputs": ("corpus/0001.txt",), "val_inputs": ("{}",)}):
        first, second = (
            config(tmp_path, **changes, **{k: tuple(v.format(name) for v in values) for k, values in inputs.items()})
            for name in ("corpus", spelling)
        )
        prepare(first.replace(overwrite=True), progress=False)
        assert prepare(second, progress=False)["run"]["already_done"]


@pytest.mark.parametrize("tokenizer", ["train", "{}/small.json", "{}/data"])
def test_a_dataset_is_replaced_when_asked_for(tmp_path, tokenizer):
    corpus(tmp_path / "corpus", words=300)
    prepare(config(tmp_path, tokenizer="train", vocab_size=280), progress=False)
    (tmp_path / "data" / "notes.md").write_text("mine")
    (tmp_path / "corpus" / "0000.txt").write_text("changed")
    new = config(tmp_path, tokenizer=tokenizer.format(tmp_path), vocab_size=270, shard_tokens=10_000)
    with pytest.raises(UserError, match=r"choose another --out_dir, or replace it with --overwrite"):
        prepare(new, progress=False)
    prepare(new.replace(out_dir=str(tmp_path / "fresh")), progress=False)
    prepare(new.replace(overwrite=True), progress=False)
    fresh, replaced = contents(tmp_path / "fresh"), contents(tmp_path / "data")
    assert replaced.keys() - fresh.keys() == {"notes.md"} and verify(tmp_path / "data") == []
    if tokenizer == "{}/data":  # an input now, and no more for prepare to remove, as dataset.json says
        del fresh["dataset.json"]
    assert replaced.items() >= fresh.items()


def test_a_damaged_dataset_is_replaced_when_asked_for(tmp_path):
    corpus(tmp_path / "corpus")
    prepare(config(tmp_path), progress=False)
    before = contents(tmp_path / "data")
    path = tmp_path / "data" / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated or damaged; prepare it anew with --overwrite"):
        prepare(config(tmp_path), progress=False)
    prepare(config(tmp_path, overwrite=True), progress=False)
    assert contents(tmp_path / "data") == before


def test_files_of_others_are_not_overwritten(tmp_path):
    """Refused before anything is removed."""
    corpus(tmp_path / "corpus")
    folder, new = tmp_path / "data", config(tmp_path, overwrite=True, val_fraction=0.5)
    folder.mkdir()
    small_tokenizer().save(folder)
    prepare(config(tmp_path, tokenizer=str(folder)), progress=False)
    other = Tokenizer.train(texts=["abab"], vocab_size=257).save(tmp_path / "other.json")
    before = contents(folder)
    for tokenizer, message in (("train", "exists; give it as --tokenizer"), (str(other), "is another tokenizer than")):
        with pytest.raises(UserError, match=message):
            prepare(new.replace(tokenizer=tokenizer), progress=False)
        assert contents(folder) == before
    (folder / "train-00099.bin").write_text("mine")
    with pytest.raises(UserError, match=r"train-00099\.bin was not written by this prepare"):
        prepare(new, progress=False)
    (folder / "train-00099.bin").unlink()
    assert contents(folder) == before
    (folder / "dataset.json").unlink()
    adopt_shards(folder, train=[p.name for p in sorted(folder.glob("train-*.bin"))], tokenizer=folder)
    before = contents(folder)
    with pytest.raises(UserError, match="holds a dataset that prepare did not write"):
        prepare(new, progress=False)
    assert contents(folder) == before


def test_killed_while_it_overwrites_nothing_is_mixed(tmp_path, small_pieces):
    corpus(tmp_path / "corpus", documents=12)
    folder, old = tmp_path / "data", config(tmp_path, shard_tokens=200)
    new = old.replace(val_fraction=0.5, tokenizer=str(tmp_path / "other.json"))
    Tokenizer.train(texts=[text(1, 60)], vocab_size=290).save(tmp_path / "other.json")
    prepare(new.replace(out_dir=str(tmp_path / "whole")), progress=False)
    whole = contents(tmp_path / "whole")
    taken_over = False
    for event in (*range(12), 20, 30):
        prepare(old.replace(overwrite=True), progress=False)
        before = contents(folder)
        in_child(lambda event=event: (kill_at(event), prepare(new.replace(overwrite=True))), -signal.SIGKILL)
        if (folder / "dataset.json").exists():
            assert not taken_over and contents(folder).items() >= before.items() and verify(folder) == []
            prepare(old, progress=False)
            assert contents(folder) == before
            in_child(lambda: prepare(new.replace(overwrite=True)))
        else:
            taken_over = True
            with pytest.raises(UserError, match=r"interrupted prepare .*replace it with --overwrite"):
                prepare(old, progress=False)
            in_child(lambda event=event: prepare(new.replace(overwrite=event % 2 == 0)))
        assert contents(folder) == whole, f"after a kill at event {event}"
    assert taken_over


def test_an_interrupted_run_is_replaced_when_asked_for(tmp_path, small_pieces):
    corpus(tmp_path / "corpus")
    other = config(tmp_path, val_fraction=0.5, tokenizer="train", vocab_size=280)
    in_child(lambda: (kill_at(60), prepare(other, progress=False)), -signal.SIGKILL)
    assert (tmp_path / "data" / "tokenizer.json").exists()
    prepare(config(tmp_path, overwrite=True), progress=False)
    prepare(config(tmp_path, out_dir=str(tmp_path / "fresh")), progress=False)
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


# ---- kills -----------------------------------------------------------------------------------


EVENTS = ((os, "fsync"), (os, "replace"), (os, "truncate"), (Path, "unlink"), (shards, "write_all"))


def kill_at(event, count=None):
    """End this process with SIGKILL at the event-th of EVENTS: before it, or in the midst of a write. Where that many
    do not come, `count` is a file that takes their number."""
    seen = 0

    def killing(function):
        def called(*args, **options):
            nonlocal seen
            if seen == event:
                if function.__name__ == "write_all":
                    args[0].write(args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
            if count:
                count.write_text(str(seen))
            return function(*args, **options)

        return called

    for owner, name in EVENTS:
        setattr(owner, name, killing(getattr(owner, name)))


@pytest.mark.parametrize(
    ("files", "shard", "end"),
    [
        (6, 200, 8),
        (1, 100_000, 24),
        *(pytest.param(files, shard, None, marks=pytest.mark.slow) for files, shard in ((2, 600), (1, 100_000))),
    ],
)
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path, small_pieces, files, shard, end):
    copies = corpus(tmp_path / "corpus", documents=files, words=90)
    copies.append(text(60, 500))
    (tmp_path / "corpus" / "0001x.txt").write_bytes(copies[-1].encode())
    (tmp_path / "corpus" / "9999.txt").write_bytes("<|endoftext|>".join(copies).encode())

    base = config(tmp_path, tokenizer="train", vocab_size=270, shard_tokens=shard)

    def run(name):
        prepare(base.replace(out_dir=str(tmp_path / name)), progress=False)

    in_child(lambda: (kill_at(10**9, tmp_path / "count"), run("whole")))
    whole = contents(tmp_path / "whole")
    folder = tmp_path / "killed"
    last = int((tmp_path / "count").read_text()) - 1
    if end is None:
        moments = range(last + 1)
    else:
        # every kind of moment: the beginning, the end, and between them at strides that share no rhythm with the pieces
        between = np.linspace(6, last - end, 8).astype(int).tolist()
        moments = sorted({*range(6), *between, *range(last - end, last + 1, 1 + end // 12)})
    for number, event in enumerate(moments):
        in_child(lambda event=event: (kill_at(event), run("killed")), -signal.SIGKILL)
        assert not (folder / "dataset.json").exists() or contents(folder).items() >= whole.items()
        for path in folder.glob("*.bin"):
            assert path.stat().st_size == 1024 + 2 * int(np.fromfile(path, "<i4", 3)[2])
        if number % 4 == 2:  # killed again while it goes on
            in_child(lambda: (kill_at(40), run("killed")), (0, -signal.SIGKILL))
        in_child(lambda: run("killed"))
        assert contents(folder) == whole, f"after a kill at event {event} of {last}"
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_killed_while_the_tokenizer_is_trained(tmp_path):
    texts = corpus(tmp_path / "corpus", documents=4)
    new = config(tmp_path, tokenizer="train", vocab_size=270, val_fraction=0.0)
    prepare(new.replace(out_dir=str(tmp_path / "whole")), progress=False)
    given = preparation.Preparation._training_texts
    for count in range(len(texts) + 1):

        def killing(self, count=count):
            yield from itertools.islice(given(self), count)
            os.kill(os.getpid(), signal.SIGKILL)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(preparation.Preparation, "_training_texts", killing)
            in_child(lambda: prepare(new, progress=False), -signal.SIGKILL)
        assert [path.name for path in (tmp_path / "data").iterdir()] == ["prepare.json"]
        with pytest.raises(UserError, match=r"holds no dataset\.json"):
            Dataset.open(tmp_path / "data")
    prepare(new, progress=False)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


SCRIPT = """
from fastgpt.config import PrepareConfig
from fastgpt.data import prepare, preparation
preparation.STATE_SECONDS = 0.0
prepare(PrepareConfig.from_json({settings!r}))
"""


def test_a_killed_prepare_leaves_no_workers_and_goes_on(tmp_path):
    corpus(tmp_path / "corpus")
    (tmp_path / "corpus" / "long.txt").write_text(text(4, 20_000) * 30)
    settings = config(tmp_path, workers=2, shard_tokens=100_000)
    prepare(settings.replace(out_dir=str(tmp_path / "whole"), workers=1), progress=False)
    # no __main__ guard: a user's script has none
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(settings=settings.to_json())], cwd=ROOT, stderr=subprocess.PIPE
    )
    first = tmp_path / "data" / "train-00000.bin"
    while not first.exists() and process.poll() is None:
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    assert not (tmp_path / "data" / "dataset.json").exists()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() and b"serve" in cmdline(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived its caller"
        time.sleep(0.01)
    meta = prepare(settings, progress=False)
    assert meta["run"]["resumed"]
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def cmdline(process):
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_dead_worker_is_reported_and_the_run_goes_on(tmp_path, monkeypatch):
    corpus(tmp_path / "corpus")
    from fastgpt.data import pool

    start = subprocess.Popen

    def dying(command, **options):
        return start([command[0], "-c", "import os; os.kill(os.getpid(), 9)"], **options)

    monkeypatch.setattr(pool.subprocess, "Popen", dying)
    with pytest.raises(UserError, match="a worker process ended with exit code -9"):
        prepare(config(tmp_path, workers=2), progress=False)
    monkeypatch.undo()
    assert prepare(config(tmp_path), progress=False)["run"]["resumed"]


def test_a_mistake_in_a_worker_is_raised_with_its_traceback():
    pool = WorkerPool(1)
    try:
        pool.start(Encoder(small_tokenizer(), "text", "strict"))
        piece = documents.Piece("jsonl", [], [("a.jsonl", 0)], documents.Position(), 0)
        with pytest.raises(RuntimeError, match=r"in lines\n(.*\n)*IndexError"):
            pool.submit(piece).result()
    finally:
        pool.close()


def test_an_interrupted_folder_takes_no_other_inputs(tmp_path, small_pieces):
    corpus(tmp_path / "corpus")
    in_child(lambda: (kill_at(30), prepare(config(tmp_path), progress=False)), -signal.SIGKILL)
    before = contents(tmp_path / "data")
    with pytest.raises(UserError, match=r"interrupted prepare .*val_fraction was 0\.2 and now is 0\.5"):
        prepare(config(tmp_path, val_fraction=0.5), progress=False)
    (tmp_path / "corpus" / "new.txt").write_text("new")
    with pytest.raises(UserError, match=r"interrupted prepare .*the input files have changed"):
        prepare(config(tmp_path), progress=False)
    assert contents(tmp_path / "data") == before
    (tmp_path / "corpus" / "new.txt").unlink()
    state = json.loads((tmp_path / "data" / "prepare.json").read_text())
    for damage in ("{", "[]", "7", "[" * 100_000, '{"version": 2}', json.dumps({**state, "consumed": 1}), "\0"):
        (tmp_path / "data" / "prepare.json").write_text(damage)
        for overwrite in (False, True):
            with pytest.raises(UserError, match=r"prepare\.json is damaged; remove .*, or choose another --out_dir$"):
                prepare(config(tmp_path, overwrite=overwrite), progress=False)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A corpus, the dataset it comes to, and what kills at several moments leave of it."""
    root = tmp_path_factory.mktemp("interrupted")
    corpus(root / "corpus", documents=6, words=90)
    (root / "corpus" / "9999.txt").write_text(text(60, 900))
    new = config(root, tokenizer="train", vocab_size=270, shard_tokens=400, val_fraction=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch_small(patch)
        in_child(lambda: (kill_at(10**9, root / "count"), prepare(new.replace(out_dir=str(root / "whole")))))
        last = int((root / "count").read_text()) - 1
        moments = (5, last // 4, last // 2, 3 * last // 4, last - 12)
        for event in moments:
            killed = new.replace(out_dir=str(root / str(event)))
            in_child(lambda event=event, killed=killed: (kill_at(event), prepare(killed)), -signal.SIGKILL)
    return root, new, [root / str(event) for event in moments]


def test_what_is_damaged_between_a_kill_and_the_resume_is_as_it_should_be(interrupted):
    """There is something of every kind to damage, and no dataset is finished."""
    _, _, folders = interrupted
    names = [{path.name for path in folder.iterdir()} for folder in folders]
    assert all("prepare.json" in found and "dataset.json" not in found for found in names)
    endings = ("prepare.digests", "tokenizer.json", ".bin", ".bin.partial")
    assert all(any(name.endswith(ending) for found in names for name in found) for ending in endings)


def test_changed_digests_are_refused_and_a_tokenizer_spelt_otherwise_is_mended(interrupted, tmp_path, small_pieces):
    root, new, folders = interrupted
    new = new.replace(out_dir=str(tmp_path / "data"))
    shutil.copytree(folders[2], tmp_path / "data")
    digests, tokenizer = (tmp_path / "data" / name for name in ("prepare.digests", "tokenizer.json"))
    whole = digests.read_bytes()
    for damaged, message in ((bytes([whole[0] ^ 1]) + whole[1:], "has changed since"), (whole[:15], "is shorter than")):
        digests.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"prepare\.digests {message} .*; remove .* or choose another --out_dir$"):
            prepare(new, progress=False)
    digests.write_bytes(whole)
    tokenizer.write_bytes(tokenizer.read_bytes() + b" ")
    assert prepare(new, progress=False)["run"]["resumed"]
    assert contents(tmp_path / "data") == contents(root / "whole")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_between_a_kill_and_the_resume_is_refused_or_does_not_matter(interrupted, tmp_path_factory, data):
    root, new, folders = interrupted
    folder = tmp_path_factory.mktemp("damaged") / "data"
    shutil.copytree(data.draw(st.sampled_from(folders)), folder)
    path = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "flip", "truncate", "zero", "remove"]))
    place = data.draw(st.integers(0, max(0, 8 * len(content) - 1)))
    if kind == "flip" and content:
        content[place // 8] ^= 1 << place % 8
    elif kind == "truncate":
        del content[place // 8 :]
    elif kind == "zero":
        content[place // 8 : place // 8 + 64] = bytes(len(content[place // 8 : place // 8 + 64]))
    path.write_bytes(content)
    if kind == "remove":
        path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch_small(patch)
        try:
            prepare(new.replace(out_dir=str(folder)), progress=False)
        except UserError as error:
            assert str(folder) in str(error) and "\n" not in str(error)
            assert not (folder / "dataset.json").exists()
        else:
            assert contents(folder) == contents(root / "whole")


def test_an_interrupt_keeps_what_was_done(tmp_path, small_pieces, monkeypatch):
    corpus(tmp_path / "corpus")
    prepare(config(tmp_path, out_dir=str(tmp_path / "whole")), progress=False)
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(preparation._Progress, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(tmp_path), progress=False)
    assert prepare(config(tmp_path), progress=False)["run"]["resumed"]
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_duplicates_are_known_over_several_interrupts(tmp_path, small_pieces, monkeypatch):
    copies = corpus(tmp_path / "corpus", documents=12)
    (tmp_path / "corpus" / "9999.txt").write_bytes("<|endoftext|>".join(copies).encode())
    whole = prepare(config(tmp_path, out_dir=str(tmp_path / "whole")), progress=False)
    left = 3

    def interrupt(*_):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(preparation._Progress, "update", interrupt)
    for _ in range(3):
        left = 3
        with pytest.raises(KeyboardInterrupt):
            prepare(config(tmp_path), progress=False)
        with open(tmp_path / "data" / "prepare.digests", "ab") as file:
            file.write(bytes(16))  # written after the state that will be gone back to
    left = 10**9
    assert prepare(config(tmp_path), progress=False)["duplicates"] == whole["duplicates"] >= 10
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


# ---- a full disk -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "tokenizer"), [*((limit, {}) for limit in (0, 100, 3000, 12_000)), (3000, {"tokenizer": "train"})]
)
def test_a_full_disk_is_refused_and_nothing_left(tmp_path, limit, tokenizer):
    """RLIMIT_FSIZE makes the system refuse a write, in the midst of one."""
    corpus(tmp_path / "corpus", words=400)

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(
            UserError, match=r"no space to write in .*: the dataset|File too large; the dataset needs about"
        ):
            prepare(config(tmp_path, shard_tokens=10**6, **tokenizer), progress=False)

    config(tmp_path)
    in_child(run)
    assert not (tmp_path / "data").exists()
    prepare(config(tmp_path), progress=False)


def test_a_disk_too_full_to_begin_leaves_what_was_to_be_overwritten(tmp_path):
    corpus(tmp_path / "corpus")
    prepare(config(tmp_path), progress=False)
    before = contents(tmp_path / "data")

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with pytest.raises(UserError, match="no space to write in"):
            prepare(config(tmp_path, val_fraction=0.5, overwrite=True), progress=False)

    in_child(run)
    assert contents(tmp_path / "data") == before


def test_a_full_file_system(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root and mount")
    try:
        texts = corpus(tmp_path / "corpus", words=1500)
        with pytest.raises(
            UserError, match=r"No space left on device; the dataset needs about [\d,]+ bytes and"
        ) as caught:
            prepare(config(tmp_path, out_dir=str(disk / "data")), progress=False)
        needed = int(str(caught.value).split("about ")[1].split(" bytes")[0].replace(",", ""))
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    # it goes by the documents read so far: what they came to, for each byte, lies between the extremes of the documents
    tokenizer = small_tokenizer()
    sizes = [(UINT16.itemsize * (len(tokenizer.encode(t)) + 1), len(t.encode())) for t in texts]
    rates, total = [ids / size for ids, size in sizes], sum(size for _, size in sizes)
    assert math.floor(min(rates) * total) <= needed <= math.ceil(max(rates) * total)


# ---- how it is used --------------------------------------------------------------------------


def test_reading_and_encoding_import_no_torch_and_workers_no_numpy():
    code = """
    import sys
    import fastgpt.data.worker, fastgpt.data.encode, fastgpt.tokenizer
    tokenizer = fastgpt.tokenizer.Tokenizer.train(texts=["some text"], vocab_size=258)
    assert tokenizer.encode_to_bytes("some") == b"".join(i.to_bytes(4, sys.byteorder) for i in tokenizer.encode("some"))
    assert "numpy" not in sys.modules
    import fastgpt.data.preparation, fastgpt.data.dataset
    assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True)


def test_a_closed_stderr_does_not_matter(tmp_path):
    corpus(tmp_path / "corpus")
    code = SCRIPT.format(settings=config(tmp_path).to_json())
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)
    process.stderr.close()
    assert process.wait() == 0
    assert verify(tmp_path / "data") == []

"""Shards and datasets on the disk: the layout byte by byte, and every way they can be damaged."""

from __future__ import annotations

import itertools
import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data import Dataset, adopt_shards, prepare, read_shard, verify
from fastgpt.data.dataset import TokenStream
from fastgpt.data.shards import HEADER_BYTES, UINT16, UINT32, ShardWriter, dtype_for, header
from fastgpt.errors import UserError
from fastgpt.tokenizer import Tokenizer

from .data_cases import config, contents, corpus, small_tokenizer, stream, text


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    corpus(root / "corpus")
    prepare(config(root), progress=False)
    return root / "data"


@pytest.fixture
def damaged(prepared, tmp_path):
    """A copy that a test may damage."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in prepared.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


# ---- layout ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "magic", "version"), [(UINT16, 20240520, 1), (UINT32, 20240801, 7)])
def test_the_layout_is_llm_c_s_byte_by_byte(tmp_path, dtype, magic, version):
    ids = np.array([0, 1, 258, 65535], dtype)
    writer = ShardWriter(tmp_path, "train", dtype, 4)
    writer.append(ids)
    data = (tmp_path / "train-00000.bin").read_bytes()
    assert data[:12] == struct.pack("<iii", magic, version, 4)
    assert data[12:1024] == bytes(1012)
    assert data[1024:] == struct.pack("<4H" if dtype is UINT16 else "<4I", 0, 1, 258, 65535)
    np.testing.assert_array_equal(read_shard(tmp_path / "train-00000.bin"), ids)


def test_the_narrowest_dtype_that_holds_every_id():
    assert dtype_for(65536) == UINT16
    assert dtype_for(65537) == UINT32


def test_bare_uint16_is_read_when_asked_for(tmp_path):
    ids = np.arange(700, dtype=np.uint16)
    ids.tofile(tmp_path / "train.bin")
    np.testing.assert_array_equal(read_shard(tmp_path / "train.bin", headerless=True), ids)
    with pytest.raises(UserError, match="magic"):
        read_shard(tmp_path / "train.bin")
    (tmp_path / "train.bin").write_bytes(bytes(701))
    with pytest.raises(UserError, match="truncated"):
        read_shard(tmp_path / "train.bin", headerless=True)


@pytest.mark.parametrize("headerless", [False, True])
def test_shards_of_other_programs_become_a_dataset(tmp_path, headerless):
    tokenizer = small_tokenizer()
    tokenizer.save(tmp_path / "given.json")
    texts = {"train": ["one fox", "über 日本"], "val": ["lazy dog"]}
    for split, documents in texts.items():
        ids = np.array([i for d in documents for i in [tokenizer.eot_id, *tokenizer.encode(d)]], np.uint16)
        (tmp_path / f"{split}.bin").write_bytes((b"" if headerless else header(UINT16, len(ids))) + ids.tobytes())
    adopt_shards(
        tmp_path, train=["train.bin"], val=["val.bin"], tokenizer=tmp_path / "given.json", headerless=headerless
    )
    dataset = Dataset.open(tmp_path)
    train = dataset.split("train")
    assert dataset.tokenizer().decode(train.read(1, 1 + len(tokenizer.encode("one fox")))) == "one fox"
    assert train.documents == 2
    assert train.text_bytes == len("one foxüber 日本".encode())
    assert verify(tmp_path) == []


def test_writing_goes_back_to_any_earlier_length(tmp_path):
    ids = np.random.default_rng(0).integers(0, 9, 25).astype(np.uint16)

    def straight(folder, n):
        folder.mkdir()
        writer = ShardWriter(folder, "train", UINT16, 10)
        writer.append(ids[:n])
        writer.finish()

    for first, back, last in itertools.product((0, 9, 10, 25), (0, 1, 10, 19, 20), (1, 20, 25)):
        if not back <= min(first, last):
            continue
        folder, expected = tmp_path / f"{first}-{back}-{last}", tmp_path / f"straight-{last}"
        folder.mkdir()
        writer = ShardWriter(folder, "train", UINT16, 10)
        writer.append(ids[:first])
        writer.truncate(back)
        assert writer.tokens == back
        writer.append(ids[back:last])
        np.testing.assert_array_equal(writer.read(0, last), ids[:last])
        assert sum(shard["tokens"] for shard in writer.finish()) == last
        if not expected.exists():
            straight(expected, last)
        assert contents(folder) == contents(expected)


def test_a_state_is_that_of_a_split_of_its_length_and_reads_one_block_at_most(tmp_path, monkeypatch):
    monkeypatch.setattr("fastgpt.data.shards.BLOCK_BYTES", 8)
    ids = np.random.default_rng(0).integers(0, 2**16, 45).astype(np.uint16)
    writer = ShardWriter(tmp_path, "train", UINT16, 20)
    read, states = ShardWriter.read, [writer.state()]
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "read", lambda *_: pytest.fail("read for the state of a whole split"))
        for i in range(len(ids)):
            writer.append(ids[i : i + 1])
            states.append(writer.state())
    sizes = []

    def measured(self, start, stop):
        sizes.append(stop - start)
        return read(self, start, stop)

    monkeypatch.setattr(ShardWriter, "read", measured)
    for tokens, state in enumerate(states):
        del sizes[:]
        assert writer.state(tokens) == state
        assert sum(sizes) < 8 // ids.itemsize and len(sizes) <= 1


def test_going_on_takes_no_byte_that_has_changed(tmp_path, monkeypatch):
    """Every bit of every file that the state speaks of, but for the header that is still to be written."""
    monkeypatch.setattr("fastgpt.data.shards.BLOCK_BYTES", 8)
    ids = np.random.default_rng(0).integers(0, 2**16, 9).astype(np.uint16)
    writer = ShardWriter(tmp_path, "train", UINT16, 6)
    writer.append(ids)
    state = json.loads(json.dumps(writer.state()))
    writer.close()
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for bit in (*range(0, 8 * HEADER_BYTES, 97), *range(8 * HEADER_BYTES, 8 * len(whole))):
            content = bytearray(whole)
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            if path.suffix == ".partial" and bit < 8 * HEADER_BYTES:
                writer.restore(state)
                np.testing.assert_array_equal(writer.read(0, 9), ids)
            else:
                with pytest.raises(UserError, match=rf"{path.name} has changed since .*; remove {tmp_path} and start"):
                    writer.restore(state)
        path.write_bytes(whole[:-1])
        with pytest.raises(UserError, match=rf"{path.name}: expected .*; remove {tmp_path} and start again, or choose"):
            writer.restore(state)
        path.write_bytes(whole)
    writer.restore(state)
    assert writer.state() == state


# ---- the stream over the shards --------------------------------------------------------------


def test_reading_spans_shards():
    tokens = stream(5, 1, 7)
    whole = np.concatenate(tokens.shards)
    for start in range(14):
        for stop in range(start, 14):
            np.testing.assert_array_equal(tokens.read(start, stop), whole[start:stop])
    for start, stop in ((-1, 3), (3, 2), (0, 14)):
        with pytest.raises(IndexError):
            tokens.read(start, stop)


@pytest.mark.parametrize("place", [0, 4, 5, 9])
def test_an_id_outside_the_vocabulary_is_named(place):
    shards = [np.zeros(5, np.uint16), np.zeros(5, np.uint16)]
    shards[place // 5][place % 5] = 50
    tokens = TokenStream(shards, 0, names=["a.bin", "b.bin"])
    tokens.check(51, 4)
    with pytest.raises(UserError, match=rf"{'ab'[place // 5]}\.bin: token {place % 5} has id 50; a vocabulary of 50"):
        tokens.check(50, 4)


def test_a_split_needs_one_window():
    tokens = stream(4, 5)
    tokens.check(50, 8)
    with pytest.raises(UserError, match="9 tokens; a block_size of 9 needs at least 10"):
        tokens.check(50, 9)


# ---- damage ----------------------------------------------------------------------------------


def test_a_prepared_folder_is_sound(prepared):
    dataset = Dataset.open(prepared)
    assert len(dataset.meta["splits"]["train"]["shards"]) > 2
    assert verify(prepared) == []
    assert dataset.tokenizer() == small_tokenizer()


@pytest.mark.parametrize("missing", [1, 2, 3, 999])
def test_a_truncated_shard_is_refused(damaged, missing):
    path = damaged / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-missing])
    with pytest.raises(UserError, match=r"train-00001\.bin: \d+ bytes; expected \d+"):
        Dataset.open(damaged)
    assert len(verify(damaged)) == 1


def test_a_shard_cut_with_its_count_is_refused(damaged):
    path = damaged / "train-00001.bin"
    path.write_bytes(header(UINT16, 10) + path.read_bytes()[HEADER_BYTES:][:20])
    with pytest.raises(UserError, match=r"holds 10 tokens; dataset\.json states 1000"):
        Dataset.open(damaged)
    assert len(verify(damaged)) == 1


def test_every_flip_in_a_header_is_refused(damaged):
    path = damaged / "val-00000.bin"
    whole = path.read_bytes()
    for bit in [*range(12 * 8), *range(12 * 8, HEADER_BYTES * 8, 97)]:
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(UserError, match="val-00000"):
            Dataset.open(damaged)


def test_a_flipped_bit_is_found_in_its_block(damaged, monkeypatch):
    monkeypatch.setattr("fastgpt.data.shards.BLOCK_BYTES", 512)
    monkeypatch.setattr("fastgpt.data.preparation.BLOCK_BYTES", 512)
    root = damaged.parent
    corpus(root / "corpus")
    prepare(config(root, out_dir=str(root / "blocks")), progress=False)
    path = root / "blocks" / "train-00002.bin"
    data = bytearray(path.read_bytes())
    data[HEADER_BYTES + 2 * 512 + 5] ^= 16
    path.write_bytes(data)
    Dataset.open(root / "blocks")
    assert verify(root / "blocks") == [f"{path}: block 2 (bytes 2048 to 2559) has changed"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            (20240801, 7, 5),
            r"found magic 20240801, version 7 \(uint32\); expected magic 20240520, version 1 \(uint16\)",
        ),
        ((20240520, 2, 5), "found magic 20240520, version 2; expected"),
        ((1, 1, 5), "found magic 1, version 1; expected"),
        ((20240520, 1, -1), "the header is damaged"),
    ],
)
def test_another_kind_of_file_is_refused(damaged, words, message):
    path = damaged / "val-00000.bin"
    path.write_bytes(struct.pack("<iii", *words) + path.read_bytes()[12:])
    with pytest.raises(UserError, match=message):
        Dataset.open(damaged)


def test_missing_files_and_folders_are_named(damaged, tmp_path):
    with pytest.raises(UserError, match="nowhere is not there"):
        Dataset.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no dataset\.json"):
        Dataset.open(tmp_path / "empty")
    (damaged / "val-00000.bin").unlink()
    with pytest.raises(UserError, match=r"cannot read the shard .*val-00000\.bin: No such file"):
        Dataset.open(damaged)
    (damaged / "val-00000.bin").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        Dataset.open(damaged)
    assert len(verify(damaged)) == 1


def test_a_changed_or_missing_tokenizer_is_found(damaged):
    assert verify(damaged) == []
    path = damaged / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-40])
    (problem,) = verify(damaged)
    assert "tokenizer.json" in problem
    path.unlink()
    (problem,) = verify(damaged)
    assert "tokenizer" in problem


def test_a_changed_dataset_json_is_refused(damaged):
    path = damaged / "dataset.json"
    meta = json.loads(path.read_text())
    for damage, message in (
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "expected format"),
        (json.dumps({**meta, "version": 2}), "expected format"),
        (json.dumps({**meta, "eot_id": 7}), "changed or damaged"),
    ):
        path.write_text(damage)
        with pytest.raises(UserError, match=message):
            Dataset.open(damaged)


def test_another_tokenizer_is_refused(damaged, tmp_path):
    dataset = Dataset.open(damaged)
    dataset.check_tokenizer(small_tokenizer().sha256)
    with pytest.raises(UserError, match="has another tokenizer"):
        dataset.check_tokenizer("0" * 64)
    dataset.save_tokenizer(tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_bytes() == (damaged / "tokenizer.json").read_bytes()
    Tokenizer.train(texts=[text(9, 500)], vocab_size=290).save(damaged / "tokenizer.json")
    for use in (dataset.tokenizer, lambda: dataset.save_tokenizer(tmp_path / "copy.json")):
        with pytest.raises(UserError, match="is not the tokenizer that made this dataset"):
            use()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_damage_is_refused_or_found_or_read_right(prepared, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damage")
    before = {path.name: path.read_bytes() for path in prepared.iterdir()}
    name = data.draw(st.sampled_from(sorted(before)))
    content = bytearray(before[name])
    kind = data.draw(st.sampled_from(["flip", "truncate", "extend", "zero", "nothing"]))
    if kind == "flip":
        for bit in data.draw(st.lists(st.integers(0, 8 * len(content) - 1), min_size=1, max_size=3, unique=True)):
            content[bit // 8] ^= 1 << bit % 8
    elif kind == "truncate":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    elif kind == "extend":
        content += data.draw(st.binary(min_size=1, max_size=9))
    elif kind == "zero":
        start = data.draw(st.integers(0, len(content) - 1))
        content[start : start + 64] = bytes(len(content[start : start + 64]))
    for other, whole in before.items():
        (folder / other).write_bytes(content if other == name else whole)
    changed = content != before[name]
    try:
        dataset = Dataset.open(folder)
        problems = verify(folder)
        for split in ("train", "val"):
            tokens = dataset.split(split)
            tokens.check(dataset.vocab_size, 8)
            if not problems:
                np.testing.assert_array_equal(
                    tokens.read(0, len(tokens)), np.concatenate(Dataset.open(prepared).split(split).shards)
                )
        if name.endswith(".bin"):
            assert bool(problems) == changed
        dataset.tokenizer()
    except UserError:
        assert changed

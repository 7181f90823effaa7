"""The tokenizer: exact round trips, one set of ids in two libraries, linear time, and what it refuses."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastgpt.tokenizer as module
from fastgpt.errors import UserError
from fastgpt.tokenizer import END_OF_TEXT, PATTERN, Tokenizer

from . import tokenizer_table

MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))

# One and more of everything that the regex tells apart, and the bytes that break careless code.
PIECES = (
    *(
        "a",
        "Z",
        "ab",
        "isn't",
        "getValue",
        "snake_case",
        "é",
        "e\u0301",
        "ß",
        "\u017f",
        "ǅ",
        "д",
        "Ω",
        "\u0627",
        "سلام",
        "\u0644\u064e",
    ),
    *("नमस्ते", "ภาษา", "中", "文字化け", "한국어", "𐍈", "1", "42", "123456", "٣", "½", "Ⅷ", "一"),
    *(
        " ",
        "  ",
        "    ",
        "\t",
        "\t\t",
        "\n",
        "\r\n",
        "\r",
        "\n\n",
        "\u00a0",
        "\u2028",
        "\u3000",
        "\u0085",
        "\x0b",
        "\x1f",
    ),
    *(".", "...", "_", "__", "'", "''", "(", ")):", "<|endoftext|>", "<|", "$", "+=", "\0", "\x7f", "\ufeff", "\ufffd"),
    *("🙂", "👨‍👩‍👧", "❤️", "🇩🇪", "\u200d", "\u200c", "\U0010ffff", "\ue000", "\u0301", "\u20dd"),
)
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
mixtures = st.lists(st.sampled_from(PIECES), max_size=60).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_table.trained()


@pytest.fixture(scope="module")
def theirs(tokenizer):
    """The same file in the other library; special tokens in a text are text for it, too."""
    loaded = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    loaded.encode_special_tokens = True
    return loaded


def changed(tokenizer: Tokenizer, **changes) -> str:
    """Its tokenizer.json with entries replaced; a dotted name goes inside."""
    document = json.loads(tokenizer.to_json())
    for name, value in changes.items():
        *path, last = name.split("__")
        place = document
        for key in path:
            place = place[key]
        place[last] = value
    return json.dumps(document)


# ---- round trip ------------------------------------------------------------------------------


@MANY
@given(text=anything | mixtures)
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, errors="strict") == text
    assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eot_id for i in ids)
    assert tokenizer.encode_to_numpy(text).tolist() == ids


def test_every_character_comes_back(tokenizer):
    text = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_all_bytes_are_tokens(tokenizer):
    assert [tokenizer.decode_bytes([b]) for b in range(256)] == [bytes([b]) for b in range(256)]
    assert tokenizer.decode([0xE4, 0xB8]) == "\ufffd"
    with pytest.raises(UserError, match="not whole UTF-8 characters"):
        tokenizer.decode([0xE4, 0xB8], errors="strict")


def test_batches_and_arrays(tokenizer):
    texts = ["", "one", "two\n", "中文" * 50, "x" * 1000] * 5
    expected = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(iter(texts)) == expected
    assert tokenizer.encode_batch(texts, num_threads=1) == tokenizer.encode_batch(texts, num_threads=4) == expected
    assert tokenizer.encode_batch([]) == []
    ids = tokenizer.encode_to_numpy("two words")
    assert ids.dtype == np.uint32
    assert tokenizer.encode_to_numpy("").shape == (0,)
    assert (
        tokenizer.decode(ids) == tokenizer.decode(ids.astype(np.uint16)) == tokenizer.decode(iter(ids)) == "two words"
    )


# ---- special tokens --------------------------------------------------------------------------


def test_special_tokens_in_a_text_stay_text(tokenizer):
    text = f"a{END_OF_TEXT}b"
    assert tokenizer.eot_id == tokenizer.vocab_size - 1
    for ids in (
        tokenizer.encode(text),
        tokenizer.encode_to_numpy(text).tolist(),
        *tokenizer.encode_batch([text, text]),
    ):
        assert tokenizer.eot_id not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, allow_special=True) == [ord("a"), tokenizer.eot_id, ord("b")]
    assert tokenizer.decode(tokenizer.encode(text, allow_special=True)) == text


# ---- the two libraries -----------------------------------------------------------------------


@MANY
@given(text=anything | mixtures)
def test_both_libraries_give_the_same_ids(tokenizer, theirs, text):
    assert theirs.encode(text).ids == tokenizer.encode(text)


def test_both_libraries_know_every_character_alike(tokenizer, theirs):
    """As a letter, mark, number, space or other; they may come with different versions of Unicode."""
    alike = [*range(0x3401, 0x9FFF), *range(0xAC01, 0xD7A3), *range(0xD800, 0xE000)]  # long runs of letters, and none
    characters = [chr(c) for c in sorted({*range(0x20010)} - {*alike})]
    for start in range(0, len(characters), 1 << 15):
        text = "".join(f"{c}a1{c}" for c in characters[start : start + (1 << 15)])
        assert theirs.encode(text).ids == tokenizer.encode(text)


@pytest.mark.parametrize("seed", range(12))
def test_both_libraries_merge_alike_over_a_tiny_alphabet(seed):
    """Few letters and much repetition give overlapping, tied and nested merges."""
    rng = random.Random(seed)
    letters = "ab" if seed % 3 else "aab"
    words = ["".join(rng.choices(letters, k=rng.randint(1, 32))) for _ in range(400)]
    words += [w * rng.randint(1, 6) for w in words[:100]]
    tiny = Tokenizer.train(texts=[" ".join(words)], vocab_size=257 + rng.randint(5, 400))
    other = tokenizers.Tokenizer.from_str(tiny.to_json())
    probes = ["".join(rng.choices(letters, k=rng.randint(1, 40))) for _ in range(1500)]
    probes += ["a" * n for n in range(40)] + ["".join(p) for n in range(9) for p in itertools.product("ab", repeat=n)]
    assert [e.ids for e in other.encode_batch(probes)] == [tiny.encode(p) for p in probes]
    parts = module._merges(tiny._ranks)
    assert len(parts) == tiny.vocab_size - 257, "a token that merging cannot reach"


@settings(MANY, max_examples=500)
@given(
    tokens=st.lists(st.text("ab", min_size=2, max_size=6), unique=True, max_size=12),
    texts=st.lists(st.text("ab", max_size=24), max_size=3),
)
def test_both_libraries_merge_alike_for_any_order_of_tokens(tokens, texts):
    """Vocabularies that no training would give, too: tokens longer than their parts come first, or have none."""
    check_any_order(tokens, texts, "[ab]{1,32}|[^ab]")


@pytest.mark.parametrize("seed", range(10))
def test_both_libraries_merge_alike_in_long_pieces(seed):
    """tiktoken changes its algorithm with the length of the piece."""
    rng = random.Random(seed)
    tokens = list({"".join(rng.choices("ab", k=rng.randint(2, 6))) for _ in range(40)})
    texts = ["".join(rng.choices("aab", k=n)) for n in (90, 110, 450, 550, 2000)] + ["a" * 999, "ab" * 500]
    check_any_order(tokens, texts, "[ab]+|[^ab]")


def check_any_order(tokens: list[str], texts: list[str], pattern: str) -> None:
    ranks = {bytes([b]): b for b in range(256)}
    ranks.update({token.encode(): 256 + i for i, token in enumerate(tokens)})
    ours = Tokenizer(pattern, ranks, {END_OF_TEXT: 256 + len(tokens)})
    file = ours.to_json()
    other = tokenizers.Tokenizer.from_str(file)
    for text in texts + tokens:
        assert other.encode(text).ids == ours.encode(text)


def test_merges_listed_by_another_hand(tokenizer):
    """Every pair that makes a token, grouped by token: some tools list them so. Ids stay the same."""
    alphabet = module._alphabet()
    words = ["".join(alphabet[b] for b in token) for token in sorted(tokenizer._ranks, key=tokenizer._ranks.get)]
    known = set(words)
    merges = [[w[:i], w[i:]] for w in words for i in range(1, len(w)) if w[:i] in known and w[i:] in known]
    assert len(merges) > len(json.loads(tokenizer.to_json())["model"]["merges"])
    text = changed(tokenizer, model__merges=merges)
    assert module._from_json(text.encode()) == tokenizer
    other = tokenizers.Tokenizer.from_str(text)
    for sample in tokenizer_table.texts()[1].values():
        assert other.encode(sample).ids == tokenizer.encode(sample)


# ---- the regex -------------------------------------------------------------------------------


def pieces(text: str) -> list[str]:
    """`text` as PATTERN cuts it, by the other library."""
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    return [piece for piece, _ in split.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("Don't stop", ["Don", "'t", " stop"]),
        ("def f(self):\n    return  x", ["def", " f", "(self", "):", "\n", "    ", "return", "  ", "x"]),
        ("a.b_c = 12345", ["a", ".b", "_c", " =", " ", "12", "34", "5"]),
        ("\tif x:\r\n\r\n\t\ty", ["\t", "if", " x", ":", "\r\n\r\n", "\t\t", "y"]),
        ("e\u0301te\u0301 हिन्दी", ["e\u0301te\u0301", " हिन्दी"]),
        ("👨‍👩‍👧 ❤️!", ["👨‍👩‍👧", " ❤️!"]),
        ("a" * 70, ["a" * 32, "a" * 32, "a" * 6]),
        (" " * 33 + "x", [" " * 32, " x"]),
        ("\0\0x", ["\0\0", "x"]),
    ],
)
def test_how_text_is_cut(text, cut):
    assert pieces(text) == cut


@MANY
@given(
    before=mixtures,
    after=mixtures,
    line_end=st.sampled_from(["\n", "\r\n", "\n\n"]),
    indent=st.sampled_from(["", "\t", "    "]),
)
def test_a_prompt_may_end_at_a_line_end(tokenizer, before, after, line_end, indent):
    """Cut before the line end, after it or after the indentation, a text gives the ids it gives inside the whole."""
    before, after = before.rstrip("\r\n") + "x", "x" + after
    whole = tokenizer.encode(before + line_end + indent + after)
    assert whole == tokenizer.encode(before) + tokenizer.encode(line_end + indent + after)
    assert whole == tokenizer.encode(before + line_end) + tokenizer.encode(indent + after)
    assert whole == tokenizer.encode(before + line_end + indent) + tokenizer.encode(after)


UNITS = {
    "one letter": "a",
    "spaces": " ",
    "no white space": "ab1!",
    "newlines": "\n",
    "CRLF": "\r\n",
    "CJK": "".join(chr(c) for c in range(0x4E00, 0x9FA0, 7)),
    "marks": "a" + "\u0301" * 99,
    "emoji": "👨‍👩‍👧",
}


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
def test_time_is_linear(tokenizer, unit):
    def seconds(megabytes: int) -> float:
        text = unit * (megabytes * 1_000_000 // len(unit.encode()))
        start = time.process_time()
        ids = tokenizer.encode_to_numpy(text)
        spent = time.process_time() - start
        if megabytes == 5:
            assert tokenizer.decode_bytes(ids) == text.encode()
        return spent

    one = min(seconds(1), seconds(1))
    # Five times the text; quadratic time would be 25. A hundredth of a second is what a clock is good for.
    assert seconds(5) < 12 * max(one, 0.01)


def test_training_time_is_linear():
    """Runs of one character do not make one enormous word."""

    def seconds(length: int) -> float:
        start = time.process_time()
        trained = Tokenizer.train(texts=["a" * length, " " * length, "中" * length], vocab_size=300)
        spent = time.process_time() - start
        assert trained.decode(trained.encode("a" * 1000)) == "a" * 1000
        return spent

    # Four times the text: nearer to four times the time than to sixteen times.
    assert seconds(1_000_000) < 8 * min(seconds(250_000), seconds(250_000))


def test_a_regex_that_gives_up_is_reported(tokenizer, capfd):
    """gpt2's does, at a very long run of blanks that does not end the text."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False}
    gpt2_like = module._from_json(changed(tokenizer, pre_tokenizer=byte_level).encode())
    assert gpt2_like.decode(gpt2_like.encode("it's  fine\n")) == "it's  fine\n"
    text = " " * 3_000_000 + "\u2028a"
    try:
        assert gpt2_like.decode(gpt2_like.encode(text)) == text
    except UserError as error:
        assert "gave up" in str(error)
    panic = type("PanicException", (BaseException,), {})

    def panics(text):
        raise panic("stack overflow")

    with pytest.raises(UserError, match="gave up on a text of 3 characters"):
        tokenizer._encode(panics, "abc")


# ---- training --------------------------------------------------------------------------------


def test_training_is_deterministic(tmp_path):
    """Whatever the order, the number of threads and the process's hash seed."""
    texts = tokenizer_table.texts()[0]
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.txt").write_text(text, encoding="utf-8")
    files = sorted(tmp_path.glob("*.txt"))
    expected = Tokenizer.train(files, 600).to_json()
    assert Tokenizer.train(reversed(files), 600).to_json() == expected
    assert Tokenizer.train(files[::-1], 600, max_bytes=4000) == Tokenizer.train(files, 600, max_bytes=4000)
    assert Tokenizer.train(texts=texts[::-1], vocab_size=600).to_json() == expected
    program = (
        "import sys; from fastgpt.tokenizer import Tokenizer; "
        "sys.stdout.buffer.write(Tokenizer.train(sys.argv[1:], 600).to_json().encode())"
    )
    for threads in ("1", "3"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        run = subprocess.run(
            [sys.executable, "-c", program, *files[::-1]], capture_output=True, env=environment, check=True
        )
        assert run.stdout.decode() == expected


def test_ids_and_size(tokenizer):
    assert tokenizer.vocab_size == tokenizer_table.VOCAB_SIZE
    assert sorted(tokenizer._ranks.values()) == list(range(tokenizer.vocab_size - 1))
    assert Tokenizer.train(texts=["ab"], vocab_size=8192).vocab_size == 257
    assert Tokenizer.train(texts=["ababab ababab"], vocab_size=257).encode("ab") == [97, 98]


@pytest.mark.parametrize("vocab_size", [256, 0, -5, 300.0, True, "300"])
def test_vocab_size_is_checked(vocab_size):
    with pytest.raises(UserError, match="at least 257"):
        Tokenizer.train(texts=["text"], vocab_size=vocab_size)


def test_a_sample_is_even_bounded_and_the_same_every_time():
    chunks = [f"{i:04d}" * 100 for i in range(1000)]
    cost = 464
    for limit in (cost, 10 * cost, 333 * cost, 10**9):
        sample = module._even_sample(iter(chunks), limit)
        stride = chunks.index(sample[1]) if len(sample) > 1 else 1024
        assert sample == module._even_sample(iter(chunks), limit) == chunks[::stride]
        assert len(sample) * cost <= limit
        assert stride == 1 or len(chunks[:: stride // 2]) * cost > limit
    assert module._even_sample(["long" * 1000], 10) == ["long" * 1000]


def test_training_memory_is_bounded_by_max_bytes():
    """An endless supply costs no more than the sample: what is seen is counted, not kept."""
    peaks = []
    for texts in (500, 2000):
        tracemalloc.start()
        trained = Tokenizer.train(texts=("word " * 2000 for _ in range(texts)), vocab_size=300, max_bytes=100_000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert trained.vocab_size > 257
    assert peaks[1] - peaks[0] < 100_000  # of 15 MB more to see; one sample may be fuller than the other


def test_invalid_utf8_names_the_offset(tmp_path):
    path = tmp_path / "bad.txt"
    for offset, bad in [
        (0, b"\xff"),
        (1, b"\x80"),
        (65_535, b"\xc3\x28"),
        (65_536, b"\xed\xa0\x80"),
        (200_001, b"\xf0\x9f"),
    ]:
        path.write_bytes(b"a" * offset + bad)
        with pytest.raises(UserError, match=rf"bad\.txt is not UTF-8: .* at byte {offset};"):
            Tokenizer.train(path, 300)
        assert Tokenizer.train([path], 300, errors="replace").vocab_size >= 257
    text = "a中🙂" * 30_000  # with characters across the ends of blocks
    path.write_text(text, encoding="utf-8")
    assert "".join(module._read_chunks(path, "strict")) == text


def test_training_refuses(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.txt: No such file"):
        Tokenizer.train(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match="directory"):
        Tokenizer.train(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="no text"):
        Tokenizer.train([tmp_path / "empty.txt"])
    for arguments in ({}, {"files": ["a"], "texts": ["a"]}):
        with pytest.raises(UserError, match="one of the two"):
            Tokenizer.train(**arguments)
    with pytest.raises(UserError, match="an iterable of texts"):
        Tokenizer.train(texts="a text")
    with pytest.raises(UserError, match="lone surrogate"):
        Tokenizer.train(texts=["fine", "\udcff"])
    with pytest.raises(UserError, match="'strict' or 'replace'"):
        Tokenizer.train(texts=["a"], errors="ignore")
    with pytest.raises(UserError, match="max_bytes"):
        Tokenizer.train(texts=["a"], max_bytes=0)


# ---- what is refused in encoding and decoding ------------------------------------------------


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "中\ud83d"])
def test_lone_surrogates_are_refused(tokenizer, text):
    for encode in (
        tokenizer.encode,
        lambda t: tokenizer.encode(t, allow_special=True),
        tokenizer.encode_to_numpy,
        lambda t: tokenizer.encode_batch([t, "fine"]),
    ):
        with pytest.raises(UserError, match=r"lone surrogate U\+D[0-9A-F]{3} at character"):
            encode(text)


def test_only_text_is_encoded(tokenizer):
    with pytest.raises(UserError, match="got bytes"):
        tokenizer.encode(b"bytes")


@pytest.mark.parametrize("bad", [-1, 1280, 2**40, 1.0, "5", None])
def test_bad_ids_are_refused(tokenizer, bad):
    with pytest.raises(UserError, match="is not a token id"):
        tokenizer.decode([65, bad])


def test_arrays_of_bad_ids_are_refused(tokenizer):
    for bad in (np.array([[65]]), np.array(65), np.array([65.0])):
        with pytest.raises(UserError, match="is not a token id"):
            tokenizer.decode(bad)


# ---- files -----------------------------------------------------------------------------------


def test_save_and_load(tokenizer, tmp_path):
    file = tokenizer.save(tmp_path)
    assert file == tmp_path / "tokenizer.json"
    (tmp_path / "plain").touch()
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode, "others may read it as any file"
    (tmp_path / "plain").unlink()
    for source in (file, str(file), tmp_path):
        loaded = Tokenizer.load(source)
        assert loaded == tokenizer
        assert (loaded.sha256, loaded.name, loaded.eot_id) == (tokenizer.sha256, tokenizer.name, tokenizer.eot_id)
        assert loaded.to_json() == tokenizer.to_json() == file.read_text(encoding="utf-8")
    other = tokenizers.Tokenizer.from_file(str(file))
    assert other.token_to_id(END_OF_TEXT) == tokenizer.eot_id
    assert other.get_vocab_size() == tokenizer.vocab_size
    assert other.decode(tokenizer.encode("déjà vu\r\n")) == "déjà vu\r\n"
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_the_hash_is_of_the_content(tokenizer, tmp_path):
    compact = tmp_path / "compact.json"
    compact.write_text(json.dumps(json.loads(tokenizer.to_json())))
    assert Tokenizer.load(compact).sha256 == tokenizer.sha256
    assert Tokenizer.train(texts=["other text, other tokens"], vocab_size=260).sha256 != tokenizer.sha256
    renamed = Tokenizer(PATTERN, tokenizer._ranks, {END_OF_TEXT: tokenizer.eot_id + 1})
    assert renamed.sha256 != tokenizer.sha256 and renamed != tokenizer


def test_a_failed_save_leaves_the_old_file(tokenizer, tmp_path, monkeypatch):
    file = tmp_path / "tokenizer.json"
    file.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left.*[0-9,]+ bytes are needed"):
        tokenizer.save(file)
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    with pytest.raises(UserError, match="No such file"):
        tokenizer.save(tmp_path / "missing" / "tokenizer.json")


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


def test_files_that_are_no_tokenizer_are_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = tokenizer.to_json()
    model = json.loads(good)["model"]
    vocab = model["vocab"]
    merges = model["merges"]
    no_end = {k: v for k, v in vocab.items() if k != END_OF_TEXT}
    split = {"type": "Split", "pattern": {"Regex": "a|b"}, "behavior": "Removed", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = {"id": tokenizer.eot_id, "content": END_OF_TEXT, "special": True, **flags}

    def sequence(*parts):
        return {"type": "Sequence", "pretokenizers": list(parts)}

    def regex(pattern):
        return sequence({**split, "behavior": "Isolated", "pattern": {"Regex": pattern}}, byte_level)

    cases = {
        "is not JSON": [
            pickle.dumps(Payload()),
            b"",
            b"\x80\x04",
            good[: len(good) // 2].encode(),
            b"[" * 100_000,
            b"\xff",
        ],
        "layout of a byte-level BPE": [
            b"{}",
            b"[]",
            b"7",
            b'"text"',
            b"null",
            changed(tokenizer, model__vocab=[]),
            changed(tokenizer, model__merges=None),
            changed(tokenizer, pre_tokenizer=None),
            changed(tokenizer, added_tokens=[{}]),
            changed(tokenizer, model__vocab={**vocab, "a b": 9999}),
        ],
        "expected byte-level BPE": [changed(tokenizer, model__type="WordPiece")],
        "expected ByteLevel": [changed(tokenizer, decoder__type="Metaspace")],
        "sets byte_fallback": [changed(tokenizer, model__byte_fallback=True)],
        "sets dropout": [changed(tokenizer, model__dropout=0.1)],
        "has a normalizer": [changed(tokenizer, normalizer={"type": "NFC"})],
        "sets lstrip": [changed(tokenizer, added_tokens=[{**added, "lstrip": True}])],
        "is not special": [changed(tokenizer, added_tokens=[{**added, "special": False}])],
        "no end-of-text token": [changed(tokenizer, model__vocab=no_end, added_tokens=[{**added, "content": "<eos>"}])],
        "cannot be reached": [changed(tokenizer, added_tokens=[{**added, "content": "<eos>", "id": 5000}])],
        "two ids": [changed(tokenizer, added_tokens=[{**added, "id": 5000}])],
        "whole numbers from 0": [
            changed(tokenizer, model__vocab={**vocab, "a": 98}),
            changed(tokenizer, model__vocab={**vocab, "a": -1}),
            changed(tokenizer, model__vocab={**vocab, "a": 2**40}),
            changed(tokenizer, model__vocab={**vocab, "a": "97"}),
        ],
        "lacks a token for 1 of the 256": [
            changed(tokenizer, model__vocab={k: v for k, v in vocab.items() if k != "a"})
        ],
        "not in the order of its ids": [changed(tokenizer, model__merges=[merges[1], merges[0], *merges[2:]])],
        "no token": [changed(tokenizer, model__merges=[*merges, "Z Z"])],
        "not a pair": [changed(tokenizer, model__merges=[*merges, "Z"]), changed(tokenizer, model__merges=[["Z"] * 3])],
        "not those that tiktoken would make": [changed(tokenizer, model__merges=merges[:-1])],
        "puts a space": [changed(tokenizer, pre_tokenizer={**byte_level, "add_prefix_space": True})],
        "not ByteLevel": [changed(tokenizer, pre_tokenizer={"type": "Whitespace"})],
        "cuts text twice": [changed(tokenizer, pre_tokenizer=sequence(split, {**byte_level, "use_regex": True}))],
        "single Split": [
            changed(tokenizer, pre_tokenizer=sequence(split, byte_level)),
            changed(tokenizer, pre_tokenizer=byte_level),
        ],
        "reads its regex otherwise": [
            changed(tokenizer, pre_tokenizer=regex(r"\p{L}{1,3}+|\P{L}")),  # possessive for one, nested for the other
            changed(tokenizer, pre_tokenizer=regex(r"\p{L}+")),  # one drops what is not matched
        ],
        "cannot be used by both": [changed(tokenizer, pre_tokenizer=regex("(unclosed"))],
    }
    for message, contents in cases.items():
        for content in contents:
            file = tmp_path / "tokenizer.json"
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
            with pytest.raises(UserError, match="cannot be used as a tokenizer.*" + message) as caught:
                Tokenizer.load(file)
            assert "\n" not in str(caught.value)
    assert not (tmp_path / "payload-ran").exists()


def test_any_damage_is_refused_or_harmless(tokenizer, tmp_path):
    """Bytes flipped or cut anywhere: a UserError, or a tokenizer that still brings every text back."""
    good = tokenizer.to_json().encode()
    rng = random.Random(0)
    for _ in range(60):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        try:
            damaged = module._from_json(bytes(data))
        except UserError:
            continue
        assert damaged.decode(damaged.encode("any text\n中")) == "any text\n中"


def test_a_foreign_layout_that_converts(tokenizer, tmp_path):
    """GPT-2's published layout: ByteLevel cuts by itself, merges are strings, the model has no type."""
    document = json.loads(tokenizer.to_json())
    document["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    document["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    del document["model"]["type"]
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(document))
    loaded = Tokenizer.load(tmp_path)
    document["model"]["type"] = "BPE"
    other = tokenizers.Tokenizer.from_str(json.dumps(document))
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choices(PIECES, k=30)).replace(END_OF_TEXT, "")
        assert other.encode(text).ids == loaded.encode(text)


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the tokenizer .*absent.json: No such file.*or by name: gpt2"):
        Tokenizer.load(tmp_path / "absent.json")
    with pytest.raises(UserError, match="did you mean 'gpt2'"):
        Tokenizer.load("gtp2")
    with pytest.raises(UserError, match=r"tokenizer\.json: No such file"):
        Tokenizer.load(tmp_path)


# ---- by name ---------------------------------------------------------------------------------


def test_a_name_without_its_files_fails_at_once(monkeypatch):
    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match=r"'gpt2' could not be had \(ConnectionError\).*TIKTOKEN_CACHE_DIR"):
        Tokenizer.load("gpt2")
    forever = threading.Event()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: forever.wait())
    monkeypatch.setattr(module, "_FETCH_SECONDS", 0.05)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"no answer within 0\.05 s.*TIKTOKEN_CACHE_DIR"):
        Tokenizer.load("o200k_base")
    assert time.monotonic() - start < 0.9
    forever.set()


def test_a_name_with_its_files(monkeypatch, tmp_path, tokenizer):
    """tiktoken's cl100k_base regex and gaps between its special ids, over a small vocabulary."""
    from tiktoken_ext import openai_public

    ranks = tokenizer._ranks
    ids = {"<|endoftext|>": len(ranks) + 1, "<|fim_prefix|>": len(ranks) + 2, "<|endofprompt|>": len(ranks) + 20}
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: ranks)
    original = openai_public.cl100k_base()
    encoding = tiktoken.Encoding(**{**original, "special_tokens": ids})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    loaded = Tokenizer.load("cl100k_base")
    assert (loaded.name, loaded.eot_id, loaded.vocab_size) == ("cl100k_base", len(ranks) + 1, len(ranks) + 21)
    saved = Tokenizer.load(loaded.save(tmp_path))
    assert saved.sha256 == loaded.sha256
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rng = random.Random(2)
    for _ in range(300):
        text = "".join(rng.choices(PIECES, k=30)).replace(END_OF_TEXT, "")
        assert encoding.encode_ordinary(text) == loaded.encode(text) == saved.encode(text) == other.encode(text).ids
    with pytest.raises(UserError, match="is not a token id"):
        loaded.decode([len(ranks)])


# ---- processes, imports ----------------------------------------------------------------------


def encode_in_worker(arguments):
    tokenizer, text = arguments
    return tokenizer.encode(text), tokenizer.sha256


def test_it_goes_to_worker_processes(tokenizer):
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.map(encode_in_worker, [(tokenizer, "to a worker\n")]) == [
            (tokenizer.encode("to a worker\n"), tokenizer.sha256)
        ]


def test_import_is_light():
    heavy = "{'torch', 'tokenizers', 'tiktoken', 'numpy', 'pickle'}"
    program = f"import sys, fastgpt.tokenizer; print({heavy} & {{*sys.modules}})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


# ---- bytes per token -------------------------------------------------------------------------


def test_bytes_per_token(tokenizer):
    """Above 1 everywhere: a script that is in the training text is never left to single bytes."""
    for name, value in tokenizer_table.bytes_per_token(tokenizer, tokenizer_table.texts()[1]).items():
        assert 1.4 < value < 8, (name, value)


def test_the_page_shows_what_is_measured_and_used(tokenizer):
    page = tokenizer_table.PAGE.read_text(encoding="utf-8")
    assert page.split(tokenizer_table.BEGIN)[1].split(tokenizer_table.END)[0] == tokenizer_table.table(tokenizer)
    assert "|".join(page.split("```regex\n")[1].split("```")[0].splitlines()) == PATTERN

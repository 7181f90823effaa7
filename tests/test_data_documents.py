"""What counts as a document in each kind of file, where reading can go on, and what is refused."""

from __future__ import annotations

import gzip
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data import documents
from fastgpt.data.digests import DigestSet
from fastgpt.data.documents import InputError, Position, cut, find_files, plain_path, read_pieces
from fastgpt.data.encode import Encoder, Texts

from .data_cases import small_tokenizer, text


def pieces(path, start=None, field="text"):
    files, _ = find_files([str(path)])
    return list(read_pieces(files, start or Position(), field))


def texts(path, errors="strict", field="text"):
    """The documents; the parts of a long one put together."""
    found = []
    for piece in pieces(path, field=field):
        for content, _ in Texts(piece, field, errors):
            if piece.kind == "part" and not piece.first:
                found[-1] += content
            else:
                found.append(content)
    return found


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = data.encode() if isinstance(data, str) else data
    if path.suffix == ".gz":
        data = gzip.compress(data, 1)
    elif path.suffix == ".zst":
        data = pytest.importorskip("zstandard").ZstdCompressor(level=1).compress(data)
    path.write_bytes(data)
    return path


def lines(*contents):
    return "".join(json.dumps({"id": i, "text": content}) + "\n" for i, content in enumerate(contents))


@pytest.fixture
def small_limits(monkeypatch):
    """Pieces, parts and long documents of some hundred bytes."""
    for name, size in dict(
        PIECE_BYTES=300, PART_BYTES=200, SEARCH_BYTES=50, LONG_DOCUMENT=400, LARGEST_DOCUMENT=5000, _BLOCK=150
    ).items():
        monkeypatch.setattr(documents, name, size)


# ---- documents -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one", ["one"]),
        ("one\n", ["one\n"]),
        ("one<|endoftext|>two", ["one", "two"]),
        ("one\n<|endoftext|>\ntwo\n", ["one", "two\n"]),
        ("one\r\n<|endoftext|>\r\ntwo", ["one", "two"]),
        ("one\n\n<|endoftext|>\n\ntwo", ["one\n", "\ntwo"]),
        ("<|endoftext|>one<|endoftext|>", ["one"]),
        ("one<|endoftext|><|endoftext|>\n<|endoftext|>two", ["one", "two"]),
        ("one <|endoftext> two", ["one <|endoftext> two"]),
        ("\ufeffone<|endoftext|>\ufefftwo", ["one", "\ufefftwo"]),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_marks_delimit_the_documents_of_txt(tmp_path, name, content, expected):
    assert texts(write(tmp_path / name, content)) == expected


def test_marks_are_found_wherever_the_blocks_end(tmp_path, small_limits):
    for shift in range(160):
        contents = ["x" * (130 + shift), "y" * (200 + shift), "z" * (420 + shift), "w"]
        path = write(tmp_path / "a.txt", "\r\n<|endoftext|>\n".join(contents))
        assert texts(path) == contents


def test_source_code_is_one_document(tmp_path):
    content = "a = '<|endoftext|>'\n"
    assert texts(write(tmp_path / "a.py", content)) == [content]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_lines_of_jsonl(tmp_path, name):
    contents = ["one", "two\u2028three\n", "<|endoftext|>", "", "日本 \U0001f98a"]
    assert texts(write(tmp_path / name, lines(*contents))) == contents
    assert texts(write(tmp_path / name, "\ufeff" + lines(*contents).replace("\n", "\r\n\n")[:-3])) == contents
    assert texts(write(tmp_path / name, '{"body": "one"}'), field="body") == ["one"]


def test_rows_of_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    contents = [text(i, 20) for i in range(700)]
    table = pyarrow.table({"n": list(range(700)), "text": contents, "body": [c.encode() for c in contents]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=150)
    assert texts(tmp_path / "a.parquet") == contents
    assert texts(tmp_path / "a.parquet", field="body") == contents
    with pytest.raises(InputError, match="has no column 'prose'; it has n, text, body; choose one with --text_field"):
        texts(tmp_path / "a.parquet", field="prose")
    with pytest.raises(InputError, match="'n' holds int64; expected text"):
        texts(tmp_path / "a.parquet", field="n")
    write(tmp_path / "b.parquet", b"no parquet")
    with pytest.raises(InputError, match=r"cannot read .*b\.parquet as \.parquet"):
        texts(tmp_path / "b.parquet")


def test_what_optional_packages_are_needed_for_is_said(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", b"PAR1")
    write(tmp_path / "a.txt.zst", "one")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    for name, package in (("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")):
        with pytest.raises(InputError, match=f"{name} needs {package}: pip install {package}"):
            texts(tmp_path / name)


# ---- folders ---------------------------------------------------------------------------------


def test_folders_are_read_in_the_order_of_their_paths(tmp_path):
    for name in ("b/z.txt", "a.txt", "b/a.py", "B.txt", "b.jsonl", "é.md"):
        write(tmp_path / name, lines(name) if name.endswith("jsonl") else name)
    for name in (".git/a.txt", "b/.hidden.txt", "a.png", "empty.txt"):
        write(tmp_path / name, "" if name == "empty.txt" else "no text")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert texts(tmp_path) == ["B.txt", "a.txt", "b.jsonl", "b/a.py", "b/z.txt", "é.md"]


def test_files_of_other_kinds_in_a_folder_are_named(tmp_path):
    for name in ("LICENSE", "a.txt", "b/c.png", ".hidden", ".git/config", "z.gz"):
        write(tmp_path / name, "text")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    files, skipped = find_files([str(tmp_path)])
    assert [file.name for file in files] == [f"{tmp_path}/a.txt"]
    assert skipped == [f"{tmp_path}/{name}" for name in ("LICENSE", "b/c.png", "z.gz")]


@pytest.mark.parametrize("spelling", ["texts/", "./texts", "texts/.", ".//texts//"])
def test_a_path_has_one_spelling(spelling):
    assert plain_path(spelling) == "texts"
    assert plain_path("link/../texts") == "link/../texts"
    assert plain_path("") == ""


def test_a_file_named_itself_is_read_whatever_its_ending(tmp_path):
    assert texts(write(tmp_path / "LICENSE", "text<|endoftext|>")) == ["text<|endoftext|>"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", r"cannot read the input .*missing\.txt: No such file"),
        ("empty.txt", r"the input .*empty\.txt is empty"),
        ("pictures", "the folder .*pictures holds no text"),
        ("pipe", "neither a file nor a folder"),
        ("a.txt/b.txt", "Not a directory"),
    ],
)
def test_inputs_that_are_none(tmp_path, name, message):
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "pictures/a.png", "one")
    __import__("os").mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=message):
        find_files([str(tmp_path / name)])


# ---- going on --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.py", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_reading_goes_on_anywhere(tmp_path, small_limits, name):
    contents = [text(seed, 3 + 7 * seed % 40) for seed in range(30)]
    if not name.endswith(("gz", "zst", "parquet", "jsonl")):
        contents[7], contents[20] = text(99, 300), text(98, 200)  # long ones
    if name == "a.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.table({"text": contents}), tmp_path / name, row_group_size=7)
    elif "jsonl" in name:
        write(tmp_path / name, lines(*contents))
    else:
        write(tmp_path / name, "<|endoftext|>".join(contents))
    write(tmp_path / "b.txt", "the last")

    def flat(found):
        return [(p.kind == "part", p.first, p.last, c) for p in found for c, _ in Texts(p, "text", "strict")]

    whole = pieces(tmp_path)
    assert len(whole) > 5
    assert {p.consumed for p in whole} != {whole[-1].consumed}
    for number, piece in enumerate(whole):
        assert flat(pieces(tmp_path, piece.position)) == flat(whole[number + 1 :])


# ---- long documents --------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_the_parts_of_a_long_document_give_its_ids(data):
    seed, words = data.draw(st.integers(0, 10**6)), data.draw(st.integers(1, 200))
    content = text(seed, words)
    tokenizer = small_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PART_BYTES", data.draw(st.integers(1, 100)))
        patch.setattr(documents, "SEARCH_BYTES", 150)
        parts = list(cut(content.encode()))
    assert b"".join(parts) == content.encode()
    ids = np.concatenate([tokenizer.encode_to_numpy(part.decode()) for part in parts])
    np.testing.assert_array_equal(ids, tokenizer.encode_to_numpy(content))


@pytest.mark.parametrize("content", ["x" * 700, "日" * 300, "\U0001f98a" * 200, " " * 600, "\n" * 600, "a\xa0" * 300])
def test_text_without_a_place_to_cut_is_cut_between_characters(content, small_limits):
    parts = list(cut(content.encode()))
    assert len(parts) > 1
    assert "".join(part.decode() for part in parts) == content


def test_long_documents_are_known_by_their_whole_content(tmp_path, small_limits):
    content = text(1, 300)
    write(tmp_path / "a.txt", f"one\n<|endoftext|>{content}\n<|endoftext|>{content}<|endoftext|>\ntwo")
    found = pieces(tmp_path)
    digests = [piece.digest for piece in found if piece.kind == "part" and piece.first]
    assert len(digests) == 2 and len(set(digests)) == 1 and digests[0]
    assert digests[0] == documents.digest_of(content.encode())
    assert texts(tmp_path) == ["one", content, content, "two"]


def test_a_document_is_never_held_whole(tmp_path):
    size = 48 << 20
    with open(tmp_path / "a.txt", "wb") as file:
        for _ in range(size >> 20):
            file.write(b"word " * (1 << 20) + b"\n" if _ % 7 == 3 else b"x" * (1 << 20))
    tracemalloc.start()
    total = sum(piece.size for piece in read_pieces(find_files([str(tmp_path)])[0], Position(), "text"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == (tmp_path / "a.txt").stat().st_size
    assert peak < 12 << 20


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.jsonl.zst", "a.txt.zst", "a.jsonl"])
def test_a_bomb_is_refused_in_bounded_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(documents, "LARGEST_DOCUMENT", 4 << 20)
    write(tmp_path / name, bytes(100 << 20))
    tracemalloc.start()
    with pytest.raises(InputError, match="longer than 4 MiB"):
        texts(tmp_path / name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


# ---- refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\xfftwo", "0xff at byte 3"),
        ("a.txt", b"one<|endoftext|>\ntwo\xe2\x82", "0xe2 at byte 20"),
        ("a.txt.gz", b"one\xc0", "0xc0 at byte 3"),
        ("a.py", b"\xff\xfeo\x00", "0xff at byte 0"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "0xff at byte 24"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "0xff at byte 24"),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud800"}', "line 2: a lone surrogate"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": ', "line 3: not JSON"),
        ("a.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", '{"txt": "a"}', r"line 1: no text in the field 'text' \(found txt\)"),
        ("a.jsonl", '{"text": 3}', "line 1: no text in the field 'text'"),
        ("a.jsonl", '"text"', "found a str"),
    ],
)
def test_bad_text_is_refused_with_its_place(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message) as caught:
        texts(write(tmp_path / name, content))
    assert name in str(caught.value)


def test_a_long_document_is_refused_with_its_place(tmp_path, small_limits):
    with pytest.raises(InputError, match="0xff at byte 900"):
        texts(write(tmp_path / "a.txt", b"x" * 900 + b"\xff" + b"x" * 900))


@pytest.mark.parametrize(
    ("name", "content", "expected", "count"),
    [
        ("a.txt", b"one\xff\xfetwo \xef\xbf\xbd \xe2\x82", "one\ufffd\ufffdtwo \ufffd \ufffd", 3),
        ("a.jsonl", b'{"text": "a\xff\\udfff\\ud83e\\udd8a"}', "a\ufffd\ufffd\U0001f98a", 2),
    ],
)
def test_invalid_utf8_is_replaced_and_counted(tmp_path, name, content, expected, count):
    write(tmp_path / name, content)
    decoded = Texts(pieces(tmp_path)[0], "text", "replace")
    assert [(c, data) for c, data in decoded] == [(expected, expected.encode())]
    assert sum(decoded.replaced.values()) == count


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_damaged_compression_is_refused(tmp_path, ending):
    path = write(tmp_path / f"a.txt.{ending}", text(1, 5000))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="truncated"):
        texts(path)
    path.write_bytes(whole[:100] + bytes(100) + whole[200:])
    with pytest.raises(InputError, match="damaged"):
        texts(path)
    path.write_bytes(b"plain text")
    with pytest.raises(InputError, match=f"no .{ending} file"):
        texts(path)
    path.write_bytes(whole + whole)  # what `cat` makes of two of them
    assert texts(path) == [text(1, 5000) * 2]


# ---- pieces to ids ---------------------------------------------------------------------------


def test_every_document_ends_with_end_of_text(tmp_path, small_limits):
    contents = ["one fox", "<|endoftext|>", text(3, 200), "", "two"]
    write(tmp_path / "a.jsonl", lines(*contents))
    tokenizer = small_tokenizer()
    encoder = Encoder(tokenizer, "text", "strict")
    results = [encoder.encode(piece) for piece in pieces(tmp_path)]
    ids = np.frombuffer(b"".join(result.ids for result in results), np.uint32)
    assert sum(result.empty for result in results) == 1
    assert [tokens for result in results for tokens in result.tokens] == [
        len(tokenizer.encode(c)) + 1 for c in contents if c
    ]
    ends = np.flatnonzero(ids == tokenizer.eot_id)
    assert len(ends) == 4
    assert [tokenizer.decode(part) for part in np.split(ids, ends + 1)[:-1]] == [
        f"{content}<|endoftext|>" for content in contents if content
    ]


def test_the_digest_set_is_a_set():
    draw = np.random.default_rng(0)
    pool = [draw.bytes(16) for _ in range(3000)] + [bytes(16), bytes(8) + b"\1" * 8, b"\0" * 7 + b"\1" * 9]
    found, expected = DigestSet(), set()
    for digest in (pool[i] for i in draw.integers(0, len(pool), 9000)):
        assert found.add(digest) == (digest not in expected)
        expected.add(digest)
    assert len(found) == len(expected)

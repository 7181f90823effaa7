"""Files and folders to documents, in pieces of about a megabyte, read in bounded memory.

| file                             | its documents                                                          |
|----------------------------------|------------------------------------------------------------------------|
| .txt                             | the text between `<|endoftext|>` marks; the whole file where it has none |
| source code, .md, ...            | the whole file; marks inside it are text                               |
| .jsonl                           | one a line: the string in the text field                               |
| .parquet                         | one a row: the text column                                             |

.txt and .jsonl may be compressed (.gz, .zst). A line break next to a mark belongs to the mark. Empty documents
are left out. In folders, files with another ending are skipped and told of, hidden ones passed over; a file that is
named itself is read whatever its ending.

The order is that of the inputs, each folder's files sorted by path. A `Position` says how far reading has come,
and reading that starts there yields what it would have yielded.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from ..errors import UserError

MARK = b"<|endoftext|>"
PIECE_BYTES = 1 << 20  # text that is handed to a worker at once
PIECE_DOCUMENTS = 4096  # ... and the most documents in it
PART_BYTES = 1 << 20  # a longer document is encoded in parts of about this size
SEARCH_BYTES = 1 << 16  # how far beyond that a place to cut is looked for
LONG_DOCUMENT = 2 << 20  # a document of a plain file longer than this is never held whole
LARGEST_DOCUMENT = 32 << 20  # the longest line of .jsonl, and the longest document of a compressed file
DIGEST_BYTES = 16

_BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_MIB = 1 << 20

TEXT_ENDINGS = (
    *(".c", ".cc", ".cpp", ".cs", ".css", ".cu", ".cuh", ".cxx", ".go", ".h", ".hh", ".hpp", ".html", ".java", ".js"),
    *(".jsx", ".kt", ".lua", ".m", ".md", ".php", ".pl", ".ptx", ".py", ".pyi", ".pyx", ".r", ".rb", ".rs", ".rst"),
    *(".scala", ".sh", ".sql", ".swift", ".tex", ".toml", ".ts", ".tsx", ".xml", ".yaml", ".yml", ".cfg", ".ini"),
)


class InputError(UserError):
    """An input cannot be used: nothing made from it is worth keeping."""


@dataclass(frozen=True)
class InputFile:
    """One file to read."""

    path: str
    name: str
    """As messages call it: the input as given, and the path inside it."""
    kind: str
    """txt, source, jsonl or parquet."""
    compression: str
    """Empty, gz or zst."""
    size: int
    mtime_ns: int
    split: str
    """train or val where the input decides it, empty where the document's hash does."""


@dataclass
class Position:
    """How far the files have been read; everything before it is in earlier pieces."""

    file: int = 0
    offset: int = 0
    """Bytes of the (decompressed) file, or rows of a .parquet file."""
    line: int = 0
    """Lines of a .jsonl file, or parts of a long document, read so far. A piece of lines does not know it: who encodes
    it counts them."""
    end: int = 0
    """Inside a long document: the offset of its end; else 0."""
    after: int = 0
    """Inside a long document: the offset of what follows it."""


@dataclass
class Piece:
    """What one worker turns into ids at a time."""

    kind: str
    """documents: whole ones; jsonl: whole lines; part: a part of one long document."""
    data: list[bytes]
    """The documents; or the lines, or the part, as its only item. Nothing where `path` says what to read."""
    where: list[tuple[str, int]]
    """For each item the file's name and where in it the item begins: byte, or row."""
    position: Position
    """Where to go on after it."""
    consumed: int
    """Bytes of all the inputs, as they lie on the disk, read so far."""
    split: str = ""
    """As InputFile.split."""
    line: int = 0
    """jsonl: lines before it, where that is known."""
    path: str = ""
    """jsonl: the plain file in which `size` bytes are to be read."""
    unit: str = "byte"
    """What `where` counts."""
    digest: bytes = b""
    """part: the whole document's."""
    first: bool = True
    """part: it begins the document."""
    last: bool = True
    """part: it ends the document."""
    size: int = 0
    """Bytes of its text."""

    def __post_init__(self) -> None:
        self.size = self.size or sum(map(len, self.data))

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """jsonl: where each line begins in the file, and the line; the last is empty where a line break ends the piece.

        Raises InputError at a line that is too long, and for a file that cannot be read.
        """
        name, offset = self.where[0]
        text = self._read() if self.path else self.data[0]
        begin = number = 0
        while begin <= len(text):
            number += 1
            end = text.find(b"\n", begin)
            end = end if end >= 0 else len(text)
            if end - begin > LARGEST_DOCUMENT:
                raise InputError(
                    f"{name}: line {self.line + number} is longer than {LARGEST_DOCUMENT // _MIB} MiB, the most for a "
                    f"document in .jsonl; put it into a .txt file of its own"
                )
            yield offset + begin, text[begin:end]
            begin = end + 1

    def _read(self) -> bytes:
        name, offset = self.where[0]
        try:
            with open(self.path, "rb") as file:
                file.seek(offset)
                data = file.read(self.size)
        except OSError as error:
            raise InputError(f"cannot read {name}: {error.strerror or error}") from None
        if len(data) < self.size:
            raise InputError(f"{name} became shorter while it was read")
        return data


def digest_of(text: bytes) -> bytes:
    """Identifies a document; equal for equal UTF-8 bytes only."""
    return hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest()


# ---- which files -----------------------------------------------------------------------------


def _classify(name: str) -> tuple[str, str] | None:
    """(kind, compression) by the file's ending, None for one that is not read from folders."""
    stem, compression = name.lower(), ""
    for ending in (".gz", ".zst"):
        if stem.endswith(ending):
            stem, compression = stem[: -len(ending)], ending[1:]
    ending = os.path.splitext(stem)[1]
    if ending == ".txt":
        return "txt", compression
    if ending == ".jsonl":
        return "jsonl", compression
    if ending == ".parquet" and not compression:
        return "parquet", ""
    if ending in TEXT_ENDINGS and not compression:
        return "source", ""
    return None


def plain_path(path: str) -> str:
    """One spelling for `texts`, `./texts` and `texts/`. (`..` stays: behind a link it is another folder.)"""
    return str(Path(path)) if path else path


def find_files(inputs: Sequence[str], split: str = "") -> tuple[list[InputFile], list[str]]:
    """The files of inputs and of the folders among them, in reading order, and the names of the files in those
    folders that are skipped as not of a kind that is read.

    Raises InputError naming the path for an input that is missing, empty, not a file, or not readable, and for a
    folder without a text file.
    """
    files: list[InputFile] = []
    skipped: list[str] = []
    for given in inputs:
        try:
            mode = os.stat(given).st_mode
        except OSError as error:
            raise InputError(f"cannot read the input {given}: {error.strerror}; expected a file or a folder") from None
        if stat.S_ISREG(mode):
            kind = _classify(given) or ("source", "")
            file = _input_file(given, given, kind, split)
            if file.size == 0:
                raise InputError(f"the input {given} is empty; expected a file with text")
            files.append(file)
        elif stat.S_ISDIR(mode):
            found = []
            for path, name, kind in _walk(given):
                if kind is None:
                    skipped.append(name)
                else:
                    found.append(_input_file(path, name, kind, split))
            if not any(file.size for file in found):
                raise InputError(
                    f"the folder {given} holds no text; expected .txt, .jsonl(.gz|.zst), .parquet or source code; "
                    f"a file with another ending is read when it is named itself"
                )
            files += found
        else:
            raise InputError(f"the input {given} is neither a file nor a folder")
    return files, skipped


def _walk(root: str) -> Iterator[tuple[str, str, tuple[str, str] | None]]:
    """The files below a folder, hidden ones left out, by path: (path, name for messages, what _classify says)."""

    def refuse(error: OSError) -> None:
        raise InputError(f"cannot list the folder {error.filename}: {error.strerror}") from None

    found = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = "" if folder == root else os.path.relpath(folder, root) + os.sep
        for name in names:
            path = os.path.join(folder, name)
            if not name.startswith(".") and os.path.isfile(path):
                found.append((os.fsencode(inside + name), path, _classify(name)))
    for relative, path, kind in sorted(found, key=itemgetter(0)):
        yield path, os.path.join(root, relative.decode("utf-8", "replace")), kind


def _input_file(path: str, name: str, kind: tuple[str, str], split: str) -> InputFile:
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(f"cannot read the input {name}: {error.strerror}") from None
    return InputFile(path, name, *kind, status.st_size, status.st_mtime_ns, split)


# ---- reading ---------------------------------------------------------------------------------


def read_pieces(files: Sequence[InputFile], start: Position, text_field: str) -> Iterator[Piece]:
    """Everything from `start` on, in order. Raises InputError at the first file that cannot be read."""
    group: list[Document] = []
    size = 0
    before = sum(file.size for file in files[: start.file])
    consumed = before

    def grouped() -> Piece:
        nonlocal group, size
        piece = Piece(
            "documents",
            [document.data for document in group],
            [(document.name, document.offset) for document in group],
            group[-1].position,
            consumed,
            split=group[-1].split,
            unit=group[-1].unit,
        )
        group, size = [], 0
        return piece

    for number in range(start.file, len(files)):
        file = files[number]
        at = start if number == start.file else Position(number)
        with _open(file) as stream:
            for item in _READERS[file.kind](file, number, stream, at, text_field):
                apart = (
                    group and isinstance(item, Document) and (group[0].split, group[0].unit) != (item.split, item.unit)
                )
                if group and (apart or isinstance(item, Piece)):
                    yield grouped()
                consumed = before + min(stream.consumed(), file.size)
                if isinstance(item, Piece):
                    item.consumed = consumed
                    yield item
                    continue
                group.append(item)
                size += len(item.data)
                if size >= PIECE_BYTES or len(group) >= PIECE_DOCUMENTS:
                    yield grouped()
        before += file.size
        consumed = before
    if group:
        yield grouped()


@dataclass
class Document:
    """A whole document, before it is put into a piece with its neighbours."""

    data: bytes
    name: str
    offset: int
    position: Position
    split: str
    unit: str = "byte"


class _Stream:
    """Reads a file in blocks, decompressed; every failure is an InputError that names the file."""

    def __init__(self, file: InputFile):
        self.file = file
        self._raw = open(file.path, "rb")  # noqa: SIM115 - closed by close()
        self._zstd: Any = None
        self._damage: tuple[type[Exception], ...] = ()
        self._rest = b""  # decompressed, not yet read
        self._fed = b""  # compressed, read from the file and not yet decompressed
        self._share: int | None = None
        # not more than a small file holds: a thousand of them would otherwise cost a thousand megabytes of pages
        self._block = _BLOCK if file.compression else min(_BLOCK, file.size + 1)
        if file.compression == "gz":
            import gzip

            self._damage = (zlib.error, gzip.BadGzipFile)
            self._data: Any = gzip.GzipFile(fileobj=self._raw)
        elif file.compression == "zst":
            try:
                import zstandard
            except ImportError:
                raise InputError(f"reading {file.name} needs zstandard: pip install zstandard") from None
            self._zstd = zstandard
            self._decompressor: Any = None
        else:
            self._data = self._raw

    def read(self, size: int = 0) -> bytes:
        """At least one byte and, but for a last block, about `size` (a block when not given); nothing at the end."""
        size = size or self._block
        if self._rest:
            rest, self._rest = self._rest, b""
            return rest
        try:
            return self._read_zstd(size) if self._zstd else self._data.read(size)
        except EOFError:
            raise InputError(f"{self.file.name} ends too soon: the compressed file is truncated") from None
        except self._damage as error:
            raise InputError(f"{self.file.name} is damaged, or no .gz file: {error}") from None
        except OSError as error:
            raise InputError(f"cannot read {self.file.name}: {error.strerror or error}") from None

    def _read_zstd(self, size: int) -> bytes:
        # fed a little at a time, because what comes out of one call cannot be bounded otherwise: up to 128 KiB for
        # every 4 bytes
        out, length = [], 0
        try:
            while length < size:
                data, self._fed = self._fed or self._raw.read(1024), b""
                if not data:
                    if self._decompressor is not None:
                        raise EOFError
                    break
                if self._decompressor is None:
                    self._decompressor = self._zstd.ZstdDecompressor().decompressobj()
                out.append(self._decompressor.decompress(data))
                length += len(out[-1])
                if self._decompressor.eof:
                    self._fed = self._decompressor.unused_data
                    self._decompressor = None
        except self._zstd.ZstdError as error:
            raise InputError(f"{self.file.name} is damaged, or no .zst file: {error}") from None
        return b"".join(out)

    def skip_to(self, offset: int) -> None:
        """Go to a byte of the decompressed file, from its beginning."""
        if not self.file.compression:
            self._raw.seek(offset)
            return
        while offset:
            block = self.read(min(offset, _BLOCK))
            if not block:
                raise InputError(f"{self.file.name} is shorter than when it was first read")
            self._rest = block[offset:]
            offset -= len(block) - len(self._rest)

    def rest_of_line(self, offset: int, limit: int) -> int:
        """Bytes of a plain file from there to the end of the line, at most `limit`."""
        try:
            self._raw.seek(offset)
            return len(self._raw.readline(limit))
        except OSError as error:
            raise InputError(f"cannot read {self.file.name}: {error.strerror or error}") from None

    def consumed(self) -> int:
        """Bytes of the file, as it lies on the disk, read so far."""
        return self._raw.tell() if self._share is None else self._share

    def set_consumed(self, size: int) -> None:
        """For a reader that opens the file by itself."""
        self._share = size

    def close(self) -> None:
        self._raw.close()


@contextlib.contextmanager
def _open(file: InputFile) -> Iterator[_Stream]:
    try:
        stream = _Stream(file)
    except OSError as error:
        raise InputError(f"cannot read {file.name}: {error.strerror}") from None
    try:
        yield stream
    finally:
        stream.close()


def _read_text(
    file: InputFile, number: int, stream: _Stream, at: Position, text_field: str
) -> Iterator[Document | Piece]:
    marked = file.kind == "txt"
    if at.end:
        yield from _read_parts(file, stream, at)
        at = Position(number, at.after)
    stream.skip_to(at.offset)
    buffer, base = b"", at.offset  # base: the offset of buffer[0], where a document begins
    limit = LARGEST_DOCUMENT if file.compression else LONG_DOCUMENT
    finished = False
    while not finished:
        block = stream.read()
        finished = not block
        if base == 0 and not buffer and block.startswith(_BOM):
            block, base = block[len(_BOM) :], len(_BOM)
        buffer += block
        begin = 0
        while begin < len(buffer) or not finished:
            mark = buffer.find(MARK, begin) if marked else -1
            after = mark + len(MARK) if mark >= 0 else len(buffer)
            if (mark if mark >= 0 else len(buffer)) - begin > limit:
                if file.compression:
                    raise InputError(
                        f"{file.name}: the document at byte {base + begin} is longer than {limit // _MIB} MiB, the "
                        f"most in a compressed file; decompress the file"
                    )
                long = _measure(stream, number, base + begin, marked)
                yield from _read_parts(file, stream, long)
                stream.skip_to(long.after)
                buffer, base, begin, finished = b"", long.after, 0, False
                break
            if not finished and (mark < 0 or after + 2 > len(buffer)):
                break  # the document, or the line break after its mark, may go on in the next block
            if mark >= 0:
                after += _line_break(buffer[after : after + 2])
            end = _before_line_break(buffer, begin, mark) if mark >= 0 else len(buffer)
            if end > begin:
                data = buffer[begin:end]
                yield Document(data, file.name, base + begin, Position(number, base + after), file.split)
            begin = after
        buffer, base = buffer[begin:], base + begin


def _line_break(following: bytes) -> int:
    """Bytes of the line break right after a mark."""
    return 2 if following.startswith(b"\r\n") else int(following.startswith(b"\n"))


def _before_line_break(buffer: bytes, begin: int, mark: int) -> int:
    """Where the document before a mark ends, without the line break right before the mark."""
    end = mark
    if end > begin and buffer[end - 1 : end] == b"\n":
        end -= 1
        if end > begin and buffer[end - 1 : end] == b"\r":
            end -= 1
    return end


def _measure(stream: _Stream, number: int, start: int, marked: bool) -> Position:
    """Find where the long document that begins at `start` ends."""
    stream.skip_to(start)
    keep = len(MARK) + 1  # a mark, but for its last byte, and the line break before it
    tail, base = b"", start
    while block := stream.read():
        window = tail + block
        mark = window.find(MARK) if marked else -1
        if mark >= 0:
            following = window[mark + len(MARK) :][:2]
            if len(following) < 2:
                following += stream.read(2)
            end = base + _before_line_break(window, 0, mark)
            return Position(number, start, 0, end, base + mark + len(MARK) + _line_break(following[:2]))
        base += len(window[:-keep])
        tail = window[-keep:]
    end = base + len(tail)
    return Position(number, start, 0, end, end)


def _read_parts(file: InputFile, stream: _Stream, at: Position) -> Iterator[Piece]:
    """The parts of a long document from at.offset on. The first carries the digest of the whole."""
    digest = b""
    first = True
    if at.line == 0:  # the document's beginning
        stream.skip_to(at.offset)
        hasher, left = hashlib.blake2b(digest_size=DIGEST_BYTES), at.end - at.offset
        while left and (block := stream.read(min(left, _BLOCK))):
            hasher.update(block)
            left -= len(block)
        digest = hasher.digest()
    else:
        first = False
    offset, part = at.offset, at.line
    while offset < at.end:
        stream.skip_to(offset)
        wanted = min(at.end - offset, PART_BYTES + SEARCH_BYTES + 8)
        window = stream.read(wanted)
        if len(window) < wanted:
            raise InputError(f"{file.name} became shorter while it was read")
        window = window[: next_cut(window)]
        last = offset + len(window) == at.end
        part += 1
        after = Position(at.file, at.after) if last else Position(at.file, offset + len(window), part, at.end, at.after)
        where = [(file.name, offset)]
        yield Piece("part", [window], where, after, 0, file.split, digest=digest, first=first, last=last)
        first = False
        offset += len(window)


def _read_lines(
    file: InputFile, number: int, stream: _Stream, at: Position, text_field: str
) -> Iterator[Document | Piece]:
    """Pieces of whole lines, not yet counted. The piece in which a line proves too long is the last: who encodes it
    refuses it, and knows the number of the line."""
    stream.skip_to(at.offset)
    offset = at.offset
    if not file.compression:
        if offset == 0 and stream.read(len(_BOM)) == _BOM:
            offset = len(_BOM)
        rest = 0
        while offset < file.size and rest <= LARGEST_DOCUMENT:
            rest = stream.rest_of_line(offset + PIECE_BYTES, LARGEST_DOCUMENT + 1)
            end = min(offset + PIECE_BYTES + rest, file.size)
            stream.set_consumed(end)
            where, after = [(file.name, offset)], Position(number, end)
            yield Piece("jsonl", [], where, after, 0, file.split, path=file.path, size=end - offset)
            offset = end
        return
    blocks: list[bytes] = []
    length = 0  # of the line that goes on in the next block
    last = False
    while not last:
        block = stream.read()
        if offset == 0 and not blocks and block.startswith(_BOM):
            block, offset = block[len(_BOM) :], len(_BOM)
        end = block.rfind(b"\n") + 1
        length = len(block) - end + (0 if end else length)
        last = not block or length > LARGEST_DOCUMENT
        if last:
            end = len(block)
        if end or last:
            lines = b"".join([*blocks, block[:end]])
            after = Position(number, offset + len(lines))
            if lines:
                yield Piece("jsonl", [lines], [(file.name, offset)], after, 0, file.split)
            offset, blocks = after.offset, []
        blocks.append(block[end:])


def _read_rows(
    file: InputFile, number: int, stream: _Stream, at: Position, text_field: str
) -> Iterator[Document | Piece]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"reading {file.name} needs pyarrow: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.ParquetFile(file.path, buffer_size=_BLOCK, pre_buffer=False)
        names = table.schema_arrow.names
        if text_field not in names:
            raise InputError(
                f"{file.name} has no column {text_field!r}; it has {', '.join(names)}; choose one with --text_field"
            )
        kind = table.schema_arrow.field(text_field).type
        text_types = (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary())
        if kind not in text_types:
            raise InputError(f"{file.name}: the column {text_field!r} holds {kind}; expected text")
        skip, row, group = at.offset, 0, 0
        while group < table.num_row_groups and row + table.metadata.row_group(group).num_rows <= skip:
            row += table.metadata.row_group(group).num_rows
            group += 1
        groups = list(range(group, table.num_row_groups))
        for batch in table.iter_batches(128, row_groups=groups, columns=[text_field], use_threads=False):
            for text in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                row += 1
                if row <= skip:
                    continue
                if text is None:
                    raise InputError(f"{file.name}: row {row - 1} of the column {text_field!r} is null; expected text")
                stream.set_consumed(file.size * row // table.metadata.num_rows)
                if text:
                    yield Document(text, file.name, row - 1, Position(number, row), file.split, "row")
    except (pyarrow.ArrowException, OSError) as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot read {file.name} as .parquet: {message}") from None


_READERS = {"txt": _read_text, "source": _read_text, "jsonl": _read_lines, "parquet": _read_rows}


# ---- long documents --------------------------------------------------------------------------

_SPACE = re.compile(rb"(?<=[A-Za-z\x80-\xbf]) (?=[A-Za-z\xc2-\xf4])")
_NEWLINE = re.compile(rb"(?<=[^\s])\n(?=[A-Za-z\xc2-\xf4])")


def next_cut(window: bytes) -> int:
    """Where to cut a long document: the length of its next part.

    `window` is what is left of it, or at least PART_BYTES + SEARCH_BYTES + 8 bytes of that. The cut is before a
    space between two letters, or else between a line break and a letter: every pre-tokenisation regex in use has
    a border there whatever stands around it, so the parts give the ids of the whole. Text without such a place in
    SEARCH_BYTES is cut between two characters; it still decodes to itself.
    """
    if len(window) <= PART_BYTES + SEARCH_BYTES:
        return len(window)
    stop = PART_BYTES + SEARCH_BYTES
    for match in _SPACE.finditer(window, PART_BYTES, stop):
        at = match.start()
        if _character_before(window, at).isalpha() and _character_at(window, at + 1).isalpha():
            return at
    for match in _NEWLINE.finditer(window, PART_BYTES, stop):
        at = match.start()
        before = _character_before(window, at)
        if before and not before.isspace() and _character_at(window, at + 1).isalpha():
            return at + 1
    for at in range(stop, stop - 4, -1):
        if window[at] & 0xC0 != 0x80:
            return at
    return stop


def cut(data: bytes) -> Iterator[bytes]:
    """The parts of a document that is held whole."""
    start = 0
    while start < len(data):
        window = data[start : start + PART_BYTES + SEARCH_BYTES + 8]
        length = next_cut(window)
        yield window[:length]
        start += length


def _character_before(data: bytes, end: int) -> str:
    start = end - 1
    while start > max(end - 4, 0) and data[start] & 0xC0 == 0x80:
        start -= 1
    return data[start:end].decode("utf-8", "ignore")


def _character_at(data: bytes, start: int) -> str:
    end = start + 1
    while end < min(start + 4, len(data)) and data[end] & 0xC0 == 0x80:
        end += 1
    return data[start:end].decode("utf-8", "ignore")

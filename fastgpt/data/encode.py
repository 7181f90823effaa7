"""Pieces of text to token ids.

Workers import this, many at a time and each from nothing: numpy stays out of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UserError
from .documents import InputError, Piece, cut, digest_of, next_cut

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

ID_BYTES = 4  # of one id in Encoded.ids

_REMEDY = "convert it to UTF-8, or go on with --errors replace"


@dataclass
class Encoded:
    """What became of one piece."""

    ids: bytes | bytearray
    """uint32 in native byte order: the documents one after another, each with its end-of-text."""
    tokens: list[int]
    """Ids of each document."""
    text_bytes: list[int]
    """UTF-8 bytes of each document."""
    digests: list[bytes]
    """digest_of each document's UTF-8 bytes."""
    replaced: dict[str, int]
    """Invalid UTF-8 sequences that became U+FFFD, by the name of their file."""
    empty: int
    """Documents without text, left out."""
    lines: int = 0
    """jsonl: lines that ended."""


class Encoder:
    """Turns pieces into ids with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, text_field: str, errors: str):
        self.tokenizer = tokenizer
        self.text_field = text_field
        self.errors = errors
        self._end = tokenizer.eot_id.to_bytes(ID_BYTES, sys.byteorder)

    def encode(self, piece: Piece) -> Encoded:
        """Raises InputError for text that is not UTF-8 or not the .jsonl that was asked for."""
        result = Encoded(b"", [], [], [], {}, 0)
        encoded: list[bytes] = []
        decoded = Texts(piece, self.text_field, self.errors)
        for text, data in decoded:
            if not data:
                result.empty += 1
                continue
            first = len(encoded)
            try:
                if next_cut(data) == len(data):
                    encoded.append(self.tokenizer.encode_to_bytes(text))
                else:
                    encoded += [self.tokenizer.encode_to_bytes(part.decode()) for part in cut(data)]
            except UserError as error:
                raise InputError(f"{piece.where[0][0]}: {error}") from None
            if piece.last:
                encoded.append(self._end)
            result.tokens.append(sum(map(len, encoded[first:])) // ID_BYTES)
            result.text_bytes.append(len(data))
            result.digests.append(digest_of(data) if piece.kind != "part" else piece.digest)
        result.ids = b"".join(encoded)
        result.replaced, result.lines = decoded.replaced, decoded.lines
        return result


class Texts:
    """The documents of a piece: iterate for (text, its UTF-8 bytes). `replaced` counts U+FFFD put in, by file, `lines`
    the line breaks of .jsonl."""

    def __init__(self, piece: Piece, text_field: str, errors: str):
        self.piece = piece
        self.text_field = text_field
        self.errors = errors
        self.replaced: dict[str, int] = {}
        self.lines = 0

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        if self.piece.kind == "jsonl":
            yield from self._lines()
            return
        for data, (name, offset) in zip(self.piece.data, self.piece.where, strict=True):
            text, replaced = self._decode(data, name, offset, self.piece.unit)
            yield text, text.encode() if replaced else data

    def _decode(self, data: bytes, name: str, offset: int, unit: str) -> tuple[str, bool]:
        try:
            return data.decode(), False
        except UnicodeDecodeError as error:
            if self.errors == "strict":
                place = f"byte {offset + error.start}" if unit == "byte" else f"{unit} {offset}, byte {error.start}"
                raise InputError(
                    f"{name} is not UTF-8: byte 0x{data[error.start]:02x} at {place} ({error.reason}); {_REMEDY}"
                ) from None
        text = data.decode("utf-8", "replace")
        self._count(name, text.count("\ufffd") - data.count("\ufffd".encode()))
        return text, True

    def _count(self, name: str, replaced: int) -> None:
        self.replaced[name] = self.replaced.get(name, 0) + replaced

    def _lines(self) -> Iterator[tuple[str, bytes]]:
        name = self.piece.where[0][0]
        # line by line, not at once: one character outside of Latin-1 makes a text four times as large
        for number, (offset, data) in enumerate(self.piece.lines(), self.piece.line + 1):
            self.lines = number - self.piece.line - 1
            line, _ = self._decode(data, name, offset, "byte")
            if not line or line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{name}, line {number}: not JSON ({error}); expected one object a line") from None
            text = row.get(self.text_field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                found = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
                raise InputError(
                    f"{name}, line {number}: no text in the field {self.text_field!r} (found {found[:200]}); choose "
                    f"the field with --text_field"
                )
            try:
                data = text.encode()
            except UnicodeEncodeError as error:
                if self.errors == "strict":
                    raise InputError(
                        f"{name}, line {number}: a lone surrogate (\\u{ord(text[error.start]):04x}) is no character; "
                        f"mend it, or go on with --errors replace"
                    ) from None
                whole = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
                self._count(name, whole.count("\ufffd") - text.count("\ufffd"))
                text, data = whole, whole.encode()
            yield text, data

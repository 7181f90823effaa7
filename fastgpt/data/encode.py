"""Pieces of text to token ids, in this process or in several.

A worker is a Python process of its own that imports neither torch nor the caller's main module, so `prepare` may
be called from a script without a `__main__` guard or from a notebook. It reads pieces from a pipe and ends when
the pipe closes, however the caller died.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from .documents import InputError, Piece, cut, digest_of, next_cut
from .shards import dtype_for, write_all

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

_REMEDY = "convert it to UTF-8, or go on with --errors replace"


@dataclass
class Encoded:
    """What became of one piece."""

    ids: np.ndarray
    """(tokens,) uint16 or uint32: the documents one after another, each with its end-of-text."""
    tokens: list[int]
    """Ids of each document."""
    text_bytes: list[int]
    """UTF-8 bytes of each document."""
    digests: list[bytes]
    """digest_of each document's UTF-8 bytes."""
    replaced: int
    """Invalid UTF-8 sequences that became U+FFFD."""
    empty: int
    """Documents without text, left out."""


class Encoder:
    """Turns pieces into ids with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, text_field: str, errors: str):
        self.tokenizer = tokenizer
        self.text_field = text_field
        self.errors = errors
        self.dtype = dtype_for(tokenizer.vocab_size)
        self._end = np.array([tokenizer.eot_id], dtype=np.uint32)

    def encode(self, piece: Piece) -> Encoded:
        """Raises InputError for text that is not UTF-8 or not the .jsonl that was asked for."""
        result = Encoded(np.empty(0, self.dtype), [], [], [], 0, 0)
        arrays: list[np.ndarray] = []
        decoded = Texts(piece, self.text_field, self.errors)
        for text, data in decoded:
            if not data:
                result.empty += 1
                continue
            first = len(arrays)
            try:
                if next_cut(data) == len(data):
                    arrays.append(self.tokenizer.encode_to_numpy(text))
                else:
                    arrays += [self.tokenizer.encode_to_numpy(part.decode()) for part in cut(data)]
            except UserError as error:
                raise InputError(f"{piece.where[0][0]}: {error}") from None
            if piece.last:
                arrays.append(self._end)
            result.tokens.append(sum(map(len, arrays[first:])))
            result.text_bytes.append(len(data))
            result.digests.append(digest_of(data) if piece.kind != "part" else piece.digest)
        if arrays:
            result.ids = np.concatenate(arrays).astype(self.dtype)
        result.replaced = decoded.replaced
        return result


class Texts:
    """The documents of a piece: iterate for (text, its UTF-8 bytes). `replaced` counts U+FFFD put in."""

    def __init__(self, piece: Piece, text_field: str, errors: str):
        self.piece = piece
        self.text_field = text_field
        self.errors = errors
        self.replaced = 0

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
        self.replaced += text.count("\ufffd") - data.count("\ufffd".encode())
        return text, True

    def _lines(self) -> Iterator[tuple[str, bytes]]:
        name, offset = self.piece.where[0]
        # line by line, not at once: one character outside of Latin-1 makes a text four times as large
        for number, data in enumerate(self.piece.data[0].split(b"\n"), self.piece.line + 1):
            line, _ = self._decode(data, name, offset, "byte")
            offset += len(data) + 1
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
                    f"the field with text_field"
                )
            try:
                data = text.encode()
            except UnicodeEncodeError as error:
                if self.errors == "strict":
                    raise InputError(
                        f"{name}, line {number}: a lone surrogate (\\u{ord(text[error.start]):04x}) is no character; "
                        f"mend it, or go on with --errors replace"
                    ) from None
                text = "".join(self._character(c) for c in text)
                data = text.encode()
            yield text, data

    def _character(self, c: str) -> str:
        if "\ud800" <= c <= "\udfff":
            self.replaced += 1
            return "\ufffd"
        return c


# ---- processes -------------------------------------------------------------------------------


class Inline:
    """The pool of one: encodes in this process."""

    workers = 1

    def start(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def submit(self, piece: Piece) -> Future[Encoded]:
        future: Future[Encoded] = Future()
        future.set_result(self._encoder.encode(piece))
        return future

    def close(self) -> None:
        pass


class _Channel:
    """A pipe for a message and bytes beside it, which are not copied on their way more than the system must."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._file = open(connection.fileno(), "r+b", buffering=0, closefd=False)  # noqa: SIM115 - closed by close()

    def send(self, message: Any, data: bytes | np.ndarray = b"") -> None:
        """Raises OSError where the other end is gone."""
        view = memoryview(data).cast("B")
        self._connection.send((message, len(view)))
        write_all(self._file, view)

    def receive(self) -> tuple[Any, np.ndarray]:
        """The message, and the bytes as (n,) uint8. Raises EOFError or OSError where the other end is gone."""
        message, size = self._connection.recv()
        data = np.empty(size, dtype=np.uint8)
        view = memoryview(data)
        while view:
            read = self._file.readinto(view)
            if not read:
                raise EOFError
            view = view[read:]
        return message, data

    def close(self) -> None:
        self._file.close()
        self._connection.close()


class WorkerPool:
    """Worker processes, each served by a thread of this one, which only waits for its pipe.

    They come up while the caller loads the tokenizer, and take pieces after `start`.
    """

    def __init__(self, workers: int):
        self.workers = workers
        self._idle: queue.SimpleQueue[tuple[_Channel, subprocess.Popen]] = queue.SimpleQueue()
        self._all: list[tuple[_Channel, subprocess.Popen]] = []
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="encode")
        code = f"import sys; sys.path[:] = {sys.path!r}; from fastgpt.data.encode import serve; serve(int(sys.argv[1]))"
        try:
            for _ in range(workers):
                ours, theirs = Pipe()
                with theirs:
                    process = subprocess.Popen(
                        [sys.executable, "-c", code, str(theirs.fileno())],
                        pass_fds=[theirs.fileno()],
                        stdin=subprocess.DEVNULL,
                        # one thread each: the workers themselves are the parallelism
                        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                    )
                self._all.append((_Channel(ours), process))
        except BaseException:
            self.close()
            raise

    def start(self, encoder: Encoder) -> None:
        """Give every worker the encoder. Raises UserError where one has died."""
        for channel, process in self._all:
            try:
                channel.send(encoder)
            except OSError:
                raise self._died(process) from None
            self._idle.put((channel, process))

    def submit(self, piece: Piece) -> Future[Encoded]:
        """The piece's ids, when a worker has made them."""
        return self._threads.submit(self._run, piece)

    def close(self) -> None:
        """End the workers; what they have in hand is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for _, process in self._all:
            process.kill()
        self._threads.shutdown(wait=True)
        for channel, process in self._all:
            channel.close()
            process.wait()

    def _run(self, piece: Piece) -> Encoded:
        channel, process = self._idle.get()
        try:
            lengths = [len(item) for item in piece.data]
            channel.send((dataclasses.replace(piece, data=[]), lengths), b"".join(piece.data))
            result, ids = channel.receive()
        except (EOFError, OSError):
            raise self._died(process) from None
        finally:
            self._idle.put((channel, process))
        if isinstance(result, BaseException):
            raise result
        result.ids = ids.view(result.ids.dtype)
        return result

    @staticmethod
    def _died(process: subprocess.Popen) -> UserError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        return UserError(
            f"a worker process ended with exit code {process.returncode} (-9 is mostly a lack of memory); run it again "
            f"to continue, with fewer workers"
        )


def serve(handle: int) -> None:
    """A worker's life: an Encoder, then pieces, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the caller ends the workers
    channel = _Channel(Connection(handle))
    with contextlib.suppress(EOFError, OSError):
        encoder: Encoder = channel.receive()[0]
        while True:
            (piece, lengths), received = channel.receive()
            data = received.tobytes()
            ends = list(itertools.accumulate(lengths))
            piece.data = [data[end - length : end] for end, length in zip(ends, lengths, strict=True)]
            try:
                result = encoder.encode(piece)
            except Exception as error:  # raised again in the caller
                channel.send(error)
                continue
            ids, result.ids = result.ids, result.ids[:0]
            channel.send(result, ids)

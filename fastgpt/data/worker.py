"""The life of a process that encodes: started by a WorkerPool, it reads pieces from its channel until that closes.

It imports neither torch nor numpy nor the caller's main module: it is at work within a tenth of a second, and
`prepare` may be called from a script without a `__main__` guard or from a notebook.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from ..files import write_all

if TYPE_CHECKING:
    from .encode import Encoder


class Channel:
    """Messages, each with bytes beside it that are not copied more than the system must."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._file = open(connection.fileno(), "r+b", buffering=0, closefd=False)  # noqa: SIM115 - closed by close()

    def send(self, message: Any, data: bytes = b"") -> None:
        """Raises OSError where the other end is gone."""
        self._connection.send((message, len(data)))
        write_all(self._file, data)

    def receive(self) -> tuple[Any, bytearray]:
        """The message and the bytes beside it. Raises EOFError or OSError where the other end is gone."""
        message, size = self._connection.recv()
        data = bytearray(size)
        left = memoryview(data)
        while left:
            read = self._file.readinto(left)
            if not read:
                raise EOFError
            left = left[read:]
        return message, data

    def close(self) -> None:
        self._file.close()
        self._connection.close()


def serve(handle: int) -> None:
    """Take an Encoder, then pieces, and send each back encoded, or the exception it raised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the caller ends the workers
    channel = Channel(Connection(handle))
    with contextlib.suppress(EOFError, OSError):
        encoder: Encoder = channel.receive()[0]
        while True:
            (piece, lengths), received = channel.receive()
            ends, view = itertools.accumulate(lengths), memoryview(received)
            piece.data = [bytes(view[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
            try:
                result = encoder.encode(piece)
            except Exception as error:  # raised again in the caller
                channel.send(error)
                continue
            ids, result.ids = result.ids, b""
            channel.send(result, ids)

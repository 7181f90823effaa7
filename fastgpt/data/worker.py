"""The life of a process that encodes: started by a WorkerPool, it reads pieces from its channel until that closes.

It imports neither torch nor numpy nor the caller's main module: it is at work within a tenth of a second, and
`prepare` may be called from a script without a `__main__` guard or from a notebook. A second of prepare is what all
cores do in it, so what is not imported here (multiprocessing, gzip, Python's `site`) is text encoded.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import signal
import struct
from typing import TYPE_CHECKING, Any

from ..files import write_all

if TYPE_CHECKING:
    from .encode import Encoder


_SIZES = struct.Struct("QQ")  # of a pickled message and of the bytes beside it


class Channel:
    """Messages over a socket, each with bytes beside it that are not copied more than the system must."""

    def __init__(self, handle: int):
        self._file = open(handle, "r+b", buffering=0)  # noqa: SIM115 - closed by close()

    def send(self, message: Any, data: bytes = b"") -> None:
        """Raises OSError where the other end is gone."""
        pickled = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        write_all(self._file, _SIZES.pack(len(pickled), len(data)) + pickled)
        write_all(self._file, data)

    def receive(self) -> tuple[Any, bytearray]:
        """The message and the bytes beside it. Raises EOFError or OSError where the other end is gone."""
        pickled, data = _SIZES.unpack(self._read(_SIZES.size))
        return pickle.loads(self._read(pickled)), self._read(data)

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        left = memoryview(data)
        while left:
            read = self._file.readinto(left)
            if not read:
                raise EOFError
            left = left[read:]
        return data

    def close(self) -> None:
        self._file.close()


def serve(handle: int) -> None:
    """Take an Encoder, then pieces, and send each back encoded, or the exception it raised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the caller ends the workers
    channel = Channel(handle)
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

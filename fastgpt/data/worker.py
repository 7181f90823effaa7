"""The life of a process that encodes: started by a WorkerPool, it reads pieces from its channel until that closes.

It imports neither torch nor numpy nor the caller's main module: it is at work within a tenth of a second, and
`prepare` may be called from a script without a `__main__` guard or from a notebook. What every worker imports is time
in which nothing is encoded, so neither multiprocessing nor gzip is among it.
"""

from __future__ import annotations

import contextlib
import itertools
import marshal
import struct
from typing import Any

from ..files import write_all
from ..tokenizer import Tokenizer
from .documents import InputError, Piece
from .encode import Encoder

_SIZES = struct.Struct("QQ")  # of a message and of the bytes beside it


class Channel:
    """Messages of plain Python values over a socket, each with bytes beside it that are not copied more than the system
    must."""

    def __init__(self, handle: int):
        self._file = open(handle, "r+b", buffering=0)  # noqa: SIM115 - closed by close()

    def send(self, message: Any, data: bytes = b"") -> None:
        """Raises OSError where the other end is gone."""
        packed = marshal.dumps(message)
        write_all(self._file, _SIZES.pack(len(packed), len(data)) + packed)
        write_all(self._file, data)

    def receive(self) -> tuple[Any, bytearray]:
        """The message and the bytes beside it. Raises EOFError or OSError where the other end is gone."""
        packed, data = _SIZES.unpack(self._read(_SIZES.size))
        return marshal.loads(self._read(packed)), self._read(data)

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
    """Take an Encoder's parts, then those of pieces, and send back what each became: the fields of an Encoded, or what
    is wrong with the `input`, or how it `failed`."""
    channel = Channel(handle)
    with contextlib.suppress(EOFError, OSError):
        (tokenizer, text_field, errors), _ = channel.receive()
        encoder = Encoder(Tokenizer(*tokenizer), text_field, errors)
        while True:
            (fields, lengths), received = channel.receive()
            ends, view = itertools.accumulate(lengths), memoryview(received)
            data = [bytes(view[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
            try:
                result = encoder.encode(Piece(**fields, data=data))
            except InputError as error:
                channel.send({"input": str(error)})
            except Exception:
                import traceback

                channel.send({"failed": traceback.format_exc()})
            else:
                ids, result.ids = result.ids, b""
                channel.send(vars(result), ids)

"""What gzip and xz need for the held-out text, counted as the model's bits are.

Every number is in bits per byte over the same bytes: the text of all held-out documents, and one byte more for
the end of each. A compressor is given that byte (a NUL); the model predicts it as `<|endoftext|>`.
"""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

END = b"\0"
READ_FIRST_LIMIT = 64_000_000  # bytes of training text that xz reads before: its window has to hold them

UNIFORM = "uniform"
GZIP_FILES = "gzip -9 per file"
XZ_FILES = "xz -9e per file"
XZ_STREAM = "xz -9e in one stream"
XZ_PRIMED = "xz -9e that has read the training text"


def uniform(vocab_size: int, tokens: int, counted_bytes: int) -> float:
    """Bits per byte of a model that knows nothing: log2(V) bits for each token."""
    return math.log2(vocab_size) * tokens / counted_bytes


def counted_bytes(documents: Sequence[str]) -> int:
    """What every bits-per-byte figure is divided by: UTF-8 bytes, and one for each document's end."""
    return sum(len(text.encode()) for text in documents) + len(documents)


def joined(documents: Sequence[str]) -> bytes:
    return b"".join(text.encode() + END for text in documents)


def _xz(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def _xz_raw(data: bytes, window: int) -> int:
    """Bytes of the bare stream, without a container, and with a window of at least the given size."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": max(1 << 16, window)}]
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))


def compress(
    val: Sequence[str], train: Sequence[str], done: Callable[[str], None] = lambda name: None
) -> dict[str, float]:
    """Bits per byte of the held-out documents under each compressor, by name.

    XZ_PRIMED is what the held-out text adds to a stream that begins with the training text (its last
    READ_FIRST_LIMIT bytes), all of it in the window. `done` is told each name as it is finished.
    """
    before, data = joined(train)[-READ_FIRST_LIMIT:], joined(val)
    window = len(before) + len(data)
    files = [text.encode() + END for text in val]
    with ThreadPoolExecutor(2) as pool:  # both libraries let go of the interpreter lock; the long ones first
        both = pool.submit(_xz_raw, before + data, window)
        alone = pool.submit(_xz_raw, before, window)
        stream = pool.submit(_xz, data)
        xz_files = pool.submit(lambda: sum(map(_xz, files)))
        gzip_files = pool.submit(lambda: sum(len(gzip.compress(file, 9, mtime=0)) for file in files))
        sizes = {}
        for name, size in (
            (GZIP_FILES, gzip_files.result),
            (XZ_FILES, xz_files.result),
            (XZ_STREAM, stream.result),
            (XZ_PRIMED, lambda: both.result() - alone.result()),
        ):
            sizes[name] = size()
            done(name)
    return {name: 8 * size / counted_bytes(val) for name, size in sizes.items()}

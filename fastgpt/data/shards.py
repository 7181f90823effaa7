"""The .bin shard: 256 little-endian int32 header words, then the token ids.

    word 0   magic    20240520 for uint16 ids, 20240801 for uint32
    word 1   version         1                          7
    word 2   number of tokens that follow
    3..255   zero

This is llm.c's layout (its version 7 is the one for vocabularies over 65,536), so llm.c and modded-nanogpt
read our shards and we read theirs. nanoGPT's files are the bare uint16 ids; they are read when asked for.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import sync, write_all

HEADER_WORDS = 256
HEADER_BYTES = 4 * HEADER_WORDS
MAX_SHARD_TOKENS = 2**31 - 1  # the count is an int32
BLOCK_BYTES = 1 << 20  # one CRC-32 for this many bytes of ids

UINT16 = np.dtype("<u2")
UINT32 = np.dtype("<u4")
_FORMATS = {UINT16: (20240520, 1), UINT32: (20240801, 7)}


def dtype_for(vocab_size: int) -> np.dtype:
    """The narrowest id type that holds every id below vocab_size."""
    return UINT16 if vocab_size <= 2**16 else UINT32


def dtype_named(name: str) -> np.dtype:
    """The dtype that dataset.json calls `uint16` or `uint32`. Raises UserError for another name."""
    for dtype in _FORMATS:
        if dtype.name == name:
            return dtype
    raise UserError(f"dtype {name!r} is not one a shard can have; expected uint16 or uint32")


def header(dtype: np.dtype, tokens: int) -> bytes:
    """The 1,024 bytes before the ids."""
    words = np.zeros(HEADER_WORDS, dtype="<i4")
    words[:3] = (*_FORMATS[dtype], tokens)
    return words.tobytes()


def read_shard(path: str | Path, *, dtype: np.dtype | None = None, headerless: bool = False) -> np.ndarray:
    """Memory-map the ids of one shard: (tokens,) uint16 or uint32, read-only.

    `dtype` is the type that the reader expects; None takes whichever the header names. `headerless` reads
    nanoGPT's bare ids (uint16 unless dtype says otherwise). Raises UserError where the file is missing, has
    another magic, version or dtype, a damaged header, or a size that is not the one its header states.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; expected a shard file")
        size = path.stat().st_size
        with open(path, "rb") as file:
            words = np.frombuffer(b"" if headerless else file.read(HEADER_BYTES), dtype=np.uint8)
    except OSError as error:
        raise UserError(f"cannot read the shard {path}: {error.strerror}") from None
    if headerless:
        dtype, offset = dtype or UINT16, 0
        tokens, rest = divmod(size, dtype.itemsize)
        if rest:
            raise UserError(f"{path}: {size} bytes is no whole number of {dtype.name} ids; the file is truncated")
    else:
        if len(words) < HEADER_BYTES:
            raise UserError(
                f"{path}: {size} bytes, shorter than the {HEADER_BYTES} bytes of a header; the file is truncated, "
                f"or has no header (nanoGPT's layout)"
            )
        words = words.view("<i4")
        magic, version, tokens = (int(word) for word in words[:3])
        found = next((d for d, numbers in _FORMATS.items() if numbers == (magic, version)), None)
        if found is None or (dtype is not None and found != dtype):
            expected = " or ".join(
                f"magic {m}, version {v} ({d.name})" for d, (m, v) in _FORMATS.items() if dtype in (None, d)
            )
            kind = f" ({found.name})" if found is not None else ""
            raise UserError(f"{path}: found magic {magic}, version {version}{kind}; expected {expected}")
        dtype, offset = found, HEADER_BYTES
        if tokens < 0 or words[3:].any():
            raise UserError(f"{path}: the header is damaged; expected a token count and 253 zero words after it")
        expected_size = HEADER_BYTES + tokens * dtype.itemsize
        if size != expected_size:
            raise UserError(
                f"{path}: {size} bytes; expected {expected_size} for the {tokens} {dtype.name} ids that its header "
                f"states; the file is truncated or damaged"
            )
    if tokens == 0:
        return np.empty(0, dtype)
    try:
        # the plain ndarray over the mapping: slicing numpy's memmap subclass costs a microsecond more
        return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(tokens,)))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot map the shard {path}: {error}") from None


def block_checksums(path: Path, offset: int, block_bytes: int = BLOCK_BYTES) -> Iterator[int]:
    """CRC-32 of each block of a file's bytes from `offset` on."""
    with open(path, "rb") as file:
        file.seek(offset)
        while block := file.read(block_bytes):
            yield zlib.crc32(block)


def start_again(folder: Path) -> str:
    """The remedy where files of an interrupted run are damaged."""
    return f"remove {folder} and start again, or choose another --out_dir"


class ShardWriter:
    """Writes one split's ids into shards of `shard_tokens` ids, able to go back to an earlier length.

    The shard in hand is `SPLIT-NNNNN.bin.partial`. When it is full (or at `finish`) its header is written,
    it is synced and renamed; so a file under its final name is always whole.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.shards: list[dict[str, Any]] = []  # the finished ones, as dataset.json lists them
        self._file: Any = None
        self._start_shard()

    @property
    def tokens(self) -> int:
        """Ids written, over all shards."""
        return sum(shard["tokens"] for shard in self.shards) + self._count

    def state(self, tokens: int | None = None) -> dict[str, Any]:
        """What `restore` goes back to: the split as it is, or cut to its first `tokens` ids. No more is read for it
        than the one block that the cut parts."""
        whole, rest = divmod(self.tokens if tokens is None else tokens, self.shard_tokens)
        crcs = self.shards[whole]["crc32"] if whole < len(self.shards) else self._crcs
        blocks, left = divmod(rest * self.dtype.itemsize, BLOCK_BYTES)
        if left and tokens is None:
            blocks, left = blocks + 1, 0
        crcs = crcs[:blocks]
        if left:
            end = whole * self.shard_tokens + rest
            crcs.append(zlib.crc32(self.read(end - left // self.dtype.itemsize, end).tobytes()))
        return {"shards": self.shards[:whole], "partial_tokens": rest, "partial_crc32": crcs}

    def append(self, ids: np.ndarray) -> None:
        """Write ids, (n,) of the split's dtype, opening and finishing shards as they fill."""
        while len(ids):
            take = min(len(ids), self.shard_tokens - self._count)
            self._write(ids[:take])
            ids = ids[take:]
            if self._count == self.shard_tokens:
                self._finish_shard()

    def sync(self) -> None:
        """Force the shard in hand to the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def finish(self) -> list[dict[str, Any]]:
        """Finish the last shard and return what dataset.json says of each."""
        if self._count:
            self._finish_shard()
        return self.shards

    def close(self) -> None:
        """Let go of the shard in hand, leaving it as it is."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to what `state` returned in an earlier process; later files are deleted.

        Every byte that is kept is read. Raises UserError where the disk holds less than that, or other bytes.
        """
        remedy = start_again(self.folder)
        for shard in state["shards"]:
            path = self.folder / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise UserError(f"{path}: expected {shard['bytes']} bytes from the interrupted run; {remedy}")
            with open(path, "rb") as file:
                intact = file.read(HEADER_BYTES) == header(self.dtype, shard["tokens"])
            if not intact or list(block_checksums(path, HEADER_BYTES, BLOCK_BYTES)) != shard["crc32"]:
                raise UserError(f"{path} has changed since the interrupted run wrote it; {remedy}")
        self._go_back(state["shards"], state["partial_tokens"])
        if self._crcs != state["partial_crc32"]:
            path = self._partial(len(self.shards))
            raise UserError(f"{path} has changed since the interrupted run wrote it; {remedy}")

    def _go_back(self, shards: list[dict[str, Any]], partial_tokens: int) -> None:
        self.close()
        self.shards = list(shards)
        self._start_shard()
        partial, final = self._partial(len(shards)), self._final(len(shards))
        if final.exists():  # finished after the state to go back to: a partial shard again, before it is cut
            os.replace(final, partial)
        for path in self.folder.glob(f"{self.split}-*.bin*"):
            if path.name not in {partial.name, *(shard["file"] for shard in shards)}:
                path.unlink()
        wanted = HEADER_BYTES + partial_tokens * self.dtype.itemsize
        if partial_tokens == 0:
            partial.unlink(missing_ok=True)
            return
        if not partial.is_file() or partial.stat().st_size < wanted:
            raise UserError(
                f"{partial}: expected at least {wanted} bytes from the interrupted run; {start_again(self.folder)}"
            )
        os.truncate(partial, wanted)
        self._file = open(partial, "r+b", buffering=0)  # noqa: SIM115 - closed by close()
        self._file.seek(HEADER_BYTES)
        while block := self._file.read(BLOCK_BYTES):
            self._checksum(memoryview(block))
        self._count = partial_tokens

    def truncate(self, tokens: int) -> None:
        """Keep only the first `tokens` ids of the split."""
        whole, rest = divmod(tokens, self.shard_tokens)
        self._go_back(self.shards[:whole], rest)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids start..stop of what has been written so far."""
        parts = []
        for shard in range(start // self.shard_tokens, -(-stop // self.shard_tokens)):
            base = shard * self.shard_tokens
            first, last = max(start - base, 0), min(stop - base, self.shard_tokens)
            path = self._final(shard) if shard < len(self.shards) else self._partial(shard)
            offset = HEADER_BYTES + first * self.dtype.itemsize
            parts.append(np.fromfile(path, self.dtype, count=last - first, offset=offset))
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def blocks(self, start: int) -> Iterator[np.ndarray]:
        """What has been written from `start` on, up to 2^16 ids at a time."""
        for first in range(start, self.tokens, 1 << 16):
            yield self.read(first, min(first + (1 << 16), self.tokens))

    def _final(self, number: int) -> Path:
        return self.folder / f"{self.split}-{number:05d}.bin"

    def _partial(self, number: int) -> Path:
        return self.folder / f"{self.split}-{number:05d}.bin.partial"

    def _start_shard(self) -> None:
        self._count, self._crcs, self._in_block = 0, [], 0

    def _checksum(self, data: memoryview) -> None:
        while data:
            if self._in_block == 0:
                self._crcs.append(0)
            piece = data[: BLOCK_BYTES - self._in_block]
            self._crcs[-1] = zlib.crc32(piece, self._crcs[-1])
            self._in_block = (self._in_block + len(piece)) % BLOCK_BYTES
            data = data[len(piece) :]

    def _write(self, ids: np.ndarray) -> None:
        if self._file is None:
            self._file = open(self._partial(len(self.shards)), "wb", buffering=0)  # noqa: SIM115 - closed by close()
            write_all(self._file, bytes(HEADER_BYTES))
        data = memoryview(np.ascontiguousarray(ids, self.dtype)).cast("B")
        write_all(self._file, data)
        self._checksum(data)
        self._count += len(ids)

    def _finish_shard(self) -> None:
        self._file.seek(0)
        write_all(self._file, header(self.dtype, self._count))
        os.fsync(self._file.fileno())
        self.close()
        partial, final = self._partial(len(self.shards)), self._final(len(self.shards))
        os.replace(partial, final)
        sync(self.folder)
        size = HEADER_BYTES + self._count * self.dtype.itemsize
        self.shards.append({"file": final.name, "tokens": self._count, "bytes": size, "crc32": self._crcs})
        self._start_shard()

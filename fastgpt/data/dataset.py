"""A prepared folder: dataset.json, tokenizer.json and the shards, checked before anything reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from ..files import write_atomically
from .shards import (
    BLOCK_BYTES,
    HEADER_BYTES,
    UINT16,
    block_checksums,
    dtype_for,
    dtype_named,
    read_shard,
)

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

DATASET_FILE = "dataset.json"
TOKENIZER_FILE = "tokenizer.json"
FORMAT, VERSION = "fastgpt dataset", 1
SPLITS = ("train", "val")

_SCAN_TOKENS = 1 << 22  # ids looked at together: a few MB, so a scan stays in cache


class TokenStream:
    """All the tokens of one split end to end, over memory-mapped shards.

    `documents` and `text_bytes` (UTF-8 bytes of the documents) are what dataset.json states; bits per byte
    divide by their sum, each end-of-text counting as one byte.
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        eot_id: int,
        *,
        documents: int = 0,
        text_bytes: int = 0,
        names: Sequence[str] = (),
        name: str = "tokens",
    ):
        self.shards = list(shards)
        self.names = list(names) or [f"shard {i}" for i in range(len(self.shards))]
        self.name = name
        self.eot_id = eot_id
        self.documents = documents
        self.text_bytes = text_bytes
        # starts[i] is the position of shard i's first token; the last entry is the length of the split
        self.starts = np.cumsum([0, *(len(shard) for shard in self.shards)], dtype=np.int64)
        self.tokens = int(self.starts[-1])

    def __len__(self) -> int:
        return self.tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids start..stop as (stop - start,) of the shards' dtype; a view where one shard holds them all.

        Raises IndexError outside the split.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start}..{stop} of a split of {self.tokens}")
        if start == stop:
            return np.empty(0, self.shards[0].dtype if self.shards else UINT16)
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = int(np.searchsorted(self.starts, stop, side="left")) - 1
        parts = [
            self.shards[i][max(start - int(self.starts[i]), 0) : stop - int(self.starts[i])]
            for i in range(first, last + 1)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def check(self, vocab_size: int, block_size: int) -> None:
        """Refuse, before the first step, a split too short for one sample or with an id outside the vocabulary.

        Reads every id once. Raises UserError naming the shard, the offset and the id.
        """
        if self.tokens < block_size + 1:
            raise UserError(
                f"{self.name} has {self.tokens} tokens; a block_size of {block_size} needs at least "
                f"{block_size + 1}; prepare more text or take a smaller block_size"
            )
        for shard, name in zip(self.shards, self.names, strict=True):
            if vocab_size > np.iinfo(shard.dtype).max:
                continue
            for start in range(0, len(shard), _SCAN_TOKENS):
                ids = shard[start : start + _SCAN_TOKENS]
                if int(ids.max()) >= vocab_size:
                    offset = int(np.argmax(ids >= vocab_size))
                    raise UserError(
                        f"{name}: token {start + offset} has id {int(ids[offset])}; a vocabulary of {vocab_size} ends "
                        f"at {vocab_size - 1}; prepare the data again with the model's tokenizer"
                    )


class Dataset:
    """A prepared folder. `Dataset.open` checks it; `split` gives the tokens."""

    def __init__(self, folder: Path, meta: dict[str, Any], streams: dict[str, TokenStream]):
        self.folder = folder
        self.meta = meta
        self._streams = streams

    @classmethod
    def open(cls, path: str | Path) -> Dataset:
        """Check dataset.json and every shard's header and size, and map them into memory.

        Raises UserError for a folder that is not there or not finished, a damaged dataset.json, and a shard that
        is missing, truncated, or of another dtype or size than dataset.json states. Flipped ids are what
        `verify` looks for.
        """
        folder = Path(path)
        meta = read_meta(folder)
        try:
            dtype = dtype_named(meta["dtype"])
            streams = {split: _open_split(folder, split, meta, dtype) for split in SPLITS}
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / DATASET_FILE} lacks what a dataset needs: {error}; prepare it again") from None
        return cls(folder, meta, streams)

    @property
    def vocab_size(self) -> int:
        """Token ids run from 0 to vocab_size - 1."""
        return self.meta["vocab_size"]

    @property
    def eot_id(self) -> int:
        """Id of `<|endoftext|>`, which ends every document."""
        return self.meta["eot_id"]

    @property
    def tokenizer_sha256(self) -> str:
        """Identifies the tokenizer that made the ids."""
        return self.meta["tokenizer"]["sha256"]

    def split(self, name: str) -> TokenStream:
        """The tokens of `train` or `val`; a split without documents has no tokens. Raises UserError."""
        if name not in self._streams:
            raise UserError(f"{self.folder} has no split {name!r}; there are {', '.join(self._streams)}")
        return self._streams[name]

    def check(self, vocab_size: int, block_size: int) -> None:
        """Refuse (UserError), before the first step, what training a model of this size would stumble over: another
        vocabulary or tokenizer, a training split too short, an id outside the vocabulary in either split."""
        if self.vocab_size != vocab_size:
            raise UserError(
                f"the dataset {self.folder} has a vocabulary of {self.vocab_size}, but model.vocab_size is "
                f"{vocab_size}; a new run takes --model.vocab_size {self.vocab_size}, a resumed one its first data"
            )
        self.tokenizer()
        for name, stream in self._streams.items():
            if name == "train" or stream.tokens:
                stream.check(vocab_size, block_size if name == "train" else 0)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids. Raises UserError where tokenizer.json is another one."""
        from ..tokenizer import Tokenizer

        path = self.folder / self.meta["tokenizer"]["file"]
        tokenizer = Tokenizer.load(path)
        if tokenizer.sha256 != self.tokenizer_sha256:
            raise UserError(
                f"{path} is not the tokenizer that made this dataset (sha256 {tokenizer.sha256[:12]}, expected "
                f"{self.tokenizer_sha256[:12]}); put the right one back or prepare the data again"
            )
        return tokenizer

    def save_tokenizer(self, path: str | Path) -> None:
        """Write the dataset's tokenizer to `path`. Raises UserError where it is not the dataset's own."""
        self.tokenizer()
        text = (self.folder / self.meta["tokenizer"]["file"]).read_text(encoding="utf-8")
        write_atomically(Path(path), text)

    def check_tokenizer(self, sha256: str, owner: str = "the checkpoint") -> None:
        """Refuse (UserError) data that another tokenizer made than `owner`'s."""
        if sha256 != self.tokenizer_sha256:
            raise UserError(
                f"{owner} has another tokenizer (sha256 {sha256[:12]}) than the data in {self.folder} "
                f"({self.tokenizer_sha256[:12]}); prepare the data with that tokenizer"
            )


def read_meta(folder: Path) -> dict[str, Any]:
    """dataset.json, its own checksum verified. Raises UserError."""
    path = folder / DATASET_FILE
    if not folder.is_dir():
        raise UserError(f"{folder} is {'no folder' if folder.exists() else 'not there'}; expected a prepared folder")
    if not path.is_file():
        raise UserError(f"{folder} holds no {DATASET_FILE}: not prepared, or not to the end; run fastgpt prepare")
    try:
        meta = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); prepare the data again, in a new folder") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or meta.get("version") != VERSION:
        found = [meta.get("format"), meta.get("version")] if isinstance(meta, dict) else type(meta).__name__
        raise UserError(f"{path}: found {found}; expected format {FORMAT!r}, version {VERSION}")
    if meta.get("sha256") != _checksum(meta):
        raise UserError(
            f"{path} was changed or damaged: its checksum does not match; prepare the data again, in a new folder"
        )
    return meta


def write_meta(folder: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """Write dataset.json, the last step of making a dataset, and return it with its checksum."""
    meta = {"format": FORMAT, "version": VERSION, **meta}
    meta["sha256"] = _checksum(meta)
    write_atomically(folder / DATASET_FILE, json.dumps(meta, indent=1) + "\n")
    return meta


def _checksum(meta: dict[str, Any]) -> str:
    content = {key: value for key, value in meta.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _open_split(folder: Path, split: str, meta: dict[str, Any], dtype: np.dtype) -> TokenStream:
    listed = meta["splits"][split]
    shards = []
    for entry in listed["shards"]:
        path = folder / entry["file"]
        ids = read_shard(path, dtype=dtype, headerless=not entry.get("header", True))
        if len(ids) != entry["tokens"]:
            raise UserError(f"{path} holds {len(ids)} tokens; {DATASET_FILE} states {entry['tokens']}")
        shards.append(ids)
    return TokenStream(
        shards,
        meta["eot_id"],
        documents=listed["documents"],
        text_bytes=listed["text_bytes"],
        names=[str(folder / entry["file"]) for entry in listed["shards"]],
        name=f"the {split} split of {folder}",
    )


def verify(path: str | Path) -> list[str]:
    """Read every shard and the tokenizer and compare them with the checksums in dataset.json.

    Returns one line for each problem, naming shard and block; an empty list means that all is as it was written.
    Raises UserError where there is no dataset or dataset.json itself is damaged.
    """
    folder = Path(path)
    meta = read_meta(folder)
    problems = []
    try:
        Dataset(folder, meta, {}).tokenizer()
    except UserError as error:
        problems.append(str(error))
    for split in SPLITS:
        for entry in meta["splits"][split]["shards"]:
            shard = folder / entry["file"]
            headerless = not entry.get("header", True)
            try:
                read_shard(shard, dtype=dtype_named(meta["dtype"]), headerless=headerless)
                if shard.stat().st_size != entry["bytes"]:
                    raise UserError(f"{shard}: {shard.stat().st_size} bytes; {DATASET_FILE} states {entry['bytes']}")
            except UserError as error:
                problems.append(str(error))
                continue
            start, size = 0 if headerless else HEADER_BYTES, meta["block_bytes"]
            for block, (found, expected) in enumerate(
                zip(block_checksums(shard, start, size), entry["crc32"], strict=True)
            ):
                if found != expected:
                    first = start + block * size
                    last = min(first + size, entry["bytes"])
                    problems.append(f"{shard}: block {block} (bytes {first} to {last - 1}) has changed")
    return problems


def adopt_shards(
    folder: str | Path,
    *,
    train: Sequence[str],
    val: Sequence[str] = (),
    tokenizer: str | Path,
    headerless: bool = False,
) -> dict[str, Any]:
    """Write dataset.json for shards that another program made (llm.c, modded-nanogpt, nanoGPT), and return it.

    Args:
        folder: where the shards lie; dataset.json and tokenizer.json are written there.
        train, val: shard file names inside the folder, in order.
        tokenizer: the one that made the ids: a name such as gpt2, or a tokenizer.json.
        headerless: the files are nanoGPT's bare uint16 ids.

    Raises UserError for shards that cannot be read, that disagree on the dtype, or whose ids the tokenizer
    does not have.
    """
    from ..tokenizer import Tokenizer

    folder = Path(folder)
    if (folder / DATASET_FILE).exists():
        raise UserError(f"{folder / DATASET_FILE} exists; remove it to describe the shards anew")
    tok = Tokenizer.load(tokenizer)
    lengths = np.array([len(tok.decode_bytes([i])) for i in range(tok.vocab_size)], dtype=np.int64)
    splits: dict[str, Any] = {}
    dtype = None
    for split, files in zip(SPLITS, (train, val), strict=True):
        entries, documents, text_bytes = [], 0, 0
        for file in files:
            ids = read_shard(folder / file, dtype=dtype, headerless=headerless)
            dtype = ids.dtype
            TokenStream([ids], tok.eot_id, names=[str(folder / file)]).check(tok.vocab_size, 0)
            for start in range(0, len(ids), _SCAN_TOKENS):
                counts = np.bincount(ids[start : start + _SCAN_TOKENS], minlength=tok.vocab_size)
                documents += int(counts[tok.eot_id])
                counts[tok.eot_id] = 0
                text_bytes += int(counts @ lengths)
            offset = 0 if headerless else HEADER_BYTES
            entry = {
                "file": file,
                "tokens": len(ids),
                "bytes": offset + ids.nbytes,
                "crc32": list(block_checksums(folder / file, offset)),
            }
            entries.append(entry | {"header": False} if headerless else entry)
        tokens = sum(entry["tokens"] for entry in entries)
        splits[split] = {"shards": entries, "tokens": tokens, "documents": documents, "text_bytes": text_bytes}
    tok.save(folder / TOKENIZER_FILE)
    return write_meta(
        folder,
        {
            "tokenizer": {"file": TOKENIZER_FILE, "name": tok.name, "sha256": tok.sha256},
            "vocab_size": tok.vocab_size,
            "eot_id": tok.eot_id,
            "dtype": (dtype or dtype_for(tok.vocab_size)).name,
            "block_bytes": BLOCK_BYTES,
            "splits": splits,
        },
    )

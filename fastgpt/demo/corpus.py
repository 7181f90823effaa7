"""The demo's text: Python's own standard library, or files of the user's, and the part of it that is held out.

Everything is decided by names and hashes, so one interpreter version gives one corpus and one split everywhere.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from ..errors import UserError

# Tests and generated tables would teach the model lists of numbers; the rest differs between machines.
LEFT_OUT = {"test", "tests", "idle_test", "idlelib", "pydoc_data", "encodings", "__pycache__"}
LEFT_OUT |= {"site-packages", "dist-packages", "lib-dynload"}
LEFT_OUT_PREFIXES = ("config-", "_sysconfigdata")
PASSED_OVER = {"__pycache__", "node_modules"}  # in the user's folders, beside hidden ones

HELD_OUT_SHARE = 0.04  # of all bytes
HELD_OUT_LIMIT = 1_000_000  # bytes: the whole of it is evaluated six times
LARGEST = 64_000_000  # bytes of the user's text that are taken: more than is read in the time there is
SMALLEST = 50_000
FEWEST_DOCUMENTS = 20  # with fewer, the end of each is held out instead of some of them
UNREAD = (".zst", ".parquet")  # `fastgpt prepare` reads these too
MARK = "<|endoftext|>"
NOT_TEXT = (OSError, ValueError, EOFError, zlib.error)  # undecodable, no JSON, not to be decompressed


@dataclass(frozen=True)
class Document:
    name: str
    """Path under the corpus's folder, with forward slashes."""
    text: str

    @property
    def size(self) -> int:
        """UTF-8 bytes."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Corpus:
    title: str
    train: list[Document]
    val: list[Document]
    held_out: list[str]
    """Names of the modules (or files) in `val`."""
    duplicates: int
    """Documents dropped because an equal one was there."""
    skipped: int
    """Files left out because they hold no UTF-8 text, or too much of it."""
    sha256: str

    def write(self, folder: Path) -> tuple[Path, Path]:
        """train.jsonl and val.jsonl, one {"name", "text"} a line."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = folder / "train.jsonl", folder / "val.jsonl"
        for path, documents in zip(paths, (self.train, self.val), strict=True):
            lines = (json.dumps({"name": d.name, "text": d.text}) + "\n" for d in documents)
            path.write_text("".join(lines), encoding="utf-8")
        return paths


def size(documents: Iterable[Document]) -> int:
    """UTF-8 bytes of all of them."""
    return sum(document.size for document in documents)


def standard_library(root: Optional[Path] = None) -> Corpus:
    """The running Python's standard library: its .py files less LEFT_OUT, split by top-level module.

    Raises UserError where the sources are not there.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    documents = []
    for path in sorted(root.rglob("*.py")) if root.is_dir() else []:
        parts = path.relative_to(root).parts
        if LEFT_OUT.isdisjoint(parts) and not any(part.startswith(LEFT_OUT_PREFIXES) for part in parts):
            with tokenize.open(path) as file:  # honours a coding line
                documents.append(Document("/".join(parts), file.read()))
    if size(documents) < SMALLEST:
        raise UserError(
            f"{sys.executable} has no sources of its standard library under {root}; use a Python that has (Debian: "
            f"apt install libpython{version}-stdlib), or train on your own text: make demo CORPUS=path"
        )
    # argparse.py -> argparse; _strptime and asyncio/locks.py -> strptime and asyncio
    return _corpus(f"Python {version}'s standard library", documents, 0, lambda name: _top(name).lstrip("_"))


def own_files(path: Path) -> Corpus:
    """A file or a folder of the user's, split by document; the end of each where there are only a few.

    A folder gives every file below it that holds UTF-8 text, hidden ones left out. A .jsonl file gives the "text"
    of each line, a .txt file what stands between `<|endoftext|>` marks, and both may be compressed (.gz). Raises
    UserError where there is nothing to read, or too little.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; CORPUS is a text file, or a folder of them")
    documents, skipped = _read(path)
    order = sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest())
    taken, total = [], 0
    for document in order:
        if total + document.size <= LARGEST or not taken:
            taken.append(document)
            total += document.size
    skipped += len(documents) - len(taken)
    if total < SMALLEST:
        raise UserError(f"{path} holds {total:,} bytes of text; the demo needs {SMALLEST:,} or more")
    return _corpus(str(path), sorted(taken, key=lambda d: d.name), skipped, lambda name: name)


def _read(path: Path) -> tuple[list[Document], int]:
    """Every document of a file or below a folder, and how many files hold none."""
    if path.is_file():
        if path.name.endswith(UNREAD):
            raise UserError(f"the demo reads text and .jsonl, not {path}; use fastgpt prepare and fastgpt train for it")
        try:
            return _documents(path, path.name), 0
        except NOT_TEXT as error:
            raise UserError(f"cannot read {path}: {_reason(error)}; expected UTF-8 text") from None
    documents, skipped = [], 0
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in PASSED_OVER)
        for name in sorted(names):
            file = Path(folder, name)
            if name.startswith(".") or not file.is_file():
                continue
            try:
                documents += _documents(file, file.relative_to(path).as_posix())
            except NOT_TEXT:
                skipped += 1
    return documents, skipped


def _documents(file: Path, name: str) -> list[Document]:
    """Raises one of NOT_TEXT."""
    with gzip.open(file) if name.endswith(".gz") else open(file, "rb") as stream:
        data = stream.read(LARGEST + 1)
    data = data[: data.rfind(b"\n", 0, LARGEST) + 1 or LARGEST] if len(data) > LARGEST else data
    text = data.decode("utf-8-sig")
    if "\0" in text:
        raise ValueError("it holds NUL bytes")
    kind = name.removesuffix(".gz")
    if kind.endswith(".jsonl"):
        lines = [json.loads(line) for line in text.split("\n") if line.strip()]
        if not all(isinstance(line, dict) and isinstance(line.get("text"), str) for line in lines):
            raise ValueError('a line is no object with a "text"')
        return [Document(f"{name}:{number}", line["text"]) for number, line in enumerate(lines, 1)]
    if kind.endswith(".txt") and MARK in text:
        return [Document(f"{name}:{number}", part.strip("\n")) for number, part in enumerate(text.split(MARK), 1)]
    return [Document(name, text)]


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start:,}"
    return getattr(error, "strerror", None) or str(error)


def _top(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def _corpus(title: str, documents: list[Document], skipped: int, group: Callable[[str], str]) -> Corpus:
    """Drops empty and repeated documents, and holds out about HELD_OUT_SHARE of the bytes in whole groups."""
    seen: set[str] = set()
    kept = []
    for document in documents:
        if document.text.strip() and document.text not in seen:
            seen.add(document.text)
            kept.append(document)
    duplicates = sum(bool(d.text.strip()) for d in documents) - len(kept)
    digest = hashlib.sha256()
    for document in kept:
        for part in (document.name.encode(), document.text.encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
    target = min(HELD_OUT_SHARE * size(kept), HELD_OUT_LIMIT)
    if len(kept) < FEWEST_DOCUMENTS:
        train, val = _cut(kept, target / size(kept))
        held_out = [f"the last {target / size(kept):.0%} of {'the file' if len(kept) == 1 else 'each file'}"]
    else:
        chosen = _choose(kept, group, target)
        train = [d for d in kept if group(d.name) not in chosen]
        val = [d for d in kept if group(d.name) in chosen]
        held_out = sorted(chosen)
    return Corpus(title, train, val, held_out, duplicates, skipped, digest.hexdigest())


def _choose(documents: list[Document], group: Callable[[str], str], target: float) -> set[str]:
    """Groups in the order of their names' hashes until `target` bytes are reached; one too large is passed over."""
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[group(document.name)] = sizes.get(group(document.name), 0) + document.size
    chosen: set[str] = set()
    total = 0
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if total < target and total + sizes[name] <= 1.2 * target:
            chosen.add(name)
            total += sizes[name]
    return chosen or {min(sizes, key=lambda name: sizes[name])}


def _cut(documents: list[Document], share: float) -> tuple[list[Document], list[Document]]:
    """The beginning of every document, and the last `share` of it, cut at the end of a line where there is one."""
    train, val = [], []
    for document in documents:
        at = round(len(document.text) * (1 - share))
        line_end = document.text.rfind("\n", 0, at) + 1
        at = line_end if line_end > at // 2 else at
        train.append(Document(document.name, document.text[:at]))
        if document.text[at:].strip():
            val.append(Document(document.name + " (end)", document.text[at:]))
    return train, val

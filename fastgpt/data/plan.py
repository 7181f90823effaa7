"""What `prepare` would do, before it does: a sample of the inputs is read and encoded, nothing is written."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import PrepareConfig
from ..errors import UserError
from ..machine import disk_free
from ..units import duration, size
from .digests import DigestSet
from .documents import InputFile, Piece, Position, read_pieces
from .encode import Encoder, Texts
from .preparation import TRAINING_BYTES, Preparation, find_inputs, workers_for
from .shards import dtype_for

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

SAMPLE_BYTES = 2 << 20  # read of the inputs: seconds, with the training of a tokenizer on it


@dataclass(frozen=True)
class Plan:
    """What `plan` found. Text, tokens, bytes of the dataset and times are estimates unless `sampled_bytes` are all."""

    files: int
    input_bytes: int
    empty_files: int
    skipped: str
    """What the folders hold and is not read, in words; empty where there is nothing."""
    sampled_bytes: int
    documents: int
    """In the sample, like the two that follow."""
    duplicates: int
    replaced: int
    """Invalid UTF-8 sequences."""
    text_bytes: int
    tokens: int
    vocab_size: int
    dataset_bytes: int
    free_bytes: int
    tokenizer_seconds: float
    seconds: float
    """Of encoding, by all the workers."""
    workers: int
    out_dir: str
    """What prepare would find there, in words; empty where there is nothing of interest."""


def plan(config: PrepareConfig) -> Plan:
    """Look at a preparation without starting it. Raises UserError where the inputs, or the part of them that is read,
    cannot be used, and where prepare would refuse the folder."""
    config, files, skipped = find_inputs(config)
    preparation = Preparation(config, Path(config.out_dir), files, skipped, progress=False)
    total = preparation.input_bytes
    pieces, sampled = _sample(files, config.text_field)
    if config.tokenizer == "train":
        tokenizer, tokenizer_seconds = _train(pieces, config)
        tokenizer_seconds *= max(1.0, min(total, TRAINING_BYTES) / max(1, sampled))
        found = preparation.outlook(None)
    else:
        from ..tokenizer import Tokenizer

        tokenizer, tokenizer_seconds = Tokenizer.load(config.tokenizer), 0.0
        found = preparation.outlook(tokenizer)
    encoder, digests = Encoder(tokenizer, config.text_field, config.errors), DigestSet()
    tokens = documents = duplicates = text_bytes = replaced = 0
    began = time.perf_counter()
    for piece in pieces:
        encoded = encoder.encode(piece)
        replaced += sum(encoded.replaced.values())
        for count, length, digest in zip(encoded.tokens, encoded.text_bytes, encoded.digests, strict=True):
            if piece.kind != "part" or piece.first:
                known = not digests.add(digest)
                duplicates += known
                documents += not known
            if not known:
                tokens, text_bytes = tokens + count, text_bytes + length
    seconds = time.perf_counter() - began
    if not tokens and sampled >= total:
        raise UserError("the inputs hold no text; expected at least one document that is not empty")
    scale = total / max(1, sampled)
    workers = config.workers or workers_for(total)
    return Plan(
        files=len(files),
        input_bytes=total,
        empty_files=sum(not file.size for file in files),
        skipped=preparation.told_skipped(),
        sampled_bytes=sampled,
        documents=documents,
        duplicates=duplicates,
        replaced=replaced,
        text_bytes=round(text_bytes * scale),
        tokens=round(tokens * scale),
        vocab_size=tokenizer.vocab_size,
        dataset_bytes=round(tokens * scale) * dtype_for(tokenizer.vocab_size).itemsize,
        free_bytes=disk_free(config.out_dir),
        tokenizer_seconds=tokenizer_seconds,
        seconds=seconds * scale / workers,
        workers=workers,
        out_dir=found,
    )


def _sample(files: list[InputFile], text_field: str) -> tuple[list[Piece], int]:
    """The first pieces of files all over the inputs, in proportion, and the bytes of the inputs that they take."""
    share = min(1.0, SAMPLE_BYTES / max(1, sum(file.size for file in files)))
    pieces: list[Piece] = []
    wanted = 0.0
    taken = 0
    for file in files:
        wanted += share * file.size
        if share < 1 and taken >= wanted:
            continue
        before, lines = taken, 0
        for piece in read_pieces([file], Position(), text_field):
            pieces.append(piece)
            if piece.kind == "jsonl":
                piece.line = lines
                lines += sum(1 for _ in piece.lines()) - 1
            taken = before + piece.consumed
            if share < 1 and taken >= wanted:
                break
        else:
            taken = before + file.size
    return pieces, taken


def _train(pieces: list[Piece], config: PrepareConfig) -> tuple[Tokenizer, float]:
    """A tokenizer of the sample, and the seconds that it took."""
    from ..tokenizer import Tokenizer

    began = time.perf_counter()
    texts = (text for piece in pieces for text, _ in Texts(piece, config.text_field, config.errors))
    return Tokenizer.train(texts=texts, vocab_size=config.vocab_size), time.perf_counter() - began


def report(found: Plan, config: PrepareConfig) -> str:
    """`plan()`'s findings as lines for people."""
    whole = found.sampled_bytes >= found.input_bytes
    about = "" if whole else "about "
    empty = f", {found.empty_files:,} of them empty" if found.empty_files else ""
    if config.val_inputs:
        split = "those of --val_inputs to validate on"
    else:
        split = f"about {100 * config.val_fraction:g} % of them to validate on"
    dropped = [f"{found.duplicates:,} duplicates" if found.duplicates else "no duplicate"]
    dropped += [f"{found.replaced:,} invalid UTF-8 sequences to be replaced"] if found.replaced else []
    rows = {
        "files": f"{found.files:,}{empty}, {size(found.input_bytes)}",
        "skipped": found.skipped,
        "sample": f"{'all' if whole else size(found.sampled_bytes)} of it was read: {', '.join(dropped)}",
        "text": f"{about}{size(found.text_bytes)}" + (f" in {found.documents:,} documents" if whole else ""),
        "tokens": f"{about}{found.tokens:,} of a vocabulary of {found.vocab_size:,}, {split}",
        "disk": f"{about}{size(found.dataset_bytes)}; {size(found.free_bytes)} are free at {config.out_dir}",
        "time": f"about {duration(found.tokenizer_seconds + found.seconds)}, with {found.workers} worker"
        f"{'s' * (found.workers > 1)}"
        + (f", {duration(found.tokenizer_seconds)} of it to train the tokenizer" if found.tokenizer_seconds else ""),
        "out_dir": found.out_dir,
    }
    lines = [f"{name:10} {value}" for name, value in rows.items() if value]
    if found.dataset_bytes > found.free_bytes:
        lines.append("The disk is too small for the dataset: make room, or give another --out_dir.")
    return "\n".join(lines)

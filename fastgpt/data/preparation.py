"""Text files to a dataset: read, encode in parallel, drop duplicates, write shards.

One process reads and writes in order; workers encode. Every so often the state of the work (how far reading and
each split's shards have come) is synced to the disk, so a run that was killed goes on from there: the shards are
cut back to that state, and what follows is a function of the inputs alone. dataset.json is written last, so a
folder either holds a whole dataset or none.

In the folder while it works: prepare.json (the state), prepare.digests (of the documents so far), *.partial. The state
has a checksum of itself and those of all that it speaks of; what does not match them is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
import sys
import time
import zlib
from collections import deque
from collections.abc import Container, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import PrepareConfig
from ..errors import UserError
from ..files import FolderLock, partial, sync, write_atomically
from ..machine import cores
from .dataset import DATASET_FILE, SPLITS, TOKENIZER_FILE, Dataset, read_meta, write_meta
from .digests import DigestSet
from .documents import (
    DIGEST_BYTES,
    InputError,
    InputFile,
    Piece,
    Position,
    digest_of,
    find_files,
    plain_path,
    read_pieces,
)
from .encode import Encoded, Encoder, Texts
from .pool import Inline, WorkerPool
from .shards import BLOCK_BYTES, MAX_SHARD_TOKENS, ShardWriter, dtype_for, start_again

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

STATE_FILE, DIGESTS_FILE = "prepare.json", "prepare.digests"
STATE_VERSION = 4

STATE_SECONDS = 5.0  # between two states on the disk: what a kill can cost
LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal
# Of text that a tokenizer is trained on: in a script without spaces hardly a piece recurs, and each byte takes about
# 120 of memory (measured on 8 and 16 MiB of Chinese characters), so this keeps training below 2 GB.
TRAINING_BYTES = 16 << 20
FEW_TOKENS = 1000  # a token's loss varies by about 3 nats, so the mean of fewer is off by more than 0.1
FEW_DOCUMENTS = 5  # in a validation split: what they happen to be about decides its loss
NAMES = 3  # of files that a line tells before it only counts them
_AHEAD_PER_WORKER = 3  # pieces read ahead of the one to write next: one encoding, two waiting
_AHEAD_BYTES = 4 << 20  # ... and their text for each worker, which bounds the memory
_SMALL = 4 << 20  # input for which another worker would start later than the work is done


def prepare(config: PrepareConfig, progress: bool = True) -> dict[str, Any]:
    """Turn `config.inputs` into a dataset in `config.out_dir`, going on where an interrupted run stopped.

    Returns dataset.json's content and, under `run` (not in the file): `seconds` (of reading, encoding and
    writing), `tokenizer_seconds`, `mb_per_second` (of text), `resumed` and `already_done`. The same inputs and
    settings give the same bytes with any number of workers, however often the run was interrupted.

    `config.overwrite` replaces a dataset that prepare wrote to the folder before, and an interrupted run of other
    inputs or settings. What is there is gone from the first moment of the work on; files of others are not touched.

    `progress` shows a bar on stderr, or lines where that is no terminal.

    Raises UserError, with nothing kept in the folder, for inputs that cannot be read (missing, empty, not UTF-8
    and errors="strict", damaged) and for a full disk; and, with the folder left as it is, where another prepare
    works there, where it holds anything but this very dataset (or, to overwrite, another), and where a worker dies.
    """
    config, files, skipped = find_inputs(config)
    folder = Path(config.out_dir)
    created = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            return Preparation(config, folder, files, skipped, progress).run()
    except OSError as error:
        raise UserError(f"cannot write to {error.filename or folder}: {error.strerror or error}") from None
    finally:
        if created:  # and nothing was kept
            with contextlib.suppress(OSError):
                folder.rmdir()


def find_inputs(config: PrepareConfig) -> tuple[PrepareConfig, list[InputFile], list[str]]:
    """The configuration with its paths spelled plainly, the files in reading order, and the names of those that are
    skipped. Raises UserError where there is nothing to read."""
    if not config.inputs:
        raise UserError("inputs is empty; expected files or folders of text")
    if config.shard_tokens > MAX_SHARD_TOKENS:
        raise UserError(
            f"--shard_tokens = {config.shard_tokens}: expected at most {MAX_SHARD_TOKENS}: a header counts in int32"
        )
    config = config.replace(
        inputs=tuple(map(plain_path, config.inputs)), val_inputs=tuple(map(plain_path, config.val_inputs))
    )
    # validation first: a training document that is also in there is the one to be dropped
    files, skipped = find_files(config.val_inputs, "val")
    more_files, more_skipped = find_files(config.inputs, "train" if config.val_inputs else "")
    return config, files + more_files, skipped + more_skipped


def workers_for(input_bytes: int) -> int:
    """Processes that encode so much, where nobody has said."""
    return min(cores(), 1 + input_bytes // _SMALL)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock ends with the process, however it ends."""
    try:
        lock = FolderLock(folder)
    except BlockingIOError:
        raise UserError(f"another prepare is at work in {folder}; wait for it or choose another --out_dir") from None
    try:
        yield
    finally:
        lock.release()


class Preparation:
    """One run over one folder."""

    def __init__(self, config: PrepareConfig, folder: Path, files: list[InputFile], skipped: list[str], progress: bool):
        self.config, self.folder, self.files, self.skipped = config, folder, files, skipped
        self.input_bytes = sum(file.size for file in files)
        self.show = _Progress(self.input_bytes, progress)
        self.tokenizer_seconds = 0.0
        # what the state on the disk holds besides the writers' own
        self.position = Position()
        self.consumed = 0
        self.long_split: str | None = None  # where the long document that is being read goes
        self.long_kept = False
        self.counts = {split: {"documents": 0, "text_bytes": 0} for split in SPLITS}
        self.duplicates = self.empty = self.replaced = 0
        self.replaced_in, self.val_in = _Files(), _Files()
        self.val_is_the_end = False  # of the text, as there were too few documents to choose from
        self.tokenizer_owned = False
        self.digests = DigestSet()
        self.digests_crc = 0  # of prepare.digests
        self.encoded_ids = self.encoded_input = 0  # what the size of the whole is estimated from
        self.pool: Inline | WorkerPool | None = None
        self.encoder: Encoder | None = None
        self.writers: dict[str, ShardWriter] = {}
        self.digests_file: Any = None

    def run(self) -> dict[str, Any]:
        try:
            tokenizer = self._given_tokenizer()
            self.settings = self._settings(tokenizer)
            self.fingerprint = self._fingerprint()
            finished = (self.folder / DATASET_FILE).exists()
            if finished and not self.config.overwrite:
                return self._already_done()
            return self._work_or_clean(tokenizer, finished)
        finally:
            self._close()
            self.show.close()

    def _given_tokenizer(self) -> Tokenizer | None:
        if self.config.tokenizer == "train":
            return None
        new = not (self.folder / DATASET_FILE).exists()
        if new:
            self._workers()  # they come up while the tokenizer is loaded
        from ..tokenizer import Tokenizer

        tokenizer = Tokenizer.load(self.config.tokenizer)
        if new:
            self._start(tokenizer)  # and build theirs while the folder is made ready
        return tokenizer

    def _work_or_clean(self, tokenizer: Tokenizer | None, overwrite: bool) -> dict[str, Any]:
        state = None
        try:
            state = self._overwritten_state(tokenizer) if overwrite else self._interrupted_state(tokenizer)
            return self._work(state, tokenizer)
        except InputError:
            self._clean()
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            needed = self._bytes_needed()
            if state is not None:  # else what is in the folder is not this run's yet
                self._clean()
            free = shutil.disk_usage(self.folder).free
            raise UserError(
                f"no space to write in {self.folder}: {error.strerror}; the dataset needs about {needed:,} bytes and "
                f"{free:,} are free now that what was written is removed"
            ) from None

    # ---- what has been done before ---------------------------------------------------------------

    def _settings(self, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """What the result depends on, besides the files."""
        settings = self.config.to_dict()
        for name in ("out_dir", "overwrite", "workers"):
            del settings[name]
        if tokenizer is not None:
            del settings["vocab_size"]
            settings["tokenizer"] = tokenizer.sha256
        if self.config.val_inputs:
            del settings["val_fraction"]
        return settings

    def _fingerprint(self) -> str:
        listed = [(file.name, file.kind, file.split, file.size, file.mtime_ns) for file in self.files]
        return hashlib.sha256(json.dumps([self.settings, listed]).encode()).hexdigest()

    def _difference(self, other: dict[str, Any]) -> str:
        """Which setting another run in this folder had, in words."""
        for name, value in self.settings.items():
            if other.get(name) != value:
                return f"{name} was {other.get(name)!r} and now is {value!r}"
        return "the input files have changed since"

    def _holds_another(self, meta: dict[str, Any]) -> str:
        return (
            f"{self.folder} holds a dataset prepared otherwise ({self._difference(meta.get('settings', {}))}); "
            f"choose another --out_dir, or replace it with --overwrite"
        )

    def _already_done(self) -> dict[str, Any]:
        meta = read_meta(self.folder)
        if meta.get("fingerprint") != self.fingerprint:
            raise UserError(self._holds_another(meta))
        try:
            Dataset.open(self.folder)
        except UserError as error:
            raise UserError(f"{error}; prepare it anew with --overwrite") from None
        self._remove_temporaries()
        self.show.line(f"{self.folder} was already prepared from these inputs; nothing to do")
        return {**meta, "run": self._run_report(0, 0, resumed=False, already_done=True)}

    def _overwritten_state(self, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """Take over the folder of a finished dataset."""
        meta = read_meta(self.folder)
        if "fingerprint" not in meta:
            raise UserError(f"{self.folder} holds a dataset that prepare did not write; choose another --out_dir")
        shards = {shard["file"] for split in SPLITS for shard in meta["splits"][split]["shards"]}
        self._refuse_files_of_others({*shards, DIGESTS_FILE})
        return self._new_state(tokenizer, meta["tokenizer"].get("owned", False))

    def _refuse_files_of_others(self, ours: Container[str]) -> None:
        for pattern in (*(f"{split}-*.bin*" for split in SPLITS), DIGESTS_FILE):
            for found in self.folder.glob(pattern):
                if found.name not in ours:
                    raise UserError(f"{found} was not written by this prepare; choose another --out_dir")

    def _new_state(self, tokenizer: Tokenizer | None, tokenizer_owned: bool) -> dict[str, Any]:
        """Take the folder: from here on it is that of an interrupted run which has done nothing yet. Such a run begins
        by removing shards, so those of a dataset that is overwritten go, whenever this one is killed."""
        path = self.folder / TOKENIZER_FILE
        if not path.exists():
            tokenizer_owned = True
        elif (given := self._given_file()) and given.samefile(path):
            tokenizer_owned = False  # it is an input
        if not tokenizer_owned and tokenizer is None:
            raise UserError(
                f"{path} exists; give it as --tokenizer to encode with it, or choose another --out_dir to train a new "
                f"one"
            )
        if not tokenizer_owned:
            self._refuse_another_tokenizer(tokenizer)
        state = {"tokenizer_owned": tokenizer_owned}
        self._write_state(state)
        (self.folder / DATASET_FILE).unlink(missing_ok=True)
        sync(self.folder)
        return state

    def _interrupted_state(self, tokenizer: Tokenizer | None) -> dict[str, Any]:
        path = self.folder / STATE_FILE
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            self._refuse_files_of_others(())
            return self._new_state(tokenizer, tokenizer_owned=False)
        state = _unsealed(content)
        if state is None or state["version"] != STATE_VERSION:
            what = "is damaged" if state is None else "is of another version of fastgpt"
            raise UserError(f"{path} {what}; {start_again(self.folder)}")
        if state["fingerprint"] == self.fingerprint:
            return state
        if self.config.overwrite:
            return self._new_state(tokenizer, state["tokenizer_owned"])
        raise UserError(
            f"{self.folder} holds an interrupted prepare of other inputs or settings "
            f"({self._difference(state['settings'])}); choose another --out_dir, or replace it with --overwrite"
        )

    def outlook(self, tokenizer: Tokenizer | None) -> str:
        """What `run` would find in the folder, in words; empty where there is nothing. Raises UserError where it would
        refuse the folder; nothing is changed."""
        self.settings = self._settings(tokenizer)
        self.fingerprint = self._fingerprint()
        state = self.folder / STATE_FILE
        if (self.folder / DATASET_FILE).exists():
            same = read_meta(self.folder).get("fingerprint") == self.fingerprint
            if self.config.overwrite:
                return "holds a dataset, which is replaced"
            if not same:
                raise UserError(self._holds_another(read_meta(self.folder)))
            return "holds this very dataset: there is nothing to do"
        begun = _unsealed(state.read_bytes()) if state.exists() else None
        if begun is not None and begun["fingerprint"] == self.fingerprint:
            return f"holds an interrupted run, which goes on after {begun.get('consumed', 0):,} bytes of the inputs"
        return ""

    # ---- the work --------------------------------------------------------------------------------

    def _work(self, state: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
        resumed = "position" in state
        if skipped := self.told_skipped():
            self.show.line(f"skipped {skipped}")
        self.tokenizer_owned = state["tokenizer_owned"]
        tokenizer = self._tokenizer(tokenizer, state if resumed else None)
        self._start(tokenizer)
        dtype = dtype_for(tokenizer.vocab_size)
        self.writers = {split: ShardWriter(self.folder, split, dtype, self.config.shard_tokens) for split in SPLITS}
        self.tokenizer_sha256 = tokenizer.sha256
        self._restore(state if resumed else None)
        self._save()
        began, text_before = time.perf_counter(), self._text_bytes()
        self.show.start(self.consumed, resumed)
        self._encode_all()
        meta = self._finish(tokenizer)
        seconds = time.perf_counter() - began
        self.show.close()
        report = self._run_report(seconds, self._text_bytes() - text_before, resumed, already_done=False)
        self.show.line(self._summary(meta, report))
        if warning := self._validation_warning(meta["splits"]["val"]):
            self.show.line(f"warning: {warning}")
        return {**meta, "run": report}

    def _tokenizer(self, tokenizer: Tokenizer | None, resumed: dict[str, Any] | None) -> Tokenizer:
        from ..tokenizer import Tokenizer

        path = self.folder / TOKENIZER_FILE
        if tokenizer is None and resumed is not None:
            try:
                tokenizer = Tokenizer.load(path)
            except UserError as error:
                raise UserError(f"{error}; {start_again(self.folder)}") from None
        elif tokenizer is None:
            self.show.line("training the tokenizer")
            began = time.perf_counter()
            try:
                tokenizer = Tokenizer.train(
                    texts=self._training_texts(), vocab_size=self.config.vocab_size, max_bytes=2 * TRAINING_BYTES
                )
            except UserError as error:
                raise InputError(str(error)) from None
            self.tokenizer_seconds = time.perf_counter() - began
            line = f"trained a tokenizer of {tokenizer.vocab_size} tokens in {self.tokenizer_seconds:.1f} s"
            if tokenizer.vocab_size < self.config.vocab_size:
                line += (
                    f"; the text is too short for the {self.config.vocab_size} asked for: no other pair occurs twice"
                )
            self.show.line(line)
        if resumed is not None and tokenizer.sha256 != resumed["tokenizer_sha256"]:
            raise UserError(f"{path} is not the tokenizer of the interrupted run; {start_again(self.folder)}")
        if self.tokenizer_owned:  # a resumed run's too: damage may leave the same tokenizer in other bytes
            write_atomically(path, self._tokenizer_text(tokenizer))
        else:
            self._refuse_another_tokenizer(tokenizer)
        return tokenizer

    def _refuse_another_tokenizer(self, tokenizer: Tokenizer) -> None:
        from ..tokenizer import Tokenizer

        path = self.folder / TOKENIZER_FILE
        if Tokenizer.load(path) != tokenizer:
            raise UserError(f"{path} is another tokenizer than {self.config.tokenizer}; choose another --out_dir")

    def _given_file(self) -> Path | None:
        """The file that the tokenizer was loaded from, if it came from one."""
        given = Path(self.config.tokenizer)
        given = given / TOKENIZER_FILE if given.is_dir() else given
        return given if self.config.tokenizer != "train" and given.is_file() else None

    def _tokenizer_text(self, tokenizer: Tokenizer) -> str:
        given = self._given_file()
        return given.read_text(encoding="utf-8") if given else tokenizer.to_json()

    def _training_texts(self) -> Iterator[str]:
        """Text of the training split, up to TRAINING_BYTES: the first part of every file, in proportion.

        Where many small files make up the corpus, it is every so-many-th of them. A corpus without validation
        documents, whose end `_cut_validation` will take, is left without its end here too.
        """
        files = [file for file in self.files if file.split != "val"]
        share = min(1.0, TRAINING_BYTES / max(1, sum(file.size for file in files)))
        wanted = taken = 0.0
        validation_seen = bool(self.config.val_inputs) or share < 1
        held: deque[str] = deque()  # texts whose end may yet be taken away
        total = 0
        for file in files:
            wanted += share * file.size
            if share < 1 and taken >= wanted:
                continue
            split, lines = "", 0
            for piece in read_pieces([file], Position(), self.config.text_field):
                piece.line = lines
                texts = Texts(piece, self.config.text_field, self.config.errors)
                for text, data in texts:
                    if piece.kind != "part" or piece.first:
                        split = self._split_of(piece.split, piece.digest or digest_of(data))
                    taken += len(data)
                    if split == "val":
                        validation_seen = True
                        continue
                    total += len(data)
                    held.append(text)
                lines += texts.lines
                while held and validation_seen:
                    yield held.popleft()
                if share < 1 and taken >= wanted:
                    break
        # nothing was held back once a validation document was seen; else cut the same share from the end
        spare = int(self.config.val_fraction * total)
        while held and spare > 0:
            last = held.pop()
            size = len(last.encode())
            if size > spare:
                held.append(last.encode()[: size - spare].decode("utf-8", "ignore"))
            spare -= size
        while held:
            yield held.popleft()

    def _split_of(self, given: str, digest: bytes) -> str:
        if given:
            return given
        return "val" if int.from_bytes(digest[:8], "little") < self.config.val_fraction * 2**64 else "train"

    def _workers(self) -> Inline | WorkerPool:
        """The processes that encode, started at the first call."""
        if self.pool is None:
            workers = self.config.workers or workers_for(self.input_bytes)
            self.pool = WorkerPool(workers) if workers > 1 else Inline()
        return self.pool

    def _start(self, tokenizer: Tokenizer) -> None:
        """Give the workers what they encode with, once."""
        if self.encoder is None:
            self.encoder = Encoder(tokenizer, self.config.text_field, self.config.errors)
            self._workers().start(self.encoder)

    def _encode_all(self) -> None:
        pool, encoder = self._workers(), self.encoder
        ahead: deque[tuple[Piece, Future[Encoded]]] = deque()
        ahead_bytes = 0
        saved = time.monotonic()
        pieces = read_pieces(self.files, self.position, self.config.text_field)
        while True:
            piece = next(pieces, None)
            while ahead and (
                piece is None
                or len(ahead) >= _AHEAD_PER_WORKER * pool.workers
                or ahead_bytes + piece.size > _AHEAD_BYTES * pool.workers
            ):
                done, future = ahead.popleft()
                ahead_bytes -= done.size
                if done.kind == "jsonl":  # what was before it is committed, and with that counted
                    done.line = self.position.line if self.position.file == done.position.file else 0
                try:
                    encoded = future.result()
                except InputError:
                    encoder.encode(done)  # raises it with the number of the line in the file
                    raise
                self._commit(done, encoded)
                if time.monotonic() - saved >= STATE_SECONDS:
                    self._save()
                    saved = time.monotonic()
            if piece is None:
                break
            ahead.append((piece, pool.submit(piece)))
            ahead_bytes += piece.size
        pool.close()
        self.position = Position(len(self.files))
        self._save()

    def _commit(self, piece: Piece, encoded: Encoded) -> None:
        """Take one piece's documents over, in reading order."""
        ids = np.frombuffer(encoded.ids, np.uint32).astype(self.writers["train"].dtype)
        self.encoded_ids += len(ids)
        self.encoded_input = piece.consumed
        runs: list[list[Any]] = []  # [split, first id, end]: neighbours that go to one place are written at once
        end = 0
        documents = zip(encoded.tokens, encoded.text_bytes, encoded.digests, strict=True)
        for number, (tokens, text_bytes, digest) in enumerate(documents):
            start, end = end, end + tokens
            if piece.kind == "part" and not piece.first:
                split, kept = self.long_split, self.long_kept
            else:
                split, kept = self._split_of(piece.split, digest), self.digests.add(digest)
                self.long_split, self.long_kept = split, kept
                if kept:
                    self.digests_file.write(digest)
                    self.digests_crc = zlib.crc32(digest, self.digests_crc)
            if not kept:
                self.duplicates += piece.last
                continue
            self.counts[split]["documents"] += piece.last
            self.counts[split]["text_bytes"] += text_bytes
            if split == "val":
                # each document of such a piece is an item of it; the lines of a .jsonl file are one item
                self.val_in.add(piece.where[number if len(piece.where) == len(encoded.tokens) else 0][0])
            if runs and runs[-1][0] == split and runs[-1][2] == start:
                runs[-1][2] = end
            else:
                runs.append([split, start, end])
        for split, start, end in runs:
            self.writers[split].append(ids[start:end])
        self.empty += encoded.empty
        for name, count in encoded.replaced.items():
            self.replaced += count
            self.replaced_in.add(name)
        if piece.kind == "jsonl":
            piece.position.line = piece.line + encoded.lines
        self.position, self.consumed = piece.position, piece.consumed
        self.show.update(self.consumed, self._text_bytes())

    def _cut_validation(self, tokenizer: Tokenizer) -> None:
        """Where documents are so few that their hashes give no fair split (a single long text, say), validation gets
        the end of the whole text instead."""
        train, val = self.writers["train"], self.writers["val"]
        fraction = self.config.val_fraction
        if self.config.val_inputs or fraction == 0:
            return
        if val.tokens > train.tokens and (fraction < 0.5 or not train.tokens):
            moved = self.counts["val"]
            self.counts["train"] = {name: count + moved[name] for name, count in self.counts["train"].items()}
            self.counts["val"] = dict.fromkeys(moved, 0)
            self._move(val, train, 0)
        if val.tokens or train.tokens < 2:
            return
        start = train.tokens - math.ceil(fraction * train.tokens)
        while start > 1 and tokenizer.decode_bytes(train.read(start, start + 1))[0] & 0xC0 == 0x80:
            start -= 1  # not inside a character
        documents = text_bytes = 0
        for ids in train.blocks(start):
            ends = int(np.count_nonzero(ids == tokenizer.eot_id))
            documents += ends
            text_bytes += len(tokenizer.decode_bytes(ids[ids != tokenizer.eot_id]))
        whole = start and int(train.read(start - 1, start)[0]) == tokenizer.eot_id  # the cut is between two documents
        self.counts["val"] = {"documents": documents, "text_bytes": text_bytes}
        self.counts["train"]["text_bytes"] -= text_bytes
        self.counts["train"]["documents"] -= documents - (not whole)
        self.val_is_the_end = True
        self._move(train, val, start)

    def _move(self, source: ShardWriter, target: ShardWriter, start: int) -> None:
        """Move a split's ids from `start` on to the other split; the counts are already those after it."""
        for ids in source.blocks(start):
            target.append(ids)
        # the state says that the source is shorter before it is: a run killed here cuts it when it goes on
        self._save({source.split: start})
        source.truncate(start)

    def _finish(self, tokenizer: Tokenizer) -> dict[str, Any]:
        if not any(writer.tokens for writer in self.writers.values()):
            raise InputError("the inputs hold no text; expected at least one document that is not empty")
        self._cut_validation(tokenizer)
        train = self.writers["train"]
        if train.tokens and int(train.read(train.tokens - 1, train.tokens)[0]) != tokenizer.eot_id:
            train.append(np.array([tokenizer.eot_id], dtype=train.dtype))  # its last document was cut
        splits = {
            split: {"shards": writer.finish(), "tokens": writer.tokens, **self.counts[split]}
            for split, writer in self.writers.items()
        }
        meta = write_meta(
            self.folder,
            {
                "tokenizer": {
                    "file": TOKENIZER_FILE,
                    "name": tokenizer.name,
                    "sha256": tokenizer.sha256,
                    "owned": self.tokenizer_owned,
                },
                "vocab_size": tokenizer.vocab_size,
                "eot_id": tokenizer.eot_id,
                "dtype": train.dtype.name,
                "block_bytes": BLOCK_BYTES,
                "splits": splits,
                "duplicates": self.duplicates,
                "empty": self.empty,
                "replaced": self.replaced,
                "sources": {"files": len(self.files), "bytes": self.input_bytes, "skipped": len(self.skipped)},
                "settings": self.settings,
                "fingerprint": self.fingerprint,
            },
        )
        self._remove_temporaries()
        return meta

    # ---- the state on the disk -------------------------------------------------------------------

    def _save(self, truncated: dict[str, int] | None = None) -> None:
        """Put the state on the disk, after what it speaks of. `truncated`: tokens a split is about to be cut to."""
        for writer in self.writers.values():
            writer.sync()
        self.digests_file.flush()
        os.fsync(self.digests_file.fileno())
        splits = {
            split: {**writer.state((truncated or {}).get(split)), **self.counts[split]}
            for split, writer in self.writers.items()
        }
        self._write_state(
            {
                "tokenizer_owned": self.tokenizer_owned,
                "tokenizer_sha256": self.tokenizer_sha256,
                "position": dataclasses.asdict(self.position),
                "consumed": self.consumed,
                "long_split": self.long_split,
                "long_kept": self.long_kept,
                "splits": splits,
                "digests": len(self.digests),
                "digests_crc32": self.digests_crc,
                "duplicates": self.duplicates,
                "empty": self.empty,
                "replaced": self.replaced,
                "replaced_in": dataclasses.asdict(self.replaced_in),
                "val_in": dataclasses.asdict(self.val_in),
                "val_is_the_end": self.val_is_the_end,
            }
        )

    def _write_state(self, state: dict[str, Any]) -> None:
        head = {"version": STATE_VERSION, "fingerprint": self.fingerprint, "settings": self.settings}
        write_atomically(self.folder / STATE_FILE, _sealed({**head, **state}))

    def _restore(self, state: dict[str, Any] | None) -> None:
        path = self.folder / DIGESTS_FILE
        if state is None:
            for writer in self.writers.values():
                writer.truncate(0)
            self.digests_file = open(path, "wb")  # noqa: SIM115 - closed by _close()
            return
        for split, writer in self.writers.items():
            saved = state["splits"][split]
            writer.restore(saved)
            self.counts[split] = {name: saved[name] for name in ("documents", "text_bytes")}
        if not path.is_file() or path.stat().st_size < DIGEST_BYTES * state["digests"]:
            raise UserError(f"{path} is shorter than the interrupted run left it; {start_again(self.folder)}")
        self.digests_file = open(path, "r+b")  # noqa: SIM115 - closed by _close()
        for _ in range(state["digests"]):
            digest = self.digests_file.read(DIGEST_BYTES)
            self.digests.add(digest)
            self.digests_crc = zlib.crc32(digest, self.digests_crc)
        if self.digests_crc != state["digests_crc32"]:
            raise UserError(f"{path} has changed since the interrupted run wrote it; {start_again(self.folder)}")
        self.digests_file.truncate(DIGEST_BYTES * state["digests"])
        self.digests_file.seek(0, os.SEEK_END)
        self.position = Position(**state["position"])
        for name in ("consumed", "long_split", "long_kept", "duplicates", "empty", "replaced", "val_is_the_end"):
            setattr(self, name, state[name])
        self.replaced_in, self.val_in = _Files(**state["replaced_in"]), _Files(**state["val_in"])
        self.encoded_ids, self.encoded_input = sum(w.tokens for w in self.writers.values()), self.consumed

    def _close(self) -> None:
        if self.pool is not None:
            self.pool.close()
        for writer in self.writers.values():
            writer.close()
        if self.digests_file is not None:
            with contextlib.suppress(OSError):  # unwritten digests of a run that ends here anyway
                self.digests_file.close()

    def _remove_temporaries(self) -> None:
        state = self.folder / STATE_FILE
        for path in (self.folder / DIGESTS_FILE, partial(state), state):  # last what says whose the others are
            path.unlink(missing_ok=True)
        sync(self.folder)

    def _clean(self) -> None:
        """Remove everything that this preparation has written."""
        self._close()
        for split in SPLITS:
            for path in self.folder.glob(f"{split}-*.bin*"):
                path.unlink()
        if self.tokenizer_owned:
            (self.folder / TOKENIZER_FILE).unlink(missing_ok=True)
        self._remove_temporaries()

    # ---- figures ---------------------------------------------------------------------------------

    def _text_bytes(self) -> int:
        return sum(count["text_bytes"] for count in self.counts.values())

    def _bytes_needed(self) -> int:
        """Bytes of the whole dataset, from what the inputs read so far came to."""
        size = self.writers["train"].dtype.itemsize if self.writers else dtype_for(self.config.vocab_size).itemsize
        if self.encoded_input:
            return int(self.encoded_ids * size * self.input_bytes / self.encoded_input)
        return self.input_bytes // 3 * size  # before anything was encoded: about three bytes to a token

    def _run_report(self, seconds: float, text_bytes: int, resumed: bool, already_done: bool) -> dict[str, Any]:
        return {
            "seconds": seconds,
            "tokenizer_seconds": self.tokenizer_seconds,
            "mb_per_second": text_bytes / 1e6 / seconds if seconds else 0.0,
            "resumed": resumed,
            "already_done": already_done,
        }

    def told_skipped(self) -> str:
        """What the folders hold and is not read, in words."""
        if not self.skipped:
            return ""
        count = len(self.skipped)
        names = ", ".join(self.skipped[:NAMES]) + (", ..." if count > NAMES else "")
        files = "1 file of another kind" if count == 1 else f"{count:,} files of other kinds"
        return f"{files}: {names}; name a file itself to read it"

    def _validation_warning(self, val: dict[str, Any]) -> str:
        """What is wrong with the validation split, if anything, and the remedy."""
        remedy = "more --val_inputs" if self.config.val_inputs else "a larger --val_fraction, or --val_inputs"
        if 0 < val["tokens"] < FEW_TOKENS:
            return f"{val['tokens']} tokens are too few for a validation loss to rely on; give {remedy}"
        if self.val_is_the_end and len(self.files) > 1:
            return (
                f"validation is the end of the text, in {self.files[-1].name}, so its loss tells little of the other "
                f"files; give --val_inputs"
            )
        if self.val_is_the_end or not 0 < val["documents"] < FEW_DOCUMENTS or self.config.val_inputs:
            return ""
        count = "1 document" if val["documents"] == 1 else f"{val['documents']} documents"
        return (
            f"validation is {count} alone, from {self.val_in.told()}, and its loss depends on what is in there; give "
            f"{remedy}"
        )

    def _summary(self, meta: dict[str, Any], report: dict[str, Any]) -> str:
        train, val = (meta["splits"][split] for split in SPLITS)
        notes = ["the end of the text became the validation split"] if self.val_is_the_end else []
        notes += [
            f"{count:,} {what}"
            for count, what in (
                (self.duplicates, "duplicates dropped"),
                (self.empty, "empty documents left out"),
                (self.replaced, f"invalid UTF-8 sequences replaced, in {self.replaced_in.told()}"),
            )
            if count
        ]
        documents = len(self.digests)
        return (
            f"{documents:,} document{'' if documents == 1 else 's'}, {self._text_bytes() / 1e6:,.1f} MB of text: "
            f"{train['tokens']:,} tokens to train on, {val['tokens']:,} to validate on, as {meta['dtype']}, in "
            f"{report['seconds']:.1f} s ({report['mb_per_second']:.1f} MB/s)" + "".join(f"; {note}" for note in notes)
        )


@dataclasses.dataclass
class _Files:
    """Files that have something in common, met in reading order: how many, and the names of the first few."""

    names: list[str] = dataclasses.field(default_factory=list)
    count: int = 0
    last: str = ""

    def add(self, name: str) -> None:
        if name == self.last:
            return
        self.last = name
        self.count += 1
        if len(self.names) < NAMES:
            self.names.append(name)

    def told(self) -> str:
        more = self.count - len(self.names)
        return ", ".join(self.names) + (f" and {more:,} more file{'s' * (more > 1)}" if more else "")


def _checksum(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _sealed(state: dict[str, Any]) -> str:
    """The text of prepare.json: the state and its checksum."""
    return json.dumps({**state, "sha256": _checksum(state)}) + "\n"


def _unsealed(content: bytes) -> dict[str, Any] | None:
    """The state that `_sealed` wrote; None where the content is anything else."""
    try:
        state = json.loads(content)
        return state if isinstance(state, dict) and state.pop("sha256", None) == _checksum(state) else None
    except (ValueError, RecursionError):
        return None


class _Progress:
    """A bar on stderr, or a line every so often where that is no terminal. A closed stderr is no matter."""

    def __init__(self, total: int, enabled: bool):
        self.total, self.enabled = total, enabled
        self.bar: Any = None

    def start(self, consumed: int, resumed: bool) -> None:
        self.began = self.last = time.monotonic()
        self.text_before: int | None = None
        if not self.enabled:
            return
        if resumed:
            self.line(f"going on after {consumed / 1e6:,.1f} of {self.total / 1e6:,.1f} MB of input")
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("prepare"),
                BarColumn(),
                DownloadColumn(),
                TextColumn("{task.fields[rate]:.1f} MB/s"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task("", total=self.total, completed=consumed, rate=0.0)
            self.bar.start()

    def update(self, consumed: int, text_bytes: int) -> None:
        if not self.enabled:
            return
        now = time.monotonic()
        if self.text_before is None:
            self.text_before = text_bytes
        rate = (text_bytes - self.text_before) / 1e6 / max(now - self.began, 1e-9)
        if self.bar is not None:
            self.bar.update(self.task, completed=consumed, rate=rate)
        elif now - self.last >= LINE_SECONDS:
            self.last = now
            self.line(f"prepare: {consumed / 1e6:,.1f} of {self.total / 1e6:,.1f} MB of input, {rate:.1f} MB/s of text")

    def line(self, text: str) -> None:
        if self.enabled:
            with contextlib.suppress(OSError, ValueError):
                print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

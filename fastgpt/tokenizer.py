"""Byte-level BPE: trained with `tokenizers`, encoded with `tiktoken`, kept as a Hugging Face `tokenizer.json`.

Text is cut into pieces by one regex (PATTERN), and each piece is merged into tokens on its own. Both
libraries get the same regex and give the same ids:

* `tiktoken` merges any two neighbours whose concatenation is a token, lowest id first, leftmost first.
* `tokenizers` merges listed pairs only. Restricted to the bytes of one token, tiktoken's procedure is
  the same wherever the token stands, so it always comes to be from the same two parts. Listing that one
  pair per token, in the order of the ids, therefore makes both the same. `_check_merges` holds
  every file to it.

All 256 bytes are tokens, so every text comes back exactly, whatever the tokenizer was trained on.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import hashlib
import itertools
import json
import os
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from .errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import tiktoken

PathLike = Union[str, "os.PathLike[str]"]

END_OF_TEXT = "<|endoftext|>"
FILE_NAME = "tokenizer.json"

# docs/tokenizer.md explains each line. Every run is bounded, so the time per byte is; the first
# alternative is atomic, which changes no match but lets tiktoken's regex engine run twice as fast.
PATTERN = "|".join(
    (
        r"(?>(?: |[^\s\p{L}\p{N}])?\p{L}[\p{L}\p{M}]{0,31})",
        r"\p{N}{1,2}",
        r" ?[^\s\p{L}\p{N}]{1,32}",
        r"[\r\n]{1,32}",
        r"[^\S\r\n]{1,32}",
    )
)

# What ByteLevel(use_regex=True) cuts with, in tiktoken's spelling of it.
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

TIKTOKEN_NAMES = ("gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base")
"""Names that `Tokenizer.load` takes, where tiktoken's files can be had."""

_END_OF_TEXT_SPELLINGS = (END_OF_TEXT, "<|end_of_text|>")
_FETCH_SECONDS = 15.0
_CHUNK = 1 << 16  # characters (of a text) or bytes (of a file) that training takes in at a time


class Tokenizer:
    """Text to token ids and back. Made by `Tokenizer.train` or `Tokenizer.load`; immutable.

    Ids run from 0 to vocab_size - 1. In a tokenizer trained here ids 0 to 255 are the bytes, the merged
    tokens follow in the order of their merging, and `<|endoftext|>` is the last.

    A Tokenizer can be sent to a worker process: it is rebuilt there from its tokens. It may be shared
    between threads; encoding releases the interpreter lock.
    """

    def __init__(
        self, pattern: str, ranks: Mapping[bytes, int], special_tokens: Mapping[str, int], name: str | None = None
    ) -> None:
        """Use `train` or `load`; this takes parts that are known to fit together.

        Args:
            pattern: the pre-tokenisation regex.
            ranks: every mergeable token and its id; a lower id merges first.
            special_tokens: text and id of the tokens that stand for no text; one must mean end of text.
            name: how it is called in messages and in dataset.json; made from the content when not given.
        """
        self._pattern = pattern
        self._ranks = dict(ranks)
        self._special_tokens = dict(special_tokens)
        ends = [self._special_tokens[s] for s in _END_OF_TEXT_SPELLINGS if s in self._special_tokens]
        if not ends:
            raise UserError(
                f"the tokenizer has no end-of-text token; one of {', '.join(_END_OF_TEXT_SPELLINGS)} is needed"
            )
        self._eot_id = ends[0]
        self._vocab_size = 1 + max(max(self._ranks.values()), *self._special_tokens.values())
        self._name = name

    @functools.cached_property
    def _encoding(self) -> tiktoken.Encoding:
        """Made when it is first used: the process that hands the tokenizer to workers mostly has no use for it."""
        import tiktoken

        return tiktoken.Encoding(
            self._name or "fastgpt",
            pat_str=self._pattern,
            mergeable_ranks=self._ranks,
            special_tokens=self._special_tokens,
        )

    # ---- what it is --------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """The highest id plus one."""
        return self._vocab_size

    @property
    def eot_id(self) -> int:
        """Id of end of text, which delimits documents."""
        return self._eot_id

    @property
    def pattern(self) -> str:
        """The pre-tokenisation regex."""
        return self._pattern

    @functools.cached_property
    def sha256(self) -> str:
        """Hex digest of the content (regex, tokens, special tokens), however the file is laid out."""
        digest = hashlib.sha256()
        content = [self._pattern, sorted(self._special_tokens.items(), key=lambda item: item[1])]
        digest.update(json.dumps(content).encode())
        for token, rank in sorted(self._ranks.items(), key=lambda item: item[1]):
            digest.update(b"%d %d %s" % (rank, len(token), token))
        return digest.hexdigest()

    @property
    def name(self) -> str:
        """tiktoken's name for it, or one made from the size and the content."""
        return self._name or f"bpe-{self.vocab_size}-{self.sha256[:8]}"

    def __repr__(self) -> str:
        return f"<Tokenizer {self.name}: {self.vocab_size} tokens>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __reduce__(self) -> tuple:
        return Tokenizer, (self._pattern, self._ranks, self._special_tokens, self._name)

    # ---- text to ids -------------------------------------------------------------------------

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of `text`. `<|endoftext|>` inside it is text like any other, unless allow_special.

        Raises UserError for a text that has no UTF-8 form (a lone surrogate).
        """
        if allow_special:
            return self._encode(self._encoding.encode, text, allowed_special="all", disallowed_special=())
        return self._encode(self._encoding.encode_ordinary, text)

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """The ids of `text` as a uint32 array (n,), read-only: the fastest way for long texts."""
        import numpy as np

        return np.frombuffer(self.encode_to_bytes(text), dtype=np.uint32)

    def encode_to_bytes(self, text: str) -> bytes:
        """The ids of `text`, four bytes each in native order: `encode_to_numpy` where numpy is not to be imported."""
        if self._to_buffer is None or not text:
            return array("I", self.encode(text)).tobytes()
        return bytes(self._encode(self._to_buffer, text, frozenset()))

    @functools.cached_property
    def _to_buffer(self) -> Callable[..., Any] | None:
        """What tiktoken's own encode_to_numpy calls, since 0.9; None up to 0.10, where it makes tokens of special
        tokens in the text, whatever it is told."""
        encode = getattr(self._encoding._core_bpe, "encode_to_tiktoken_buffer", None)
        text = "".join(self._special_tokens)
        exact = encode is not None and bytes(encode(text, frozenset())) == array("I", self.encode(text)).tobytes()
        return encode if exact else None

    def encode_batch(self, texts: Iterable[str], num_threads: int | None = None) -> list[list[int]]:
        """The ids of each text, on num_threads threads (one per core when not given)."""
        texts = list(texts)
        threads = min(num_threads or _cores(), len(texts))
        if threads <= 1:
            return [self.encode(text) for text in texts]
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode, texts))

    def _encode(self, encode: Callable[..., Any], text: str, *options: Any, **named: Any) -> Any:
        _check_text(text)
        try:
            return encode(text, *options, **named)
        except BaseException as error:
            if not _is_panic(error):
                raise
            # PATTERN cannot come here; gpt2's regex does at some hundred thousand blanks in a row.
            raise UserError(
                f"the regex of the tokenizer {self.name} gave up on a text of {len(text)} characters, which some "
                "do at long runs of white space; shorten the runs, or use a tokenizer trained by fastgpt"
            ) from None

    # ---- ids to text -------------------------------------------------------------------------

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for. Ids: a list, or an integer array or tensor (n,).

        Raises UserError for anything that is not an id of this tokenizer.
        """
        values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        try:
            return self._encoding.decode_bytes(values)
        except BaseException as error:
            if not (isinstance(error, (KeyError, OverflowError, TypeError, ValueError)) or _is_panic(error)):
                raise
            known = {*self._ranks.values(), *self._special_tokens.values()}
            listed = values if isinstance(values, list) else [values]
            bad = next((v for v in listed if not isinstance(v, int) or v not in known), values)
            raise UserError(
                f"{bad!r} is not a token id of {self.name}; its ids are whole numbers from 0 to {self.vocab_size - 1}"
            ) from None

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The text of the ids. A character cut apart becomes U+FFFD, or, with errors="strict", a UserError."""
        try:
            return self.decode_bytes(ids).decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise UserError(
                f"the ids are not whole UTF-8 characters at byte {error.start}; errors='replace' shows U+FFFD there"
            ) from None

    # ---- files -------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The text of its `tokenizer.json`: the same for equal tokenizers, byte by byte."""
        tokens = sorted(self._ranks.items(), key=lambda item: item[1])
        special = sorted(self._special_tokens.items(), key=lambda item: item[1])
        parts = _merges(self._ranks)
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": self._pattern}, "behavior": "Isolated", "invert": False}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        document = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": id_, "content": text, **flags} for text, id_ in special],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                # true where a token is found whole in the vocabulary but never merged, as tiktoken does
                "ignore_merges": any(len(token) > 1 and token not in parts for token in self._ranks),
                "vocab": {**{_spell(token): id_ for token, id_ in tokens}, **dict(special)},
                "merges": [f"{_spell(a)} {_spell(b)}" for a, b in parts.values()],
            },
        }
        return json.dumps(document, ensure_ascii=False, indent=1) + "\n"

    def save(self, path: PathLike) -> Path:
        """Write `tokenizer.json` at `path`, or in it if it is a folder; never half of it. Returns the file's path.

        Raises UserError where it cannot be written; a file that was there is then unchanged.
        """
        path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME
        data = self.to_json().encode("utf-8")
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise UserError(
                f"cannot write the tokenizer {path}: {error.strerror or error}; "
                f"{len(data):,} bytes are needed in a folder that exists"
            ) from None
        return path

    @classmethod
    def load(cls, source: PathLike) -> Tokenizer:
        """A tokenizer from a `tokenizer.json`, a folder that holds one (a run, a dataset), or by name.

        Names are TIKTOKEN_NAMES; their files come from tiktoken's cache or over the network. A file by
        another hand is taken if it is a byte-level BPE that both libraries cut and merge alike.

        Raises UserError for a missing or unreadable file, one that is not such a tokenizer, and files of
        a name that cannot be had.
        """
        path = Path(source)
        if not path.exists() and str(source) in TIKTOKEN_NAMES:
            return _from_tiktoken(str(source))
        file = path / FILE_NAME if path.is_dir() else path
        try:
            data = file.read_bytes()
        except OSError as error:
            import difflib

            near = difflib.get_close_matches(str(source), TIKTOKEN_NAMES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"or by name: {', '.join(TIKTOKEN_NAMES)}"
            raise UserError(
                f"cannot read the tokenizer {file}: {error.strerror or error}; "
                f"expected a {FILE_NAME}, a folder that holds one, {hint}"
            ) from None
        try:
            return _from_json(data)
        except UserError as error:
            raise UserError(f"{file} cannot be used as a tokenizer: {error}") from None

    @classmethod
    def train(
        cls,
        files: Iterable[PathLike] | PathLike = (),
        vocab_size: int = 8192,
        *,
        texts: Iterable[str] | None = None,
        max_bytes: int = 32 << 20,
        errors: str = "strict",
    ) -> Tokenizer:
        """Train on text files (UTF-8), or on an iterator of texts.

        Counts weigh equally wherever they come from, so neither the order of the files nor the number of
        threads changes the result. Input is read in chunks of 64 Ki. When they come to more than
        max_bytes, only every second chunk is kept, then every fourth, and so on: an even sample of more
        than max_bytes / 2 where there is that much, the same at every run.

        Args:
            files: paths; a single path will do.
            vocab_size: tokens, `<|endoftext|>` and the 256 bytes included: at least 257. A text with too
                few pairs that occur twice gives fewer; `vocab_size` of the result tells.
            texts: documents, instead of files; each is a text of its own.
            max_bytes: the most text (UTF-8) to train on. It bounds the memory: about 2 bytes for each of
                them in code or prose, where pieces recur, about 120 in a script without spaces.
            errors: "strict" refuses invalid UTF-8; "replace" turns it into U+FFFD.

        Raises UserError for a file that is missing, a directory or not UTF-8 (with the byte offset), for
        no text at all, and for arguments out of range.
        """
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 257:
            raise UserError(
                f"vocab_size = {vocab_size!r}: expected a whole number of at least 257 (256 bytes and {END_OF_TEXT})"
            )
        if max_bytes < 1:
            raise UserError(f"max_bytes = {max_bytes!r}: expected at least 1")
        if errors not in ("strict", "replace"):
            raise UserError(f"errors = {errors!r}: expected 'strict' or 'replace'")
        paths = [Path(files)] if isinstance(files, (str, os.PathLike)) else sorted(map(Path, files))
        if bool(paths) == (texts is not None):
            raise UserError("a tokenizer is trained on files or on texts; give one of the two")
        if texts is None:
            chunks: Iterable[str] = itertools.chain.from_iterable(_read_chunks(path, errors) for path in paths)
        else:
            chunks = _cut_texts(texts)
        sample = _even_sample(chunks, max_bytes)
        if not sample:
            raise UserError("there is no text to train a tokenizer on; every input is empty")
        return _train(sample, vocab_size)


# ---- training --------------------------------------------------------------------------------


def _read_chunks(path: Path, errors: str) -> Iterator[str]:
    """The text of a file in chunks, decoded incrementally. Raises UserError with path and byte offset."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    end = 0  # offset of the end of what was read
    try:
        with open(path, "rb") as file:
            while True:
                block = file.read(_CHUNK)
                end += len(block)
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:  # error.object: bytes kept from before, then the block
                    offset = end - len(error.object) + error.start
                    raise UserError(
                        f"{path} is not UTF-8: {error.reason} at byte {offset}; "
                        "convert it, or replace what is invalid with errors='replace'"
                    ) from None
                if text:
                    yield text
                if not block:
                    return
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; expected a text file") from None


def _cut_texts(texts: Iterable[str]) -> Iterator[str]:
    if isinstance(texts, str):
        raise UserError("texts is a single text; expected an iterable of texts, such as [text]")
    for text in texts:
        _check_text(text)
        for start in range(0, len(text), _CHUNK):
            yield text[start : start + _CHUNK]


def _even_sample(chunks: Iterable[str], max_bytes: int) -> list[str]:
    """Every 2^k-th chunk, k the least that keeps the sum within max_bytes. The first is always kept."""
    overhead = 64  # of a string object: many tiny texts must not escape the bound
    kept: list[str] = []
    size, stride = 0, 1
    for index, chunk in enumerate(chunks):
        if index % stride:
            continue
        kept.append(chunk)
        size += len(chunk.encode("utf-8")) + overhead
        while size > max_bytes and len(kept) > 1:
            kept = kept[::2]
            stride *= 2
            size = sum(len(c.encode("utf-8")) + overhead for c in kept)
    return kept


def _train(chunks: Sequence[str], vocab_size: int) -> Tokenizer:
    # Once its threads have run, `tokenizers` warns at every later fork (the workers of prepare) unless
    # this was set; the workers use none of its threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trainee

    trainee = Trainee(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trainee.train_from_iterator(chunks, trainer)
    # The trainer's ids follow the order of merging, after the bytes in an order of its own.
    byte_of = {c: b for b, c in enumerate(_alphabet())}
    trained = json.loads(trainee.to_str())["model"]["vocab"]
    in_order = [bytes(byte_of[c] for c in text) for text in sorted(trained, key=trained.get)]
    tokens = [bytes([b]) for b in range(256)] + [token for token in in_order if len(token) > 1]
    return Tokenizer(PATTERN, {token: id_ for id_, token in enumerate(tokens)}, {END_OF_TEXT: len(tokens)})


# ---- merges ----------------------------------------------------------------------------------


def _merges(ranks: Mapping[bytes, int]) -> dict[bytes, tuple[bytes, bytes]]:
    """The two parts that each token is merged from, for the tokens that merging can reach, by rank.

    A token's parts are the last two that tiktoken's procedure comes to on the token's own bytes. They
    are also the only two that it ever merges into that token inside a longer piece: no merge has crossed
    the token's ends when it is made, so what happened between them happened in the same order alone.
    """
    found = {}
    none = 1 + max(ranks.values())
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best, at = none, -1
            for i in range(len(parts) - 1):
                rank = ranks.get(parts[i] + parts[i + 1], none)
                if rank < best:
                    best, at = rank, i
            if at < 0:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            found[token] = (parts[0], parts[1])
    return found


@functools.cache
def _alphabet() -> str:
    """The character that byte-level files write for each byte (GPT-2's choice): printable ones are themselves."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return "".join(chr(b if b in printable else next(others)) for b in range(256))


def _spell(token: bytes) -> str:
    alphabet = _alphabet()
    return "".join(alphabet[b] for b in token)


# ---- reading tokenizer.json ------------------------------------------------------------------


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def _from_json(data: bytes) -> Tokenizer:
    """Build from the content of a `tokenizer.json`. Raises UserError saying what about it does not fit."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise UserError("it is not JSON; expected a Hugging Face tokenizer.json") from None
    try:
        model, added, decoder = document["model"], document["added_tokens"], document["decoder"]
        kind, vocab, merges = model.get("type", "BPE"), model["vocab"], model["merges"]
        _need(kind == "BPE", f"its model is {kind!r}; expected byte-level BPE")
        _need(decoder["type"] == "ByteLevel", f"its decoder is {decoder['type']!r}; expected ByteLevel")
        for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            _need(not model.get(key), f"its model sets {key}, which tiktoken does not know")
        for key in ("normalizer", "truncation", "padding"):
            _need(not document.get(key), f"it has a {key}, so text would not come back as it was")
        for token in added:
            odd = [k for k in ("single_word", "lstrip", "rstrip") if token.get(k)]
            _need(not odd, f"its added token {token['content']!r} sets {', '.join(odd)}, which tiktoken does not know")
            _need(token["special"], f"its added token {token['content']!r} is not special, so text is not BPE alone")
        special = {token["content"]: token["id"] for token in added}
        ids = [*(id_ for text, id_ in vocab.items() if text not in special), *special.values()]
        whole = all(type(id_) is int and 0 <= id_ < 2**31 for id_ in ids)
        _need(whole and len(set(ids)) == len(ids), "its ids are not different whole numbers from 0 up")
        _need(all(text and vocab.get(text, id_) == id_ for text, id_ in special.items()), "a special token has two ids")
        byte_of = {c: b for b, c in enumerate(_alphabet())}

        @functools.cache  # the parts of merges are tokens
        def spelled(text: str) -> bytes:
            return bytes([byte_of[c] for c in text])

        ranks = {spelled(text): id_ for text, id_ in vocab.items() if text not in special}
        pairs = [tuple(map(spelled, m.split(" ") if isinstance(m, str) else m)) for m in merges]
        pattern = _read_pattern(document["pre_tokenizer"])
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"it is not the layout of a byte-level BPE in Hugging Face's format ({what})") from None
    _need(b"" not in ranks, "it has an empty token")
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    _need(not missing, f"it lacks a token for {len(missing)} of the 256 bytes, so not every text has ids")
    _check_merges(ranks, pairs, ignores_merges=bool(model.get("ignore_merges")))
    if pattern not in (PATTERN, _GPT2_PATTERN):
        _compare_on_probe(pattern)
    return Tokenizer(pattern, ranks, special)


def _check_merges(ranks: Mapping[bytes, int], pairs: list[tuple[bytes, ...]], ignores_merges: bool) -> None:
    """Hold listed merges to giving tiktoken's ids: in the order of the ids, with every pair tiktoken uses.

    More pairs than that do no harm: at the moment when a token is the next to be made, its bytes are
    never parted otherwise than `_merges` says.
    """
    _need(all(len(pair) == 2 for pair in pairs), "a merge is not a pair")
    made = [ranks.get(b"".join(pair), -1) for pair in pairs]
    _need(-1 not in made, "a merge makes something that is no token")
    _need(all(a <= b for a, b in itertools.pairwise(made)), "its merges are not in the order of its ids")
    expected = _merges(ranks)
    unreached = [token for token in ranks if len(token) > 1 and token not in expected]
    _need(ignores_merges or not unreached, f"{len(unreached)} of its tokens cannot be reached by merging")
    _need({*expected.values()} <= {*pairs}, "its merges are not those that tiktoken would make")


def _read_pattern(pre_tokenizer: dict) -> str:
    """The regex of a `pre_tokenizer` entry. KeyError and TypeError mean another layout."""
    *before, byte_level = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    _need(byte_level["type"] == "ByteLevel", f"its pre_tokenizer ends with {byte_level['type']!r}, not ByteLevel")
    _need(not byte_level["add_prefix_space"], "it puts a space before the text, so the text would not come back")
    if byte_level.get("use_regex", True):
        _need(not before, "it cuts text twice, which tiktoken cannot do")
        return _GPT2_PATTERN
    (split,) = before or [{"type": "nothing"}]
    isolated = split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"]
    _need(isolated, "its pre_tokenizer is not a single Split into isolated pieces")
    pattern = split["pattern"]["Regex"]
    _need(isinstance(pattern, str) and bool(pattern), "its Split has no regex")
    return pattern


def _compare_on_probe(pattern: str) -> None:
    """Refuse a regex that the two libraries read differently, as far as a text with every three kinds of
    character in a row, and long runs of each, shows it."""
    import tiktoken
    from tokenizers import Regex, pre_tokenizers

    kinds = (
        "a",
        "S",
        "é",
        "中",
        "\u0301",
        "7",
        "٣",
        " ",
        "\t",
        "\n",
        "\r",
        "\u00a0",
        "'",
        "_",
        ".",
        "🙂",
        "\0",
        "\u017f",
    )
    probe = "".join(map("".join, itertools.product(kinds, repeat=3))) + "".join(kind * 100 for kind in kinds)
    try:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        pieces = [piece.encode("utf-8") for piece, _ in split.pre_tokenize_str(probe)]
        # Every piece is a token, and so are two neighbours: a cut more or less gives another id.
        tokens = [bytes([b]) for b in range(256)] + pieces + [a + b for a, b in itertools.pairwise(pieces)]
        ranks = {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}
        ids = tiktoken.Encoding("probe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode_ordinary(
            probe
        )
    except BaseException as error:
        if not (isinstance(error, Exception) or _is_panic(error)):
            raise
        raise UserError(f"its regex {pattern!r} cannot be used by both libraries: {error}") from None
    _need(ids == [ranks[piece] for piece in pieces], "tiktoken reads its regex otherwise than the tokenizers library")


# ---- tiktoken's own --------------------------------------------------------------------------


def _from_tiktoken(name: str) -> Tokenizer:
    encoding = _fetch(name)
    # {1,3}+ is possessive for tiktoken but a nested repeat for the other library. It stands at the end
    # of its alternative, where being possessive changes nothing.
    pattern = encoding._pat_str.replace("{1,3}+", "{1,3}")
    return Tokenizer(pattern, encoding._mergeable_ranks, encoding._special_tokens, name)


def _fetch(name: str) -> Any:
    """tiktoken's encoding. It waits for the network without a limit, so a thread of its own does the waiting."""
    import tiktoken

    outcome: list[Any] = []

    def fetch() -> None:
        try:
            outcome.append(tiktoken.get_encoding(name))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=fetch, name=f"fetch {name}", daemon=True)
    thread.start()
    thread.join(_FETCH_SECONDS)
    if outcome and not isinstance(outcome[0], Exception):
        return outcome[0]
    reason = type(outcome[0]).__name__ if outcome else f"no answer within {_FETCH_SECONDS:g} s"
    raise UserError(
        f"the files of the tokenizer {name!r} could not be had ({reason}); where there is a network, load it once "
        "with TIKTOKEN_CACHE_DIR set to a folder, then bring that folder here and set TIKTOKEN_CACHE_DIR to it"
    )


# ---- small things ----------------------------------------------------------------------------


def _check_text(text: str) -> None:
    """Refuse what has no UTF-8 form; tiktoken would replace it without a word."""
    if not isinstance(text, str):
        raise UserError(f"expected a text (str), got {type(text).__name__}")
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, "
            "which has no UTF-8 form; decode the source with errors='replace' or remove it"
        ) from None


def _is_panic(error: BaseException) -> bool:
    """Whether Rust code gave up: its exception derives from BaseException and cannot be imported."""
    return type(error).__name__ == "PanicException"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

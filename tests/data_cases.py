"""Small corpora and tokenizers that the data tests share."""

from __future__ import annotations

import functools
import hashlib
import random
from pathlib import Path

import numpy as np

from fastgpt.config import PrepareConfig
from fastgpt.data.dataset import TokenStream
from fastgpt.tokenizer import Tokenizer

WORDS = (
    "the",
    "a",
    "of",
    "fox",
    "Ärger",
    "日本",
    "über",
    "lazy",
    "dog",
    "jumps",
    "over",
    "🦊",
    "return",
    "None",
    "3.14",
)


def text(seed: int, words: int) -> str:
    """Words, punctuation and line breaks, the same for the same seed."""
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice((" ", " ", " ", ", ", ".\n", "\r\n", "  ")) for _ in range(words))


@functools.cache
def small_tokenizer() -> Tokenizer:
    return Tokenizer.train(texts=[text(0, 3000)], vocab_size=300)


@functools.cache
def large_tokenizer() -> Tokenizer:
    """More ids than uint16 has: the 256 bytes, every pair of bytes, and end of text."""
    ranks = {bytes([i]): i for i in range(256)}
    for i in range(2**16):
        ranks[bytes(divmod(i, 256))] = 256 + i
    return Tokenizer(small_tokenizer().pattern, ranks, {"<|endoftext|>": 256 + 2**16})


def corpus(folder: Path, documents: int = 40, words: int = 60) -> list[str]:
    """A folder of .txt files, one document each; returns their texts in reading order."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [text(seed, words) for seed in range(1, documents + 1)]
    for number, content in enumerate(texts):
        (folder / f"{number:04d}.txt").write_bytes(content.encode())
    return texts


def config(tmp_path: Path, **changes) -> PrepareConfig:
    """Prepare tmp_path/corpus into tmp_path/data with the small tokenizer, in this process."""
    tokenizer = tmp_path / "small.json"
    if not tokenizer.exists():
        small_tokenizer().save(tokenizer)
    settings = dict(
        inputs=(str(tmp_path / "corpus"),),
        out_dir=str(tmp_path / "data"),
        tokenizer=str(tokenizer),
        val_fraction=0.2,
        shard_tokens=1000,
        workers=1,
    )
    return PrepareConfig(**{**settings, **changes})


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder and its hash."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def stream(*lengths: int, eot: int = 0, vocab: int = 50, seed: int = 0) -> TokenStream:
    """Random ids in shards of these lengths; ends of documents among them, and at the end."""
    ids = np.random.default_rng(seed).integers(0, vocab, sum(lengths)).astype(np.uint16)
    ids[-1] = eot
    return TokenStream(np.split(ids, np.cumsum(lengths)[:-1]), eot)

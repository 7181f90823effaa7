"""Datasets made from ids, not from text: tests that know what there is to learn."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from fastgpt import Tokenizer
from fastgpt.data.dataset import write_meta
from fastgpt.data.shards import BLOCK_BYTES, UINT16, ShardWriter

VOCAB = 257  # the 256 bytes and <|endoftext|>


@functools.cache
def byte_tokenizer() -> Tokenizer:
    return Tokenizer.train(texts=["ab"], vocab_size=VOCAB)


def write_dataset(folder: Path, train: np.ndarray, val: np.ndarray, shard_tokens: int = 10**9) -> Path:
    """A prepared folder with these ids; ids below 256 count as one byte of text each."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.save(folder / "tokenizer.json")
    splits = {}
    for name, ids in (("train", train), ("val", val)):
        writer = ShardWriter(folder, name, UINT16, shard_tokens)
        writer.append(np.asarray(ids, dtype=UINT16))
        ends = int((np.asarray(ids) == tokenizer.eot_id).sum())
        counts = {"tokens": len(ids), "documents": ends, "text_bytes": len(ids) - ends}
        splits[name] = {"shards": writer.finish(), **counts}
    write_meta(
        folder,
        {
            "tokenizer": {"file": "tokenizer.json", "name": tokenizer.name, "sha256": tokenizer.sha256},
            "vocab_size": VOCAB,
            "eot_id": tokenizer.eot_id,
            "dtype": "uint16",
            "block_bytes": BLOCK_BYTES,
            "splits": splits,
        },
    )
    return folder


def text_ids(tokens: int, seed: int = 0) -> np.ndarray:
    """Ids with structure: words of four letters from a small lexicon, and an end of text now and then."""
    draw = np.random.default_rng(seed)
    lexicon = np.random.default_rng(99).integers(97, 123, (40, 4))
    words = lexicon[draw.integers(40, size=tokens // 5 + 1)]
    separators = np.where(draw.random(len(words)) < 0.05, 256, 32)[:, None]
    return np.concatenate([words, separators], axis=1).ravel()[:tokens]

"""Documents to tokens to shards to batches.

    prepare(PrepareConfig(...))         text files -> a folder with dataset.json, tokenizer.json and shards
    Dataset.open(folder)                checked and memory-mapped
    dataset.split("train")              a TokenStream: all the tokens of a split, end to end
    Batches(stream, ...)                the training order, a pure function of (seed, sample number)
    evaluation_batches(stream, ...)     every token of a split as a target exactly once
    verify(folder)                      which blocks of which shards have changed since they were written
    adopt_shards(folder, ...)           a dataset.json for .bin shards that other programs wrote

Names are imported when they are first used; only `batches` needs torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "prepare": "preparation",
    "Dataset": "dataset",
    "TokenStream": "dataset",
    "verify": "dataset",
    "adopt_shards": "dataset",
    "read_shard": "shards",
    "Batch": "batches",
    "Batches": "batches",
    "evaluation_batches": "batches",
}

__all__ = [
    "Batch",
    "Batches",
    "Dataset",
    "TokenStream",
    "adopt_shards",
    "evaluation_batches",
    "prepare",
    "read_shard",
    "verify",
]

if TYPE_CHECKING:
    from .batches import Batch, Batches, evaluation_batches
    from .dataset import Dataset, TokenStream, adopt_shards, verify
    from .preparation import prepare
    from .shards import read_shard


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

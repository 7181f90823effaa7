"""Which tokens go into which batch.

Training order: sample i is a pure function of (seed, i). With n samples to an epoch, i belongs to epoch i // n
and is window p(i mod n), where p is a keyed permutation: a Feistel network over the next power of four, whose
values of n or more are encrypted again until they fall below n (cycle walking). Nothing is stored, so a resumed
run, another batch size or another number of processes sees the same samples in the same order.

The windows of an epoch lie end to end from an offset that the epoch's number draws, round the end of the split
and on from its beginning (its last token is an end of a document). So their borders move from epoch to epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import UserError
from .dataset import TokenStream

IGNORED = -100  # a target with this value takes no part in the loss

_ROUNDS = 6
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_AHEAD = 2048  # samples whose places are computed together: numpy's overhead is per call


@dataclass(frozen=True)
class Batch:
    """One batch on the CPU."""

    idx: torch.Tensor
    """(B, T) int64: the inputs."""
    targets: torch.Tensor
    """(B, T) int64: the token after each input; -100 where there is none to predict."""
    n_targets: int
    """Targets that are not -100, known without asking a device."""
    cu_seqlens: torch.Tensor | None = None
    """(documents + 1,) int32: where documents begin in the flattened B * T inputs, and B * T; every row begins one."""


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: (n,) uint64 -> (n,) uint64, every output bit depending on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(seed: int, epochs: np.ndarray, purpose: int) -> np.ndarray:
    """One 64-bit key for each epoch, (n,) uint64, differing by seed and purpose."""
    seeded = _mix(np.array([(seed + purpose * _GOLDEN) & _MASK], dtype=np.uint64))
    return _mix(epochs.astype(np.uint64) * np.uint64(_GOLDEN) + seeded)


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of 0..n-1 sends each index.

    index (m,) int64 in 0..n-1; keys (m,) uint64, one for each index -> (m,) int64. Equal keys make one bijection.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))  # bits in each half
    low = np.uint64((1 << int(half)) - 1)
    round_keys = [_mix(keys + np.uint64((r + 1) * _GOLDEN & _MASK)) for r in range(_ROUNDS)]
    result = np.asarray(index).astype(np.uint64)
    walking = np.arange(len(result))
    while len(walking):
        value = result[walking]
        left, right = value >> half, value & low
        for key in round_keys:
            left, right = right, left ^ (_mix(right ^ key[walking]) & low)
        value = (left << half) | right
        result[walking] = value
        walking = walking[value >= n]
    return result.astype(np.int64)


class Batches:
    """Training batches of `batch_size` windows of `block_size` tokens, in an order that needs no state.

    Args:
        stream: the split to read.
        block_size: inputs in a window (T); a window reads T + 1 tokens.
        batch_size: windows in a batch (B).
        seed: of the order.
        documents: also give cu_seqlens. A document begins at the `<|endoftext|>` before it, as in evaluation and in
            sampling: its first token is then learned too, and no target lies in another document than its input.
        eot_id: the id that ends a document; the stream's own when not given.
        pin_memory: page-locked batches, which a GPU can fetch while the host goes on.

    Raises UserError where the split is shorter than block_size + 1.
    """

    def __init__(
        self,
        stream: TokenStream,
        block_size: int,
        batch_size: int,
        seed: int,
        documents: bool = False,
        eot_id: int | None = None,
        pin_memory: bool = False,
    ):
        if stream.tokens < block_size + 1:
            raise UserError(
                f"{stream.name} has {stream.tokens} tokens; a block_size of {block_size} needs at least "
                f"{block_size + 1}"
            )
        self.stream = stream
        self.block_size = block_size
        self.batch_size = batch_size
        self.seed = seed
        self.documents = documents
        self.eot_id = stream.eot_id if eot_id is None else eot_id
        self.pin_memory = pin_memory
        self.samples_per_epoch = stream.tokens // block_size
        self._ahead: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def starts(self, samples: np.ndarray) -> np.ndarray:
        """Position of each sample's first token: (n,) int64 sample numbers -> (n,) int64."""
        n = self.samples_per_epoch
        epochs, index = np.divmod(np.asarray(samples, dtype=np.int64), n)
        offset = (_keys(self.seed, epochs, 1) % np.uint64(self.stream.tokens)).astype(np.int64)
        window = permute(index, n, _keys(self.seed, epochs, 2))
        return (offset + window * self.block_size) % self.stream.tokens

    def batch(self, first_sample: int) -> Batch:
        """Samples first_sample .. first_sample + B - 1."""
        width = self.block_size + 1
        rows = np.empty((self.batch_size, width), dtype=np.int64)
        shards, borders = self.stream.shards, self.stream.starts
        starts = self._starts(first_sample)
        which = np.searchsorted(borders, starts, side="right") - 1
        for row, start, shard in zip(rows, starts.tolist(), which.tolist(), strict=True):
            begin = start - int(borders[shard])
            if begin + width <= len(shards[shard]):
                row[:] = shards[shard][begin : begin + width]
            else:  # over the border of a shard, or round the end of the split
                stop = min(start + width, self.stream.tokens)
                row[: stop - start] = self.stream.read(start, stop)
                row[stop - start :] = self.stream.read(0, width - (stop - start))
        tokens = torch.from_numpy(rows)
        idx, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        cu_seqlens = _cu_seqlens(_begins(idx.numpy(), self.eot_id)) if self.documents else None
        if self.pin_memory:
            idx, targets = idx.pin_memory(), targets.pin_memory()
            cu_seqlens = None if cu_seqlens is None else cu_seqlens.pin_memory()
        return Batch(idx, targets, idx.numel(), cu_seqlens)

    def _starts(self, first: int) -> np.ndarray:
        """starts() of one batch, computed for many samples at a time."""
        parts = []
        last = first + self.batch_size
        while first < last:
            chunk, within = divmod(first, _AHEAD)
            if self._ahead[0] != chunk:
                self._ahead = (chunk, self.starts(np.arange(chunk * _AHEAD, (chunk + 1) * _AHEAD)))
            parts.append(self._ahead[1][within : within + last - first])
            first += len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _begins(idx: np.ndarray, eot: int) -> np.ndarray:
    """(B, T) ids -> (B, T) bool, True where a document begins: at every end of text, and at every row."""
    begins = idx == eot
    begins[:, 0] = True
    return begins


def _cu_seqlens(begins: np.ndarray) -> torch.Tensor:
    """(B, T) bool, True where a document begins -> (documents + 1,) int32."""
    return torch.from_numpy(np.append(np.flatnonzero(begins), begins.size).astype(np.int32))


def evaluation_batches(
    stream: TokenStream,
    block_size: int,
    batch_size: int,
    *,
    documents: bool = False,
    eot_id: int | None = None,
    batches: int = 0,
) -> Iterator[Batch]:
    """Every token of a split as a target exactly once, in order.

    The split's first token is predicted from `<|endoftext|>`, the first of each later window from the token
    before it. The last row is filled up with targets of -100; the last batch may have fewer rows. With
    `documents`, cu_seqlens begins a document at each `<|endoftext|>` among the inputs, which is the context that its
    first token is predicted from. `batches` > 0 stops after that many.

    Raises UserError where the split is empty.
    """
    eot = stream.eot_id if eot_id is None else eot_id
    if stream.tokens == 0:
        raise UserError(f"{stream.name} is empty; prepare with val_inputs or a larger val_fraction")
    per_batch = block_size * batch_size
    for number, start in enumerate(range(0, stream.tokens, per_batch)):
        if batches and number == batches:
            return
        stop = min(start + per_batch, stream.tokens)
        n = stop - start
        rows = -(-n // block_size)
        idx = np.full(rows * block_size, eot, dtype=np.int64)
        targets = np.full(rows * block_size, IGNORED, dtype=np.int64)
        targets[:n] = stream.read(start, stop)
        idx[0] = eot if start == 0 else stream.read(start - 1, start)[0]
        idx[1:n] = targets[: n - 1]
        idx, targets = idx.reshape(rows, block_size), targets.reshape(rows, block_size)
        cu_seqlens = None
        if documents:
            begins = _begins(idx, eot)
            begins.reshape(-1)[n:] = False  # the filling needs no documents of its own
            cu_seqlens = _cu_seqlens(begins)
        yield Batch(torch.from_numpy(idx), torch.from_numpy(targets), n, cu_seqlens)

"""How well a model predicts a text it has not seen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .data import TokenStream
    from .model import GPT


@dataclass(frozen=True)
class Evaluation:
    """The outcome over a split, or over its first batches."""

    nll: float
    """Negative log-likelihood of all targets, in nats."""
    tokens: int
    """Targets predicted."""
    bytes: float
    """Bytes that these tokens stand for: the text's, and one for each end of a document. For a part of a split
    the split's average bytes per token is assumed."""
    seconds: float
    complete: bool
    """False where it was stopped before the last batch."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / max(self.tokens, 1)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, and with compressors."""
        return self.nll / math.log(2) / max(self.bytes, 1)


@torch.inference_mode()
def evaluate(
    model: GPT,
    stream: TokenStream,
    *,
    batch_size: int = 16,
    batches: int = 0,
    documents: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Predict every token of a split exactly once, in windows of block_size.

    The first token of the split is predicted from `<|endoftext|>`, the first of every later window from the last
    token of the one before. `batches` > 0 reads only that many batches of `batch_size` windows. The model's mode
    (train or eval) is left as it was.
    """
    from .data import evaluation_batches

    began = time.perf_counter()
    was_training = model.training
    model.eval()
    nll, tokens, complete = 0.0, 0, True
    try:
        source = evaluation_batches(stream, model.config.block_size, batch_size, documents=documents)
        for number, batch in enumerate(source):
            if batches and number == batches:
                break
            if should_stop():
                complete = False
                break
            cu_seqlens = None if batch.cu_seqlens is None else batch.cu_seqlens.to(model.device)
            summed = model(
                batch.idx.to(model.device), batch.targets.to(model.device), cu_seqlens=cu_seqlens, loss_divisor=1
            )
            nll += float(summed)
            tokens += batch.n_targets
    finally:
        model.train(was_training)
    size = (stream.text_bytes + stream.documents) * (tokens / max(stream.tokens, 1))
    return Evaluation(nll, tokens, size, time.perf_counter() - began, complete)

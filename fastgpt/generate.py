"""Sampling from a model, one token at a time over a cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .model import GPT, KVCache


def sampling_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """(B, V) logits -> (B, V) fp32 probabilities after temperature, top-k and top-p, in that order.

    top_k keeps the k largest (ties with the k-th are all kept); top_p keeps the fewest of the largest whose
    sum reaches p (Holtzman et al., 2020, https://arxiv.org/abs/1904.09751). temperature 0 is the limit: all
    weight on the largest logit, the first of them on a tie.
    """
    logits = logits.float()
    if temperature == 0.0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        unneeded = ordered.cumsum(-1) - ordered >= top_p  # the sum before this token already reaches p
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(unneeded, 0.0))
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def _check(model: GPT, idx: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None):
    if idx.dim() != 2 or idx.numel() == 0:
        raise ValueError(f"idx must be (B, T) with at least one row and one token, got {tuple(idx.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if temperature < 0.0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be more than 0 and at most 1, got {top_p}")


@torch.inference_mode()
def generate(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    *,
    lengths: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop_ids: Sequence[int] = (),
    use_cache: bool = True,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue the prompts idx (B, T) by up to max_new_tokens tokens.

    lengths:   (B,) number of real tokens in each row of idx, which is padded on the right; all of it when
               not given. New tokens follow a row's own prompt.
    stop_ids:  a row that produced one of them is finished and repeats it; when all rows are, generation ends.
    generator: of the random draws (torch's global one when not given); greedy when temperature is 0.
    use_cache: False recomputes the whole context for each token: the same result, slower.
    on_token:  called with each (B,) tensor of new tokens.

    When a context is full (block_size), its older half is dropped and the rest read again, with the cache and
    without alike. Returns (B, T + new); a row with a shorter prompt is padded on the right with its last token.
    Raises ValueError for an argument out of its range.
    """
    _check(model, idx, max_new_tokens, temperature, top_k, top_p)
    B, T = idx.shape
    was_training = model.training
    model.eval()
    try:
        lengths = torch.full((B,), T, device=idx.device) if lengths is None else lengths.to(idx.device).long()
        if lengths.shape != (B,) or not bool(((lengths >= 1) & (lengths <= T)).all()):
            raise ValueError(f"lengths must be (B,) = ({B},) numbers from 1 to {T}, got {lengths.tolist()}")
        rows = torch.arange(B, device=idx.device)
        tokens = torch.cat([idx, idx.new_zeros(B, max_new_tokens)], dim=1)
        stops = torch.tensor(list(stop_ids), device=idx.device, dtype=idx.dtype)
        finished = torch.zeros(B, device=idx.device, dtype=torch.bool)
        reader = _Reader(model, B, min(model.config.block_size, T + max_new_tokens), use_cache)
        for _ in range(max_new_tokens):
            logits = reader.next_logits(tokens, lengths)
            probabilities = sampling_probabilities(logits, temperature, top_k, top_p)
            if temperature == 0.0:
                new = probabilities.argmax(-1)
            else:
                new = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            new = torch.where(finished, tokens[rows, lengths - 1], new.to(tokens.dtype))
            tokens[rows, lengths] = new
            lengths = lengths + 1
            if on_token is not None:
                on_token(new)
            if len(stops):
                finished |= (new[:, None] == stops).any(-1)
                if bool(finished.all()):
                    break
        tokens = tokens[:, : int(lengths.max())]
        beyond = torch.arange(tokens.shape[1], device=idx.device) >= lengths[:, None]
        return torch.where(beyond, tokens[rows, lengths - 1][:, None], tokens)
    finally:
        model.train(was_training)


class _Reader:
    """Feeds the model what it has not read yet and returns the logits after each row's last token."""

    def __init__(self, model: GPT, batch_size: int, max_tokens: int, use_cache: bool):
        self.model, self.batch_size, self.max_tokens, self.use_cache = model, batch_size, max_tokens, use_cache
        self.start = 0  # column of `tokens` at which the context begins
        self.longest: int | None = None  # columns in use, known on the host
        self.cache: KVCache | None = None

    def next_logits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens (B, columns), lengths (B,) -> (B, V)."""
        self.longest = int(lengths.max()) if self.longest is None else self.longest + 1
        block_size = self.model.config.block_size
        while self.longest - self.start > block_size:
            self.start += max(1, block_size // 2)
            self.cache = None
        if self.start and self.start >= int(lengths.min()):
            raise ValueError(
                "the context of the longest prompt has moved past the end of the shortest: give one prompt at a time"
            )
        if self.cache is not None:
            rows = torch.arange(tokens.shape[0], device=tokens.device)
            return self.model(tokens[rows, lengths - 1][:, None], cache=self.cache)[:, -1]
        if self.use_cache:
            self.cache = KVCache(
                self.model.config, self.batch_size, self.max_tokens, device=tokens.device, dtype=self.model.dtype
            )
        logits = self.model(tokens[:, self.start : self.longest], cache=self.cache)
        if self.cache is not None:
            self.cache.lengths.copy_(lengths - self.start)  # the padding of short rows is overwritten next
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        return logits[rows, lengths - 1 - self.start]

"""A decoder-only transformer, in one file: GPT-2, Llama and what lies between them.

Shapes: B batch, T tokens, C n_embd, H query heads, KV key/value heads, D head_dim, F ffn_width,
V vocabulary. Every heavy operation is one call into `fastgpt.ops`, which picks the kernel or the
reference; this file says what is computed, never how.

The residual stream is carried as a pair (residual, delta): a block returns `delta`, and the next
norm adds it to `residual` in the same pass over memory (`ops.layer_norm(delta, residual=...)`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import native, ops
from .config import ModelConfig
from .linear import Linear

INIT_STD = 0.02


class KVCache:
    """Keys and values of the tokens seen so far: fixed shapes, indexed on the device.

    `keys` and `values` are (n_layer, B, T_max, KV, D). `lengths` (B,) counts the tokens each row holds;
    what lies beyond is garbage that the next append overwrites.
    """

    def __init__(self, config: ModelConfig, batch_size: int, max_tokens: int, device=None, dtype=None):
        config = config.resolved()
        shape = (config.n_layer, batch_size, max_tokens, config.n_kv_head, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.int32)
        self.filled = 0  # the longest row, known on the host: attention looks no further

    def positions(self, count: int) -> Tensor:
        """(B, count): where the next `count` tokens of every row go."""
        return self.lengths[:, None] + torch.arange(count, device=self.lengths.device, dtype=torch.int32)

    def append(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, T, KV, D) of one layer; returns everything stored so far, (B, filled + T, KV, D)."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.keys[layer, rows, positions] = k
        self.values[layer, rows, positions] = v
        stop = self.filled + k.shape[1]
        return self.keys[layer, :, :stop], self.values[layer, :, :stop]

    def advance(self, count: int) -> None:
        self.lengths += count
        self.filled += count


class Norm(nn.Module):
    """LayerNorm or RMSNorm, fused with the addition into the residual stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.kind, self.eps = config.norm, config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.norm_bias else None

    def forward(self, delta: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """delta, residual (B, T, C) -> (the normalised sum, the sum). Without a residual the sum is delta."""
        if self.kind == "rmsnorm":
            out = ops.rms_norm(delta, self.weight, eps=self.eps, residual=residual)
        else:
            out = ops.layer_norm(delta, self.weight, self.bias, eps=self.eps, residual=residual)
        return (out, delta) if residual is None else out


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads; Q, K and V come from one projection."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.window, self.dropout = config.window, config.dropout
        heads = config.n_head + 2 * config.n_kv_head
        self.qkv = Linear(config.n_embd, heads * config.head_dim, bias=config.qkv_bias)
        self.out = Linear(config.n_head * config.head_dim, config.n_embd, bias=config.linear_bias)
        self.rotary = config.positions == "rope"
        self.eps = config.norm_eps
        self.q_norm = nn.Parameter(torch.ones(config.head_dim)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(config.head_dim)) if config.qk_norm else None

    def forward(self, x: Tensor, context: Context, layer: int) -> Tensor:
        B, T, _ = x.shape
        H, KV, D = self.n_head, self.n_kv_head, self.head_dim
        qkv = self.qkv(x).view(B, T, H + 2 * KV, D)  # [Q heads | K heads | V heads]
        if self.rotary:
            qkv = ops.rotary(
                qkv,
                context.cos,
                context.sin,
                n_head=H,
                n_kv_head=KV,
                positions=context.positions,
                q_weight=self.q_norm,
                k_weight=self.k_norm,
                eps=self.eps,
                may_overwrite=True,
            )
        q, k, v = qkv.split([H, KV, KV], dim=2)  # views: nothing is copied
        if not self.rotary and self.q_norm is not None:
            q, k = ops.rms_norm(q, self.q_norm, eps=self.eps), ops.rms_norm(k, self.k_norm, eps=self.eps)
        if context.cache is None:
            o = ops.attention(q, k, v, window=self.window, doc_start=context.doc_start, doc_end=context.doc_end)
        else:
            k, v = context.cache.append(layer, k, v, context.positions)
            o = ops.attention(q, k, v, window=self.window, kv_lengths=context.cache.lengths + T)
        o = self.out(o.reshape(B, T, H * D))
        return F.dropout(o, self.dropout, self.training)


class FeedForward(nn.Module):
    """Two projections with a nonlinearity between; for swiglu the first yields [gate | up] in one GEMM."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation, self.dropout = config.activation, config.dropout
        width = config.ffn_width * (2 if config.activation == "swiglu" else 1)
        self.up = Linear(config.n_embd, width, bias=config.linear_bias)
        self.down = Linear(config.ffn_width, config.n_embd, bias=config.linear_bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.activation == "swiglu":
            h = ops.swiglu(h)
        elif self.activation == "relu":
            h = F.relu(h)
        else:
            h = ops.gelu(h, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return F.dropout(self.down(h), self.dropout, self.training)


class Block(nn.Module):
    """norm, attention, norm, feed-forward: pre-norm, each half adds to the residual stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = Norm(config)
        self.attention = Attention(config)
        self.ffn_norm = Norm(config)
        self.ffn = FeedForward(config)

    def forward(self, delta: Tensor, residual: Tensor | None, context: Context, layer: int) -> tuple[Tensor, Tensor]:
        x, residual = self.attention_norm(delta, residual)
        x, residual = self.ffn_norm(self.attention(x, context, layer), residual)
        return self.ffn(x), residual


class VocabMatrix(nn.Module):
    """A (V, C) matrix stored with V rounded up; the extra rows are zero and are never saved."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.rows = config.vocab_size
        self.weight = nn.Parameter(torch.zeros(config.padded_vocab_size, config.n_embd))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = destination[prefix + "weight"][: self.rows]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        key = prefix + "weight"
        if key in state_dict and state_dict[key].shape == (self.rows, self.weight.shape[1]):
            padded = self.weight.detach().new_zeros(self.weight.shape, dtype=state_dict[key].dtype)
            padded[: self.rows] = state_dict[key]
            state_dict = {**state_dict, key: padded}
        super()._load_from_state_dict(state_dict, prefix, *args)


class Context:
    """What every block needs to know of the batch besides its tokens."""

    def __init__(self, cache: KVCache | None = None):
        self.cache = cache
        self.positions: Tensor | None = None  # (B, T), or None for 0..T-1
        self.doc_start: Tensor | None = None  # (B, T): the visible keys of token t are doc_start <= j < doc_end
        self.doc_end: Tensor | None = None
        self.cos: Tensor | None = None  # (block_size, rotated dims / 2), fp32
        self.sin: Tensor | None = None


def ops_of(config: ModelConfig) -> list[str]:
    """The ops that a training step of such a model calls, named as `native.OPS` names them."""
    found = {"attention", "embedding", "linear_cross_entropy", "adamw", "grad_norm"}
    found.add({"layernorm": "layer_norm", "rmsnorm": "rms_norm"}[config.norm])
    found.add({"swiglu": "swiglu", "relu": ""}.get(config.activation, "gelu"))
    if config.positions == "rope":
        found.add("rotary")  # the norm of Q and K included
    elif config.qk_norm:
        found.add("rms_norm")
    return [op for op in native.OPS if op in found]


class GPT(nn.Module):
    """The model. `model(idx)` gives logits, `model(idx, targets)` the loss.

    Initialisation (GPT-2): normal with std 0.02; the projections into the residual stream are scaled
    down by sqrt(2 n_layer), because that many of them add up; biases zero, norm weights one. Drawn from
    `generator`, or torch's global one.
    """

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config = config.resolved()
        self.token_embedding = VocabMatrix(config)
        if config.positions == "learned":
            self.position_embedding = nn.Parameter(torch.empty(config.block_size, config.n_embd))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = Norm(config)
        self.head = None if config.tied_embeddings else VocabMatrix(config)
        self._tables: tuple[Tensor, Tensor] | None = None
        self.initialise(generator)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        residual_std = INIT_STD / math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                into_residual = name.endswith((".attention.out", ".ffn.down"))
                module.weight.normal_(0.0, residual_std if into_residual else INIT_STD, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, VocabMatrix):
                module.weight[: module.rows].normal_(0.0, INIT_STD, generator=generator)
        if self.config.positions == "learned":
            self.position_embedding.normal_(0.0, INIT_STD, generator=generator)

    @property
    def device(self) -> torch.device:
        return self.token_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.token_embedding.weight.dtype

    def num_parameters(self, embeddings: bool = True) -> int:
        """Trained numbers, padding rows not counted; without `embeddings`, those of the blocks and norms only."""
        total = sum(p.numel() for p in self.parameters())
        vocab = [m for m in (self.token_embedding, self.head) if m is not None]
        if embeddings:
            return total - sum(m.weight[m.rows :].numel() for m in vocab)
        total -= sum(m.weight.numel() for m in vocab)
        return total - (self.position_embedding.numel() if self.config.positions == "learned" else 0)

    def logical_rows(self) -> dict[str, int]:
        """Parameters that are stored with padding rows, and how many of their rows are real."""
        return {f"{n}.weight": m.rows for n, m in self.named_modules() if isinstance(m, VocabMatrix)}

    def rotary_tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin, each (block_size, rotated dims / 2) in fp32, made once per device."""
        if self._tables is None or self._tables[0].device != self.device:
            c = self.config
            rotated = int(c.head_dim * c.rope_fraction)
            self._tables = ops.rotary_tables(c.block_size, rotated, c.rope_theta, c.rope_scaling, self.device)
        return self._tables

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        loss_divisor: int | Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits, or the loss where targets are given.

        idx:          (B, T) token ids.
        targets:      (B, T) ids to predict; -100 is not counted.
        cu_seqlens:   (documents + 1,) int32, bounds of the documents in the flattened B * T tokens: attention and
                      positions stay inside one document.
        loss_divisor: what the summed loss is divided by: the number of targets of the whole step when micro-batches
                      are accumulated. The mean over this batch's targets when not given.
        cache:        the tokens continue those in the cache, which is extended by them.

        Returns (B, T, V) logits in the model's dtype, or a scalar loss in fp32 (fp64 for fp64), in nats.
        Raises ValueError where idx is not (B, T) integers or T does not fit block_size.
        """
        if idx.dim() != 2 or idx.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"idx must be (B, T) int64 or int32, got {tuple(idx.shape)} {idx.dtype}")
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets must have the shape of idx {tuple(idx.shape)}, got {tuple(targets.shape)}")
        used = cache.filled if cache is not None else 0
        held = f" after {used} cached" if used else ""
        if used + idx.shape[1] > self.config.block_size:
            raise ValueError(f"got {idx.shape[1]} tokens{held}, but block_size is {self.config.block_size}")
        if cache is not None and used + idx.shape[1] > cache.keys.shape[2]:
            raise ValueError(f"got {idx.shape[1]} tokens{held}, but the cache has room for {cache.keys.shape[2]}")

        context = self._context(idx, cu_seqlens, cache)
        # the real rows alone, so that an id past the vocabulary is refused instead of reading padding
        delta, residual = ops.embedding(idx, self.token_embedding.weight, vocab_size=self.config.vocab_size), None
        if self.config.positions == "learned":
            table = self.position_embedding
            T = idx.shape[1]
            delta = delta + (table[:T] if context.positions is None else ops.embedding(context.positions, table))
        delta = F.dropout(delta, self.config.dropout, self.training)
        for layer, block in enumerate(self.blocks):
            delta, residual = block(delta, residual, context, layer)
        x, _ = self.final_norm(delta, residual)
        if cache is not None:
            cache.advance(idx.shape[1])

        head = (self.head or self.token_embedding).weight
        if targets is None:
            return F.linear(x, head)[..., : self.config.vocab_size]
        loss = ops.linear_cross_entropy(
            x.flatten(0, 1),
            head,
            targets.flatten(),
            vocab_size=self.config.vocab_size,
            reduction="mean" if loss_divisor is None else "sum",
        )
        if isinstance(loss_divisor, Tensor):
            loss_divisor = loss_divisor.to(loss.dtype)  # two scalars in tensors would give the wider dtype
        return loss if loss_divisor is None else loss / loss_divisor

    def _context(self, idx: Tensor, cu_seqlens: Tensor | None, cache: KVCache | None) -> Context:
        context = Context(cache)
        if cu_seqlens is not None:
            if cache is not None:
                raise ValueError("cu_seqlens cannot be combined with a cache: documents are separate rows there")
            B, T = idx.shape
            context.doc_start, context.doc_end = ops.document_bounds(cu_seqlens, B, T)
            context.positions = torch.arange(T, device=idx.device, dtype=torch.int32) - context.doc_start
        elif cache is not None:
            context.positions = cache.positions(idx.shape[1])
        if self.config.positions == "rope":
            context.cos, context.sin = self.rotary_tables()
        return context

    def generate(self, idx: Tensor, max_new_tokens: int, **options) -> Tensor:
        """Continue idx (B, T) by max_new_tokens; see `fastgpt.generate.generate` for the options."""
        from .generate import generate

        return generate(self, idx, max_new_tokens, **options)

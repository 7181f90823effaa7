"""The loop that fastgpt's speed is measured against: a GPT in plain eager PyTorch, the way most people begin.

GPT-2's block (LayerNorm, GELU, learned positions, no biases, tied embedding), torch's fused attention and fused
AdamW, batches at random offsets of a memory-mapped array: what nanoGPT does by default, without `torch.compile`.
Shares nothing with the rest of the package.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.norm_1 = nn.LayerNorm(n_embd, bias=False)
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.out = nn.Linear(n_embd, n_embd, bias=False)
        self.norm_2 = nn.LayerNorm(n_embd, bias=False)
        self.up = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.down = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        heads = self.qkv(self.norm_1(x)).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class PlainGPT(nn.Module):
    def __init__(self, vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*(Block(n_embd, n_head) for _ in range(n_layer)))
        self.norm = nn.LayerNorm(n_embd, bias=False)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, 0.0, 0.02 / math.sqrt(2 * n_layer) if into_residual else 0.02)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """idx (B, T) -> logits (B, T, V), or the mean loss where targets (B, T) are given."""
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        logits = self.head(self.norm(self.blocks(x)))
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PlainLoop:
    """One training loop; `step()` does one optimizer step on a batch of batch_size * block_size tokens.

    data: 1-D array of token ids. autocast: a dtype for torch.autocast, or None for plain fp32.
    """

    def __init__(
        self,
        model: nn.Module,
        data: np.ndarray,
        block_size: int,
        batch_size: int,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        beta2: float = 0.95,
        grad_clip: float = 1.0,
        autocast: torch.dtype | None = None,
        seed: int = 1337,
    ):
        self.model, self.data, self.block_size, self.batch_size = model, data, block_size, batch_size
        self.grad_clip, self.autocast = grad_clip, autocast
        self.device = next(model.parameters()).device
        self.draw = torch.Generator().manual_seed(seed)
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=True)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.block_size

    def batch(self) -> tuple[Tensor, Tensor]:
        """(idx, targets), each (B, T) int64."""
        offsets = torch.randint(len(self.data) - self.block_size, (self.batch_size,), generator=self.draw).tolist()
        rows = np.stack([self.data[i : i + self.block_size + 1] for i in offsets]).astype(np.int64)
        rows = torch.from_numpy(rows).to(self.device)
        return rows[:, :-1], rows[:, 1:]

    def step(self, lr: float | None = None) -> float:
        """Forward, backward, clip, update. Returns the loss; `lr` replaces the learning rate."""
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        idx, targets = self.batch()
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            loss = self.model(idx, targets)
        loss.backward()
        if self.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

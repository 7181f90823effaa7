"""How much arithmetic training takes, and how much the device could do."""

from __future__ import annotations

import torch

from .config import ModelConfig

# Dense bf16 FLOP/s of the vendor's data sheet, by a part of the device's name; the first match counts.
PEAK_BF16_FLOPS = (
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("T4", 65e12),
)


def flops_per_token(config: ModelConfig) -> float:
    """Forward and backward FLOPs for one token of a full block: 6 per weight of every matrix multiplication, and
    attention's 6 H D T (both of its products, three passes, the causal half)."""
    c = config.resolved()
    heads = c.n_head + 2 * c.n_kv_head
    attention = c.n_embd * heads * c.head_dim + c.n_head * c.head_dim * c.n_embd
    ffn = c.n_embd * c.ffn_width * (3 if c.activation == "swiglu" else 2)
    weights = c.n_layer * (attention + ffn) + c.n_embd * c.vocab_size
    reach = c.block_size / 2 if c.window is None else min(c.window + 1, c.block_size / 2)
    return 6.0 * weights + 12.0 * c.n_layer * c.n_head * c.head_dim * reach


def peak_flops(device: torch.device) -> float | None:
    """The device's peak in bf16, or None where it is not known (every CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_FLOPS if part in name), None)

"""The learning rate over a run, as a share of its peak."""

from __future__ import annotations

import math

from .config import OptimConfig


def learning_rate_scale(step: int, steps: int, config: OptimConfig) -> float:
    """The factor that optimizer step `step` (0-based) of `steps` applies to every group's peak rate.

    Linear warm-up over `warmup_steps`: the first step already moves. Then, down to `min_lr_fraction` at the
    last step: `cosine` (Loshchilov & Hutter, 2017, https://arxiv.org/abs/1608.03983); `wsd`, flat and then
    linear over the last `decay_fraction` of all steps (Hu et al., 2024, https://arxiv.org/abs/2404.06395);
    or `constant`, which stays at the peak.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    floor, last = config.min_lr_fraction, max(steps - 1, 1)
    if config.schedule == "cosine":
        begin = config.warmup_steps
        progress = min(1.0, (step - begin) / max(last - begin, 1))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    begin = max(config.warmup_steps, last - round(config.decay_fraction * steps))
    return 1 - (1 - floor) * min(1.0, max(0.0, step - begin) / max(last - begin, 1))

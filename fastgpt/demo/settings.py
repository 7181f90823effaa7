"""What the demo trains, on a CPU and on a GPU. `benchmarks/sweep_demo.py` is how the numbers were chosen."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import CheckpointConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig


@dataclass(frozen=True)
class Settings:
    train: TrainConfig
    """Everything but the data, the folder and the number of steps. model.vocab_size is the largest vocabulary."""
    seconds: float
    """Of training: the schedule ends then."""
    sample_at: tuple[float, ...]
    """Shares of the seconds at which the model is sampled and evaluated; the end is always one."""
    most_passes: int
    """A small text ends the training earlier, after this many passes over it."""


CPU = Settings(
    train=TrainConfig(
        model=ModelConfig(
            vocab_size=4096,
            block_size=256,
            n_layer=4,
            n_head=4,
            n_embd=128,
            norm="rmsnorm",
            activation="swiglu",
            positions="rope",
            linear_bias=False,
            tied_embeddings=True,
        ),
        optim=OptimConfig(
            optimizer="muon", lr=0.04, muon_lr=0.01, weight_decay=0.1, warmup_steps=50, min_lr_fraction=0.0
        ),
        eval=EvalConfig(every=0, batch_size=16),
        checkpoint=CheckpointConfig(every=0, keep_last=1, keep_best=False),
        batch_tokens=2048,
        micro_batch_size=8,
        log_every=10,
    ),
    seconds=180.0,
    sample_at=(0.0, 10 / 180, 30 / 180, 60 / 180, 120 / 180),
    most_passes=20,
)

GPU = Settings(
    train=CPU.train.replace(
        model=CPU.train.model.replace(n_layer=8, n_head=8, n_embd=512, block_size=512),
        optim=CPU.train.optim.replace(lr=1e-3, weight_decay=0.3),
        eval=EvalConfig(every=0, batch_size=32),
        batch_tokens=16384,
        micro_batch_size=32,
    ),
    seconds=180.0,
    sample_at=CPU.sample_at,
    most_passes=16,
)

"""fastgpt: train a GPT from scratch with CUDA kernels that you can read.

Names are imported when they are first used: `import fastgpt` is instant and needs torch and numpy only.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "ModelConfig": "config",
    "TrainConfig": "config",
    "PrepareConfig": "config",
    "Tokenizer": "tokenizer",
    "GPT": "model",
    "Trainer": "train",
}
_MODULES = ("ops", "optim", "native", "data", "checkpoint")

__all__ = [
    "GPT",
    "ModelConfig",
    "PrepareConfig",
    "Tokenizer",
    "TrainConfig",
    "Trainer",
    "__version__",
    "checkpoint",
    "data",
    "native",
    "ops",
    "optim",
]

if TYPE_CHECKING:
    from . import checkpoint, data, native, ops, optim
    from .config import ModelConfig, PrepareConfig, TrainConfig
    from .model import GPT
    from .tokenizer import Tokenizer
    from .train import Trainer


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

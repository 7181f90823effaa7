"""Bits per byte of held-out text after equal wall time: fastgpt's demo beside a plain PyTorch GPT loop.

    python benchmarks/quality.py --seconds 180 --out benchmarks/results/quality-cpu.json

Both train on the demo's corpus, tokens and shape for the same seconds, each with a cosine schedule whose number of
steps follows from its own measured speed, and are evaluated on the whole validation split in the same windows. The
plain loop is in fp32 and under bf16 autocast, each at several learning rates, of which its best counts.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import machine, write_result
from sweep_demo import Data, run

from fastgpt.config import OptimConfig
from fastgpt.data import Dataset, evaluation_batches
from fastgpt.demo import settings
from fastgpt.demo.plain_gpt import PlainGPT, PlainLoop
from fastgpt.schedule import learning_rate_scale

TIMED_STEPS = 40


def train_plain(path: Path, seconds: float, lr: float, autocast: torch.dtype | None, seed: int) -> dict[str, Any]:
    """The plain loop at the demo's shape; returns its bits per byte and what it did."""
    config = settings.CPU.train
    dataset = Dataset.open(path)
    stream, c = dataset.split("train"), config.model
    batch_size = config.batch_tokens // c.block_size

    def fresh() -> PlainLoop:
        torch.manual_seed(seed)
        model = PlainGPT(dataset.vocab_size, c.block_size, c.n_layer, c.n_head, c.n_embd)
        return PlainLoop(
            model, stream.read(0, len(stream)), c.block_size, batch_size, lr=lr, autocast=autocast, seed=seed
        )

    loop = fresh()
    for _ in range(3):
        loop.step()
    began = time.perf_counter()
    for _ in range(TIMED_STEPS):
        loop.step()
    steps = max(1, round(seconds * TIMED_STEPS / (time.perf_counter() - began)))
    schedule = OptimConfig(warmup_steps=config.optim.warmup_steps, min_lr_fraction=0.1)
    loop = fresh()
    began = time.perf_counter()
    for step in range(steps):
        loop.step(lr * learning_rate_scale(step, steps, schedule))
    spent = time.perf_counter() - began
    return {
        "loop": f"plain, {'fp32' if autocast is None else 'bf16 autocast'}",
        "lr": lr,
        "bits_per_byte": round(bits_per_byte(loop, dataset, autocast), 4),
        "steps": steps,
        "seconds": round(spent, 1),
        "tokens_per_second": round(steps * loop.tokens_per_step / spent),
        "parameters": sum(p.numel() for p in loop.model.parameters()),
    }


@torch.inference_mode()
def bits_per_byte(loop: PlainLoop, dataset: Dataset, autocast: torch.dtype | None) -> float:
    """Over the whole validation split, in the windows that `fastgpt.evaluate` uses."""
    val, nll = dataset.split("val"), 0.0
    for batch in evaluation_batches(val, loop.block_size, 16):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            logits = loop.model(batch.idx)
        nll += F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), reduction="sum").item()
    return nll / math.log(2) / (val.text_bytes + val.documents)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180.0, help="of training in each run")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3], help="learning rates of the plain loop")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    arguments = parser.parse_args()
    rows = []

    def show(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        data = Data(None, Path(folder))
        config = settings.CPU.train.replace(device="cpu", seed=arguments.seed)
        path = data.path(config.model.vocab_size)
        show({"loop": "fastgpt", **run(config, data, arguments.seconds)})
        for autocast in (None, torch.bfloat16):
            for lr in arguments.lr:
                show(train_plain(path, arguments.seconds, lr, autocast, arguments.seed))
    best = min(row["bits_per_byte"] for row in rows[1:])
    print(f"fastgpt {rows[0]['bits_per_byte']:.4f}, the best plain loop {best:.4f} bits per byte")
    if arguments.out:
        facts = {**machine(), "threads": torch.get_num_threads()}
        write_result(arguments.out, {"machine": facts, "seconds": arguments.seconds, "runs": rows})
    return 0 if rows[0]["bits_per_byte"] <= best else 1


if __name__ == "__main__":
    sys.exit(main())

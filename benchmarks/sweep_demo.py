"""Which settings reach the fewest bits per byte of held-out text in the demo's time: one JSON line for each.

    python benchmarks/sweep_demo.py --seconds 60 '' 'optim.optimizer=adamw' 'model.n_layer=3 model.n_embd=160'

A setting is a list of fields of TrainConfig, laid over the demo's own (the empty one is the demo as it is);
model.vocab_size prepares the data anew. Each runs alone, for the given seconds of training, in a schedule whose
steps follow from its own measured speed, as in the demo. Lines are printed as they come, and appended to --out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from fastgpt.config import ConfigError, PrepareConfig, TrainConfig
from fastgpt.data import Dataset, prepare
from fastgpt.demo import settings
from fastgpt.demo.corpus import own_files, standard_library
from fastgpt.demo.speed import seconds_per_step
from fastgpt.errors import UserError
from fastgpt.precision import resolve_device
from fastgpt.train import Trainer

TIMED_STEPS = 40


def changed(config: TrainConfig, text: str) -> TrainConfig:
    """`config` with fields replaced as in 'model.n_embd=160 micro_batch_size=8'. Raises ConfigError."""
    values = config.to_dict()
    for assignment in shlex.split(text):
        name, _, value = assignment.partition("=")
        *sections, field = name.split(".")
        table = values
        for section in sections:
            table = table.get(section, {})
        if field not in table:
            raise ConfigError(f"TrainConfig has no field {name!r}")
        try:
            table[field] = json.loads(value)
        except ValueError:
            table[field] = value
    return TrainConfig.from_dict(values)


class Data:
    """The corpus, prepared once for each size of vocabulary."""

    def __init__(self, corpus: Path | None, folder: Path):
        self.folder = folder
        self.files = (own_files(corpus) if corpus else standard_library()).write(folder)
        self.prepared: dict[int, Path] = {}

    def path(self, vocab_size: int) -> Path:
        if vocab_size not in self.prepared:
            path = self.folder / str(vocab_size)
            inputs, val_inputs = ((str(file),) for file in self.files)
            config = PrepareConfig(inputs=inputs, val_inputs=val_inputs, out_dir=str(path), vocab_size=vocab_size)
            prepare(config, progress=False)
            self.prepared[vocab_size] = path
        return self.prepared[vocab_size]


def run(config: TrainConfig, data: Data, seconds: float) -> dict[str, Any]:
    """Train for `seconds` and evaluate the whole validation split."""
    path = data.path(config.model.vocab_size)
    vocab_size = Dataset.open(path).vocab_size
    config = config.replace(
        data=config.data.replace(path=str(path)), model=config.model.replace(vocab_size=vocab_size), log_every=10**9
    )
    each, precision = seconds_per_step(config, TIMED_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        config = config.replace(out_dir=folder, steps=max(1, round(seconds / each)), precision=precision)
        trainer = Trainer(config)
        progress = trainer.fit()
        if trainer.interrupted:
            raise KeyboardInterrupt
        result = trainer.evaluate()
    return {
        "bits_per_byte": round(result.bits_per_byte, 4),
        "parameters": trainer.model.num_parameters(),
        "steps": progress.step,
        "seconds": round(progress.seconds, 1),
        "tokens_per_second": round(progress.step * config.batch_tokens / progress.seconds),
        "evaluation_seconds": round(result.seconds, 2),
        "precision": precision,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=[""], help="fields to change, one quoted list for each run")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training in each run")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each setting, with seeds 1337, 1338, ...")
    parser.add_argument("--corpus", type=Path, help="text to train on; Python's standard library when not given")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="a file that the lines are appended to")
    arguments = parser.parse_args()
    cpu = resolve_device(arguments.device).type == "cpu"
    base = (settings.CPU if cpu else settings.GPU).train.replace(device=arguments.device)
    try:
        configs = [(text, changed(base, text)) for text in arguments.settings]
        with tempfile.TemporaryDirectory() as folder:
            data = Data(arguments.corpus, Path(folder))
            for text, config in configs:
                for repeat in range(arguments.repeats):
                    config = config.replace(seed=base.seed + repeat)
                    line = json.dumps({"settings": text, "seed": config.seed, **run(config, data, arguments.seconds)})
                    print(line, flush=True)
                    if arguments.out:
                        with open(arguments.out, "a", encoding="utf-8") as file:
                            file.write(line + "\n")
    except (UserError, ConfigError) as error:
        print(f"sweep_demo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Variants of attention's forward on Hopper, timed: keys of a tile, stages, and the schedule.

    python benchmarks/tune_attention.py [--seconds 60] [--only "forward causal"] [--out FILE.json]

A copy of the sources gets other constants in csrc/attention/forward_sm90.cu, is built, and bench_attention.py times it
there, beside cuDNN and FlashAttention in the same minutes, at most --seconds for each variant. What does not compile,
or spills, is a result too. The first build compiles all kernels, the others one file. Without a GPU all is emulated.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "csrc/attention/forward_sm90.cu"
COPIED = ("csrc", "fastgpt", "benchmarks")

# Constants of HopperTile by name; others stay. (Three consumers spill, but for tiles of 64 keys and D up to 96.)
VARIANTS: dict[str, dict[str, int]] = {
    "as it is": {},
    "tiles of 64 keys": {"kKeys": 64},
    "three stages of 64 keys": {"kKeys": 64, "kStages": 3},
    "four stages of 64 keys": {"kKeys": 64, "kStages": 4},
    "tiles of 96 keys": {"kKeys": 96},
    "a block for each tile": {"kPersistent": 0},
}


def with_constants(text: str, constants: dict[str, int]) -> str:
    """The source with other constants. Raises ValueError for one that it does not define as a number, once."""
    for name, value in constants.items():
        text, found = re.subn(rf"\b{name} = \d+", f"{name} = {value}", text)
        if found != 1:
            raise ValueError(f"{SOURCE} defines {name} {found} times as a number, expected once")
    return text


def run_variant(root: Path, constants: dict[str, int], kind: str, seconds: float, only: str) -> dict[str, Any]:
    """What bench_attention.py found with the kernels of `root`, a copy of the sources, or why it did not run."""
    text = (ROOT / SOURCE).read_text(encoding="utf-8")
    (root / SOURCE).write_text(with_constants(text, constants), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(root), "FASTGPT_CUDA_ARCHS": "9.0a"}

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True)

    if (built := python("-m", "fastgpt.native.build", kind)).returncode:
        return {"does not build": built.stderr.strip().splitlines()[:1]}
    out = root / "found.json"
    out.unlink(missing_ok=True)
    timed = python("benchmarks/bench_attention.py", "--seconds", str(seconds), "--only", only, "--out", str(out))
    if timed.returncode or not out.exists():
        return {"does not run": timed.stderr.strip().splitlines()[-1:]}
    print(timed.stdout, flush=True)
    return json.loads(out.read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> int:
    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing for each variant")
    parser.add_argument("--only", default="forward causal", metavar="WORDS", help="cases of bench_attention.py")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="which; all of them")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    arguments = parser.parse_args(argv)
    kind = "cuda" if torch.cuda.is_available() else "emulated"
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            shutil.copytree(ROOT / name, Path(folder) / name)
        for name in arguments.variants:
            print(f"--- {name}", flush=True)
            found[name] = run_variant(Path(folder), VARIANTS[name], kind, arguments.seconds, arguments.only)
            if len(found[name]) == 1:
                print(*found[name].items())
            if arguments.out:
                arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

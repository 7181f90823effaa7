"""The weight gradients of linear layers, in each of the formulations that fastgpt/linear.py has.

    python benchmarks/bench_linear.py [--seconds 60] [--out FILE.json]

The layers are those of GPT-2 and of a model of width 4,096; from bf16 to the float32 that gradients are summed up in.
What a model trains with is measured for itself, where its training begins (fastgpt/precision.py); this shows what there
is to gain. On a CPU there is nothing to show: no kernel of ours takes part, and all formulations are about as fast.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from operations import Case, main, normal

from fastgpt.linear import FORMULATIONS, weight_gradient

LAYERS = ((768, 2304), (768, 768), (768, 3072), (3072, 768), (4096, 4096))  # inputs, outputs


def case(inputs: int, outputs: int) -> Case:
    def contender(name: str) -> Callable[[str, int], Callable[[], Any]]:
        def make(device: str, rows: int) -> Callable[[], Any]:
            x, d_y = (normal(rows, n, dtype=torch.bfloat16, device=device) for n in (inputs, outputs))
            return lambda: weight_gradient(d_y, x, name, torch.float32)

        return make

    return Case(
        "linear",
        "weight gradient",
        inputs,
        torch.bfloat16,
        lambda rows: 2 * rows * (inputs + outputs) + 4 * inputs * outputs,
        {name: contender(name) for name in FORMULATIONS},
        f"{inputs} x {outputs}",
        lambda rows: 2 * rows * inputs * outputs,
    )


if __name__ == "__main__":
    sys.exit(main([case(*layer) for layer in LAYERS], (__doc__ or "").split("\n")[0], kernels=False))

"""Training steps of the real Trainer on fake CUDA tensors, for which no GPU is needed: `python -m tests.fake_cuda`.

    python -m tests.fake_cuda [FOLDER [LIBRARY]]

FakeTensorMode runs no kernel: it says what shape, dtype and device each result has. So what is looked at is the way
that a step takes: which entries of `fastgpt::` it calls, and whether the host ever waits for the device. LIBRARY is
fake_cuda.cpp, compiled, for a torch without CUDA. It cannot be unloaded, so this is a program of its own; it prints one
JSON object: what became of each case of CASES and PLANTS.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import itertools
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__" and len(sys.argv) > 2:
    ctypes.CDLL(sys.argv[2])  # before torch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgpt import ModelConfig, TrainConfig, Trainer, native, train
from fastgpt.config import CheckpointConfig, DataConfig, EvalConfig, OptimConfig
from fastgpt.linear import FORMULATIONS
from fastgpt.native import loading, schemas
from fastgpt.precision import linear_layers, shape_of
from tests.ops.kernels import no_reference
from tests.synthetic import VOCAB, text_ids, write_dataset

STEPS, ACCUMULATION, LAYERS = 2, 2, 1
SHAPE = dict(vocab_size=VOCAB, block_size=16, n_layer=LAYERS, n_head=4, n_embd=32)
GPT2 = dict(SHAPE, norm="layernorm", activation="gelu", positions="learned", tied_embeddings=True)
LLAMA = dict(SHAPE, norm="rmsnorm", activation="swiglu", positions="rope", n_kv_head=2, linear_bias=False)

# name -> model, precision, documents, optimizer
CASES: dict[str, tuple[dict[str, Any], str, bool, str]] = {
    "gpt2 float32": (GPT2, "float32", False, "adamw"),
    "gpt2 bfloat16": (GPT2, "bfloat16", False, "adamw"),
    "llama float32": (LLAMA, "float32", False, "adamw"),
    "llama bfloat16, documents": (dict(LLAMA, qk_norm=True, dropout=0.1), "bfloat16", True, "adamw"),
    "llama bfloat16_stochastic": (LLAMA, "bfloat16_stochastic", False, "adamw"),
    "gpt2 bfloat16, muon": (dict(GPT2, activation="gelu_tanh"), "bfloat16", False, "muon"),
}


class Waited(AssertionError):
    """The host waited for the device."""


# ---- what makes the host wait --------------------------------------------------------------------------------

INDEXED = ("aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")  # by masks: nonzero
COPIES = ("aten::_to_copy", "aten::copy_")


class Spy(TorchDispatchMode):
    """Notes what is computed, in order, and raises Waited where a GPU would have the host wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.name()
        if name == "prim::device":
            return function(*args, **kwargs)
        inputs = tensors((args, kwargs))
        on_device = any(x.is_cuda for x in inputs)
        if on_device and values_decide(name, function, args):
            raise Waited(f"{name} reads values of the device")
        result = function(*args, **kwargs)
        outputs = tensors(result)
        if on_device and any(x.device.type == "cpu" for x in outputs):
            raise Waited(f"{name} copies to the host")
        from_host = name in COPIES and any(x.is_cuda for x in outputs) and inputs[-1].device.type == "cpu"
        if from_host and not (kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:] == (True,))):
            raise Waited(f"{name} copies from the host, and waits for it")
        self.names.append(name)
        return result


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def values_decide(name: str, function: Any, args: Any) -> bool:
    """Whether the values in a tensor decide the result's shape, or a number that the host gets."""
    if name in INDEXED:
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags))


@contextmanager
def guarded(reads: list[int], spy: Spy) -> Iterator[None]:
    """What does not go through the dispatcher. Of the trainer's own read it is noted when it came."""

    def synchronize(*args: Any, **kwargs: Any) -> None:
        raise Waited("synchronize() waits for the device")

    def numpy(x: Tensor, **kwargs: Any) -> Any:
        if x.is_cuda:
            raise Waited("numpy() copies to the host")
        return host_numpy(x, **kwargs)

    def tolist(x: Tensor) -> Any:
        if not x.is_cuda:
            return host_tolist(x)
        if sys._getframe(1).f_code is not Trainer._step.__code__:
            raise Waited("tolist() copies to the host")
        reads.append(len(spy.names))
        return [1.0] * len(x)

    host_numpy, host_tolist = Tensor.numpy, Tensor.tolist
    with pytest.MonkeyPatch.context() as patch:
        for place in (torch.cuda, torch.accelerator, torch.cuda.Stream, torch.cuda.Event):
            patch.setattr(place, "synchronize", synchronize)
        for place in (Tensor, FakeTensor):
            patch.setattr(place, "numpy", numpy)
            patch.setattr(place, "tolist", tolist)
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
        yield


# ---- steps ---------------------------------------------------------------------------------------------------


def chosen(model: train.GPT, tokens: int) -> tuple[dict[str, str], dict]:
    """In the place of a choice by measuring: each formulation of a weight gradient in turn."""
    shapes = dict.fromkeys(map(shape_of, linear_layers(model)))
    return dict(zip(shapes, itertools.cycle(FORMULATIONS), strict=False)), {}


class FakeGPT(train.GPT):
    """A GPT that can be moved: torch's `to` swaps parameters in place, which fake ones refuse."""

    def to(self, target: Any) -> FakeGPT:
        for module in self.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(p.detach().to(target))
        return self


def run(folder: Path, case: str, plant: Callable[[Trainer], None] | None = None) -> dict[str, Any]:
    """STEPS steps of a case: the entries of `fastgpt::` that they called, the reads, and what was raised."""
    model, precision, documents, optimizer = CASES[case]
    config = TrainConfig(
        model=ModelConfig(**model),
        data=DataConfig(path=str(folder / "data"), documents=documents),
        optim=OptimConfig(optimizer=optimizer),
        eval=EvalConfig(every=0),
        checkpoint=CheckpointConfig(every=0),
        out_dir=str(folder / "run"),
        steps=STEPS,
        micro_batch_size=2,
        batch_tokens=ACCUMULATION * 2 * SHAPE["block_size"],
        precision=precision,
        device="cuda",
        cuda_graphs=False,
    )
    spy, reads, ends, error = Spy(), [], [], None
    pages = [importlib.import_module(f"fastgpt.ops.{page}") for page in schemas.read_pages()]
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode() as mode, no_reference(*pages):
        patch.setattr(train, "GPT", FakeGPT)
        patch.setattr(train, "measure_weight_gradients", chosen)
        patch.setattr(native, "_warned", True)
        trainer = Trainer(config)
        trainer.batches.pin_memory = False
        real_batch = trainer.batches.batch

        def batch(first_sample: int) -> Any:
            with unset_fake_temporarily():  # the loader's work is on the host
                made = real_batch(first_sample)
            fields = {name: mode.from_tensor(x) for name, x in vars(made).items() if isinstance(x, Tensor)}
            return dataclasses.replace(made, **fields)

        patch.setattr(trainer.batches, "batch", batch)
        trainer.model.train()
        if plant is not None:
            plant(trainer)
        try:
            with guarded(reads, spy), spy:
                for _ in range(STEPS):
                    trainer._step()
                    ends.append(len(spy.names))
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}".splitlines()[0]
            if plant is None:
                traceback.print_exc()
        trainer._lock.release()
    entries = [name.split("::")[1] for name in spy.names if name.startswith("fastgpt::")]
    return {"entries": entries, "reads": reads, "ends": ends, "error": error}


# ---- faults, to see that they are found ------------------------------------------------------------------------


def in_forward(fault: Callable[[Tensor], Any]) -> Callable[[Trainer], None]:
    def plant(trainer: Trainer) -> None:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            fault(output[0].detach())

        trainer.model.blocks[0].register_forward_hook(hook)

    return plant


def in_backward(fault: Callable[[Tensor], Any]) -> Callable[[Trainer], None]:
    def plant(trainer: Trainer) -> None:
        trainer.model.blocks[0].ffn.up.weight.register_hook(lambda gradient: fault(gradient) and None)

    return plant


def in_update(fault: Callable[[Tensor], Any]) -> Callable[[Trainer], None]:
    def plant(trainer: Trainer) -> None:
        def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
            fault(kwargs["clip"])

        trainer.optimizer.register_step_pre_hook(hook)

    return plant


def assign(x: Tensor) -> None:
    x.clone()[x > 0] = x.flatten()[:1]


PLANTS: dict[str, Callable[[Trainer], None]] = {
    "item": in_forward(lambda x: x.sum().item()),
    "item in the backward": in_backward(lambda x: x.sum().item()),
    "item in the update": in_update(lambda x: x.item()),
    "float": in_update(float),
    "if": in_update(lambda x: 1 if x > 0 else 2),
    "cpu": in_forward(lambda x: x.cpu()),
    "cpu in the backward": in_backward(lambda x: x.cpu()),
    "to, without waiting": in_forward(lambda x: x.to("cpu", non_blocking=True)),
    "copy_": in_forward(lambda x: torch.empty(x.shape, dtype=x.dtype).copy_(x)),
    "tolist": in_forward(lambda x: x.tolist()),
    "numpy": in_forward(lambda x: x.numpy()),
    "equal": in_forward(lambda x: torch.equal(x, x)),
    "nonzero": in_forward(lambda x: x.nonzero()),
    "mask": in_forward(lambda x: x[x > 0]),
    "assignment by mask": in_forward(assign),
    "masked_select": in_forward(lambda x: x.masked_select(x > 0)),
    "unique": in_forward(lambda x: x.unique()),
    "repeat_interleave": in_forward(lambda x: x[0, 0].repeat_interleave(torch.ones_like(x[0, 0], dtype=torch.int64))),
    "synchronize": in_forward(lambda x: torch.cuda.synchronize()),
    "copy from the host": in_forward(lambda x: torch.ones(3).to(x.device)),
}
PLANTED_IN = "llama float32"


def main(folder: Path) -> None:
    write_dataset(folder / "data", text_ids(600), text_ids(100, seed=1))
    torch.autograd.set_multithreading_enabled(False)  # the backward stays in this thread, where the modes are
    library = loading.library("cuda")
    if isinstance(library, loading.Refused):  # fakes need none
        native._cuda_ops = frozenset(schemas.read_pages())
    said = {case: run(folder, case) for case in CASES}
    said |= {name: run(folder, PLANTED_IN, plant) for name, plant in PLANTS.items()}

    native._cuda_ops = frozenset()
    said["no kernels"] = run(folder, PLANTED_IN, lambda trainer: None)
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

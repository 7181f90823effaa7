"""The step that is captured on a GPU: here a recording stands in for the CUDA graph, and a GPU has the real one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgpt import ModelConfig, TrainConfig, Trainer, native, step, train
from fastgpt.config import CheckpointConfig, DataConfig, EvalConfig, OptimConfig
from fastgpt.errors import UserError
from fastgpt.native import loading
from tests.fake_cuda import chosen
from tests.native_cases import built
from tests.synthetic import VOCAB, text_ids, write_dataset

STEPS = 4
SHAPE = dict(vocab_size=VOCAB, block_size=16, n_layer=2, n_head=2, n_embd=16)
LLAMA = dict(SHAPE, norm="rmsnorm", activation="swiglu", positions="rope", linear_bias=False)

# name -> model, precision, documents, optimizer
CASES: dict[str, tuple[dict[str, Any], str, bool, str]] = {
    "gpt2, dropout": (dict(SHAPE, dropout=0.1), "float32", False, "adamw"),
    "llama, documents": (LLAMA, "bfloat16", True, "adamw"),
    "llama, stochastic": (LLAMA, "bfloat16_stochastic", False, "adamw"),
    "gpt2, muon": (SHAPE, "bfloat16", False, "muon"),
}


class Recording(TorchDispatchMode):
    """Everything that torch computes, with the very tensors; `replay` computes it again, in their memory.

    As a CUDA graph does: a number that the host knew goes in as it was, and what the host decided stays decided.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert torch.Tag.data_dependent_output not in function.tags, f"{function.name()} has the host read a value"
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        made = new_memory(result, (args, kwargs))
        if made or function._schema.is_mutable:  # others look at the same memory in another way
            self.calls.append((function, args, kwargs, made))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, made in self.calls:
            for old, new in zip(made, new_memory(function(*args, **kwargs), (args, kwargs)), strict=True):
                old.copy_(new)


def new_memory(result: Any, inputs: Any) -> list[torch.Tensor]:
    """The tensors in a result that lie in memory of their own."""
    known = {x.untyped_storage().data_ptr() for x in tensors(inputs)} - {0}
    return [x for x in tensors(result) if x.untyped_storage().data_ptr() not in known]


def tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Recorder:
    """Stands in for `step.Capture`."""

    def __init__(self, device: torch.device):
        pass

    def run(self, work: Callable[[], None]) -> None:
        work()

    def graph(self, work: Callable[[], None]) -> Callable[[], None]:
        with Recording() as recording:
            work()
        return recording.replay


@contextlib.contextmanager
def recording(monkeypatch: pytest.MonkeyPatch, capture: type = Recorder) -> Iterator[None]:
    """Inside, a Trainer's step is recorded and replayed."""
    real = step.Step

    def captured_step(*args: Any, capture: bool) -> step.Step:
        return real(*args, capture=True)

    with monkeypatch.context() as patch:
        patch.setattr(step, "Capture", capture)
        patch.setattr(train, "Step", captured_step)
        yield


State = dict[str, torch.Tensor]


def trained(
    folder: Path, case: str, captured: bool, device: str = "cpu", accumulation: int = 3, **changes: Any
) -> tuple[list[float], State]:
    """The losses of STEPS steps of a case, `captured` or not, and the weights and the optimizer's state after them."""
    model, precision, documents, optimizer = CASES[case]
    config = TrainConfig(
        model=ModelConfig(**model),
        data=DataConfig(path=str(folder / "data"), documents=documents),
        optim=OptimConfig(lr=1e-2, warmup_steps=2, optimizer=optimizer),
        eval=EvalConfig(every=0),
        checkpoint=CheckpointConfig(every=0),
        out_dir=str(folder / "run"),
        steps=STEPS,
        micro_batch_size=2,
        batch_tokens=accumulation * 2 * SHAPE["block_size"],
        precision=precision,
        device=device,
        **changes,
    )
    trainer = Trainer(config)
    assert trainer.step.captured == captured
    try:
        trainer.model.train()
        losses = [trainer._step()["loss"] for _ in range(STEPS)]
        weights, moments = train.training_tensors(trainer.model, trainer.optimizer)
    finally:
        trainer._lock.release()
    return losses, {name: x.clone() for name, x in {**weights, **moments}.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step")
    write_dataset(folder / "data", text_ids(3000), text_ids(100, seed=1))
    return folder


@pytest.mark.parametrize(("case", "accumulation"), [*((case, 3) for case in CASES), ("llama, documents", 1)])
def test_a_step_that_is_replayed_is_the_step(
    case: str, accumulation: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: learning rates, tokens, divisors and bounds of documents reach it through its memory alone."""
    losses, state = trained(folder, case, False, accumulation=accumulation)
    with recording(monkeypatch):
        again, state_again = trained(folder, case, True, accumulation=accumulation)
    assert again == losses and len(set(losses)) == STEPS
    assert state.keys() == state_again.keys()
    for name in state:
        assert torch.equal(state[name], state_again[name]), name


def test_kernels_are_replayed_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built("emulated")
    case = "llama, documents"
    with native.emulated(only=loading.library("emulated").ops, checked=False):
        losses, state = trained(folder, case, False)
        with recording(monkeypatch):
            again, state_again = trained(folder, case, True)
    assert again == losses and all(torch.equal(state[name], state_again[name]) for name in state)


def test_the_first_micro_batch_writes_the_gradients(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is in their memory: nobody zeroes it. Nor does anybody after a signal."""
    with recording(monkeypatch):
        losses, state = trained(folder, "gpt2, dropout", True)
        real = step.Step.reset

        def spoil(self: step.Step) -> None:
            real(self)
            for p in self.model.parameters():
                if p.grad is not None:
                    p.grad.fill_(torch.nan)

        monkeypatch.setattr(step.Step, "reset", spoil)
        again, state_again = trained(folder, "gpt2, dropout", True)
    assert again == losses and all(torch.equal(state[name], state_again[name]) for name in state)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_nothing_runs_beside_the_memory_of_a_graph(
    accumulation: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That memory is its own: what a run takes, or has left, between captures would be held beside it."""
    events: list[tuple[str, int]] = []

    class Watched(Recorder):
        def run(self, work: Callable[[], None]) -> None:
            super().run(work)
            events.append(("run", gradients(work)))

        def graph(self, work: Callable[[], None]) -> Callable[[], None]:
            events.append(("graph", gradients(work)))
            return super().graph(work)

    def gradients(work: Any) -> int:
        return sum(p.grad is not None for p in work.__self__.model.parameters())

    with recording(monkeypatch, Watched):
        trained(folder, "llama, documents", True, accumulation=accumulation)
    parts, every = min(accumulation, 2) + 1, events[0][1]
    assert every > 0
    assert events == [("run", every)] * parts + [("graph", 0)] + [("graph", every)] * (parts - 1)


def test_graphs_share_a_stream_and_a_pool_and_say_what_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another stream's memory the allocator gives nothing, not within a pool either."""
    places: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def graph(graph: Any, pool: Any, stream: Any) -> Iterator[None]:
        places.append((pool, stream))
        try:
            yield
        except RuntimeError:
            raise RuntimeError("the capture was invalidated")  # noqa: B904 - as torch's own

    def fails(error: Exception) -> Callable[[], None]:
        def work() -> None:
            raise error

        return work

    fakes: dict[str, Any] = dict(Stream=lambda device: mock.Mock(device=device), graph_pool_handle=object, graph=graph)
    for name in ("CUDAGraph", "device", "stream", "current_stream"):
        fakes[name] = mock.MagicMock()
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    capture, done = step.Capture(torch.device("cuda")), []
    capture.run(lambda: done.append("run"))
    replays = [capture.graph(lambda: done.append("graph")) for _ in range(2)]
    assert done == ["run", "graph", "graph"] and replays == [torch.cuda.CUDAGraph().replay] * 2
    assert places == [(capture.pool, capture.stream)] * 2
    torch.cuda.stream.assert_called_once_with(capture.stream)
    with pytest.raises(UserError, match=r"\(not permitted\); train with --cuda_graphs false"):
        capture.graph(fails(RuntimeError("not permitted\nand more")))
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        capture.graph(fails(torch.OutOfMemoryError("no room")))


def test_a_batch_of_another_shape_is_refused(folder: Path) -> None:
    config = TrainConfig(
        model=ModelConfig(**SHAPE),
        data=DataConfig(path=str(folder / "data")),
        out_dir=str(folder / "run"),
        micro_batch_size=2,
        batch_tokens=2 * SHAPE["block_size"],
        precision="float32",
        device="cpu",
    )
    trainer = Trainer(config)
    row = dataclasses.replace(trainer.batches.batch(0), idx=torch.zeros(1, SHAPE["block_size"], dtype=torch.int64))
    with pytest.raises(ValueError, match=r"takes batches of \(2, 16\), got \(1, 16\)"):
        trainer.step.accumulate(row, 16)
    trainer.abandon()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("case", "accumulation"), [*((case, 3) for case in CASES), ("llama, documents", 1)])
def test_on_a_gpu_the_graphs_are_the_step_and_nothing_waits(
    case: str, accumulation: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watched(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                return work(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        return call

    monkeypatch.setattr(train, "measure_weight_gradients", chosen)  # measured, two runs may choose otherwise
    for part in ("accumulate", "update"):
        monkeypatch.setattr(step.Step, part, watched(getattr(step.Step, part)))
    losses, state = trained(folder, case, False, "cuda", accumulation, cuda_graphs=False)
    again, state_again = trained(folder, case, True, "cuda", accumulation, cuda_graphs=True)
    assert again == losses and len(set(losses)) == STEPS
    for name in state:
        assert torch.equal(state[name], state_again[name]), name

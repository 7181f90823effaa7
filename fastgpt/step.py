"""What an optimizer step computes on the device, in two parts, each of which a CUDA graph can hold.

accumulate  forward and backward of one micro-batch, added to the gradients and to the step's losses
update      the norm of all gradients, the clip, the optimizer

Neither reads a value of the device, and neither depends on a number of the host: what differs from step to step
(tokens, learning rates, the count of targets) is written into tensors that stay where they are. So on a GPU each part
is captured once and then replayed: one launch for a micro-batch and one for an update, whatever the model's depth. The
first micro-batch of a step has a graph of its own, which writes the gradients that the others add to: nothing is
zeroed, and without accumulation nothing is added. On a CPU, and where config.cuda_graphs is off, the same functions are
simply called.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import ops
from .config import TrainConfig
from .data.batches import Batch
from .errors import UserError
from .model import GPT
from .optim import AdamW


class Step:
    """One optimizer step after the other: `accumulate` for each micro-batch, then `update`.

    capture: replay CUDA graphs. What both parts do is then the same to the last bit as without; the weights and the
    optimizer's state are changed where they lie, so neither may be loaded or replaced afterwards.
    """

    def __init__(self, model: GPT, optimizer: AdamW, config: TrainConfig, capture: bool):
        self.model, self.optimizer, self.config, self.captured = model, optimizer, config, capture
        device, shape = model.device, (config.micro_batch_size, config.model.block_size)
        self.idx = torch.zeros(shape, dtype=torch.int64, device=device)
        self.targets = torch.zeros_like(self.idx)
        self.cu_seqlens: Tensor | None = None
        if config.data.documents:  # room for a document a token: repeated bounds are harmless
            self.cu_seqlens = torch.full((self.idx.numel() + 1,), self.idx.numel(), dtype=torch.int32, device=device)
        self.divisor = torch.ones((), dtype=torch.float64, device=device)
        self.losses = torch.zeros(config.accumulation, dtype=torch.float64, device=device)  # of the micro-batches
        self.number = torch.zeros(1, dtype=torch.int64, device=device)  # of the next one
        self.outcome = torch.zeros(2, dtype=torch.float64, device=device)
        self._first = self._next = self.accumulate_eagerly
        self._update = self.update_eagerly
        self._begun = False  # there are gradients of this step
        if capture:
            self._capture()

    def accumulate(self, batch: Batch, divisor: int) -> None:
        """Add a micro-batch (B, T) to the step; `divisor` is the number of targets of the whole step.

        Raises ValueError for a batch of another shape than config's."""
        if batch.idx.shape != self.idx.shape:
            raise ValueError(f"a step takes batches of {tuple(self.idx.shape)}, got {tuple(batch.idx.shape)}")
        self.idx.copy_(batch.idx, non_blocking=True)
        self.targets.copy_(batch.targets, non_blocking=True)
        if self.cu_seqlens is not None:
            n = len(batch.cu_seqlens)
            self.cu_seqlens[:n].copy_(batch.cu_seqlens, non_blocking=True)
            self.cu_seqlens[n:].fill_(self.idx.numel())
        self.divisor.fill_(divisor)
        (self._next if self._begun else self._first)()
        self._begun = True

    def update(self, lr_scale: float) -> Tensor:
        """Apply what was accumulated, under the initial learning rates times `lr_scale`, unless loss or norm is not
        finite. Returns (loss, norm of the gradient before it is clipped), (2,), which the next update overwrites."""
        for group in self.optimizer.param_groups:
            lr = group["initial_lr"] * lr_scale
            if self.captured:
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self._update()
        self.reset()
        return self.outcome

    def reset(self) -> None:
        """Forget what was accumulated."""
        self._begun = False
        self.number.zero_()
        if not self.captured:
            self.optimizer.zero_grad()

    # ---- the two parts -----------------------------------------------------------------------------

    def accumulate_eagerly(self) -> None:
        loss = self.model(self.idx, self.targets, cu_seqlens=self.cu_seqlens, loss_divisor=self.divisor)
        loss.backward()
        self.losses.index_copy_(0, self.number, loss.detach().view(1).double())
        self.number.add_(1)

    def update_eagerly(self) -> None:
        loss = self.losses.sum()
        norm = ops.grad_norm([p.grad for p in self.model.parameters() if p.grad is not None]).sqrt()
        bad = ~(torch.isfinite(norm) & torch.isfinite(loss))
        limit = self.config.optim.grad_clip
        clip = (limit / (norm + 1e-6)).clamp(max=1.0) if limit else None
        self.optimizer.step(clip=clip, skip=bad)
        self.outcome.copy_(torch.stack([loss, norm]))

    # ---- CUDA graphs ---------------------------------------------------------------------------------

    def _capture(self) -> None:
        """Each part is run once first, for what libraries and the optimizer set up, and changes nothing. All of these
        runs come before the captures: then no more is held at any time than while training."""
        device = self.idx.device
        for group in self.optimizer.param_groups:
            group["lr"] = torch.tensor(group["initial_lr"], dtype=torch.float64, device=device)
        capture = Capture(device)
        accumulations = min(self.config.accumulation, 2)
        for _ in range(accumulations):
            capture.run(self.accumulate_eagerly)
        self.losses.fill_(torch.nan)  # an update that is skipped
        capture.run(self.update_eagerly)
        self.optimizer.zero_grad()  # to None: the gradients that the first graph makes are kept, not added to any
        self.number.zero_()
        self._first = capture.graph(self.accumulate_eagerly)
        if accumulations > 1:
            self._next = capture.graph(self.accumulate_eagerly)
        self.losses.fill_(torch.nan)  # whether capturing computes or not
        self._update = capture.graph(self.update_eagerly)
        self.losses.zero_()
        self.reset()


class Capture:
    """Makes CUDA graphs that are replayed one at a time, in the order in which they were made.

    They have one pool of memory, and one stream, for within a pool the allocator gives the memory of a stream to no
    other. What a graph leaves there, the gradients, stays taken; the rest the next graph takes too.
    """

    def __init__(self, device: torch.device):
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def run(self, work: Callable[[], None]) -> None:
        """work(), on the stream."""
        with torch.cuda.device(self.stream.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                work()
            torch.cuda.current_stream().wait_stream(self.stream)

    def graph(self, work: Callable[[], None]) -> Callable[[], None]:
        """work() as a CUDA graph, after it has been run: a function that replays it on the current stream.

        Raises UserError where something in it cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self.stream.device), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                work()
        except RuntimeError as error:
            cause = error.__context__ or error  # ending a capture that has failed raises an error of its own
            if isinstance(cause, torch.OutOfMemoryError):  # has its own remedy
                raise cause from None
            reason = str(cause).splitlines()[0]
            raise UserError(
                f"a training step cannot be captured as a CUDA graph ({reason}); train with --cuda_graphs false"
            ) from cause
        return graph.replay

"""Cross-entropy of logits against target ids, with label smoothing, z-loss and softcap.

For a row x of V logits with target t (softcap c first: x <- c * tanh(x / c)):

    LSE  = ln sum_j exp(x_j)
    loss = (1 - s) (LSE - x_t) + s (LSE - mean_j x_j) + z LSE^2        s: label_smoothing, z: z_loss
    d loss / d x_j = p_j (1 + 2 z LSE) - (1 - s) [j = t] - s / V       p_j = exp(x_j - LSE)

Rows whose target is ignore_index have loss 0 and no gradient. Reductions: "none", the losses of the rows; "sum"; and
"mean", their sum over the number of rows that are not ignored. Where every row is ignored the mean is 0 / 0 = NaN, with
zero gradients, as torch's is: a trainer wants "sum" and a count of its own.

Contract
    logits       (..., V) fp64, fp32, bf16 or fp16; any strides.
    targets      (...) int64 or int32: ignore_index, or 0 .. vocab_size - 1. With other values the reference raises
                 (RuntimeError, from torch's gather; on a GPU it is an assertion on the device); the kernels make the
                 row's loss and gradient NaN, and so the sum and the mean, without waiting for anything.
    vocab_size   columns from here on are padding: not in the logsumexp or the mean, no gradient. V when not given.
    overwrite_logits  lets the backward of the kernels write the gradient over the logits, where those are contiguous:
                 no second tensor of that size. Whoever else needs the logits for a backward gets autograd's error, as
                 does a second backward. Not for leaves.
    returns      fp32 (fp64 for fp64) in nats: a scalar, or (...) for "none". Computed in that type.
    ValueError   where a shape, dtype, device or option is otherwise; the same on every device.
    The kernels (csrc/cross_entropy) are deterministic, and have no second derivative.

Sources: the loss is torch.nn.functional.cross_entropy's; z-loss: Chowdhery et al. 2022 (PaLM), section 5; label
smoothing: Szegedy et al. 2016, section 7; softcap: Gemma 2, 2024, section 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt import native
from fastgpt.ops import contract
from fastgpt.ops.registry import contiguous_like, register

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    # Not 0.0: with dynamic=True torch.compile takes a float default for a symbol, needs its value, and traces anew.
    label_smoothing: float = 0,
    z_loss: float = 0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    overwrite_logits: bool = False,
) -> Tensor:
    """Loss of logits (..., V) against targets (...), in nats.

    The contract is at the top of this file. Raises ValueError where it is broken.
    """
    contract.check_rows("cross_entropy", "logits", logits)
    check_targets("cross_entropy", "logits", logits, targets)
    check_options("cross_entropy", reduction, label_smoothing, z_loss, softcap, vocab_size, logits.shape[-1])
    if overwrite_logits and _in_leaf_memory(logits):
        raise ValueError("cross_entropy: overwrite_logits is not for a leaf: its values would become its gradient")
    ops = native.select(logits, "cross_entropy")
    if ops is None or contract.transformed():
        return reference(
            logits,
            targets,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            vocab_size=vocab_size,
        )
    options = ignore_index, label_smoothing, z_loss, softcap or 0.0, vocab_size
    if contract.needs_gradient(logits):
        losses = _Kernels.apply(ops, logits, targets, options, overwrite_logits and logits.is_contiguous())
    else:
        losses, _ = ops.cross_entropy_forward.default(logits, targets, *options)
    if reduction == "none":
        return losses
    total = losses.sum(dtype=torch.float64)  # so that only the result is rounded
    return (total if reduction == "sum" else total / (targets != ignore_index).sum()).to(losses.dtype)


def reference(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """The equations in torch, differentiable any number of times."""
    x = logits[..., :vocab_size].to(contract.accumulator(logits.dtype))
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    counted = targets != ignore_index
    column = torch.where(counted, targets, 0).long().unsqueeze(-1)
    log_p = torch.log_softmax(x, -1)
    nll = -log_p.gather(-1, column).squeeze(-1)
    loss = nll
    if label_smoothing:
        loss = (1.0 - label_smoothing) * nll - label_smoothing * log_p.mean(-1)
    if z_loss:
        lse = x.gather(-1, column).squeeze(-1) + nll
        loss = loss + z_loss * lse.square()
    loss = torch.where(counted, loss, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum()


def check_targets(op: str, name: str, rows: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless there is one integer target for each row of `rows`, on its device."""
    contract.check_tensor(op, "targets", targets)
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: targets must be int64 or int32, got {contract.dtype_name(targets.dtype)}")
    if targets.shape != rows.shape[:-1]:
        raise ValueError(
            f"{op}: targets must have the shape of {name} without its last dimension, {tuple(rows.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )
    contract.check_device(op, "targets", targets, name, rows)


def _in_leaf_memory(x: Tensor) -> bool:
    """Whether `x` is a leaf that wants a gradient, or a view of one. Compiled code never overwrites: there, False."""
    if torch.compiler.is_compiling():
        return False
    owner = x if x._base is None else x._base
    return owner.is_leaf and owner.requires_grad


def check_options(
    op: str,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    vocab_size: int | None,
    V: int,
) -> None:
    """Raise ValueError unless the options of the loss are in range."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be in 0 .. 1, got {label_smoothing}")
    if not z_loss >= 0.0:
        raise ValueError(f"{op}: z_loss must be 0 or more, got {z_loss}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap must be more than 0, got {softcap}")
    if vocab_size is not None and not 1 <= vocab_size <= V:
        raise ValueError(f"{op}: vocab_size must be in 1 .. {V}, the width of the logits, got {vocab_size}")


# ---- kernels -------------------------------------------------------------------------------------------


# softcap 0: none. d_losses (...) is the gradient of the losses, of their dtype.
SCHEMAS = {
    # peak_and_rest (..., 2) is for the backward: the largest logit x of a row, and the sum of exp(x_j - x) less x's own
    # term, 1.
    "cross_entropy_forward": (
        "(Tensor logits, Tensor targets, int ignore_index, float label_smoothing, float z_loss, float softcap, "
        "int? vocab_size) -> (Tensor losses, Tensor peak_and_rest)"
    ),
    "cross_entropy_backward": (
        "(Tensor d_losses, Tensor logits, Tensor targets, Tensor peak_and_rest, int ignore_index, "
        "float label_smoothing, float z_loss, float softcap, int? vocab_size) -> Tensor d_logits"
    ),
    # Both at once, in one read and one write: the logits, contiguous, become their gradient.
    "cross_entropy_gradient_": (
        "(Tensor(a!) logits, Tensor targets, Tensor d_losses, int ignore_index, float label_smoothing, float z_loss, "
        "float softcap, int? vocab_size) -> Tensor losses"
    ),
}


def _fake_losses(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=contract.accumulator(logits.dtype))


def _fake_forward(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    losses = _fake_losses(logits)
    return losses, losses.new_empty((*losses.shape, 2))


register(
    SCHEMAS,
    {
        "cross_entropy_forward": _fake_forward,
        "cross_entropy_backward": lambda d_losses, logits, *_: contiguous_like(logits),
        "cross_entropy_gradient_": _fake_losses,
    },
)


class _Kernels(torch.autograd.Function):
    """The losses of the rows."""

    @staticmethod
    def forward(ctx: Any, ops: Any, logits: Tensor, targets: Tensor, options: tuple, overwrite: bool) -> Tensor:
        losses, peak_and_rest = ops.cross_entropy_forward.default(logits, targets, *options)
        ctx.ops, ctx.options, ctx.overwrite = ops, options, overwrite
        ctx.save_for_backward(logits, targets, peak_and_rest)
        return losses

    @staticmethod
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor | None, ...]:
        contract.refuse_double_backward("cross_entropy")
        logits, targets, peak_and_rest = ctx.saved_tensors
        if ctx.overwrite and not torch.compiler.is_compiling():
            ctx.ops.cross_entropy_gradient_.default(logits, targets, d_losses, *ctx.options)
            # Autograd is to know, so that no other backward takes them for the logits.
            torch.autograd.graph.increment_version(logits)
            d_logits = logits.detach()  # the memory alone: a gradient has no graph
        else:
            d_logits = ctx.ops.cross_entropy_backward.default(d_losses, logits, targets, peak_and_rest, *ctx.options)
        return None, d_logits, None, None, None

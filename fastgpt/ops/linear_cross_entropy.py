"""Cross-entropy of `x @ weight.T (+ bias)` against target ids, without ever holding all the logits.

    loss = cross_entropy(x @ weight[:vocab_size].T + bias[:vocab_size], targets)      see cross_entropy.py for its terms

B * T rows of V logits are by far the largest tensor of a small GPT's step, and only needed to be reduced. So rows go
through in chunks: one buffer takes a chunk's logits, becomes their softmax, then their gradient, in place, and is
multiplied at once into the gradients of x and of the weight:

    dX_chunk = dL W,   dW += dL^T X_chunk       dL = softmax(logits) - onehot  (with the other terms)

Both are thus known when the forward ends, up to the factor from upstream, a scalar that the backward multiplies in on
the device. With reduction "none" that factor differs by row, so the backward goes through the chunks once more. No
gradient is computed for what does not ask for one, nor under torch.no_grad().

Contract
    x              (..., C), weight (V, C), bias (V,) or None: floating, one dtype and device, any strides.
    targets        (...) int64 or int32: ignore_index, or 0 .. vocab_size - 1; others: see cross_entropy.py.
    vocab_size     rows of weight (and bias) from here on are padding: no logit, zero gradient. V when not given.
    token_weights  (...) floating, not differentiated: multiplies the loss of each token; "mean" then divides by the
                   sum of the weights that count instead of their number.
    chunk_bytes    how much memory a chunk's logits may take in fp32; a chunk never has fewer than MIN_ROWS rows, nor
                   fewer than C up to ENOUGH_ROWS, below which the machine is wasted. By device when not given.
    returns        fp32 (fp64 for fp64) in nats: a scalar, or (...) for reduction "none".
    ValueError     where a shape, dtype, device or option is otherwise; the same on every device.
    With the kernels of cross_entropy one call makes a chunk's logits their gradient, in one read and one write.
    In bf16 and fp16 the logits are rounded to that type by their GEMM, the softmax is in fp32, its gradient is rounded
    once, and dW sums over the chunks in fp32: on a GPU inside the GEMM, elsewhere a chunk's product is rounded first.
    Where a weight's gradients are gathered in float32 (`weight.grad_dtype`), its sum is not rounded at all.
    Under autocast x, weight and bias are cast to its dtype.
    Differentiable twice without kernels (the second time through `reference`, which holds the logits).

Sources: the loss as in cross_entropy.py; gradients in the forward, by chunks: Hsu et al. 2024 (Liger Kernel).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import native
from fastgpt.ops import contract
from fastgpt.ops.cross_entropy import check_options, check_targets
from fastgpt.ops.cross_entropy import reference as cross_entropy_reference

# On a CPU a chunk of logits that stays in its cache: with 32 MiB of it, 2 to 16 MiB were alike and 32 a tenth slower.
# On a GPU a few thousand rows fill the machine at any V.
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 1 << 30}
MIN_ROWS = 256
# With fewer rows than C, adding a chunk to dW (V, C) moves more memory than its logits do; from here on it is bearable.
ENOUGH_ROWS = 512
# Columns that the rows of logits are padded to for the kernels, so that each begins at a multiple of 128 bytes.
ROW_ALIGNMENT = 64


@dataclass(frozen=True)
class _Options:
    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    softcap: float | None
    vocab_size: int
    rows: int  # in a chunk


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0,  # not 0.0: see cross_entropy
    z_loss: float = 0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    token_weights: Tensor | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Loss of x (..., C) through the projection weight (V, C) against targets (...), in nats.

    The contract is at the top of this file. Raises ValueError where it is broken.
    """
    _check(x, weight, bias, targets, token_weights, chunk_bytes)
    V = weight.shape[0]
    check_options("linear_cross_entropy", reduction, label_smoothing, z_loss, softcap, vocab_size, V)
    x, weight = contract.autocast(x, weight)
    bias = None if bias is None else contract.autocast(bias)[0]
    ops = native.select(x, "linear_cross_entropy")
    if contract.transformed():
        return reference(
            x,
            weight,
            targets,
            bias=bias,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            vocab_size=vocab_size,
            token_weights=token_weights,
        )
    vocab_size = V if vocab_size is None else vocab_size
    budget = CHUNK_BYTES.get(x.device.type, CHUNK_BYTES["cpu"]) if chunk_bytes is None else chunk_bytes
    rows = max(MIN_ROWS, min(x.shape[-1], ENOUGH_ROWS), budget // (vocab_size * contract.accumulator(x.dtype).itemsize))
    options = _Options(ignore_index, reduction, label_smoothing, z_loss, softcap, vocab_size, rows)
    weights = None if token_weights is None else token_weights.reshape(-1)
    # Other strides would have the GEMMs sum in another order; the copies, where any is made, are small.
    x, weight = x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous()
    arguments = x, weight, bias, targets.reshape(-1), weights
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        loss = _LinearCrossEntropy.apply(ops, *arguments, options)
    else:
        row_weights = _row_weights(*arguments[3:], options, contract.accumulator(x.dtype))
        losses, _ = _by_chunks(ops, *arguments[:4], row_weights, options, (False,) * 3)
        loss = _reduced(losses, row_weights, options)[0]
    return loss.view(targets.shape) if reduction == "none" else loss


def reference(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    token_weights: Tensor | None = None,
) -> Tensor:
    """The loss by way of all the logits, differentiable any number of times."""
    losses = cross_entropy_reference(
        F.linear(x, weight[:vocab_size], None if bias is None else bias[:vocab_size]),
        targets,
        ignore_index=ignore_index,
        reduction="none" if token_weights is not None else reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
    )
    if token_weights is None:
        return losses
    token_weights = torch.where(targets != ignore_index, token_weights.to(losses.dtype), 0.0)
    losses = losses * token_weights
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / token_weights.sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ops, x, weight, bias, targets, token_weights, options):
        row_weights = _row_weights(targets, token_weights, options, contract.accumulator(x.dtype))
        # With "none" the rows' factors are known only in the backward.
        needed = tuple(n and options.reduction != "none" for n in ctx.needs_input_grad[1:4])
        ctx.dtypes = [None if t is None else contract.gradient_dtype(t) for t in (x, weight, bias)]
        losses, gradients = _by_chunks(ops, x, weight, bias, targets, row_weights, options, needed, ctx.dtypes[1])
        loss, divisor = _reduced(losses, row_weights, options)
        ctx.save_for_backward(x, weight, bias, targets, token_weights, row_weights, divisor, *gradients)
        ctx.ops, ctx.options = ops, options
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        x, weight, bias, targets, token_weights, row_weights, divisor, *gradients = ctx.saved_tensors
        options: _Options = ctx.options
        needed = ctx.needs_input_grad[1:4]
        if ctx.ops is not None:
            contract.refuse_double_backward("linear_cross_entropy")
        if torch.is_grad_enabled():  # somebody will differentiate this: give them the plain formulation's graph
            loss = reference(
                x,
                weight,
                targets,
                bias=bias,
                ignore_index=options.ignore_index,
                reduction=options.reduction,
                label_smoothing=options.label_smoothing,
                z_loss=options.z_loss,
                softcap=options.softcap,
                vocab_size=options.vocab_size,
                token_weights=token_weights,
            )
            wanted = [t for t, n in zip((x, weight, bias), needed, strict=True) if n]
            found = iter(torch.autograd.grad(loss, wanted, d_loss, create_graph=True))
            return None, *(next(found) if n else None for n in needed), None, None, None
        if options.reduction == "none":
            row_weights = row_weights * d_loss
            _, gradients = _by_chunks(ctx.ops, x, weight, bias, targets, row_weights, options, needed, ctx.dtypes[1])
            factor = None
        elif options.reduction == "sum":
            factor = d_loss
        else:
            factor = torch.where(divisor == 0, 0.0, d_loss / divisor)  # all ignored: no gradient, as torch
        found = []
        for dtype, gradient in zip(ctx.dtypes, gradients, strict=True):
            if gradient is not None and (factor is not None or gradient.dtype != dtype):
                scaled = torch.empty_like(gradient, dtype=dtype)
                gradient = torch.mul(gradient, 1.0 if factor is None else factor, out=scaled)  # one pass, one rounding
            found.append(gradient)
        return None, *found, None, None, None


def _row_weights(targets: Tensor, token_weights: Tensor | None, options: _Options, dtype: torch.dtype) -> Tensor:
    """(N,): what the loss of each row is multiplied by; 0 for ignored ones."""
    counted = targets != options.ignore_index
    return counted.to(dtype) if token_weights is None else torch.where(counted, token_weights.to(dtype), 0.0)


def _reduced(losses: Tensor, row_weights: Tensor, options: _Options) -> tuple[Tensor, Tensor | None]:
    """The loss, and for "mean" what the sum was divided by."""
    losses = torch.where(row_weights == 0, 0.0, losses * row_weights)
    if options.reduction == "none":
        return losses, None
    if options.reduction == "sum":
        return losses.sum(), None
    divisor = row_weights.sum()
    return losses.sum() / divisor, divisor


def _by_chunks(
    ops: Any,  # that have the kernels of cross_entropy, or None
    x: Tensor,  # (N, C)
    weight: Tensor,  # (V, C)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    row_weights: Tensor,  # (N,) fp32 or fp64
    options: _Options,
    needed: tuple[bool, bool, bool],
    weight_gradient: torch.dtype | None = None,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Losses (N,) of the rows, unweighted, and the gradients of their weighted sum that are needed.

    The gradient of x is in its dtype, that of bias in the type of row_weights; that of weight in the latter too where
    it is summed over several chunks, or wanted in it.
    """
    (N, C), V = x.shape, options.vocab_size
    compute = row_weights.dtype
    losses = row_weights.new_empty(N)
    d_x = torch.empty(N, C, dtype=x.dtype, device=x.device) if needed[0] else None
    sums = compute if options.rows < N or weight_gradient == compute else x.dtype
    d_weight = torch.empty(weight.shape, dtype=sums, device=x.device) if needed[1] else None
    if d_weight is not None:
        d_weight[V if N else 0 :] = 0.0  # the rest is written by the first chunk
    d_bias = row_weights.new_zeros(weight.shape[0]) if needed[2] else None
    weight_used = weight[:V]

    rows = min(options.rows, N)
    width = V if ops is None else -(-V // ROW_ALIGNMENT) * ROW_ALIGNMENT
    projected = torch.empty(rows, width, dtype=x.dtype, device=x.device)  # as the GEMMs read and write it
    narrow = x.dtype != compute
    wide = (
        projected.new_empty(rows, V, dtype=compute) if narrow and ops is None else projected
    )  # as it is computed with
    for start in range(0, N, max(rows, 1)):
        chunk = slice(start, min(start + rows, N))
        x_chunk, n = x[chunk], chunk.stop - chunk.start
        gemm = projected[:n, :V]
        if torch.compiler.is_compiling() and not gemm.is_contiguous():  # dynamo takes no such `out`
            gemm.copy_(F.linear(x_chunk, weight_used, None if bias is None else bias[:V]))
        elif bias is None:
            torch.mm(x_chunk, weight_used.t(), out=gemm)
        else:
            torch.addmm(bias[:V], x_chunk, weight_used.t(), out=gemm)
        factor = row_weights[chunk]
        if ops is None:
            losses[chunk] = _softmax_to_gradient_(gemm, wide[:n], targets[chunk], options, any(needed))
        else:
            arguments = options.ignore_index, options.label_smoothing, options.z_loss, options.softcap or 0.0, V
            if any(needed):
                of_chunk = ops.cross_entropy_gradient_.default(projected[:n], targets[chunk], factor, *arguments)
            else:
                of_chunk, _ = ops.cross_entropy_forward.default(projected[:n], targets[chunk], *arguments)
            losses[chunk] = of_chunk
        if not any(needed):
            continue

        # The kernel has multiplied by the rows' weights. Without it they go into the narrow factors: no pass over the
        # logits.
        if d_x is not None:
            torch.mm(gemm, weight_used, out=d_x[chunk])
            if ops is None:
                d_x[chunk].mul_(factor[:, None])
        if d_weight is not None:
            weighted = x_chunk if ops is not None else (x_chunk * factor[:, None]).to(x.dtype)
            _add_product_(d_weight[:V], gemm.t(), weighted, beta=int(start > 0))
        if d_bias is not None:
            d_bias[:V] += gemm.sum(0, dtype=compute) if ops is not None else torch.mv(wide[:n].t(), factor)
    return losses, (d_x, d_weight, d_bias)


def _softmax_to_gradient_(
    gemm: Tensor,  # (n, V) logits
    y: Tensor,  # (n, V) of the dtype that is computed in: the same memory, or workspace
    targets: Tensor,  # (n,)
    options: _Options,
    with_gradient: bool,
) -> Tensor:
    """Losses (n,); `gemm` and `y` become the gradient of each row's loss where that is wanted."""
    V = options.vocab_size
    smoothing, z_loss, softcap = options.label_smoothing, options.z_loss, options.softcap
    narrow = y.dtype != gemm.dtype
    if narrow:
        y.copy_(gemm)
    if softcap is not None:
        y.div_(softcap).tanh_()
        slope = 1.0 - y.square() if with_gradient else None
        y.mul_(softcap)
    counted = targets != options.ignore_index
    column = torch.where(counted, targets, 0).long()[:, None]
    target_logit = y.gather(1, column)
    mean_logit = y.mean(1, keepdim=True) if smoothing else None
    # Neither exp nor log over the whole chunk but torch's one vectorised softmax, in place. The largest probability is
    # 1 / sum(exp(y - peak)), so its log gives the logsumexp.
    peak = y.amax(1, keepdim=True)
    torch.softmax(y, 1, out=y)
    log_sum = -y.amax(1, keepdim=True).log()
    nll = (peak - target_logit) + log_sum  # the difference first: exact where the loss is small
    loss, lse = nll, peak + log_sum
    if smoothing:
        loss = (1.0 - smoothing) * nll + smoothing * (lse - mean_logit)
    if z_loss:
        loss = loss + z_loss * lse.square()
    if with_gradient:
        # y: probabilities -> gradient of each row's loss. At the target p - 1 would lose all digits as p nears 1.
        at_target = torch.expm1(-nll)
        if z_loss:
            y.mul_(1.0 + 2.0 * z_loss * lse)
            at_target += 2.0 * z_loss * lse * torch.exp(-nll)
        if smoothing:
            y.sub_(smoothing / V)
            at_target += smoothing - smoothing / V
        y.scatter_(1, column, at_target)
        if softcap is not None:
            y.mul_(slope)
        if narrow:
            gemm.copy_(y)
    return loss.squeeze(1)


def _add_product_(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """total <- beta * total + a @ b, beta 0 or 1; total may be wider than a and b, and with beta 0 is not read."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta)
    elif total.is_cuda and not torch.compiler.is_compiling():  # inductor would round to the dtype of a and b
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)  # nothing rounded, no other pass
    elif beta:
        total.add_(a @ b)
    else:
        total.copy_(a @ b)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    token_weights: Tensor | None,
    chunk_bytes: int | None,
) -> None:
    op = "linear_cross_entropy"
    for name, t in (("x", x), ("weight", weight), ("bias", bias), ("token_weights", token_weights)):
        if t is None and name in ("bias", "token_weights"):
            continue
        contract.check_floating(op, name, t)
        contract.check_device(op, name, t, "x", x)
        if name != "token_weights" and t.dtype != x.dtype and not contract.autocasting(x):
            raise ValueError(f"{op}: {name} must have the dtype of x ({x.dtype}), got {t.dtype}")
    contract.check_rows(op, "x", x)
    if weight.dim() != 2 or weight.shape[0] < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x and weight must be (..., C) and (V, C) with V >= 1, "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must be (V,) = ({weight.shape[0]},), got {tuple(bias.shape)}")
    check_targets(op, "x", x, targets)
    if token_weights is not None:
        if token_weights.shape != targets.shape:
            raise ValueError(
                f"{op}: token_weights must have the shape of targets {tuple(targets.shape)}, "
                f"got {tuple(token_weights.shape)}"
            )
        if token_weights.requires_grad:
            raise ValueError(f"{op}: token_weights are not differentiated, but require a gradient; detach them")
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"{op}: chunk_bytes must be 1 or more, got {chunk_bytes}")

"""Softmax attention over grouped heads, with causal, window, document and length masks.

    S_ij = scale * q_i . k_j                     softcap c:  S_ij <- c * tanh(S_ij / c)
    P_ij = exp(S_ij - LSE_i),   LSE_i = ln sum_j exp(S_ij)       over the keys j that query i sees
    O_i  = sum_j P_ij v_j

Which keys query i sees. Let L be the number of keys (`kv_lengths[b]` where given, else Tk). The queries are the last
of them: query i stands at position p = i + L - Tq, so the causal mask is aligned to the bottom right. Then j < L and

    causal      j <= p
    window w    j >= p - w                        (0 sees itself alone; more than L is no window)
    documents   doc_start[b, i] <= j < doc_end[b, i]

A query that sees no key at all has O = 0 and LSE = -inf, and no gradient flows from it. Keys and values at and past
kv_lengths are never used, whatever they hold.

Contract
    q            (B, Tq, H, D), k, v (B, Tk, KV, D): floating, one dtype, one device, any strides; H a multiple of KV;
                 query head h reads key/value head h // (H / KV).
    scale        1 / sqrt(D) when not given.
    doc_start, doc_end   (B, T) int32, both or none, Tq == Tk (see `documents.document_bounds`).
    kv_lengths   (B,) int32 or int64, 0 <= value <= Tk.
    returns      O (B, Tq, H, D), contiguous, in q's dtype; with return_lse also LSE (B, H, Tq), fp32 (fp64 for fp64).
    ValueError   where a shape, dtype, device or option is otherwise; the same on every device.
    Under autocast, q, k and v are cast to its dtype.

Sources: Vaswani et al. 2017, equation 1; grouped heads: Ainslie et al. 2023; softcap: Gemma 2, 2024, section 2;
the block-wise evaluation on a CPU follows the backward equations of Dao et al. 2022 (FlashAttention, appendix B.4).

The kernels (csrc/attention; docs/attention.md explains them) keep S and P in fp32, or fp64 for fp64, are
deterministic, and have no second derivative. Those on tensor cores round P and dS to q's dtype, to multiply them.
`choose_path` in attention.cpp says which of them serves a call.

Which formulation runs where kernels do not (differentiable twice, but for the last):
    plain        `reference`: a softmax over the whole (Tq, Tk) matrix in fp32 or fp64; for softcap, LSE, torch.func.
    by blocks    `_BlockedAttention`: on a CPU, for all else but lengths. In bf16 it rounds S and P to bf16, as torch's
                 own matmul, softmax, matmul does.
    torch's      `F.scaled_dot_product_attention`: under torch.compile, on other devices, for lengths, and for long fp32
                 (see `_fused_is_faster`). Where it fuses, torch refuses a second derivative.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import native
from fastgpt.ops import contract
from fastgpt.ops.registry import contiguous_like, nothing_like, register

# Probabilities up to this size are kept for the backward; larger ones are computed again, so memory stays linear in T.
KEPT_PROBABILITIES_BYTES = 32 << 20


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    doc_start: Tensor | None = None,
    doc_end: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """O (B, Tq, H, D) of q (B, Tq, H, D) over k, v (B, Tk, KV, D), and LSE (B, H, Tq) if asked for.

    The contract is at the top of this file. Raises ValueError where it is broken.
    """
    _check(q, k, v, window, scale, softcap, doc_start, doc_end, kv_lengths)
    q, k, v = contract.autocast(q, k, v)
    scale = 1.0 / math.sqrt(max(q.shape[-1], 1)) if scale is None else float(scale)
    ops = native.select(q, "attention")
    if ops is not None:
        bounds = (doc_start, doc_end, kv_lengths)
        o, lse = _on_kernels(ops, q, k, v, causal, window, scale, float(softcap or 0.0), *bounds)
        return (o, lse) if return_lse else o
    masks = dict(causal=causal, window=window, doc_start=doc_start, doc_end=doc_end, kv_lengths=kv_lengths)
    if softcap is not None or return_lse or contract.transformed():
        return reference(q, k, v, scale=scale, softcap=softcap, return_lse=return_lse, **masks)
    blocks_serve = q.device.type == "cpu" and kv_lengths is None and not torch.compiler.is_compiling()
    if blocks_serve and not _fused_is_faster(q, k, causal, window, doc_start):
        return _by_blocks(q, k, v, scale, causal, window, doc_start, doc_end)
    return _by_torch(q, k, v, scale, **masks)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    doc_start: Tensor | None = None,
    doc_end: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The equations as they stand, in fp32 (fp64 for fp64), differentiable any number of times."""
    (H, D), KV = q.shape[2:], k.shape[2]
    compute = contract.accumulator(q.dtype)
    k, v = _existing(k, kv_lengths), _existing(v, kv_lengths)
    grouped = q.to(compute).transpose(1, 2).unflatten(1, (KV, H // KV))  # (B, KV, G, Tq, D)
    keys, values = (t.to(compute).transpose(1, 2).unsqueeze(2) for t in (k, v))  # (B, KV, 1, Tk, D)
    scores = grouped @ keys.mT * (1.0 / math.sqrt(max(D, 1)) if scale is None else scale)  # (B, KV, G, Tq, Tk)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = _visible(q, k, causal, window, doc_start, doc_end, kv_lengths)  # (B or 1, Tq, Tk)
    # A row that sees nothing keeps its scores, so that no NaN arises, and what it yields is replaced.
    sees = visible.any(-1)  # (B or 1, Tq)
    hidden = ~visible & sees[..., None]
    scores = scores.masked_fill(hidden[:, None, None], -math.inf)
    blind = ~sees[:, None, None, :]  # (B or 1, 1, 1, Tq)
    probabilities = torch.softmax(scores, -1)
    o = (probabilities @ values).masked_fill(blind[..., None], 0.0)
    o = o.flatten(1, 2).transpose(1, 2).to(q.dtype).contiguous()
    if not return_lse:
        return o
    lse = torch.logsumexp(scores, -1).masked_fill(blind, -math.inf).flatten(1, 2)
    return o, lse


# ---- masks ------------------------------------------------------------------------------------


def _visible(
    q: Tensor,
    k: Tensor,
    causal: bool,
    window: int | None,
    doc_start: Tensor | None,
    doc_end: Tensor | None,
    kv_lengths: Tensor | None,
) -> Tensor:
    """(B or 1, Tq, Tk) bool: which keys each query sees."""
    Tq, Tk = q.shape[1], k.shape[1]
    key = torch.arange(Tk, device=q.device)
    lengths = torch.full((1, 1), Tk, device=q.device) if kv_lengths is None else kv_lengths[:, None]
    position = (torch.arange(Tq, device=q.device) + lengths - Tq)[..., None]  # (B or 1, Tq, 1)
    visible = (key < lengths[..., None]).expand(-1, Tq, Tk)
    if causal:
        visible = visible & (key <= position)
    if window is not None:
        visible = visible & (key >= position - window)
    if doc_start is not None:
        visible = visible & (key >= doc_start[..., None]) & (key < doc_end[..., None])
    return visible


def _existing(x: Tensor, kv_lengths: Tensor | None) -> Tensor:
    """x (B, Tk, KV, D) with zeros past the lengths: 0 * NaN would be NaN."""
    if kv_lengths is None:
        return x
    past = torch.arange(x.shape[1], device=x.device) >= kv_lengths[:, None]
    return x.masked_fill(past[..., None, None], 0.0)


# ---- torch's own fused attention --------------------------------------------------------------


def _fused_is_faster(q: Tensor, k: Tensor, causal: bool, window: int | None, doc_start: Tensor | None) -> bool:
    """Whether, on a CPU, torch's fused attention beats the blocks: plain fp32 whose probabilities cannot be kept.

    Measured forward and backward: keeping them, the blocks take about as long in fp32 and half as long in bf16;
    computing them again costs a quarter more than the fused kernel in fp32, and still only six tenths in bf16.
    """
    (B, Tq, H, _), Tk = q.shape, k.shape[1]
    plain = window is None and doc_start is None and (Tq == Tk or not causal)
    kept = B * H * Tq * Tk * q.element_size() // (2 if causal else 1)
    return plain and q.dtype == torch.float32 and kept > KEPT_PROBABILITIES_BYTES


def _by_torch(q: Tensor, k: Tensor, v: Tensor, scale: float, **masks) -> Tensor:
    if q.numel() == 0 or k.numel() == 0:
        return reference(q, k, v, scale=scale, **masks)
    Tq, Tk = q.shape[1], k.shape[1]
    k, v = (_existing(t, masks["kv_lengths"]) for t in (k, v))
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    grouped = q.shape[2] != k.shape[2]
    unmasked = all(mask is None for name, mask in masks.items() if name != "causal")
    if unmasked and (Tq == Tk or not masks["causal"]):
        o = F.scaled_dot_product_attention(*heads_first, is_causal=masks["causal"], scale=scale, enable_gqa=grouped)
        return o.transpose(1, 2).contiguous()
    visible = _visible(q, k, **masks)
    sees = visible.any(-1)
    mask = (visible | ~sees[..., None])[:, None]  # a row that sees nothing looks at everything and is replaced
    o = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return o.transpose(1, 2).masked_fill(~sees[..., None, None], 0.0).contiguous()


# ---- by blocks, on a CPU ----------------------------------------------------------------------


def _by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    doc_start: Tensor | None,
    doc_end: Tensor | None,
) -> Tensor:
    (B, Tq, H, D), (Tk, KV) = q.shape, k.shape[1:3]
    # One copy each, heads first, so that every GEMM below is batched over B * KV and reads contiguous rows.
    q = q.unflatten(2, (KV, H // KV)).permute(0, 2, 3, 1, 4).reshape(B * KV, H // KV, Tq, D)
    k, v = (t.transpose(1, 2).reshape(B * KV, Tk, D) for t in (k, v))
    return _BlockedAttention.apply(q, k, v, doc_start, doc_end, KV, scale, causal, window)


class _BlockedAttention(torch.autograd.Function):
    """Attention in blocks of query rows, each against the keys that it can see.

    q (B * KV, G, Tq, D), k, v (B * KV, Tk, D), contiguous; returns (B, Tq, KV * G, D). The G heads that share keys are
    rows of one GEMM. Scores become probabilities, and their gradients become the scores', in place: batched GEMMs and
    the vectorised softmax, which outrun torch's fused CPU backward where matrix units do bf16.
    """

    @staticmethod
    def forward(ctx, q, k, v, doc_start, doc_end, KV, scale, causal, window):
        blocks = _Blocks(q, k, doc_start, doc_end, KV, scale, causal, window)
        BKV, G, Tq, D = q.shape
        B = BKV // KV
        o = q.new_empty(B, Tq, KV, G, D)
        by_head = o.permute(0, 2, 3, 1, 4)  # (B, KV, G, Tq, D), as the results come
        keep = any(ctx.needs_input_grad) and blocks.probabilities_bytes() <= KEPT_PROBABILITIES_BYTES
        kept = []
        for block in blocks.ranges():
            i0, i1, lo, hi = block
            p = blocks.probabilities(q, k, block)
            by_head[:, :, :, i0:i1] = torch.bmm(p, v[:, lo:hi]).view(B, KV, G, i1 - i0, D)
            if keep:
                kept.append(p)
        ctx.save_for_backward(q, k, v, doc_start, doc_end, *kept)
        ctx.options = KV, scale, causal, window
        return o.view(B, Tq, KV * G, D)

    @staticmethod
    def backward(ctx, d_o):
        q, k, v, doc_start, doc_end, *kept = ctx.saved_tensors
        KV, scale, causal, window = ctx.options
        BKV, G, Tq, D = q.shape
        if torch.is_grad_enabled():  # somebody will differentiate this: give them the plain formulation's graph
            wanted = [t for t, needed in zip((q, k, v), ctx.needs_input_grad, strict=False) if needed]
            o = reference(
                q.unflatten(0, (BKV // KV, KV)).permute(0, 3, 1, 2, 4).flatten(2, 3),
                k.unflatten(0, (BKV // KV, KV)).transpose(1, 2),
                v.unflatten(0, (BKV // KV, KV)).transpose(1, 2),
                causal=causal,
                window=window,
                scale=scale,
                doc_start=doc_start,
                doc_end=doc_end,
            )
            found = iter(torch.autograd.grad(o, wanted, d_o, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), *[None] * 6
        blocks = _Blocks(q, k, doc_start, doc_end, KV, scale, causal, window)
        d_o = d_o.unflatten(2, (KV, G)).permute(0, 2, 3, 1, 4).reshape(BKV, G, Tq, D)
        d_q = torch.empty_like(q)
        # Keys collect gradients from every block below them: in fp32, or they would be rounded each time.
        d_k, d_v = (torch.zeros_like(k, dtype=contract.accumulator(k.dtype)) for _ in range(2))
        for n, block in enumerate(blocks.ranges()):
            i0, i1, lo, hi = block
            p = kept[n] if kept else blocks.probabilities(q, k, block)
            rows_q, rows_d_o = (t[:, :, i0:i1].reshape(BKV, G * (i1 - i0), D) for t in (q, d_o))
            _add_product_(d_v[:, lo:hi], p.mT, rows_d_o)
            d_p = torch.bmm(rows_d_o, v[:, lo:hi].mT)
            # dS = P * (dP - rowsum(P * dP)): torch's softmax kernel, in place
            d_s = torch.ops.aten._softmax_backward_data.out(d_p, p, -1, p.dtype, grad_input=d_p)
            _add_product_(d_k[:, lo:hi], d_s.mT, rows_q)
            d_q[:, :, i0:i1] = torch.bmm(d_s, k[:, lo:hi]).view(BKV, G, i1 - i0, D)
        return d_q.mul_(scale), d_k.mul_(scale).to(k.dtype), d_v.to(v.dtype), *[None] * 6


def _block_rows(dtype: torch.dtype, Tq: int) -> int:
    """Rows of queries in a block, as measured on a CPU. Of causal work rows / (2 Tk) is done in vain; fewer rows are
    smaller GEMMs, and in low precision more passes that add the keys' gradients up in fp32."""
    if dtype in (torch.float32, torch.float64):
        return 64
    return 128 if Tq <= 512 else 256


_SUMMED_AT_A_TIME = 64


class _Blocks:
    """The geometry of blocked attention: which keys each block of query rows can see."""

    def __init__(self, q, k, doc_start, doc_end, KV, scale, causal, window):
        self.KV, self.scale, self.causal, self.window = KV, scale, causal, window
        self.doc_start, self.doc_end = doc_start, doc_end
        self.BKV, self.G, self.Tq, self.D = q.shape
        self.Tk, self.itemsize = k.shape[1], q.element_size()
        self.offset = self.Tk - self.Tq  # position of a query = its row + offset
        self.rows = _block_rows(q.dtype, self.Tq)

    def ranges(self):
        """(i0, i1, lo, hi): query rows i0:i1 see no key outside lo:hi."""
        for i0 in range(0, self.Tq, self.rows):
            i1 = min(self.Tq, i0 + self.rows)
            hi = max(0, i1 + self.offset) if self.causal else self.Tk
            lo = 0 if self.window is None else min(hi, max(0, i0 + self.offset - self.window))
            yield i0, i1, lo, hi

    def probabilities_bytes(self) -> int:
        pairs = sum((i1 - i0) * (hi - lo) for i0, i1, lo, hi in self.ranges())
        return pairs * self.BKV * self.G * self.itemsize

    def probabilities(self, q, k, block):
        """P (B * KV, G * rows, keys) of one block."""
        i0, i1, lo, hi = block
        rows, keys = i1 - i0, hi - lo
        queries = q[:, :, i0:i1].reshape(self.BKV, self.G * rows, self.D)
        # beta 0: the first argument is not read. alpha scales before the result is rounded to bf16.
        s = torch.baddbmm(q.new_empty(()), queries, k[:, lo:hi].mT, beta=0, alpha=self.scale)
        by_row = s.view(self.BKV // self.KV, self.KV * self.G, rows, keys)
        blind = self._hide_(by_row, block)
        torch.softmax(s, -1, out=s)
        if blind is not None:
            by_row.masked_fill_(blind, 0.0)
        return s

    def _hide_(self, s, block):
        """Set hidden scores of s (B, KV * G, rows, keys) to -inf; returns (B or 1, 1, rows, 1): who sees nothing."""
        i0, i1, lo, hi = block
        position = torch.arange(i0, i1)[:, None] + self.offset
        key = torch.arange(lo, hi)
        if self.doc_start is None:  # only the two edges of the band hold hidden keys
            first, last = i0 + self.offset, i1 - 1 + self.offset
            if self.causal and first + 1 < hi:
                edge = max(first + 1, lo) - lo
                s[..., edge:].masked_fill_(key[edge:] > position, -math.inf)
            if self.window is not None and lo < last - self.window:
                edge = min(last - self.window, hi) - lo
                s[..., :edge].masked_fill_(key[:edge] < position - self.window, -math.inf)
            blind = None
            if self.causal and first < 0:  # more queries than keys: the first ones stand before every key
                blind = position < 0
            return blind
        visible = (key >= self.doc_start[:, i0:i1, None]) & (key < self.doc_end[:, i0:i1, None])  # (B, rows, keys)
        if self.causal:
            visible &= key <= position
        if self.window is not None:
            visible &= key >= position - self.window
        visible = visible[:, None]
        s.masked_fill_(~visible, -math.inf)
        return ~visible.any(-1, keepdim=True)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, batched; total may be wider than a and b.

    In the dtype of total a GEMM adds up _SUMMED_AT_A_TIME rows at most, and by itself: some CPUs sum one after the
    other, and from the total on if they are given it (baddbmm). Over the rows of all the heads that share keys the
    largest errors were more than twice those of a GEMM for each head.
    """
    rows = _SUMMED_AT_A_TIME if total.dtype == a.dtype else max(a.shape[2], 1)
    for i in range(0, a.shape[2], rows):
        total.add_(torch.bmm(a[:, :, i : i + rows], b[:, i : i + rows]))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    doc_start: Tensor | None,
    doc_end: Tensor | None,
    kv_lengths: Tensor | None,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        contract.check_floating("attention", name, x)
        contract.check_device("attention", name, x, "q", q)
        if x.dim() != 4:
            raise ValueError(f"attention: {name} must be (B, T, heads, D), got {tuple(x.shape)}")
        if x.dtype != q.dtype and not contract.autocasting(q):
            raise ValueError(f"attention: {name} must have the dtype of q ({q.dtype}), got {x.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"attention: k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: q {tuple(q.shape)} and k {tuple(k.shape)} must have the same B and D")
    H, KV = q.shape[2], k.shape[2]
    if KV == 0 or H % KV:
        raise ValueError(
            f"attention: the number of query heads must be a multiple of the number of key heads, got {H} and {KV}"
        )
    if window is not None and window < 0:
        raise ValueError(f"attention: window must be 0 or more, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention: softcap must be more than 0, got {softcap}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"attention: scale must be finite, got {scale}")
    for name, given in (("doc_start", doc_start), ("doc_end", doc_end), ("kv_lengths", kv_lengths)):
        if given is not None:
            contract.check_tensor("attention", name, given)
    if (doc_start is None) != (doc_end is None):
        raise ValueError("attention: doc_start and doc_end must be given together")
    for name, bound in (("doc_start", doc_start), ("doc_end", doc_end)):
        if bound is None:
            continue
        if kv_lengths is not None:
            raise ValueError("attention: documents and kv_lengths cannot be combined")
        if q.shape[1] != k.shape[1]:
            raise ValueError(f"attention: documents need as many queries as keys, got {q.shape[1]} and {k.shape[1]}")
        if bound.shape != q.shape[:2] or bound.dtype != torch.int32:
            raise ValueError(
                f"attention: {name} must be (B, T) = {tuple(q.shape[:2])} int32, got {tuple(bound.shape)} {bound.dtype}"
            )
        contract.check_device("attention", name, bound, "q", q)
    if kv_lengths is not None:
        if kv_lengths.shape != q.shape[:1] or kv_lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"attention: kv_lengths must be (B,) = ({q.shape[0]},) int32 or int64, "
                f"got {tuple(kv_lengths.shape)} {kv_lengths.dtype}"
            )
        contract.check_device("attention", "kv_lengths", kv_lengths, "q", q)


# ---- kernels ----------------------------------------------------------------------------------


# softcap 0: none.
SCHEMAS = {
    "attention_forward": (
        "(Tensor q, Tensor k, Tensor v, bool causal, int? window, float scale, float softcap, Tensor? doc_start, "
        "Tensor? doc_end, Tensor? kv_lengths) -> (Tensor o, Tensor lse)"
    ),
    # What is not needed is empty.
    "attention_backward": (
        "(Tensor d_o, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, bool causal, int? window, "
        "float scale, float softcap, Tensor? doc_start, Tensor? doc_end, Tensor? kv_lengths, "
        "bool need_q, bool need_k, bool need_v) -> (Tensor d_q, Tensor d_k, Tensor d_v)"
    ),
}


def _fake_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, Tq, H, _D = q.shape
    return contiguous_like(q), q.new_empty((B, H, Tq), dtype=contract.accumulator(q.dtype))


def _fake_backward(
    d_o: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (
        contiguous_like(x) if needed else nothing_like(x) for x, needed in zip((q, k, v), options[-3:], strict=True)
    )
    return d_q, d_k, d_v


register(SCHEMAS, {"attention_forward": _fake_forward, "attention_backward": _fake_backward})


def _on_kernels(ops: Any, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """options: those of both entries, from `causal` on."""
    if contract.needs_gradient(q, k, v):
        return _Kernels.apply(ops, q, k, v, *options)
    return ops.attention_forward.default(q, k, v, *options)


class _Kernels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ops: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        window: int | None,
        scale: float,
        softcap: float,
        doc_start: Tensor | None,
        doc_end: Tensor | None,
        kv_lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        options = (causal, window, scale, softcap)
        o, lse = ops.attention_forward.default(q, k, v, *options, doc_start, doc_end, kv_lengths)
        ctx.save_for_backward(q, k, v, o, lse, doc_start, doc_end, kv_lengths)
        ctx.ops, ctx.options = ops, options
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        contract.refuse_double_backward("attention")
        q, k, v, o, lse, *bounds = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:4]
        d_o = torch.zeros_like(o) if d_o is None else d_o
        found = ctx.ops.attention_backward.default(d_o, d_lse, q, k, v, o, lse, *ctx.options, *bounds, *needs)
        return None, *(g if needed else None for g, needed in zip(found, needs, strict=True)), *(None,) * 7

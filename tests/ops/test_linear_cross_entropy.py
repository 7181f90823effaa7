"""Linear + cross-entropy against torch's two steps: the same loss and gradients, in several chunks, in less memory."""

import itertools
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import native
from fastgpt.ops import linear_cross_entropy
from fastgpt.ops.linear_cross_entropy import ROW_ALIGNMENT, _add_product_, reference
from tests.ops import kernels
from tests.ops.checks import check_compiled, check_error, check_fake, check_gradients, check_layouts, values
from tests.ops.test_cross_entropy import IGNORED, some_targets, torchs
from tests.rule import RULE_DTYPES, check_by_rule, outputs_and_gradients, poison, randn

OPTIONS = (
    dict(),
    dict(reduction="sum"),
    dict(reduction="none"),
    dict(label_smoothing=0.1),
    dict(z_loss=0.01),
    dict(softcap=3.0),
    dict(vocab_size=37),
    dict(label_smoothing=0.2, z_loss=0.02, softcap=5.0, vocab_size=37, reduction="none"),
)


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """The smallest chunks are 16 rows, so that small tests go through several."""
    module = sys.modules["fastgpt.ops.linear_cross_entropy"]
    monkeypatch.setattr(module, "MIN_ROWS", 16)
    monkeypatch.setattr(module, "ENOUGH_ROWS", 0)
    monkeypatch.setattr(module, "CHUNK_BYTES", {"cpu": 1, "cuda": 1})


@pytest.fixture(params=kernels.WHERE)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.at(request.param) as device:
        yield device


def on_kernels() -> bool:
    return native.select(torch.ones(1), "linear_cross_entropy") is not None


def width(V: int) -> int:
    """Of the buffer that takes a chunk's logits."""
    return -(-V // ROW_ALIGNMENT) * ROW_ALIGNMENT if on_kernels() else V


def two_steps(x, weight, targets, bias=None, vocab_size=None, token_weights=None, reduction="mean", **options):
    """torch's linear, then cross-entropy in fp32."""
    logits = torch.nn.functional.linear(x, weight[:vocab_size], None if bias is None else bias[:vocab_size])
    if token_weights is None:
        return torchs(logits, targets, reduction=reduction, **options)
    w = torch.where(targets == IGNORED, 0.0, token_weights)
    losses = torchs(logits, targets, reduction="none", **options) * w.to(token_weights.dtype)
    return losses if reduction == "none" else losses.sum() / (1 if reduction == "sum" else w.sum())


def arguments(N=50, C=24, V=40, dtype=torch.float64, device="cpu") -> list[Tensor]:
    return [randn(*s, dtype=dtype, seed=i, device=device) for i, s in enumerate(((N, C), (V, C), (V,)))]


@pytest.mark.parametrize("dtype", (torch.float64, *RULE_DTYPES))
@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_by_the_rule(device, options, with_bias, dtype):
    targets = some_targets(50, 37, device)

    def call(op):
        return lambda x, w, b=None: op(x, w, targets, bias=b, **options)

    given = arguments(dtype=dtype, device=device)[: 3 if with_bias else 2]
    check_by_rule(call(linear_cross_entropy), call(two_steps), given, f"linear_cross_entropy {options}")


@pytest.mark.parametrize("dtype", (torch.float64, *RULE_DTYPES))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_token_weights_by_the_rule(device, reduction, dtype):
    targets = some_targets(50, 37, device)
    weights = randn(50, dtype=torch.float32, seed=9, device=device).abs()
    weights[3] = 0.0

    def call(op):
        return lambda x, w: op(x, w, targets, token_weights=weights.to(torch.promote_types(x.dtype, torch.float32)),
                               reduction=reduction)  # fmt: skip

    check_by_rule(call(linear_cross_entropy), call(two_steps), arguments(dtype=dtype, device=device)[:2], "weights")


@pytest.mark.parametrize("V", (1, 7, 8, 9, 1000))
@pytest.mark.parametrize("N", (1, 15, 16, 17, 33))
def test_sizes_around_a_chunk(device, N, V):
    targets = some_targets(N, V, device, ignored=False)
    x, weight, _ = arguments(N, 5, V, device=device)
    ours = outputs_and_gradients(lambda x, w: linear_cross_entropy(x, w, targets), [x, weight])
    theirs = outputs_and_gradients(lambda x, w: two_steps(x, w, targets), [x, weight])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_far_from_zero_by_the_rule(device, dtype):
    x, weight, bias = arguments(dtype=dtype, device=device)
    targets = some_targets(50, 40, device)
    check_by_rule(
        lambda x, w, b: linear_cross_entropy(x, w, targets, bias=b),
        lambda x, w, b: two_steps(x, w, targets, bias=b),
        [x, weight, bias + 100],
        "logits + 100",
    )


def test_sure_targets_keep_a_gradient(device):
    # p rounds to 1 in bf16; p - 1 must not round to 0
    x, weight = torch.ones(1, 1, device=device).bfloat16(), torch.zeros(4, 1, device=device).bfloat16()
    weight[2] = 8.0
    targets = torch.tensor([2], device=device)

    def call(op):
        return lambda w: op(x.to(w.dtype), w, targets, reduction="sum")

    check_by_rule(call(linear_cross_entropy), call(two_steps), [weight], "a sure target")
    assert outputs_and_gradients(call(linear_cross_entropy), [weight])[1][2, 0] != 0


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("N", (0, 40))
def test_nothing_counted_is_as_in_torch(device, N, reduction):
    x, weight, bias = arguments(N, device=device)
    targets = torch.full((N,), IGNORED, device=device)
    loss, *gradients = outputs_and_gradients(
        lambda x, w, b: linear_cross_entropy(x, w, targets, bias=b, reduction=reduction), [x, weight, bias]
    )
    assert loss.isnan() if reduction == "mean" else (loss == 0).all()
    assert all((g == 0).all() for g in gradients)


def test_ignored_inside_the_vocabulary_and_integers(device):
    x, weight, _ = arguments(device=device)
    targets = some_targets(50, 37, device, ignored=False)
    targets[::3] = 5
    want = two_steps(x, weight, torch.where(targets == 5, IGNORED, targets))
    for integer in (torch.int32, torch.int64):
        torch.testing.assert_close(linear_cross_entropy(x, weight, targets.to(integer), ignore_index=5), want)


@pytest.mark.parametrize("bad", (40, 41, -1))
@pytest.mark.parametrize("grad", (False, True))
def test_target_out_of_range_is_an_error(bad, grad):
    x, weight, _ = arguments()
    targets = some_targets(50, 40, "cpu")
    targets[45] = bad
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(x.requires_grad_(grad), weight, targets)
    targets[45] = 37  # a padding row is out of range too
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(x, weight, targets, vocab_size=37)


def test_padding_rows_do_not_matter(device):
    x, weight, bias = arguments(device=device)
    weight[37:], bias[37:] = float("nan"), float("nan")
    targets = some_targets(50, 37, device)
    loss, d_x, d_weight, d_bias = outputs_and_gradients(
        lambda x, w, b: linear_cross_entropy(x, w, targets, bias=b, vocab_size=37), [x, weight, bias]
    )
    torch.testing.assert_close(loss, two_steps(x, weight[:37], targets, bias[:37]))
    assert (d_weight[37:] == 0).all() and (d_bias[37:] == 0).all()
    assert all(g.isfinite().all() for g in (d_x, d_weight, d_bias))


def test_shapes(device):
    x, weight, _ = arguments(48, device=device)
    targets = some_targets(48, 40, device)
    flat = linear_cross_entropy(x, weight, targets, reduction="none")
    shaped = linear_cross_entropy(x.view(4, 12, 24), weight, targets.view(4, 12), reduction="none")
    assert shaped.shape == (4, 12)
    assert torch.equal(shaped.flatten(), flat)
    assert linear_cross_entropy(x[0], weight, targets[0]).shape == ()
    assert linear_cross_entropy(x.bfloat16(), weight.bfloat16(), targets).dtype == torch.float32


@pytest.mark.parametrize("dtype", (torch.float64, *RULE_DTYPES))
def test_chunking_does_not_matter(device, dtype):
    x, weight, _ = arguments(100, dtype=dtype, device=device)
    targets = some_targets(100, 40, device)
    check_by_rule(
        lambda x, w: linear_cross_entropy(x, w, targets, chunk_bytes=1),
        lambda x, w: linear_cross_entropy(x, w, targets, chunk_bytes=1 << 30),
        [x, weight],
        "chunks",
    )


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_weight_gradients_stay_accurate_over_many_chunks(device, dtype):
    N = 16 * 128
    targets = torch.arange(N, device=device) % 5  # so that every chunk adds to the same rows
    x, weight, _ = arguments(N, 8, 40, dtype, device)
    check_by_rule(
        lambda x, w: linear_cross_entropy(x.abs(), w, targets),
        lambda x, w: two_steps(x.abs(), w, targets),
        [x, weight],
        "many chunks",
    )


@pytest.mark.parametrize(
    ("place", "dtype", "compiling", "by_gemm"),
    [
        ("cuda", torch.bfloat16, False, True),
        ("cuda", torch.float16, False, True),
        ("cuda", torch.bfloat16, True, False),
        ("cuda", torch.float32, False, False),  # addmm_, as ever
        ("cpu", torch.bfloat16, False, False),
    ],
)
def test_on_a_gpu_the_gemm_adds_to_the_weight_gradient(place, dtype, compiling, by_gemm, monkeypatch):
    """In place, in fp32, and with no product of its own. Fake tensors need no GPU."""
    calls = []
    monkeypatch.setattr(torch, "addmm", lambda *given, **options: calls.append((given, options)))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    with FakeTensorMode(), Allocations() as seen:
        total = torch.empty(4, 5, device=place)
        a, b = (torch.empty(*shape, device=place, dtype=dtype) for shape in ((4, 7), (7, 5)))
        _add_product_(total, a, b, beta=1)
    assert ("mm" in seen.names) == (not by_gemm and dtype != torch.float32)
    if not by_gemm:
        assert not calls
        return
    [((summand, *factors), options)] = calls
    assert summand is total and factors[0] is a and factors[1] is b
    assert options.pop("out") is total and options == dict(beta=1, out_dtype=torch.float32)


@pytest.mark.parametrize("N", [16, 50])
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_gradient_gathered_in_float32_is_not_rounded(device, dtype, N):
    """Out of one chunk and of several: nearer to float64's than one that was rounded to the weight's type."""
    x, weight, _ = arguments(N=N, dtype=dtype, device=device)
    targets = some_targets(N, 40, device)
    errors = []
    for gathered in (None, torch.float32):
        leaf = weight.clone().requires_grad_()
        if gathered is not None:
            leaf.grad_dtype = gathered
        linear_cross_entropy(x, leaf, targets, z_loss=0.01).backward()
        exact = weight.double().requires_grad_()
        two_steps(x.double(), exact, targets, z_loss=0.01).backward()
        assert leaf.grad.dtype == (gathered or dtype)
        errors.append((leaf.grad.double() - exact.grad).abs().mean())
    assert errors[1] < errors[0]
    assert not torch.equal(leaf.grad, leaf.grad.to(dtype).float())


def test_accumulated_micro_batches_equal_one_batch(device):
    x, weight, _ = arguments(64 * 6, dtype=torch.float32, device=device)
    targets = some_targets(64 * 6, 40, device)
    count = (targets != IGNORED).sum()

    cuts = [0, *range(5, 63 * 6, 6), 64 * 6]  # unequal

    def accumulated(op):
        return lambda x, w: sum(
            op(x[i:j], w, targets[i:j], reduction="sum") / count for i, j in itertools.pairwise(cuts)
        )

    assert len(cuts) == 65
    check_by_rule(accumulated(linear_cross_entropy), accumulated(two_steps), [x, weight], "64 micro-batches")
    whole, parts = (
        outputs_and_gradients(op, [x.double(), weight.double()])
        for op in (lambda x, w: linear_cross_entropy(x, w, targets), accumulated(linear_cross_entropy))
    )
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


# ---- memory, and work that is not asked for ---------------------------------------------------


class Allocations(TorchDispatchMode):
    """Elements of the largest tensor any operation returned, and the operations' names."""

    def __init__(self):
        super().__init__()
        self.largest, self.names = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_the_logits_are_never_all_there(device, reduction, dtype):
    N, C, V = 256, 8, 500
    x, weight, _ = arguments(N, C, V, dtype, device)
    targets = some_targets(N, V, device)
    with Allocations() as ours:
        outputs_and_gradients(lambda x, w: linear_cross_entropy(x, w, targets, reduction=reduction), [x, weight])
    assert ours.largest == 16 * width(V)  # a chunk
    with Allocations() as theirs:
        outputs_and_gradients(lambda x, w: two_steps(x, w, targets, reduction=reduction), [x, weight])
    assert theirs.largest == N * V


def test_chunk_bytes_is_kept(device):
    N, V = 256, 500
    x, weight, _ = arguments(N, 8, V, torch.float32, device)
    for rows in (16, 64, 100):
        with Allocations() as seen:
            linear_cross_entropy(x, weight, some_targets(N, V, device), chunk_bytes=rows * V * 4)
        assert seen.largest == rows * width(V)


@pytest.mark.parametrize("needed", ((), (0,), (1,), (2,), (0, 1), (0, 1, 2)), ids=str)
def test_only_needed_products_are_computed(device, needed):
    given = [t.requires_grad_(i in needed) for i, t in enumerate(arguments(16, device=device))]
    targets = some_targets(16, 40, device)
    with Allocations() as seen:
        loss = linear_cross_entropy(*given[:2], targets, bias=given[2])
        assert loss.requires_grad == bool(needed)
        if needed:
            loss.backward()
    products = sum(name in ("mm", "addmm", "addmm_") for name in seen.names)
    assert products == 1 + (0 in needed) + (1 in needed)
    gradient = "cross_entropy_gradient_" if on_kernels() else "scatter_"
    assert (gradient in seen.names) == bool(needed)  # the gradient of the logits
    with Allocations() as seen, torch.no_grad():
        linear_cross_entropy(*given[:2], targets, bias=given[2])
    assert sum(name in ("mm", "addmm", "addmm_") for name in seen.names) == 1


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_backward_twice_over_one_graph(device, reduction):
    x, weight, _ = (t.requires_grad_() for t in arguments(device=device))
    loss = linear_cross_entropy(x, weight, some_targets(50, 37, device), reduction=reduction).sum()
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    again = torch.autograd.grad(3 * loss, (x, weight))
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(3 * a, b)


# ---- derivatives, layouts, contract -----------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_derivatives(device, options):
    targets = some_targets(17, 3, device)
    options = {**options, **({"vocab_size": 3} if "vocab_size" in options else {})}
    given = arguments(17, 2, 4, device=device)
    call = lambda x, w, b: linear_cross_entropy(x, w, targets, bias=b, **options)  # noqa: E731
    check_gradients(call, given, twice=not on_kernels())


def test_derivatives_with_weights(device):
    targets, weights = some_targets(17, 3, device), randn(17, device=device).abs()
    for reduction in ("mean", "none"):
        check_gradients(
            lambda x, w: linear_cross_entropy(x, w, targets, token_weights=weights, reduction=reduction),  # noqa: B023
            arguments(17, 2, 3, device=device)[:2],
            twice=not on_kernels(),
        )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_layouts_fakes_and_poison(device, dtype):
    given = arguments(dtype=dtype, device=device)
    targets = some_targets(50, 37, device)

    def ours(x, w, b):
        return linear_cross_entropy(x, w, targets, bias=b)

    check_layouts(ours, given)
    check_fake(linear_cross_entropy, [*given[:2], targets])
    clean = outputs_and_gradients(ours, given)
    with poison():
        again = outputs_and_gradients(ours, given)
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


def test_nan_propagates(device):
    x, weight, _ = arguments(device=device)
    targets = some_targets(50, 37, device, ignored=False)
    x[20, 3] = float("nan")
    losses = linear_cross_entropy(x, weight, targets, reduction="none")
    assert losses[20].isnan() and losses.isnan().sum() == 1


def test_vmap(device):
    x, weight, _ = arguments(device=device)
    targets = some_targets(50, 37, device)
    batched = torch.func.vmap(lambda x: linear_cross_entropy(x, weight, targets))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(batched[1], reference(2 * x, weight, targets))


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_compiles_whole(device, reduction):
    targets = some_targets(50, 37, device)
    check_compiled(
        lambda x, w: linear_cross_entropy(x, w, targets, reduction=reduction),
        lambda x, w: two_steps(x, w, targets, reduction=reduction),
        arguments(dtype=torch.float32, device=device)[:2],
        "linear_cross_entropy",
    )


def test_autocast(device):
    given = arguments(dtype=torch.float32, device=device)[:2]
    targets = some_targets(50, 37, device)

    def ours(x, w):
        return linear_cross_entropy(x, w, targets)

    with torch.autocast(device, torch.bfloat16):
        got = outputs_and_gradients(ours, given)
    low = outputs_and_gradients(ours, given, dtype=torch.bfloat16)
    for a, b in zip(got, low, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())


BAD = {
    "x must be float64": lambda d: dict(x=values(6, 4, device=d).int()),
    "weight must have the dtype of x": lambda d: dict(weight=values(9, 4, dtype=torch.float32, device=d)),
    "must be (..., C) and (V, C)": lambda d: dict(weight=values(9, 5, device=d)),
    "with V >= 1": lambda d: dict(weight=values(0, 4, device=d)),
    "(..., C) with C >= 1": lambda d: dict(x=values(6, 0, device=d)),
    "bias must be (V,) = (9,)": lambda d: dict(bias=values(8, device=d)),
    "targets must be int64 or int32": lambda d: dict(targets=values(6, device=d)),
    "targets must have the shape of x": lambda d: dict(targets=values(5, device=d).long()),
    "token_weights must have the shape": lambda d: dict(token_weights=values(5, device=d)),
    "are not differentiated": lambda d: dict(token_weights=values(6, device=d).requires_grad_()),
    "chunk_bytes must be": lambda d: dict(chunk_bytes=0),
    "reduction must be one of": lambda d: dict(reduction="average"),
    "vocab_size must be in 1 .. 9": lambda d: dict(vocab_size=0),
}


@pytest.mark.parametrize("message", BAD)
def test_the_same_error_everywhere(message):
    def make(device):
        given = dict(x=values(6, 4, device=device), weight=values(9, 4, device=device))
        return (), {**given, "targets": values(6, device=device).long(), **BAD[message](device)}

    check_error(linear_cross_entropy, message, make)

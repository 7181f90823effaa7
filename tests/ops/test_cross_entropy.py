"""Cross-entropy against torch's own, with the terms that torch lacks written out: the reference, and the kernels on the
emulator."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from fastgpt import native
from fastgpt.ops import cross_entropy
from fastgpt.ops.cross_entropy import reference
from tests.ops import kernels
from tests.ops.checks import check_compiled, check_error, check_fake, check_gradients, check_layouts, values
from tests.rule import RULE_DTYPES, check_by_rule, outputs_and_gradients, randn

IGNORED = -100
OPTIONS = (
    dict(),
    dict(reduction="sum"),
    dict(reduction="none"),
    dict(label_smoothing=0.1),
    dict(z_loss=0.01),
    dict(softcap=3.0),
    dict(vocab_size=13),
    dict(label_smoothing=0.2, z_loss=0.02, softcap=5.0, vocab_size=13, reduction="none"),
)


@pytest.fixture(params=kernels.WHERE)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.at(request.param) as device:
        yield device


def torchs(
    logits, targets, *, z_loss=0.0, softcap=None, vocab_size=None, reduction="mean", ignore_index=IGNORED, **options
) -> Tensor:
    """F.cross_entropy in fp32 (fp64 for fp64), with z-loss, softcap and padding around it."""
    x = logits[..., :vocab_size].to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    targets = targets.long()
    options["ignore_index"] = ignore_index
    losses = F.cross_entropy(x.flatten(0, -2), targets.flatten(), reduction="none", **options).view(targets.shape)
    losses = losses + z_loss * torch.where(targets == ignore_index, 0.0, x.logsumexp(-1) ** 2) if z_loss else losses
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (targets != ignore_index).sum()


def some_targets(N: int, V: int, device: str, ignored: bool = True) -> Tensor:
    """First and last class among them, and ignored rows."""
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(7))
    targets[0], targets[-1] = 0, V - 1
    if ignored:
        targets[1::5] = IGNORED
    return targets.to(device)


@pytest.mark.parametrize("dtype", (torch.float64, *RULE_DTYPES))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_by_the_rule(device, options, dtype):
    targets = some_targets(40, 13, device)
    check_by_rule(
        lambda x: cross_entropy(x, targets, **options),
        lambda x: torchs(x, targets, **options),
        [3 * randn(40, 19, dtype=dtype, device=device)],
        f"cross_entropy {options}",
    )


@pytest.mark.parametrize("V", (1, 2, 7, 8, 9, 4096, 50257))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_widths(device, V, dtype):
    targets = some_targets(12, V, device)
    check_by_rule(
        lambda x: cross_entropy(x, targets),
        lambda x: torchs(x, targets),
        [randn(12, V, dtype=dtype, device=device)],
        f"cross_entropy V={V}",
    )


@pytest.mark.parametrize("dtype", RULE_DTYPES)
@pytest.mark.parametrize("shift", (100.0, -100.0))
def test_far_from_zero(device, shift, dtype):
    targets = some_targets(40, 13, device)
    check_by_rule(
        lambda x: cross_entropy(x, targets),
        lambda x: torchs(x, targets),
        [randn(40, 13, dtype=dtype, device=device) + shift],
        f"logits {shift:+}",
    )


@pytest.mark.parametrize("integer", (torch.int32, torch.int64))
@pytest.mark.parametrize("shape", ((), (6,), (2, 3), (2, 3, 2)), ids=str)
def test_shapes_and_integers(device, shape, integer):
    logits = randn(*shape, 11, device=device)
    targets = torch.randint(11, shape, generator=torch.Generator().manual_seed(0)).to(device, integer)
    got = cross_entropy(logits, targets, reduction="none")
    assert got.shape == shape
    flat = F.cross_entropy(logits.reshape(-1, 11), targets.reshape(-1).long(), reduction="none")
    torch.testing.assert_close(got.reshape(-1), flat)
    assert cross_entropy(logits.bfloat16(), targets).dtype == torch.float32


@pytest.mark.parametrize("ignore_index", (-100, -1, 3))
def test_ignored_rows(device, ignore_index):
    logits, targets = randn(6, 8, device=device), torch.tensor([3, 1, 0, 7, 3, 2], device=device)
    if ignore_index < 0:
        targets[targets == 3] = ignore_index
    losses, d_logits = outputs_and_gradients(
        lambda x: cross_entropy(x, targets, ignore_index=ignore_index, reduction="none"), [logits]
    )
    ignored = targets == ignore_index
    assert (losses[ignored] == 0).all() and (losses[~ignored] > 0).all()
    assert (d_logits[ignored] == 0).all() and (d_logits[~ignored] != 0).all()
    mean = cross_entropy(logits, targets, ignore_index=ignore_index)
    torch.testing.assert_close(mean, F.cross_entropy(logits, targets, ignore_index=ignore_index))


@pytest.mark.parametrize("rows", (0, 5))
def test_nothing_counted_is_as_in_torch(device, rows):
    targets = torch.full((rows,), IGNORED, device=device)
    for reduction in ("mean", "sum", "none"):
        both = [
            outputs_and_gradients(lambda x: op(x, targets, reduction=reduction), [randn(rows, 8, device=device)])  # noqa: B023
            for op in (cross_entropy, F.cross_entropy)
        ]
        for ours, theirs in zip(*both, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)
        assert (both[0][1] == 0).all()


@pytest.mark.parametrize("bad", (8, 9, -1, 2**31 - 1))
def test_target_out_of_range_is_an_error(bad):
    targets = torch.tensor([1, bad, 2])
    with pytest.raises(RuntimeError, match="out of bounds"):
        cross_entropy(randn(3, 8), targets)
    with pytest.raises(RuntimeError, match="out of bounds"):  # a padding column is out of range too
        cross_entropy(randn(3, 8), torch.tensor([1, 6, 2]), vocab_size=6)


def test_padding_columns_do_not_matter(device):
    targets = some_targets(9, 10, device)
    logits = randn(9, 16, device=device)
    logits[:, 10:] = float("nan")
    for options in (dict(), dict(label_smoothing=0.1, z_loss=0.1)):
        loss, d_logits = outputs_and_gradients(lambda x: cross_entropy(x, targets, vocab_size=10, **options), [logits])  # noqa: B023
        torch.testing.assert_close(loss, torchs(logits[:, :10], targets, **options))
        assert (d_logits[:, 10:] == 0).all() and d_logits.isfinite().all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_derivatives(device, options):
    targets = some_targets(4, 6, device)
    options = {**options, **({"vocab_size": 6} if "vocab_size" in options else {})}
    twice = native.select(targets, "cross_entropy") is None  # the kernels have no second derivative
    check_gradients(lambda x: cross_entropy(x, targets, **options), [randn(4, 7, device=device)], twice)


def test_layouts_fakes_and_vmap(device):
    targets = some_targets(6, 9, device)
    for dtype in (torch.float32, torch.bfloat16):
        x = randn(6, 9, dtype=dtype, device=device)
        check_layouts(lambda x: cross_entropy(x, targets, reduction="none"), [x])
        check_fake(cross_entropy, [x, targets])
    strided = torch.stack([targets, targets], 1)[:, 0]
    assert torch.equal(cross_entropy(x, strided), cross_entropy(x, targets))
    batched = torch.func.vmap(lambda x: cross_entropy(x, targets))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(batched[1], reference(2 * x, targets))


def test_compiles_whole(device):
    targets = some_targets(6, 9, device)
    options = dict(label_smoothing=0.1, z_loss=0.1, vocab_size=9)
    check_compiled(
        lambda x: cross_entropy(x, targets, **options),
        lambda x: torchs(x, targets, **options),
        [randn(6, 12, dtype=torch.float32, device=device)],
        "cross_entropy",
    )


def with_options(logits, targets):
    return cross_entropy(logits, targets, label_smoothing=0.1, z_loss=0.1, softcap=5.0)


@pytest.mark.parametrize("op", [cross_entropy, with_options])
def test_one_compilation_serves_all_batch_sizes(op, device):
    """And one tracing: dynamo would begin again for a float that it took for a symbol."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=backend)
    for B in (4, 6, 9):
        targets = some_targets(B, 12, device)
        found, expected = (
            outputs_and_gradients(lambda x: f(x, targets), [randn(B, 12, device=device)])  # noqa: B023
            for f in (compiled, op)
        )
        torch.testing.assert_close(found, expected)
    assert len(graphs) == 1


BAD = {
    "logits must be float64": lambda d: dict(logits=values(6, 9, device=d).int()),
    "(..., C) with C >= 1": lambda d: dict(logits=values(6, 0, device=d)),
    "targets must be int64 or int32": lambda d: dict(targets=values(6, device=d)),
    "targets must have the shape of logits": lambda d: dict(targets=values(5, device=d).long()),
    "targets must be a tensor": lambda d: dict(targets=3),
    "reduction must be one of": lambda d: dict(reduction="average"),
    "label_smoothing must be": lambda d: dict(label_smoothing=1.5),
    "z_loss must be": lambda d: dict(z_loss=-1.0),
    "softcap must be": lambda d: dict(softcap=-1.0),
    "vocab_size must be in 1 .. 9": lambda d: dict(vocab_size=10),
}


@pytest.mark.parametrize("message", BAD)
def test_the_same_error_everywhere(message):
    def make(device):
        given = dict(logits=values(6, 9, device=device), targets=values(6, device=device).long())
        return (), {**given, **BAD[message](device)}

    check_error(cross_entropy, message, make)

"""The kernels behind cross_entropy and linear_cross_entropy: which serve a call, that they are the same every time,
what they move, and how much memory they take.

That they are right is shown by test_cross_entropy.py and test_linear_cross_entropy.py, whose tests run on them too.
"""

from __future__ import annotations

import importlib
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgpt import native, ops
from tests.ops import kernels
from tests.ops.test_cross_entropy import IGNORED, some_targets, torchs
from tests.rule import LAYOUTS, check_by_rule, in_layout, outputs_and_gradients, poison, randn

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
EVERYTHING = dict(label_smoothing=0.1, z_loss=0.01, softcap=5.0)
entries = torch.ops.fastgpt_emulated


@pytest.fixture(autouse=True)
def emulated():
    with kernels.at(kernels.EMULATED):
        yield


def arguments(options: dict[str, Any]) -> tuple[Any, ...]:
    """The options as the entries take them."""
    given = {"ignore_index": IGNORED, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0, "vocab_size": None}
    return tuple({**given, **options}.values())


def in_place(x: Tensor, targets: Tensor, d_losses: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The losses and the gradient by cross_entropy_gradient_."""
    d_x = x.clone(memory_format=torch.contiguous_format)
    return entries.cross_entropy_gradient_(d_x, targets, d_losses, *arguments(options)), d_x


class InPlace(torch.autograd.Function):
    """cross_entropy_gradient_ as a function that the rule can be applied to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor:
        ctx.given = x, targets, options
        return in_place(x, targets, torch.ones(x.shape[:-1], dtype=torch.promote_types(x.dtype, F32)), **options)[0]

    @staticmethod
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor, None, None]:
        x, targets, options = ctx.given
        return in_place(x, targets, d_losses, **options)[1], None, None


def check(x: Tensor, targets: Tensor, what: str, **options: Any) -> None:
    """Both ways: forward and backward, and both at once in place."""
    exact = lambda x: torchs(x, targets, reduction="none", **options)  # noqa: E731
    check_by_rule(lambda x: ops.cross_entropy(x, targets, reduction="none", **options), exact, [x], what)
    check_by_rule(lambda x: InPlace.apply(x, targets, options), exact, [x], f"in place, {what}")


# ---- sizes --------------------------------------------------------------------------------------------------


@DTYPES
def test_widths_at_the_edges_of_vectors_and_tiles(dtype: torch.dtype) -> None:
    """A vector and one element more or less; the last of the tile of a warp, and the first of the wide one; all that a
    block of 512 threads has at a time, and a vector or an element more."""
    vector = 16 // dtype.itemsize
    for width in {1, vector - 1, vector, vector + 1, 127, 128, 129, 128 * vector, 129 * vector, 513 * vector}:
        check(randn(2, width, dtype=dtype), torch.tensor([0, width - 1]), f"width {width}")
        assert kernels.last_path()[0] == ("vector" if width % vector == 0 else "generic"), width


@pytest.mark.parametrize("columns", [40, 1040])
@DTYPES
def test_padding_that_ends_within_a_vector(columns: int, dtype: torch.dtype) -> None:
    for vocab_size in (columns - 9, columns - 8, columns - 1) if columns > 40 else (1, 31, 32, 33, 39):
        x = randn(12, columns, dtype=dtype)
        x[:, vocab_size:] = float("nan")
        targets = some_targets(12, vocab_size, "cpu")
        loss, d_x = outputs_and_gradients(
            lambda x: ops.cross_entropy(x, targets, vocab_size=vocab_size, **EVERYTHING),  # noqa: B023
            [x],
        )
        assert loss.isfinite() and (d_x[:, vocab_size:] == 0).all()
        check(x, targets, f"{vocab_size} of {columns}", vocab_size=vocab_size, label_smoothing=0.1)


# Bytes of a row that fit a block's shared memory: all but one KB of what the chip gives. Of a wider row as many times
# 512 vectors are kept as fit there, and 12 times as many in registers.
KEPT = {"sm_90a": 226 * 1024, "sm_80": 162 * 1024, "sm_86": 98 * 1024}
WHOLE, REGISTERS, PART = (
    f"16-byte accesses; {end}"
    for end in (
        "rows are kept in shared memory",
        "rows are kept in shared memory and registers",
        "a part of each row is kept, the rest read twice",
    )
)


def with_registers(chip: str) -> int:
    """Bytes of the widest row that is read once."""
    return (KEPT[chip] // 8192 + 12) * 8192


@pytest.mark.parametrize("chip", ["sm_90a", "sm_80"])
def test_rows_around_what_is_kept(chip: str) -> None:
    """The widest row in shared memory and the next one, the widest with registers and the next one, a part of which is
    read twice; bitwise as the two entries."""
    widest, wider = KEPT[chip] // 2, with_registers(chip) // 2
    for columns, reason in ((widest, WHOLE), (widest + 8, REGISTERS), (wider, REGISTERS), (wider + 8, PART)):
        x, targets, d_losses = randn(1, columns, dtype=BF16), torch.tensor([columns - 1]), torch.ones(1)
        with native.emulated(chip, checked=False):
            losses, d_x = in_place(x, targets, d_losses)
            assert kernels.last_path() == ("vector", reason)
            expected, known = entries.cross_entropy_forward(x, targets, *arguments({}))
            d_expected = entries.cross_entropy_backward(d_losses, x, targets, known, *arguments({}))
        assert kernels.same([losses, d_x], [expected, d_expected])


@DTYPES
def test_rows_that_registers_keep_a_part_of(dtype: torch.dtype) -> None:
    """A second row for each block, ignored rows, targets and padding in that part; doubles have no registers for it."""
    size = dtype.itemsize
    columns = KEPT["sm_86"] // size + 1000
    vocab_size, targets = columns - 9, torch.tensor([columns - 10, IGNORED, 5, columns - 900, IGNORED])
    x, d_losses = randn(5, columns, dtype=dtype), randn(5, dtype=torch.promote_types(dtype, F32), seed=1)
    x[:, vocab_size:] = float("nan")
    given = dict(EVERYTHING, vocab_size=vocab_size)
    with native.emulated("sm_86"):
        losses, d_x = in_place(x, targets, d_losses, **given)
        assert kernels.last_path() == ("vector", PART if dtype == F64 else REGISTERS)
        expected, known = entries.cross_entropy_forward(x, targets, *arguments(given))
        d_expected = entries.cross_entropy_backward(d_losses, x, targets, known, *arguments(given))
    assert kernels.same([losses, d_x], [expected, d_expected])
    assert (d_x[:, vocab_size:] == 0).all() and (d_x[targets == IGNORED] == 0).all()


def test_many_rows() -> None:
    targets = torch.full((2**16 + 3,), IGNORED)  # most, for they are quick
    targets[::5000], targets[-3:] = 2, 3
    x = randn(2**16 + 3, 4, dtype=F32)
    with native.emulated(checked=False):
        check_by_rule(
            lambda x: ops.cross_entropy(x, targets, reduction="none"),
            lambda x: torchs(x, targets, reduction="none"),
            [x],
            "many rows",
        )


@pytest.mark.parametrize("columns", [16, 13])
def test_a_row_may_lie_beyond_two_billion_elements(columns: int) -> None:
    """Its place is counted in 64 bits. Nothing between the two rows is touched, so it takes no memory."""
    near, targets = randn(2, columns, dtype=BF16), torch.tensor([0, columns - 1])
    far = torch.empty(2**31 + columns, dtype=BF16).as_strided(near.shape, (2**31, 1)).copy_(near)
    with native.emulated(checked=False):  # the checks keep a byte for each element between
        both = [entries.cross_entropy_forward(x, targets, *arguments({})) for x in (far, near)]
        assert kernels.same([*both[0]], [*both[1]])
        d_far, d_near = (
            entries.cross_entropy_backward(torch.ones(2), x, targets, both[0][1], *arguments({})) for x in (far, near)
        )
    assert kernels.same([d_far], [d_near])


def test_places_are_counted_in_64_bits() -> None:
    """Of the gradients, and of rows in place: more than a test can hold, so what counts them is read."""
    text = (kernels.CSRC / "cross_entropy/cross_entropy.cu").read_text()
    assert "int64_t row = int64_t(blockIdx.x)" in text and not re.search(r"\bint row\b", text)


# ---- targets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "dtype"), [(16, BF16), (13, F64), (13, F16), (520, F32)])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_a_target_out_of_range_makes_its_row_nan(columns: int, integer: torch.dtype, dtype: torch.dtype) -> None:
    """And reads nothing that is not there, or the emulator would have found it; other rows are as they were."""
    x, rest = randn(4, columns, dtype=dtype), torch.tensor([0, IGNORED, columns - 1])
    limits = torch.iinfo(integer)
    for bad in (-1, columns, limits.max, limits.min):
        targets = torch.cat([rest, torch.tensor([bad])]).to(integer)
        losses, known = entries.cross_entropy_forward(x, targets, *arguments({}))
        d_x = entries.cross_entropy_backward(torch.ones_like(losses), x, targets, known, *arguments({}))
        for loss, d in ((losses, d_x), in_place(x, targets, torch.ones_like(losses))):
            assert loss[3].isnan() and d[3].isnan().all()
            assert loss[:3].isfinite().all() and d[:3].isfinite().all() and loss[1] == 0 and (d[1] == 0).all()
        assert ops.cross_entropy(x, targets).isnan() and ops.cross_entropy(x, targets, reduction="sum").isnan()
    targets = torch.tensor([0, 1, 2, columns - 1])  # of the padding
    losses = ops.cross_entropy(x, targets, vocab_size=columns - 1, reduction="none")
    assert losses.isnan().tolist() == [False, False, False, True]


def test_a_target_out_of_range_in_the_linear_op() -> None:
    x, weight = (randn(5, 8, seed=1).requires_grad_(), randn(20, 8, seed=2).requires_grad_())
    for bad in (20, -1):
        targets = torch.tensor([1, bad, 2, IGNORED, 3])
        losses = ops.linear_cross_entropy(x, weight, targets, reduction="none")
        assert losses.isnan().tolist() == [False, True, False, False, False]
        loss = ops.linear_cross_entropy(x, weight, targets)
        d_x, d_weight = torch.autograd.grad(loss, (x, weight))
        assert loss.isnan() and d_x[1].isnan().all() and d_weight.isnan().all()


def test_ignore_index_may_be_any_number() -> None:
    x = randn(3, 16, dtype=BF16)
    for ignored in (0, 5, 15, 16, -1, 2**31 - 1, 2**40, -(2**40)):
        targets = torch.tensor([3, ignored, 2])
        losses = ops.cross_entropy(x, targets, ignore_index=ignored, reduction="none")
        assert losses[1] == 0 and (losses[::2] > 0).all()


# ---- values -------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("columns", [40, 41])
def test_non_finite(columns: int, dtype: torch.dtype) -> None:
    """As in torch: NaN and inf spoil their row, -inf is a probability of 0, also where a thread sees nothing else."""
    x, targets = randn(6, columns, dtype=dtype), torch.tensor([3, 4, 5, 39, 3, 3])
    x[0, 7], x[1, 8], x[2, 9:], x[3, :39] = float("nan"), float("inf"), -float("inf"), -float("inf")
    x[4] = -float("inf")
    x[5, 3] = -float("inf")
    ours = outputs_and_gradients(lambda x: ops.cross_entropy(x, targets, reduction="none"), [x])
    theirs = outputs_and_gradients(lambda x: torchs(x, targets, reduction="none"), [x])
    once = in_place(x, targets, torch.ones(6, dtype=ours[0].dtype))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())
    assert torch.equal(once[0].isnan(), ours[0].isnan()) and torch.equal(once[1].isnan(), ours[1].isnan())
    x = randn(20, columns, dtype=dtype, seed=1)
    x[:, 9:39] = -float("inf")
    check(x, torch.arange(20) % 9, "some -inf")


@pytest.mark.parametrize("shift", [100.0, -100.0])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_far_from_zero(shift: float, dtype: torch.dtype) -> None:
    """No digits are lost, of a mean of the logits neither."""
    x, targets = randn(20, 1040, dtype=dtype) + shift, some_targets(20, 1040, "cpu")
    check(x, targets, f"{shift:+}")
    check(x, targets, f"{shift:+}, smoothed", label_smoothing=0.3)


@pytest.mark.parametrize("columns", [16, 1030, 1040])
def test_a_sure_target_keeps_the_digits_of_its_loss(columns: int) -> None:
    """Also where the threads of a row have many small terms to add to its 1, which would lose them one by one."""
    targets = torch.arange(12) * (columns - 1) // 11
    for distance in (9.0, 12.0, 16.0):
        x = (randn(12, columns) / 4).scatter_(1, targets[:, None], distance).float()
        check(x, targets, f"sure by {distance}")


def test_a_sure_target_keeps_its_gradient() -> None:
    """Its probability rounds to 1 in bfloat16, but 1 less that is not 0."""
    x = torch.zeros(1, 16, dtype=BF16)
    x[0, 3] = 12.0
    assert in_place(x, torch.tensor([3]), torch.ones(1))[1][0, 3] != 0


# ---- which path ---------------------------------------------------------------------------------------------


def gap(x: Tensor) -> Tensor:
    """The same in rows that are one element too far from each other."""
    return torch.cat([x, x[:, :1]], 1)[:, :-1]


PATHS = {
    "16-byte accesses": lambda x: x,
    "the width is no multiple of 16 bytes": lambda x: x[:, :-1],
    "a tensor does not begin at a multiple of 16 bytes": lambda x: in_layout(x, "offset"),
    "a row does not begin at a multiple of 16 bytes": gap,
}


@DTYPES
@pytest.mark.parametrize("reason", PATHS)
def test_choose_path_says_which_and_why(reason: str, dtype: torch.dtype) -> None:
    x, targets = PATHS[reason](randn(4, 32, dtype=dtype)), torch.tensor([0, 1, IGNORED, 30])
    path = "vector" if reason == "16-byte accesses" else "generic"
    _, known = entries.cross_entropy_forward(x, targets, *arguments({}))
    assert kernels.last_path() == (path, reason)
    entries.cross_entropy_backward(torch.ones(4, dtype=known.dtype), x, targets, known, *arguments({}))
    assert kernels.last_path() == (path, reason)
    check(x, targets, reason, **EVERYTHING)


@DTYPES
@pytest.mark.parametrize("columns", [40, 41])
def test_layouts(columns: int, dtype: torch.dtype) -> None:
    """Bitwise the same on one path; within the rule on another, which adds up in another order."""
    x, targets = randn(2, 3, columns, dtype=dtype), torch.tensor([[0, 1, 2], [3, IGNORED, columns - 1]])
    for layout in (*LAYOUTS, "gap"):
        laid_out = gap(x.view(6, -1)).view(2, 3, -1) if layout == "gap" else in_layout(x, layout)
        call = lambda x: ops.cross_entropy(x, targets, reduction="none")  # noqa: E731
        got, expected = outputs_and_gradients(call, [laid_out]), outputs_and_gradients(call, [laid_out.contiguous()])
        if layout in ("contiguous", "transposed", "strided", "expanded") or columns == 41:
            assert kernels.same(got, expected), layout
        else:
            torch.testing.assert_close(got, expected)


# ---- in place -----------------------------------------------------------------------------------------------


def test_the_gradient_takes_the_place_of_the_logits_where_asked() -> None:
    x, weight, targets = randn(5, 16), randn(16, 16, seed=1).requires_grad_(), torch.tensor([0, 1, 2, IGNORED, 15])
    expected = torch.autograd.grad(ops.cross_entropy(x @ weight, targets), weight)[0]
    logits = x @ weight
    loss = ops.cross_entropy(logits, targets, overwrite_logits=True)
    before = logits.detach().clone()
    with kernels.Spy() as spy:
        d_logits, d_weight = torch.autograd.grad(loss, (logits, weight), retain_graph=True)
    assert spy.kernels == ["cross_entropy_gradient_"]
    assert d_logits.data_ptr() == logits.data_ptr() and not torch.equal(logits, before)
    torch.testing.assert_close(d_weight, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, weight)


def test_what_autograd_still_needs_is_never_corrupted() -> None:
    """tanh keeps its output for its backward, and that is the logits."""
    x, targets = randn(5, 16).requires_grad_(), torch.tensor([0, 1, 2, 3, 15])
    loss = ops.cross_entropy(x.tanh(), targets, overwrite_logits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    for leaf in (x, x.view(5, 16)):
        with pytest.raises(ValueError, match="overwrite_logits is not for a leaf"):
            ops.cross_entropy(leaf, targets, overwrite_logits=True)
    logits = 2 * x
    loss = ops.cross_entropy(logits, targets, overwrite_logits=True)
    (d_logits,) = torch.autograd.grad(loss, logits)
    assert d_logits.data_ptr() == logits.data_ptr() and not d_logits.requires_grad
    logits = (2 * x).t().contiguous().t()  # not in rows: the gradient gets memory of its own
    before = logits.detach().clone()
    ops.cross_entropy(logits, targets, overwrite_logits=True).backward()
    assert torch.equal(logits, before)
    with kernels.Spy() as spy:
        logits = 2 * x
        ops.cross_entropy(logits, targets).backward()
    assert "cross_entropy_gradient_" not in spy.kernels


# ---- dispatch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
def test_the_kernels_run_and_no_reference(grad: bool) -> None:
    pages = [importlib.import_module(f"fastgpt.ops.{page}") for page in ("cross_entropy", "linear_cross_entropy")]
    x, targets = randn(5, 48, dtype=BF16).requires_grad_(grad), some_targets(5, 48, "cpu")
    weight = randn(48, 48, dtype=BF16, seed=1).requires_grad_(grad)
    torchs_own = re.compile(r"softmax|exp(?!and)|log|gather|scatter|tanh")
    with kernels.no_reference(*pages), kernels.Spy() as spy:
        loss = ops.cross_entropy(x, targets, **EVERYTHING)
        if grad:
            loss.backward()
    assert spy.kernels == [f"cross_entropy_{part}" for part in ("forward", "backward")[: 1 + grad]]
    assert not list(filter(torchs_own.search, [name for name in spy.names if "fastgpt" not in name]))
    with kernels.no_reference(*pages), kernels.Spy() as spy:
        loss = ops.linear_cross_entropy(x, weight, targets, **EVERYTHING)
        if grad:
            loss.backward()
    assert spy.kernels == ["cross_entropy_gradient_" if grad else "cross_entropy_forward"]
    assert not list(filter(torchs_own.search, [name for name in spy.names if "fastgpt" not in name]))


def test_a_second_derivative_is_refused() -> None:
    x, weight, targets = randn(3, 8).requires_grad_(), randn(8, 8).requires_grad_(), torch.tensor([0, 1, 2])
    for name, loss in (
        ("cross_entropy", ops.cross_entropy(x, targets)),
        ("linear_cross_entropy", ops.linear_cross_entropy(x, weight, targets)),
    ):
        with pytest.raises(RuntimeError, match=f"^{name}: the kernels have no second derivative"):
            torch.autograd.grad(loss, x, create_graph=True)


CASES = {
    "vectors": lambda: (randn(2, 3, 16, dtype=BF16), torch.tensor([[0, 1, 2], [3, IGNORED, 15]])),
    "single elements": lambda: (randn(3, 10), torch.tensor([0, 1, 9], dtype=torch.int32)),
    "strided": lambda: (randn(3, 32, dtype=F32)[:, ::2], torch.tensor([0, 1, 15, 0])[:3]),
    "none": lambda: (randn(0, 8, dtype=F32), torch.empty(0, dtype=torch.int64)),
    "one": lambda: (randn(8, dtype=F32), torch.tensor(3)),
}


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str) -> None:
    """Schemas and fakes say what the entries do."""
    x, targets = CASES[case]()
    given = arguments(EVERYTHING)
    losses, known = entries.cross_entropy_forward(x, targets, *given)
    torch.library.opcheck(entries.cross_entropy_forward.default, (x, targets, *given))
    torch.library.opcheck(entries.cross_entropy_backward.default, (losses, x, targets, known, *given))
    torch.library.opcheck(entries.cross_entropy_gradient_.default, (x.contiguous(), targets, losses, *given))


def test_entries_refuse_what_would_leave_their_memory() -> None:
    x, targets, ones = torch.ones(3, 8), torch.tensor([0, 1, 2]), torch.ones(3)
    forward, backward, gradient_ = (
        getattr(entries, f"cross_entropy_{name}") for name in ("forward", "backward", "gradient_")
    )
    given = arguments({})
    known = torch.ones(3, 2)
    for message, call in {
        "targets must be on the device of logits, 1 for each row": lambda: forward(x, targets[:2], *given),
        "targets must be int64 or int32": lambda: forward(x, targets.short(), *given),
        "at least one dimension": lambda: forward(ones[0], targets[0], *given),
        r"vocab_size must be in 1 \.\. 8, got 9": lambda: forward(x, targets, *arguments({"vocab_size": 9})),
        r"vocab_size must be in 1 \.\. 8, got 0": lambda: forward(x, targets, *arguments({"vocab_size": 0})),
        "float64, float32, bfloat16 or float16": lambda: forward(x.int(), targets, *given),
        "peak_and_rest must be on the device of logits, 2 for each row": lambda: backward(
            ones, x, targets, ones, *given
        ),
        "d_losses must be on the device of logits, 1 for": lambda: backward(ones[:2], x, targets, known, *given),
        "d_losses must be float32": lambda: backward(ones.double(), x, targets, known, *given),
        "logits must be contiguous": lambda: gradient_(x.t().contiguous().t(), targets, ones, *given),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


def test_autocast() -> None:
    """The logits stay as they are, and so the loss keeps its digits."""
    x, targets = randn(4, 32, dtype=F32), some_targets(4, 32, "cpu")
    with torch.autocast("cpu", dtype=BF16):
        got = outputs_and_gradients(lambda x: ops.cross_entropy(x, targets, reduction="none"), [x])
    assert kernels.same(got, outputs_and_gradients(lambda x: ops.cross_entropy(x, targets, reduction="none"), [x]))


# ---- the same every time ------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [40, 41, 1040])
def test_bitwise_the_same_over_schedules(columns: int) -> None:
    x, targets, runs = randn(11, columns, dtype=BF16), some_targets(11, columns, "cpu"), []
    for seed in (1, 2, 3):
        with native.emulated(seed=seed), poison():
            run = outputs_and_gradients(lambda x: ops.cross_entropy(x, targets, reduction="none", **EVERYTHING), [x])
            runs.append([*run, *in_place(x, targets, torch.ones(11), **EVERYTHING)])
    assert kernels.same(runs[0], runs[1]) and kernels.same(runs[1], runs[2])
    assert not native.findings()


# ---- what is moved, and how ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("columns", [512, 50304])
def test_bytes_and_sectors(columns: int, dtype: torch.dtype) -> None:
    """Forward: one read of the logits. In place, and backward: one read and one write; by whole sectors of 32 bytes."""
    x, targets, d_losses = randn(2, columns, dtype=dtype), torch.tensor([1, columns - 1]), torch.ones(2)
    with kernels.counted() as forward:
        _, known = entries.cross_entropy_forward(x, targets, *arguments({}))
    with kernels.counted() as backward:
        entries.cross_entropy_backward(d_losses, x, targets, known, *arguments({}))
    with kernels.counted() as both:
        in_place(x, targets, d_losses)
    for counts, least in ((forward, x.nbytes), (backward, 2 * x.nbytes), (both, 2 * x.nbytes)):
        if dtype.itemsize * columns <= KEPT["sm_90a"] and columns > 512:
            assert least <= kernels.total(counts, "bytes") <= 1.03 * least
        assert kernels.total(counts, "sectors") == kernels.total(counts, "ideal_sectors")
        assert kernels.total(counts, "conflicts") == 0


# Four dtypes, vectors and single elements; two tiles, and the backward. The tile with registers has vectors and three.
KERNELS = 4 * 2 * 3 + 3


def test_instantiations_are_few() -> None:
    """Each one costs everybody's build time, for every architecture."""
    found = kernels.instantiations(r"cross_entropy_\w*kernel")
    assert len(found) == KERNELS, sorted(found)


# ---- memory -------------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were alive at a time, of those that were made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if not isinstance(t, Tensor):
                continue
            storage = t.untyped_storage()
            if storage._cdata in before or storage._cdata in self.known:
                continue
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return result

    def freed(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.now -= size


def peak(function: Callable[[Tensor, Tensor, Tensor], Tensor], N: int, C: int, V: int) -> int:
    """Of forward and backward in bfloat16, without the inputs."""
    x, weight = (torch.zeros(*shape, dtype=BF16).requires_grad_() for shape in ((N, C), (V, C)))
    targets = torch.zeros(N, dtype=torch.int64)
    with Peak() as seen:
        function(x, weight, targets).backward()
    return seen.most


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((x @ weight.T).float(), targets)


def test_the_peak_is_under_an_eighth_of_the_plain_losss() -> None:
    """Computed, from tensors without data, at the size of a GPT-2 step with the chunks that a GPU takes; and, scaled
    down, of real ones."""

    def ours(chunk_bytes: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda x, w, t: ops.linear_cross_entropy(x, w, t, chunk_bytes=chunk_bytes)

    with FakeTensorMode():
        large = peak(ours(1 << 30), 32768, 768, 50304), peak(plain, 32768, 768, 50304)
    with native.emulated(checked=False):
        small = peak(ours(1), 4096, 24, 640), peak(plain, 4096, 24, 640)
    assert large[0] < large[1] / 8 and small[0] < small[1] / 8, (large, small)

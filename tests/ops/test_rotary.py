"""Rotary embedding against complex multiplication, on the reference and on the kernels, and its tables against Llama's
published formulas."""

import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import native
from fastgpt.ops import rotary, rotary_tables
from fastgpt.ops.rotary import reference
from tests.ops import kernels
from tests.ops.checks import check_compiled, check_error, check_fake, check_gradients, check_layouts, values
from tests.rule import RULE_DTYPES, check_by_rule, half_ulp, outputs_and_gradients, poison, randn

H, KV = 4, 2


@pytest.fixture(params=kernels.WHERE)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.at(request.param) as device:
        yield device


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, norm: bool = False, *weights: Tensor):
    """Pairs (x_i, x_{i + R/2}) as complex numbers, turned; in fp32, rounded once."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    q, k, v = x.split([H, KV, KV], 2)
    if weights:
        q, k = (F.rms_norm(t.to(wide), t.shape[-1:], w.to(wide), 1e-6) for t, w in zip((q, k), weights, strict=True))
    turn = torch.complex(cos, sin).to(torch.complex128 if wide == torch.float64 else torch.complex64)
    turn = turn[: x.shape[1]] if positions is None else turn[positions]
    half = cos.shape[1]
    out = []
    for t in (q, k):
        a, b, rest = t.to(wide).split([half, half, x.shape[3] - 2 * half], -1)
        turned = torch.complex(a, b) * turn.unsqueeze(-2)
        out.append(torch.cat([turned.real, turned.imag, rest], -1).to(x.dtype))
    return torch.cat([*out, v], 2)


def ours(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *weights: Tensor) -> Tensor:
    q_weight, k_weight = weights or (None, None)
    return rotary(
        x, cos, sin, n_head=H, n_kv_head=KV, positions=positions, q_weight=q_weight, k_weight=k_weight, eps=1e-6
    )


def arguments(B=2, T=9, D=8, R=8, dtype=torch.float64, device="cpu"):
    """qkv and tables of a few more positions than needed."""
    return randn(B, T, H + 2 * KV, D, dtype=dtype, device=device), *rotary_tables(T + 3, R, 100.0, device=device)


@pytest.mark.parametrize("dtype", (torch.float64, *RULE_DTYPES))
@pytest.mark.parametrize("T", (1, 33))
@pytest.mark.parametrize("widths", ((32, 32), (40, 8), (6, 2)), ids=str)
def test_by_the_rule(device, widths, T, dtype):
    x, cos, sin = arguments(2, T, *widths, dtype, device)
    check_by_rule(lambda x: ours(x, cos, sin), lambda x: rotate(x, cos, sin), [x], f"rotary {widths}")


@pytest.mark.parametrize("dtype", (torch.float64, *RULE_DTYPES))
@pytest.mark.parametrize("integer", (torch.int32, torch.int64))
@pytest.mark.parametrize("per_row", (False, True))
def test_positions_by_the_rule(device, per_row, integer, dtype):
    x, cos, sin = arguments(dtype=dtype, device=device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 9, 10, 11], [3] * 9], dtype=integer, device=device)
    positions = positions if per_row else positions[0]
    check_by_rule(
        lambda x: ours(x, cos, sin, positions), lambda x: rotate(x, cos, sin, positions), [x], "rotary at positions"
    )


@pytest.mark.parametrize("dtype", (torch.float64, *RULE_DTYPES))
def test_norm_by_the_rule(device, dtype):
    x, cos, sin = arguments(2, 33, 32, 16, dtype, device)
    weights = [randn(32, dtype=dtype, seed=s, device=device) for s in (1, 2)]
    check_by_rule(
        lambda x, *w: ours(x, cos, sin, None, *w),
        lambda x, *w: rotate(x, cos, sin, None, True, *w),
        [x, *weights],
        "rotary with a norm",
    )


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_low_precision_is_rounded_once(device, dtype):
    x, cos, sin = arguments(2, 33, 40, 32, dtype, device)
    assert torch.equal(ours(x, cos, sin), ours(x.float(), cos, sin).to(dtype))


def test_what_a_rotation_is(device):
    x, _, _ = arguments(1, 9, device=device)
    angles = torch.arange(9, dtype=torch.float64, device=device)[:, None] * 100.0 ** (-torch.arange(4.0) / 4).to(x)
    cos, sin = angles.cos(), angles.sin()  # in fp64, so that nothing is rounded before the comparison
    y = ours(x, cos, sin)
    assert torch.equal(y[:, :, H + KV :], x[:, :, H + KV :])  # values pass
    assert torch.equal(y[:, 0], x[:, 0])  # position 0 is not turned
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    # q_i . k_j depends on i - j alone
    same = x[:, :1].expand(1, 9, -1, -1)
    y = ours(same, cos, sin)
    scores = y[0, :, 0] @ y[0, :, H].mT
    for offset in range(-8, 9):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_derivatives(device):
    x, cos, sin = arguments(1, 3, 6, 4, device=device)
    weights = [randn(6, seed=s, device=device) for s in (1, 2)]
    twice = native.select(x, "rotary") is None
    check_gradients(lambda x: ours(x, cos, sin), [x], twice)
    check_gradients(lambda x, *w: ours(x, cos, sin, None, *w), [x[:, :, :, :], *weights], twice)


def test_layouts_empties_and_poison(device):
    for dtype in (torch.float32, torch.bfloat16):
        x, cos, sin = arguments(dtype=dtype, device=device)
        check_layouts(lambda x: ours(x, cos, sin), [x])  # noqa: B023
        check_fake(lambda *t: ours(*t), [x, cos, sin])
        clean = outputs_and_gradients(lambda x: ours(x, cos, sin), [x])  # noqa: B023
        with poison():
            again = outputs_and_gradients(lambda x: ours(x, cos, sin), [x])  # noqa: B023
        assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))
        for empty in (x[:0], x[:, :0]):
            y, d_x = outputs_and_gradients(lambda x: ours(x, cos, sin), [empty])  # noqa: B023
            assert y.shape == d_x.shape == empty.shape
    before = x.clone()
    ours(x, cos, sin)
    assert torch.equal(x, before)


def test_vmap():
    x, cos, sin = arguments()
    batched = torch.func.vmap(lambda x: ours(x[None], cos, sin)[0])(x)
    torch.testing.assert_close(batched, reference(x, cos, sin, n_head=H, n_kv_head=KV))


@pytest.mark.parametrize("norm", (False, True))
def test_compiles_whole(device, norm):
    x, cos, sin = arguments(device=device)
    weights = [randn(8, seed=s, device=device) for s in (1, 2)] if norm else []
    check_compiled(
        lambda x, *w: ours(x, cos, sin, None, *w),
        lambda x, *w: rotate(x, cos, sin, None, norm, *w),
        [x, *weights],
        "rotary",
    )


BAD = {
    "n_head must be a positive multiple": lambda d: dict(n_head=3),
    "qkv must be (B, T, 8, D)": lambda d: dict(qkv=values(2, 9, 7, 8, device=d)),
    "qkv must be float64": lambda d: dict(qkv=values(2, 9, 8, 8, device=d).int()),
    "with R <= 8": lambda d: dict(cos=values(12, 5, device=d), sin=values(12, 5, device=d)),
    "cos must be float32": lambda d: dict(cos=values(12, 4, device=d).bfloat16()),
    "hold 5 positions, but qkv has 9": lambda d: dict(cos=values(5, 4, device=d), sin=values(5, 4, device=d)),
    "positions must be (B, T) or (T,)": lambda d: dict(positions=values(2, 8, device=d).long()),
    "given together": lambda d: dict(q_weight=values(8, device=d)),
    "k_weight must have shape (8,)": lambda d: dict(q_weight=values(8, device=d), k_weight=values(7, device=d)),
}


@pytest.mark.parametrize("message", BAD)
def test_the_same_error_everywhere(message):
    def make(device):
        given = dict(qkv=values(2, 9, 8, 8, device=device), cos=values(12, 4, device=device), n_head=H, n_kv_head=KV)
        given["sin"] = values(12, 4, device=device)
        return (), {**given, **BAD[message](device)}

    check_error(rotary, message, make)


# ---- tables ---------------------------------------------------------------------------------


def assert_rounded_once(table: Tensor, exact: list[float]) -> None:
    """Each entry of `table` (n,) is the float32 nearest to the exact one: off by half a unit in its last place."""
    assert table.dtype == torch.float32
    want = torch.tensor(exact, dtype=torch.float64)
    assert ((table.cpu().double() - want).abs() <= half_ulp(want, torch.float32)).all()


def test_tables(device):
    cos, sin = rotary_tables(50, 8, 10000.0, device=device)
    assert cos.shape == sin.shape == (50, 4)
    for t in (0, 1, 49):
        angles = [t * 10000.0 ** (-2 * i / 8) for i in range(4)]
        assert_rounded_once(cos[t], [math.cos(a) for a in angles])
        assert_rounded_once(sin[t], [math.sin(a) for a in angles])
    far_cos, far_sin = rotary_tables(1_000_000, 2, 10000.0, device=device)
    assert_rounded_once(far_cos[-1], [math.cos(999_999)])
    assert_rounded_once(far_sin[-1], [math.sin(999_999)])


def test_linear_scaling_is_slower_time(device):
    plain, _ = rotary_tables(10, 8, 100.0, device=device)
    scaled, _ = rotary_tables(40, 8, 100.0, SimpleNamespace(kind="linear", factor=4.0), device=device)
    assert torch.equal(scaled[::4], plain)  # a power of two: no rounding differs
    none, _ = rotary_tables(10, 8, 100.0, SimpleNamespace(kind="none", factor=4.0), device=device)
    assert torch.equal(none, plain)


def test_llama3_scaling(device):
    scaling = SimpleNamespace(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_block_size=8192
    )
    R, theta = 128, 500000.0

    def published(frequency: float) -> float:  # as in Llama 3.1's apply_scaling
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4.0:
            return frequency
        if wavelength > 8192 / 1.0:
            return frequency / 8.0
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        return (1 - smooth) * frequency / 8.0 + smooth * frequency

    want = [published(theta ** (-2 * i / R)) for i in range(R // 2)]
    cos, sin = rotary_tables(2, R, theta, scaling, device=device)
    assert_rounded_once(cos[1], [math.cos(f) for f in want])
    assert_rounded_once(sin[1], [math.sin(f) for f in want])


def test_tables_refuse():
    for bad, words in (
        ((4, 3, 100.0), "even and positive"),
        ((4, 0, 100.0), "even and positive"),
        ((-1, 4, 100.0), "T must be"),
        ((4, 4, 0.0), "theta more than 0"),
        ((4, 4, 1.0, SimpleNamespace(kind="yarn", factor=2.0)), "got 'yarn'"),
    ):
        with pytest.raises(ValueError, match=words):
            rotary_tables(*bad)

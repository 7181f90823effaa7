"""The rule itself: it must let correct rounding through and stop anything twice as bad as torch."""

import pytest
import torch

from tests.rule import LAYOUTS, RULE_DTYPES, assert_within_rule, check_by_rule, half_ulp, in_layout, poison, randn


@pytest.mark.parametrize("dtype", RULE_DTYPES)
def test_correct_rounding_passes_and_a_larger_error_fails(dtype: torch.dtype) -> None:
    exact = randn(1000)
    rounded = exact.to(dtype)
    assert_within_rule(rounded, rounded, exact, "rounding")
    assert ((rounded.double() - exact).abs() <= half_ulp(exact, dtype)).all()
    worse = rounded.clone()
    worst = exact.abs().argmax()
    worse[worst] *= 1 + 4 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match="largest error"):
        assert_within_rule(worse, rounded, exact, "one element")
    exact[0] = 1000.0  # so that the largest error of the others goes unnoticed
    rounded = exact.to(dtype)
    biased = torch.where(exact == 1000.0, rounded, (exact * (1 + 4 * torch.finfo(dtype).eps)).to(dtype))
    with pytest.raises(AssertionError, match="mean error"):
        assert_within_rule(biased, rounded, exact, "every element")


def test_non_finite_values_must_agree() -> None:
    exact = torch.tensor([1.0, float("nan"), float("inf")], dtype=torch.float64)
    good = exact.float()
    assert_within_rule(good, good, exact, "same")
    for bad in (
        [1.0, 1.0, float("inf")],
        [1.0, float("nan"), float("-inf")],
        [float("nan"), float("nan"), float("inf")],
    ):
        with pytest.raises(AssertionError):
            assert_within_rule(torch.tensor(bad), good, exact, "differs")


def test_half_ulp() -> None:
    x = torch.tensor([1.0, 1.5, 2.0, 0.0, 1e-310])
    assert half_ulp(x[:3], torch.bfloat16).tolist() == [2**-8, 2**-8, 2**-7]
    assert half_ulp(x[3:], torch.float16).tolist() == [2**-25, 2**-25]


def test_check_by_rule_sees_a_wrong_gradient() -> None:
    def wrong(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) + 0.01 * (x - x.detach())

    x = randn(64, 32, dtype=torch.float32)
    check_by_rule(torch.tanh, torch.tanh, [x], "tanh")
    with pytest.raises(AssertionError, match="gradient of input 0"):
        check_by_rule(wrong, torch.tanh, [x], "tanh")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    x = randn(4, 6, 8)
    y = in_layout(x, layout)
    assert torch.equal(y, x[:1].expand_as(x) if layout == "expanded" else x)
    assert y.is_contiguous() == (layout in ("contiguous", "offset"))
    assert (y.storage_offset() == 1) == (layout == "offset")


def test_poison() -> None:
    with poison():
        assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2, dtype=torch.bfloat16)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()

"""The comparison itself: it must fail where it should, and say where."""

import math

import numpy as np
import pytest
import torch

from polyrank.testing.tolerance import TOL, assert_close, tolerance

DTYPES = list(TOL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_bound_is_relative_to_the_largest_expected_value(dtype, size):
    expected = torch.tensor([1.0, -0.25, 1e-9], dtype=torch.float64) * size
    inside, outside = expected.clone(), expected.clone()
    inside[2] += 0.9 * TOL[dtype] * size
    outside[2] += 1.1 * TOL[dtype] * size
    assert_close(inside, expected, dtype=dtype)
    with pytest.raises(AssertionError, match=r"1 of 3 values differ; worst at \(2,\)"):
        assert_close(outside, expected, dtype=dtype)


def test_table_grows_with_the_rounding_of_the_dtype():
    assert TOL[torch.float64] < TOL[torch.float32] < TOL[torch.float16] < TOL[torch.bfloat16]
    for dtype, bound in TOL.items():
        assert bound >= torch.finfo(dtype).eps


def test_coarser_dtype_decides():
    expected = torch.ones(3, dtype=torch.float64)
    assert_close((expected + 5e-3).bfloat16(), expected)
    with pytest.raises(AssertionError):
        assert_close((expected + 5e-3).float(), expected)
    assert tolerance(torch.float64, torch.bfloat16, torch.int64) == TOL[torch.bfloat16]
    assert tolerance(torch.complex64) == TOL[torch.float32]
    assert tolerance(torch.int64, torch.bool) == 0.0


def test_worst_place_is_named_in_many_dimensions():
    expected = torch.ones(2, 3, 5)
    actual = expected.clone()
    actual[1, 2, 3] = 2.0
    actual[0, 0, 0] = 1.5
    with pytest.raises(AssertionError, match=r"2 of 30 .* worst at \(1, 2, 3\): got 2.0, expe"):
        assert_close(actual, expected)


def test_shapes_are_never_broadcast():
    with pytest.raises(AssertionError, match=r"shape: got \(3,\), expected \(1, 3\)"):
        assert_close(torch.ones(3), torch.ones(1, 3))


def test_zero_is_only_close_to_zero():
    assert_close(torch.zeros(3), torch.zeros(3))
    with pytest.raises(AssertionError):
        assert_close(torch.full((3,), 1e-30), torch.zeros(3))


def test_nan_is_never_close():
    nan = torch.tensor([1.0, math.nan])
    for actual, expected in [(nan, nan), (nan, torch.ones(2)), (torch.ones(2), nan)]:
        with pytest.raises(AssertionError, match=r"worst at \(1,\)"):
            assert_close(actual, expected)


def test_infinities_must_agree_in_place_and_sign():
    expected = torch.tensor([1.0, math.inf, -math.inf])
    assert_close(expected.clone(), expected)
    for wrong in (
        [1.0, math.inf, math.inf],
        [1.0, 5.0, -math.inf],
        [math.inf, math.inf, -math.inf],
    ):
        with pytest.raises(AssertionError, match="1 of 3"):
            assert_close(wrong, expected)
    with pytest.raises(AssertionError, match=r"worst at \(0,\)"):
        assert_close([1.1, math.inf, -math.inf], expected)


def test_integers_and_booleans_are_equal_or_not():
    assert_close(torch.tensor([1, 2]), torch.tensor([1, 2]))
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1_000_000]), torch.tensor([1_000_001]))
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([True]), torch.tensor([False]))


def test_numbers_lists_and_arrays_are_doubles():
    assert_close(0.1 + 0.2, 0.3)
    assert_close([0.1, 0.2], np.array([0.1, 0.2]))
    with pytest.raises(AssertionError):
        assert_close(0.3 + 1e-9, 0.3)
    assert_close(torch.tensor(0.3), 0.3)


def test_complex_values():
    assert_close(torch.tensor([1 + 1j]), torch.tensor([1 + 1.000001j]))
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1 + 1j]), torch.tensor([1 - 1j]))


def test_nothing_equals_nothing():
    assert_close(torch.ones(0, 3), torch.ones(0, 3))


def test_gradients_may_be_on():
    assert_close(torch.ones(2, requires_grad=True), torch.ones(2))


@pytest.mark.parametrize(
    "override", [{"tol": 0.1}, {"tol": 0.1, "reason": " "}, {"reason": "because"}], ids=str
)
def test_override_needs_tolerance_and_reason(override):
    with pytest.raises(ValueError, match="expected both or neither"):
        assert_close(torch.ones(2), torch.ones(2), **override)


def test_override_counts():
    assert_close(torch.ones(2) * 1.05, torch.ones(2), tol=0.1, reason="a test of the override")
    with pytest.raises(AssertionError, match="allowed 1e-01"):
        assert_close(torch.ones(2) * 1.2, torch.ones(2), tol=0.1, reason="a test of the override")


def test_dtype_without_a_row_is_refused():
    small = torch.ones(2).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="cast to one of them"):
        assert_close(small, small)

"""The grid of a sweep: values, ends, and the points beside it."""

import pytest

from polyrank.engine.sweep.grid import Grid
from polyrank.testing import assert_close


def between(low, high, per_decade=4, anchor=2e-4):
    return Grid.between(low, high, per_decade=per_decade, anchor=anchor)


def test_quarter_decades_around_the_anchor():
    grid = between(2e-5, 2e-3)
    expected = [
        2e-5,
        3.556558820077846e-05,
        6.324555320336759e-05,
        1.1246826503806981e-04,
        2e-4,
        3.556558820077846e-04,
        6.324555320336759e-04,
        1.1246826503806982e-03,
        2e-3,
    ]
    assert_close(grid.rates(), expected)
    assert grid.rate(0) == 2e-4
    assert list(grid.indices()) == list(range(-4, 5))


def test_the_published_range_has_the_published_points():
    # 2·10^{i/4} from 2e-6 to 6e-3, arXiv 2602.04998.
    rates = between(2e-6, 6e-3).rates()
    assert len(rates) == 14
    assert_close([rates[0], rates[-1]], [2e-6, 2 * 10 ** (-4 + 5 / 4)])


@pytest.mark.parametrize("per_decade", range(2, 9))
def test_ends_of_whole_decades_belong_to_the_range(per_decade):
    grid = between(2e-7, 2e-1, per_decade)
    assert len(grid.rates()) == 6 * per_decade + 1
    assert_close([grid.rates()[0], grid.rates()[-1]], [2e-7, 2e-1])
    steps = [b / a for a, b in zip(grid.rates(), grid.rates()[1:], strict=False)]
    assert_close(steps, [10 ** (1 / per_decade)] * len(steps))


@pytest.mark.parametrize(("low", "high"), [(1e-5, 2e-3), (3e-4, 3.5e-4), (7e-9, 5e-1)])
def test_all_points_inside_and_none_outside(low, high):
    grid = between(low, high)
    inside = [i for i in range(-60, 61) if low <= 2e-4 * 10 ** (i / 4) <= high]
    assert list(grid.indices()) == inside


def test_more_points_continue_the_same_grid():
    grid = between(2e-4, 2e-3)
    assert list(grid.indices(1, 2)) == list(range(-1, 7))
    assert_close(grid.rate(-1) * 10 ** (1 / 4), grid.rate(0))


@pytest.mark.parametrize("per_decade", [2, 3, 4, 7])
def test_a_point_of_the_grid_as_both_ends_is_that_point(per_decade):
    grid = between(2e-4, 2e-4, per_decade)
    for index in range(-30, 31):
        rate = grid.rate(index)
        assert list(between(rate, rate, per_decade).indices()) == [index]

"""How many updates a run takes to a loss, against curves worked out by hand."""

import math

import pytest

from polyrank.engine.sweep.pace import curve_of, level_of, reached
from polyrank.testing import assert_close

# Noted every 5 updates; means of three: 7, 6, 5, 4 at 15, 20, 25, 30.
FALLING = ((5, 8.0), (10, 7.0), (15, 6.0), (20, 5.0), (25, 4.0), (30, 3.0))


def test_the_level_is_the_mean_of_three_entries_at_half_of_the_updates():
    assert_close(level_of([FALLING]), 7.0)
    # Half of 40 updates is at 20.
    longer = (*FALLING, (35, 2.0), (40, 1.0))
    assert_close(level_of([longer]), 6.0)
    assert_close(level_of([FALLING, longer]), 6.5)


def test_a_curve_is_at_a_level_when_the_mean_of_three_entries_is():
    assert reached(FALLING, 7.0) == 15
    assert reached(FALLING, 6.9) == 20
    assert reached(FALLING, 4.0) == 30
    assert reached(FALLING, 3.9) is None
    # One lucky batch is not yet the level.
    assert reached(((5, 8.0), (10, 1.0), (15, 8.0), (20, 8.0)), 5.0) is None


@pytest.mark.parametrize("short", [(), FALLING[:2]], ids=["none", "two"])
def test_a_curve_of_fewer_entries_says_nothing(short):
    assert reached(short, 100.0) is None
    assert level_of([FALLING, short]) is None
    assert level_of([]) is None


def test_a_loss_that_was_not_finite_is_above_every_level():
    curve = curve_of({"loss": [3.0, None, 1.0, 1.0, 1.0], "loss_at": [2, 4, 6, 8, 10]})
    assert curve[1] == (4, math.inf)
    assert reached(curve, 1.0) == 10
    assert level_of([curve]) is None


def test_lines_that_do_not_say_when_have_no_curve():
    assert curve_of({"loss": [3.0, 2.0]}) == ()
    assert curve_of({}) == ()

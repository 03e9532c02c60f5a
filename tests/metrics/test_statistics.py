"""Means, deviations, paired differences and plateaus by hand."""

import math
import random

import numpy as np
import pytest

from polyrank.errors import ConfigError
from polyrank.metrics import statistics

NAN = math.nan
EXACT = 1e-12


def near(value):
    return pytest.approx(value, rel=0, abs=EXACT, nan_ok=True)


def test_mean_deviation_and_error_by_hand():
    # Squares of the distances to 5: 9 + 1 + 1 + 1 + 0 + 0 + 4 + 16 = 32, over 7.
    values = [2, 4, 4, 4, 5, 5, 7, 9]
    assert statistics.mean(values) == 5
    assert statistics.sample_deviation(values) == near(math.sqrt(32 / 7))
    assert statistics.standard_error(values) == near(math.sqrt(32 / 7 / 8))


def test_the_deviation_divides_by_one_less():
    values = np.random.default_rng(0).random(9)
    assert statistics.sample_deviation(values) == near(np.std(values, ddof=1))


@pytest.mark.parametrize(("values", "middle"), [([], NAN), ([0.5], 0.5), ([NAN, 0.5, None], 0.5)])
def test_one_seed_has_no_deviation(values, middle):
    assert statistics.mean(values) == near(middle)
    assert math.isnan(statistics.sample_deviation(values))
    assert math.isnan(statistics.standard_error(values))


def test_what_was_not_measured_is_left_out():
    assert statistics.mean([1, NAN, 3, None]) == 2
    assert statistics.sample_deviation([1, NAN, 3]) == near(math.sqrt(2))


@pytest.mark.parametrize("value", [11.8, 0.1, 1 / 3, -0.7])
def test_equal_values_do_not_deviate(value):
    for count in range(2, 12):
        assert statistics.mean([value] * count) == value
        assert statistics.sample_deviation([value] * count) == 0


def test_the_order_of_seeds_changes_no_digit():
    values = [random.Random(n).uniform(-1, 1) * 10**n for n in range(12)]
    found = {
        (statistics.mean(order), statistics.sample_deviation(order))
        for order in (values, values[::-1], sorted(values), values[5:] + values[:5])
    }
    assert len(found) == 1


def test_differences_are_paired_by_seed():
    # The seed moves both by far more than they differ: 0.1, 0.2, 0.3.
    own = {0: 0.9, 1: 0.5, 2: 0.6, 7: 0.0}
    base = {2: 0.3, 1: 0.3, 0: 0.8, 9: 1.0}
    found = statistics.paired_difference(own, base)
    assert found.mean == near(0.2)
    assert found.error == near(0.1 / math.sqrt(3))
    assert found.count == 3
    assert found.marked
    mirrored = statistics.paired_difference(base, own)
    assert (mirrored.mean, mirrored.error) == near((-found.mean, found.error))
    assert mirrored.marked


@pytest.mark.parametrize(
    ("gaps", "marked"),
    [
        ([0.125, 0.5], False),
        ([0.25, 0.5], True),
        ([0.125, 0.375], False),
        ([0.25, 0.26], True),
        ([-0.25, -0.26], True),
        ([0.3], False),
        ([], False),
        ([0.0, 0.0], False),
        ([0.25, 0.25], True),
    ],
    ids=str,
)
def test_only_more_than_two_errors_are_marked(gaps, marked):
    own = dict(enumerate(gaps))
    found = statistics.paired_difference(own, dict.fromkeys(own, 0.0))
    assert found.marked is marked
    assert found.count == len(gaps)


def test_exactly_two_errors_are_not_marked():
    # Differences 1 and 3: mean 2, sd sqrt(2), SE 1.
    found = statistics.paired_difference({0: 1.0, 1: 3.0}, {0: 0.0, 1: 0.0})
    assert (found.mean, found.error) == near((2.0, 1.0))
    assert statistics.Difference(mean=2.0, error=1.0, count=2).marked is False
    assert statistics.Difference(mean=2.0 + 1e-9, error=1.0, count=2).marked is True


def test_a_seed_that_one_side_did_not_measure_is_no_pair():
    found = statistics.paired_difference({0: 0.5, 1: NAN, 2: 0.75}, {0: 0.25, 1: 0.1, 2: None})
    assert (found.mean, found.count) == (0.25, 1)
    assert math.isnan(found.error)
    none = statistics.paired_difference({0: 0.5}, {1: 0.5})
    assert math.isnan(none.mean)
    assert not none.marked


def test_the_plateau_is_the_factor_of_rates_that_are_nearly_best():
    rates = [1e-4, 2e-4, 4e-4, 8e-4]
    scores = [0.70, 0.795, 0.80, 0.791]
    assert statistics.plateau(rates, scores) == near(4)
    assert statistics.plateau(rates, scores, within=0) == 1
    assert statistics.plateau(rates, scores, within=0.2) == near(8)
    order = [2, 0, 3, 1]
    swapped = statistics.plateau([rates[i] for i in order], [scores[i] for i in order])
    assert swapped == near(4)


def test_diverged_rates_belong_to_no_plateau():
    assert statistics.plateau([1, 2, 4], [NAN, 0.5, 0.5]) == 2
    assert math.isnan(statistics.plateau([1, 2], [NAN, NAN]))


def test_all_faults_of_a_plateau_at_once():
    with pytest.raises(ConfigError) as caught:
        statistics.plateau([1e-3, 0], [0.5], within=-1)
    text = caught.value.problems
    assert len(text) == 3
    assert "got 1, expected 2" in text[0]
    assert "got 0, expected finite numbers above 0" in text[1]
    assert "within: got -1" in text[2]

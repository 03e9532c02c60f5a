"""Global and local forgetting, plasticity, unlearning; the summary of every shape and range."""

import logging
import math

import numpy as np
import pytest

from polyrank import metrics
from polyrank.errors import ConfigError

EXACT = 1e-12
NAN = math.nan

ONE = [[0.75]]
TWO = [[0.9, NAN], [0.6, 0.8]]
RAGGED = [[0.90], [0.95, 0.60], [0.50, 0.40, 0.80]]


def near(value):
    return pytest.approx(value, rel=0, abs=EXACT, nan_ok=True)


def test_global_forgetting_by_hand():
    # After task 2: 2/6 · (0.9 − 0.95); after task 3: 2/10 · (0.9 − 0.5) + 4/10 · (0.6 − 0.4).
    expected = (2 / 6 * -0.05 + 0.2 * 0.4 + 0.4 * 0.2) / 2
    assert metrics.global_forgetting(RAGGED, [2, 4, 4]) == near(expected)
    assert metrics.global_forgetting(RAGGED, [2, 4, 4], k=2) == near(2 / 6 * -0.05)
    assert metrics.global_forgetting(TWO, [1, 3]) == near(0.3 / 4)
    assert math.isnan(metrics.global_forgetting(ONE, [2]))


@pytest.mark.parametrize("seed", range(5))
def test_equally_many_classes_weigh_each_pair_alike(seed):
    a = np.random.default_rng(seed).random((5, 5))
    pairs = [(a[n, n] - a[i, n]) / (i + 1) for i in range(1, 5) for n in range(i)]
    assert metrics.global_forgetting(a, [7] * 5) == near(sum(pairs) / 4)
    # Only shares count, and nothing above the diagonal.
    assert metrics.global_forgetting(np.tril(a), [1] * 5) == near(sum(pairs) / 4)


def test_local_forgetting_by_hand():
    assert metrics.local_forgetting(RAGGED) == near((-0.4 - 0.2) / 2)
    assert metrics.local_forgetting(TWO) == near(-0.3)
    assert math.isnan(metrics.local_forgetting(ONE))


@pytest.mark.parametrize("seed", range(5))
def test_plasticity_and_backward_transfer_add_up_to_the_average(seed):
    a = np.random.default_rng(seed).random((6, 6))
    for k in range(2, 7):
        sum_of_both = metrics.plasticity(a, k) + (k - 1) / k * metrics.backward_transfer(a, k)
        assert metrics.average_accuracy(a, k) == near(sum_of_both)
    assert metrics.plasticity(ONE) == 0.75
    assert metrics.plasticity(RAGGED) == near(2.3 / 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.global_forgetting(TWO, [2]), "classes: got 1 values, expected 2.*number"),
        (lambda: metrics.global_forgetting(TWO, [2, 0]), "classes: got 0 for task 1.*leave `cla"),
        (lambda: metrics.global_forgetting([[0.9], [NAN, 0.8]], [1, 1]), "row 1, column 0"),
        (lambda: metrics.local_forgetting([[NAN], [0.5, 0.8]]), "row 0, column 0"),
        (lambda: metrics.plasticity([[0.9], [0.5, NAN]]), "plasticity: got NaN at row 1, column 1"),
        (lambda: metrics.summary(TWO, [1, 1], restricted=ONE), "restricted: got 1 rows, expected"),
        (lambda: metrics.summary(TWO, [1, 1], classes=[1]), "classes: got 1 values"),
    ],
)
def test_malformed_input_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_summary_of_one_task():
    found = metrics.summary(ONE, [7], classes=[2], restricted=[[1.0]], untrained=[0.1], joint=[1])
    assert found == near(
        {
            "average_accuracy": 0.75,
            "average_incremental_accuracy": 0.75,
            "forgetting": NAN,
            "backward_transfer": NAN,
            "plasticity": 0.75,
            "weighted_average_accuracy": 0.75,
            "weighted_average_incremental_accuracy": 0.75,
            "intransigence": 0.25,
            "forward_transfer_gem": NAN,
            "global_forgetting": NAN,
            "local_forgetting": NAN,
        }
    )


def test_summary_of_two_tasks():
    found = metrics.summary(
        TWO,
        [10, 30],
        joint=[NAN, 0.85],
        single=[NAN, 0.9],
        classes=[1, 3],
        restricted=[[1.0, NAN], [0.9, 1.0]],
    )
    assert found == near(
        {
            "average_accuracy": 0.7,
            "average_incremental_accuracy": 0.8,
            "forgetting": 0.3,
            "backward_transfer": -0.3,
            "plasticity": 0.85,
            "weighted_average_accuracy": 0.75,
            "weighted_average_incremental_accuracy": 0.825,
            "intransigence": 0.05,
            "forward_transfer": -0.1,
            "global_forgetting": 0.075,
            "local_forgetting": -0.1,
        }
    )


def test_summary_of_a_matrix_with_gaps():
    # Task 1 was not looked at after task 2: what asks for that has no value, the rest has.
    gap = [[0.9, NAN, NAN], [NAN, 0.6, NAN], [0.5, 0.4, 0.8]]
    found = metrics.summary(gap, [1, 1, 2], classes=[2, 2, 2], restricted=gap, missing="nan")
    assert found == near(
        {
            "average_accuracy": 1.7 / 3,
            "average_incremental_accuracy": NAN,
            "forgetting": NAN,
            "backward_transfer": -0.3,
            "plasticity": 2.3 / 3,
            "weighted_average_accuracy": 0.625,
            "weighted_average_incremental_accuracy": NAN,
            "global_forgetting": NAN,
            "local_forgetting": -0.3,
        }
    )
    with pytest.raises(ConfigError, match="average_incremental_accuracy: got NaN at row 1, col"):
        metrics.summary(gap, [1, 1, 2])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_summary_of_a_matrix_without_meaning(size):
    empty = np.full((size, size), NAN)
    found = metrics.summary(
        empty,
        [5] * size,
        joint=[NAN] * size,
        classes=[1] * size,
        restricted=empty,
        missing="nan",
    )
    assert len(found) == 10
    assert all(math.isnan(value) for value in found.values())
    own = metrics.summary(np.eye(size), [5] * size, restricted=empty, missing="nan")
    assert math.isnan(own["local_forgetting"])
    assert own["average_accuracy"] == near(1 / size)


LOSSES = [[-2.0, NAN], [-5.0, -1.0]]


@pytest.mark.parametrize("limits", [metrics.RANGES["negative_loss"], (-6, 0), (-math.inf, 1)])
def test_losses_by_hand(limits):
    found = metrics.summary(LOSSES, [1, 3], limits=limits, joint=[NAN, -0.5], classes=[1, 1])
    assert found == near(
        {
            "average_accuracy": -3.0,
            "average_incremental_accuracy": -2.5,
            "forgetting": 3.0,
            "backward_transfer": -3.0,
            "plasticity": -1.5,
            "weighted_average_accuracy": -2.0,
            "weighted_average_incremental_accuracy": -2.0,
            "intransigence": 0.5,
            "global_forgetting": 1.5,
        }
    )
    assert metrics.forgetting_mammoth(LOSSES, limits=limits) == near(3)


def test_correlations_by_hand():
    signed = metrics.RANGES["matthews"]
    assert metrics.average_accuracy([[-1.0, NAN], [-0.5, 1.0]], limits=signed) == 0.25
    # What was never measured is the worst score, not 0, which would be better than −0.5.
    assert metrics.forgetting_mammoth([[0.5], [0.25, -0.5], [0, -0.75, 0.5]], limits=signed) == (
        near((0.5 + 0.25) / 2)
    )
    pilot = metrics.forgetting_pilot([[0.5], [0.25, -0.5], [0, -0.75, 0.5]], limits=signed)
    assert pilot == near((0.5 + 0.25) / 2)


@pytest.mark.parametrize(
    ("matrix", "limits", "message"),
    [
        ([[0.5]], (-math.inf, 0), "matrix: got 0.5 at row 0, column 0, expected -inf..0; pass lim"),
        ([[-math.inf]], (-math.inf, 0), "got -inf at row 0.*the model diverged"),
        ([[math.inf]], (0, math.inf), "got inf at row 0"),
        ([[1.5]], (-1, 1), "got 1.5 .*expected -1..1"),
    ],
)
def test_scores_beyond_their_range_are_refused(matrix, limits, message):
    with pytest.raises(ConfigError, match=message):
        metrics.average_accuracy(matrix, limits=limits)
    with pytest.raises(ConfigError, match=message):
        metrics.summary(matrix, [1], missing="nan", limits=limits)


@pytest.mark.parametrize(
    "call",
    [
        lambda limits: metrics.forgetting_pilot(LOSSES, limits=limits),
        lambda limits: metrics.average_accuracy_pilot(LOSSES, [1, 1], limits=limits),
    ],
    ids=["forgetting", "average"],
)
def test_percent_of_an_open_range_is_refused(call):
    with pytest.raises(ConfigError, match="expected a finite range, of which LAMDA-PILOT"):
        call((-math.inf, 0))
    assert math.isfinite(call((-10, 0)))


def test_unlearning_is_the_harmonic_mean_of_drop_and_rest(caplog):
    assert metrics.unlearning_score(0.75, 0.25, 0.5) == near(0.5)
    assert metrics.unlearning_score(80, 20, 90, limits=(0, 100)) == near(72)
    # Symmetric in both, at most twice the smaller one.
    assert metrics.unlearning_score(0.9, 0.6, 0.8) == near(metrics.unlearning_score(0.8, 0, 0.3))
    assert metrics.unlearning_score(0.9, 0.8, 1.0) <= 0.2 + EXACT
    assert metrics.unlearning_score(0.5, 0.5, 1.0) == 0
    assert metrics.unlearning_score(0.5, 0.0, 0.0) == 0
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert metrics.unlearning_score(0.5, 0.75, 0.9) == 0
    assert "rose by 0.25" in caplog.text
    with pytest.raises(ConfigError) as caught:
        metrics.unlearning_score(75, NAN, 0.5)
    assert len(caught.value.problems) == 2
    assert "before: got 75, expected 0..1; pass limits=(0, 100)" in caught.value.problems[0]

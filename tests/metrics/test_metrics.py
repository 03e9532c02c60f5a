"""Metrics on the accuracy matrix: hand-computed values, invariances, refusals, other libraries."""

import math
import subprocess
import sys

import numpy as np
import pytest

from polyrank import metrics
from polyrank.errors import ConfigError

# Float64 sums of a handful of fractions; the definitions are exact.
EXACT = 1e-12
NAN = math.nan

TWO = [[0.9, NAN], [0.6, 0.8]]
# Column 0 peaks in the middle, column 1 had a lucky zero-shot score, all entries measured.
THREE = [[0.90, 0.70, 0.10], [0.95, 0.60, 0.20], [0.50, 0.40, 0.80]]
RAGGED = [[0.90], [0.95, 0.60], [0.50, 0.40, 0.80]]
# Accuracies only rise: training later tasks helps earlier ones.
RISING = [[0.50], [0.60, 0.60], [0.66, 0.66, 0.70], [0.73, 0.71, 0.75, 0.80]]
MATRIX_ONLY = [
    metrics.average_accuracy,
    metrics.average_incremental_accuracy,
    metrics.forgetting,
    metrics.backward_transfer,
    metrics.plasticity,
    metrics.forgetting_mammoth,
    metrics.forgetting_avalanche,
    metrics.forgetting_pilot,
    metrics.backward_transfer_avalanche,
]


def near(value):
    return pytest.approx(value, rel=0, abs=EXACT, nan_ok=True)


def random_matrix(seed, size=5):
    return np.random.default_rng(seed).random((size, size))


@pytest.mark.parametrize("matrix", [THREE, RAGGED], ids=["full", "ragged"])
def test_three_tasks_by_hand(matrix):
    assert metrics.average_accuracy(matrix) == near((0.50 + 0.40 + 0.80) / 3)
    assert metrics.average_accuracy(matrix, 2) == near(0.775)
    assert metrics.average_accuracy_curve(matrix) == near([0.9, 0.775, 1.7 / 3])
    assert metrics.average_incremental_accuracy(matrix) == near((0.9 + 0.775 + 1.7 / 3) / 3)
    assert metrics.forgetting_by_task(matrix) == near([0.45, 0.20])
    assert metrics.forgetting(matrix) == near(0.325)
    assert metrics.forgetting(matrix, 2) == near(-0.05)
    assert metrics.backward_transfer(matrix) == near((-0.40 - 0.20) / 2)


def test_zero_shot_counts_only_on_request():
    # Task 1 had 0.70 before it was learnt: max 0.70 instead of 0.60.
    assert metrics.forgetting(THREE, seen_only=False) == near((0.45 + 0.30) / 2)
    assert metrics.forgetting_all(THREE) == metrics.forgetting(THREE, seen_only=False)


def test_two_tasks_by_hand():
    assert metrics.average_accuracy(TWO) == near(0.7)
    assert metrics.average_incremental_accuracy(TWO) == near(0.8)
    assert metrics.forgetting(TWO) == near(0.3)
    assert metrics.backward_transfer(TWO) == near(-0.3)
    assert metrics.forward_transfer(TWO, [NAN, 0.85]) == near(-0.05)
    assert metrics.forward_transfer_gem([[0.9, 0.3], [0.6, 0.8]], [0.1, 0.1]) == near(0.2)


def test_one_task():
    one = [[0.75]]
    assert metrics.average_accuracy(one) == metrics.average_incremental_accuracy(one) == 0.75
    assert metrics.weighted_average_accuracy(one, [7]) == 0.75
    for value in (
        metrics.forgetting(one),
        metrics.forgetting_all(one),
        metrics.backward_transfer(one),
        metrics.forward_transfer(one, [NAN]),
        metrics.forward_transfer_gem(one, [NAN]),
        metrics.forgetting_mammoth(one),
        metrics.forgetting_pilot(one),
    ):
        assert math.isnan(value)
    assert metrics.forgetting_by_task(one).shape == (0,)
    assert metrics.intransigence(one, [0.8]) == near(0.05)


def test_k_looks_at_the_first_tasks_only():
    full = random_matrix(0)
    for k in range(1, 5):
        for metric in MATRIX_ONLY:
            assert metric(full, k) == near(metric(full[:k, :k]))


def test_intransigence_and_forward_transfer_by_hand():
    assert metrics.intransigence(THREE, [NAN, NAN, 0.85]) == near(0.05)
    assert metrics.intransigence(THREE, [0.95, 0.5, NAN], k=2) == near(-0.1)
    assert metrics.forward_transfer(THREE, [NAN, 0.55, 0.85]) == near((0.05 - 0.05) / 2)
    assert metrics.forward_transfer_gem(THREE, [NAN, 0.1, 0.1]) == near((0.6 + 0.1) / 2)


def test_weighted_average_is_accuracy_over_all_samples():
    counts = [10, 30, 60]
    right = 10 * 0.5 + 30 * 0.4 + 60 * 0.8
    assert metrics.weighted_average_accuracy(THREE, counts) == near(right / 100)
    curve = [0.9, (9.5 + 18) / 40, right / 100]
    assert metrics.weighted_average_incremental_accuracy(THREE, counts) == near(sum(curve) / 3)


@pytest.mark.parametrize("seed", range(5))
def test_equal_counts_give_the_plain_average(seed):
    a, counts = random_matrix(seed), [17] * 5
    assert metrics.weighted_average_accuracy(a, counts) == near(metrics.average_accuracy(a))
    plain = metrics.average_incremental_accuracy(a)
    assert metrics.weighted_average_incremental_accuracy(a, counts) == near(plain)
    assert metrics.average_accuracy_curve(a).mean() == near(plain)


def test_constant_matrix():
    c = np.full((4, 4), 0.37)
    assert metrics.average_accuracy(c) == near(0.37)
    assert metrics.average_incremental_accuracy(c) == near(0.37)
    assert metrics.forgetting(c) == metrics.backward_transfer(c) == 0


@pytest.mark.parametrize("seed", range(5))
def test_adding_a_constant_shifts_averages_only(seed):
    a = random_matrix(seed) / 2
    for metric in (metrics.average_accuracy, metrics.average_incremental_accuracy):
        assert metric(a + 0.25) == near(metric(a) + 0.25)
    for metric in (metrics.forgetting, metrics.forgetting_all, metrics.backward_transfer):
        assert metric(a + 0.25) == near(metric(a))


@pytest.mark.parametrize("seed", range(20))
def test_forgetting_bounds(seed):
    a = random_matrix(seed)
    assert metrics.forgetting(a) >= -metrics.backward_transfer(a) - EXACT
    assert metrics.forgetting_all(a) >= metrics.forgetting(a) - EXACT
    falling = np.sort(a, axis=0)[::-1]
    assert metrics.forgetting(falling) == near(-metrics.backward_transfer(falling))


def test_order_of_tasks_matters():
    a = np.array(THREE)
    order = [0, 2, 1]
    swapped = a[np.ix_(order, order)]
    assert abs(metrics.forgetting(a) - metrics.forgetting(swapped)) > 0.02
    assert abs(metrics.backward_transfer(a) - metrics.backward_transfer(swapped)) > 0.02


def test_each_metric_reads_only_its_region():
    size = 5
    row, column = np.indices((size, size))
    base = random_matrix(3)
    reference = [0.5] * size
    readers = {
        "above": (row + 1 == column, lambda m: metrics.forward_transfer_gem(m, reference)),
        "diagonal": (row == column, lambda m: metrics.forward_transfer(m, reference)),
        "last and diagonal": ((row == column) | (row == size - 1), metrics.backward_transfer),
        "lower": (row >= column, metrics.forgetting),
        "last": (row == size - 1, metrics.average_accuracy),
        "newest": (
            (row == size - 1) & (row == column),
            lambda m: metrics.intransigence(m, reference),
        ),
    }
    for region, metric in readers.values():
        blind = np.where(region, base, NAN)
        assert metric(blind) == metric(base)
        assert metric(np.where(region, base * 0.5, base)) != near(metric(base))


def test_inputs_stay_as_they_are():
    ragged = [list(row) for row in RAGGED]
    array = np.array(THREE, dtype=np.float32)
    before = array.copy()
    array.setflags(write=False)
    for metric in MATRIX_ONLY:
        metric(ragged)
        metric(array)
    metrics.summary(array, [1, 2, 3], joint=[1, 1, 1], single=[1, 1, 1], untrained=[0, 0, 0])
    assert ragged == RAGGED
    assert (array == before).all()


def test_lists_arrays_and_tensors_give_float64():
    torch = pytest.importorskip("torch")
    exact = [[0.5, 0.25], [0.75, 0.125]]
    inputs = [
        exact,
        tuple(map(tuple, exact)),
        np.array(exact, dtype=np.float16),
        torch.tensor(exact, requires_grad=True),
        torch.tensor(exact, dtype=torch.bfloat16),
    ]
    for matrix in inputs:
        assert metrics.average_accuracy_curve(matrix).dtype == np.float64
        for metric in MATRIX_ONLY:
            value = metric(matrix)
            assert type(value) is float
            assert value == metric(exact)


def test_none_counts_as_not_measured():
    assert metrics.average_accuracy([[0.5, None], [0.5, 1.0]]) == 0.75


@pytest.mark.parametrize(
    ("metric", "cell"),
    [
        (metrics.average_accuracy, (2, 1)),
        (metrics.average_incremental_accuracy, (1, 0)),
        (metrics.weighted_average_accuracy, (2, 1)),
        (metrics.weighted_average_incremental_accuracy, (1, 0)),
        (metrics.forgetting, (1, 0)),
        (metrics.forgetting_all, (0, 1)),
        (metrics.backward_transfer, (1, 1)),
        (metrics.forgetting_mammoth, (1, 0)),
        (metrics.forgetting_pilot, (2, 0)),
        (metrics.forgetting_avalanche, (0, 0)),
        (metrics.average_accuracy_pilot, (1, 1)),
        (metrics.forward_transfer, (1, 1)),
        (metrics.forward_transfer_gem, (0, 1)),
        (metrics.forward_transfer_avalanche, (1, 2)),
        (metrics.intransigence, (2, 2)),
    ],
    ids=lambda value: getattr(value, "__name__", None) or f"row{value[0]}-column{value[1]}",
)
def test_a_gap_in_the_needed_region_is_an_error(metric, cell):
    a = np.array(THREE)
    a[cell] = NAN
    needs_array = "weighted" in metric.__name__ or metric.__name__ in {
        "average_accuracy_pilot",
        "forward_transfer",
        "forward_transfer_gem",
        "forward_transfer_avalanche",
        "intransigence",
    }
    with pytest.raises(ConfigError, match=f"row {cell[0]}, column {cell[1]}, expected a measured"):
        metric(a, [1, 1, 1]) if needs_array else metric(a)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.forward_transfer(TWO, [0.1, NAN]), "task 1.*fresh model on each task"),
        (lambda: metrics.forward_transfer(TWO, [0.1]), "single: got 1 values, expected 2"),
        (lambda: metrics.forward_transfer_gem(THREE, [0.1] * 4), "untrained: got 4 values"),
        (lambda: metrics.intransigence(TWO, [0.1, NAN]), "task 1.*joint reference"),
        (lambda: metrics.intransigence(TWO, [0.1, 1.5]), "joint: got 1.5 at task 1.*divide by 100"),
        (lambda: metrics.average_accuracy([]), "no rows"),
        (lambda: metrics.average_accuracy(0.5), "got float, expected a list"),
        (lambda: metrics.average_accuracy("abc"), "got str, expected a list"),
        (lambda: metrics.average_accuracy([[0.1, 0.2, 0.3]] * 2), "2 rows and 3 columns"),
        (lambda: metrics.average_accuracy(np.zeros((2, 2, 2))), "2 dimensions, expected one"),
        (lambda: metrics.average_accuracy([["a"]]), "row 0: could not convert"),
        (lambda: metrics.average_accuracy([[87.5]]), "87.5 at row 0, column 0.*percent: divide"),
        (lambda: metrics.average_accuracy([[-0.1]]), r"-0.1 at row 0.*pass limits"),
        (lambda: metrics.average_accuracy([[math.inf]]), "got inf"),
        (lambda: metrics.average_accuracy([[0.5]], limits=(1, 0)), r"low < high; swap"),
        (lambda: metrics.average_accuracy(TWO, 3), r"k: got 3, expected a whole number 1..2"),
        (lambda: metrics.average_accuracy(TWO, 0), "k: got 0"),
        (lambda: metrics.average_accuracy(TWO, 1.0), "k: got 1.0"),
        (lambda: metrics.average_accuracy(TWO, True), "k: got True"),
        (lambda: metrics.weighted_average_accuracy(TWO, [5, 0]), "got 0 for task 1.*above 0"),
        (lambda: metrics.weighted_average_accuracy(TWO, [5]), "counts: got 1 values"),
        (lambda: metrics.summary(TWO, [5, NAN]), "got nan for task 1"),
        (lambda: metrics.summary(TWO, [5, 5], missing="skip"), "missing: got 'skip'"),
        (lambda: metrics.summary([[0.5, 2], [0, 0]], [5, 5], missing="nan"), "divide by 100"),
    ],
)
def test_malformed_input_is_refused_with_the_remedy(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_percent_and_other_scores_by_declared_limits():
    percent = np.array(THREE) * 100
    assert metrics.forgetting(percent, limits=(0, 100)) == pytest.approx(32.5, abs=1e-10)
    assert metrics.average_accuracy([[-3.0]], limits=(-5, 5)) == -3.0


def test_rising_accuracies_under_four_definitions_of_forgetting():
    assert metrics.forgetting(RISING) == near(-0.17 / 3)
    assert metrics.forgetting_avalanche(RISING) == near(-0.13)
    # Their maximum includes the final row, so a rise is clipped at 0.
    assert metrics.forgetting_mammoth(RISING) == metrics.forgetting_pilot(RISING) == 0


def test_mammoth_depends_on_recorded_zero_shot_scores():
    recorded = [[0.9, 0.75], [0.85, 0.55, 0.1], [0.80, 0.50, 0.95]]
    assert metrics.forgetting_mammoth(recorded) == near(0.175)
    assert metrics.forgetting_mammoth([row[: i + 1] for i, row in enumerate(recorded)]) == near(
        0.075
    )
    assert metrics.forgetting(recorded) == near(0.075)


def test_numbers_of_the_released_functions():
    # Made by running Mammoth's utils/metrics.forgetting and the forgetting lines of LAMDA-PILOT's
    # trainer.py (which reports percent: 9.71) on this matrix; no random draws.
    a = [[37 / 41], [35 / 41, 50 / 53], [36 / 41, 41 / 53, 29 / 31]]
    assert metrics.forgetting_mammoth(a) == near(0.097100782328578)
    assert metrics.forgetting_pilot(a) == near(0.0971)


def test_pilot_average_is_the_rounded_sample_weighted_curve():
    a, counts = [[37 / 41], [35 / 41, 50 / 53]], [41, 53]
    # 37/41 = 90.24 %, 85/94 = 90.43 %
    assert metrics.average_accuracy_pilot(a, counts) == near((0.9024 + 0.9043) / 2)


def test_avalanche_after_one_task_and_ahead_by_one():
    assert metrics.forgetting_avalanche([[0.5]]) == 0
    assert metrics.backward_transfer_avalanche([[0.5]]) == 0
    assert metrics.forward_transfer_avalanche([[0.5]], [0.1]) == 0
    untrained = [0.1, 0.2, 0.05]
    ahead = metrics.forward_transfer_avalanche(THREE, untrained, k=1)
    assert ahead == metrics.forward_transfer_gem(THREE, untrained, k=2) == near(0.5)
    last = metrics.forward_transfer_avalanche(THREE, untrained)
    assert last == metrics.forward_transfer_gem(THREE, untrained)


def test_summary_holds_every_metric_its_inputs_allow():
    plain = metrics.summary(RAGGED, [10, 30, 60])
    assert plain == near(
        {
            "average_accuracy": metrics.average_accuracy(RAGGED),
            "average_incremental_accuracy": metrics.average_incremental_accuracy(RAGGED),
            "forgetting": 0.325,
            "backward_transfer": -0.3,
            "plasticity": 2.3 / 3,
            "weighted_average_accuracy": 0.65,
            "weighted_average_incremental_accuracy": (0.9 + 27.5 / 40 + 0.65) / 3,
        }
    )
    full = metrics.summary(THREE, [1, 1, 1], joint=[1] * 3, single=[1] * 3, untrained=[0] * 3)
    assert set(full) - set(plain) == {"intransigence", "forward_transfer", "forward_transfer_gem"}
    assert full["intransigence"] == near(0.2)
    assert metrics.summary(RAGGED, [10, 30, 60], k=1)["average_accuracy"] == 0.9


def test_summary_of_a_reference_with_only_its_last_row():
    joint = [[NAN, NAN], [0.9, 0.7]]
    with pytest.raises(ConfigError, match="average_incremental_accuracy: got NaN"):
        metrics.summary(joint, [10, 30])
    some = metrics.summary(joint, [10, 30], missing="nan")
    assert some["average_accuracy"] == near(0.8)
    assert some["weighted_average_accuracy"] == near(0.75)
    assert math.isnan(some["forgetting"])
    assert math.isnan(some["average_incremental_accuracy"])


def test_every_metric_has_its_own_printed_definition():
    printed = metrics.definitions()
    functions = set(metrics.__all__) - {"definitions", "summary", "score", "RANGES"}
    assert set(printed) == functions
    for name, formula in printed.items():
        assert formula
        assert formula in getattr(metrics, name).__doc__
    assert printed["average_accuracy"] == "AA_k = (1/k) Σ_{j≤k} a_{k,j}"
    # Two names never print the same formula.
    assert len(set(printed.values())) == len(printed)


def test_load_entropy_by_hand():
    assert metrics.load_entropy([3, 3, 3]) == near(1)
    assert metrics.load_entropy([0.25] * 7) == near(1)
    assert metrics.load_entropy([0, 9, 0, 0]) == 0
    # Two of four ranks alike: ln 2 / ln 4.
    assert metrics.load_entropy([5, 0, 5, 0]) == near(0.5)
    assert metrics.load_entropy(np.array([1, 3])) == near(
        -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    )
    assert math.isnan(metrics.load_entropy([4]))
    assert math.isnan(metrics.load_entropy([0, 0]))
    for wrong in ([1, -1], [1, NAN], [1, math.inf]):
        with pytest.raises(ConfigError, match="expected finite numbers of at least 0; pass how"):
            metrics.load_entropy(wrong)


def test_restricted_accuracy_is_at_least_unrestricted_for_the_same_logits():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(400, 6)), rng.integers(0, 6, 400)
    tasks = labels // 2
    inside = np.arange(6) // 2 == tasks[:, None]
    free = logits.argmax(1) == labels
    masked = np.where(inside, logits, -np.inf).argmax(1) == labels
    for j in range(3):
        assert masked[tasks == j].mean() >= free[tasks == j].mean()
    row = [free[tasks == j].mean() for j in range(3)]
    counts = [int((tasks == j).sum()) for j in range(3)]
    matrix = [[NAN] * 3, [NAN] * 3, row]
    assert metrics.weighted_average_accuracy(matrix, counts) == near(free.mean())


def test_metrics_import_no_torch():
    code = "import sys, polyrank.metrics; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"

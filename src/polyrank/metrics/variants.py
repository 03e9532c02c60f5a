"""What three other libraries compute from the same matrix under the same words.

Each is kept under its own name, so that a number can be compared with a number of theirs. Read in
Mammoth e75a491 (`utils/metrics.py`), Avalanche eb075be (`evaluation/metrics`) and LAMDA-PILOT
5240714 (`trainer.py`, `utils/toolkit.py`), all MIT; written anew from what they compute.
Mammoth's `backward_transfer` and `forward_transfer` equal ours (the latter `forward_transfer_gem`).
Arguments as in `polyrank.metrics.survey`.
"""

import numpy as np

from polyrank.errors import ConfigError
from polyrank.metrics._inputs import (
    Array,
    Limits,
    Scores,
    reference,
    require,
    sample_counts,
    square,
    trained,
)
from polyrank.metrics.survey import FRACTION, backward_transfer

_EVERY = "evaluate every task seen so far after each task"


def forgetting_mammoth(matrix: Scores, k: int | None = None, *, limits: Limits = FRACTION) -> float:
    """Mammoth's forgetting: the final row is a candidate, so it is never negative; NaN for k = 1.

    Definition: (1/(k−1)) Σ_{j<k} (max_{i∈{1..k}} a_{i,j} − a_{k,j}), not measured before j: 0

    With another range than 0..1, not measured before j is its lower end.
    Zero-shot scores that were recorded count, so the value depends on whether they were recorded.
    Theirs pads its argument in place; this does not.
    """
    a = _padded(square(matrix, limits), k, "forgetting_mammoth", limits)
    return float((a.max(axis=0) - a[-1])[:-1].mean()) if len(a) > 1 else float("nan")


def forgetting_avalanche(
    matrix: Scores, k: int | None = None, *, limits: Limits = FRACTION
) -> float:
    """Avalanche's stream forgetting: first minus last, which is −BWT; 0 for k = 1.

    Definition: (1/(k−1)) Σ_{j<k} (a_{j,j} − a_{k,j});  0 if k = 1
    """
    change = backward_transfer_avalanche(matrix, k, limits=limits)
    return -change if change else 0.0


def backward_transfer_avalanche(
    matrix: Scores, k: int | None = None, *, limits: Limits = FRACTION
) -> float:
    """Avalanche's backward transfer: as the survey's, but 0 instead of NaN for k = 1.

    Definition: (1/(k−1)) Σ_{j<k} (a_{k,j} − a_{j,j});  0 if k = 1
    """
    change = backward_transfer(matrix, k, limits=limits)
    return 0.0 if np.isnan(change) else change


def forward_transfer_avalanche(
    matrix: Scores, untrained: Scores, k: int | None = None, *, limits: Limits = FRACTION
) -> float:
    """Avalanche's forward transfer: after task k it already includes task k + 1; 0 for K = 1.

    Definition: (1/(m−1)) Σ_{j=2..m} (a_{j−1,j} − b_j), m = min(k+1, K);  b_j: untrained model
    """
    a = square(matrix, limits)
    last = min(trained(k, len(a)) + 1, len(a))
    start = reference(untrained, len(a), limits, "untrained")
    remedy = "evaluate the next task before it is trained"
    require(a, [(j - 1, j) for j in range(1, last)], "forward_transfer_avalanche", remedy)
    remedy = "evaluate every task once before the first training step"
    require(start, [(j,) for j in range(1, last)], "forward_transfer_avalanche", remedy)
    return float((a.diagonal(1)[: last - 1] - start[1:last]).mean()) if last > 1 else 0.0


def forgetting_pilot(matrix: Scores, k: int | None = None, *, limits: Limits = FRACTION) -> float:
    """LAMDA-PILOT's forgetting: scores in percent rounded to 2 decimals; NaN for k = 1.

    Definition: (1/(k−1)) Σ_{j<k} (max_{i∈{j..k}} â_{i,j} − â_{k,j}), â = a to 4 decimals

    Never negative, as the final row is a candidate. Tasks not yet seen are not evaluated there, so
    scores above the diagonal are left out. Returned as a fraction; the rounding is that of `limits`
    stretched to 0..100.
    """
    a = _rounded(square(matrix, limits), limits)
    a[np.triu_indices(len(a), 1)] = np.nan
    a = _padded(a, k, "forgetting_pilot", limits)
    return float((a.max(axis=0) - a[-1])[:-1].mean()) if len(a) > 1 else float("nan")


def average_accuracy_pilot(
    matrix: Scores, counts: Scores, k: int | None = None, *, limits: Limits = FRACTION
) -> float:
    """LAMDA-PILOT's "Average Accuracy": the mean over tasks of rounded total accuracies.

    Definition: (1/k) Σ_{i≤k} Â_i,  Â_i = Σ_{j≤i} n_j a_{i,j} / Σ_{j≤i} n_j to 4 decimals

    What others call average incremental accuracy, sample-weighted.
    """
    a = square(matrix, limits)
    k = trained(k, len(a))
    n = sample_counts(counts, len(a))
    require(a, [(i, j) for i in range(k) for j in range(i + 1)], "average_accuracy_pilot", _EVERY)
    totals = [np.average(a[i, : i + 1], weights=n[: i + 1]) for i in range(k)]
    return float(_rounded(np.array(totals, dtype=np.float64), limits).mean())


def _padded(a: Array, k: int | None, name: str, limits: Limits) -> Array:
    """The first k rows and columns with the worst score for what was not measured above them."""
    k = trained(k, len(a))
    require(a, [(i, j) for i in range(k) for j in range(min(i + 1, k - 1))], name, _EVERY)
    return np.where(np.isnan(a), limits[0], a)[:k, :k]


def _rounded(a: Array, limits: Limits) -> Array:
    if not np.isfinite(limits[1] - limits[0]):
        raise ConfigError(
            f"limits: got {limits}, expected a finite range, of which LAMDA-PILOT's metrics round "
            "percent; use `forgetting` and `weighted_average_incremental_accuracy`"
        )
    percent = 100.0 / (limits[1] - limits[0])
    return np.around(a * percent, decimals=2) / percent

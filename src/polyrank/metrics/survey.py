"""The survey's metrics on the accuracy matrix of a stream of tasks.

Notation, 1-based as in the source: a_{k,j} is the accuracy on task j after training tasks 1..k, a
fraction in [0, 1]; in memory row k - 1, column j - 1. NaN (or None) marks what was not measured, a
short row is filled up with NaN. Inputs are copied to float64 and never changed. Instead of an
accuracy any score may stand in the matrix of which more is better; `limits` declares its range.

Every function takes `k`, the number of tasks trained so far (default: all), reads only the entries
that its definition names, and raises `ConfigError` if one of these is NaN.

Source: Wang, Zhang, Su, Zhu, "A Comprehensive Survey of Continual Learning", arXiv:2302.00487,
section 2; the second forward transfer: Lopez-Paz, Ranzato, "Gradient Episodic Memory",
arXiv:1706.08840, section 2.
"""

import numpy as np

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

FRACTION: Limits = (0.0, 1.0)
_EVERY = "evaluate every task seen so far after each task"


def average_accuracy(matrix: Scores, k: int | None = None, *, limits: Limits = FRACTION) -> float:
    """Mean accuracy over the tasks seen so far, each task with the same weight (AA).

    Definition: AA_k = (1/k) Σ_{j≤k} a_{k,j}
    """
    a = square(matrix, limits)
    return _average(a, trained(k, len(a)), "average_accuracy")


def average_accuracy_curve(
    matrix: Scores, k: int | None = None, *, limits: Limits = FRACTION
) -> Array:
    """Average accuracy after each of the first k tasks, an array of length k.

    Definition: (AA_1, …, AA_k),  AA_i = (1/i) Σ_{j≤i} a_{i,j}
    """
    a = square(matrix, limits)
    return _curve(a, trained(k, len(a)), "average_accuracy_curve")


def average_incremental_accuracy(
    matrix: Scores, k: int | None = None, *, limits: Limits = FRACTION
) -> float:
    """Mean of the average accuracies after each task (AIA): rewards being good all the way.

    Definition: AIA_k = (1/k) Σ_{i≤k} AA_i,  AA_i = (1/i) Σ_{j≤i} a_{i,j}
    """
    a = square(matrix, limits)
    return float(_curve(a, trained(k, len(a)), "average_incremental_accuracy").mean())


def weighted_average_accuracy(
    matrix: Scores, counts: Scores, k: int | None = None, *, limits: Limits = FRACTION
) -> float:
    """Accuracy over all test samples of the tasks seen so far ("total accuracy").

    Definition: AA^w_k = Σ_{j≤k} n_j a_{k,j} / Σ_{j≤k} n_j

    Args:
        matrix: Accuracies, row i after task i.
        counts: Number of test samples n_j of every task, > 0.
        k: Number of tasks trained so far.
        limits: Range of the score.
    """
    a = square(matrix, limits)
    n = sample_counts(counts, len(a))
    return _average(a, trained(k, len(a)), "weighted_average_accuracy", n)


def weighted_average_incremental_accuracy(
    matrix: Scores, counts: Scores, k: int | None = None, *, limits: Limits = FRACTION
) -> float:
    """Mean of the sample-weighted average accuracies after each task.

    Definition: AIA^w_k = (1/k) Σ_{i≤k} AA^w_i,  AA^w_i = Σ_{j≤i} n_j a_{i,j} / Σ_{j≤i} n_j

    Args:
        matrix: Accuracies, row i after task i.
        counts: Number of test samples n_j of every task, > 0.
        k: Number of tasks trained so far.
        limits: Range of the score.
    """
    a = square(matrix, limits)
    n = sample_counts(counts, len(a))
    curve = _curve(a, trained(k, len(a)), "weighted_average_incremental_accuracy", n)
    return float(curve.mean())


def forgetting_by_task(
    matrix: Scores,
    k: int | None = None,
    *,
    seen_only: bool = True,
    limits: Limits = FRACTION,
) -> Array:
    """Forgetting of every earlier task, an array of length k - 1 (empty for k = 1).

    Definition: f_{j,k} = max_{i∈{j..k−1}} a_{i,j} − a_{k,j} for j < k

    Args:
        matrix: Accuracies, row i after task i.
        k: Number of tasks trained so far.
        seen_only: True looks for the best score from row j on, when task j had been learnt; False
            from row 1 on as the source prints it, which counts a lucky zero-shot score as known.
        limits: Range of the score.
    """
    a = square(matrix, limits)
    k = trained(k, len(a))
    cells = [(i, j) for j in range(k - 1) for i in range(j if seen_only else 0, k)]
    remedy = _EVERY if seen_only else "evaluate all tasks after each task, or use seen_only=True"
    require(a, cells, "forgetting" if seen_only else "forgetting with seen_only=False", remedy)
    best = [a[(j if seen_only else 0) : k - 1, j].max() for j in range(k - 1)]
    return np.array(best, dtype=np.float64) - a[k - 1, : k - 1]


def forgetting(
    matrix: Scores,
    k: int | None = None,
    *,
    seen_only: bool = True,
    limits: Limits = FRACTION,
) -> float:
    """Mean drop from the best earlier score of each earlier task (FM); NaN for k = 1.

    Definition: FM_k = (1/(k−1)) Σ_{j<k} (max_{i∈{j..k−1}} a_{i,j} − a_{k,j})

    The last row is no candidate for the maximum, so FM is negative where training later tasks
    helped an earlier one. FM ≥ −BWT.

    Args:
        matrix: Accuracies, row i after task i.
        k: Number of tasks trained so far.
        seen_only: False lets i run from 1, see `forgetting_all`.
        limits: Range of the score.
    """
    return _mean(forgetting_by_task(matrix, k, seen_only=seen_only, limits=limits))


def forgetting_all(matrix: Scores, k: int | None = None, *, limits: Limits = FRACTION) -> float:
    """`forgetting` with seen_only=False, the range that the source prints; NaN for k = 1.

    Definition: FM^all_k = (1/(k−1)) Σ_{j<k} (max_{i∈{1..k−1}} a_{i,j} − a_{k,j})

    Differs from `forgetting` where the score of a task before it was learnt exceeds all later ones.
    """
    return forgetting(matrix, k, seen_only=False, limits=limits)


def backward_transfer(matrix: Scores, k: int | None = None, *, limits: Limits = FRACTION) -> float:
    """Mean change of each earlier task since it was learnt (BWT); NaN for k = 1.

    Definition: BWT_k = (1/(k−1)) Σ_{j<k} (a_{k,j} − a_{j,j})
    """
    a = square(matrix, limits)
    k = trained(k, len(a))
    cells = [cell for j in range(k - 1) for cell in ((j, j), (k - 1, j))]
    require(a, cells, "backward_transfer", _EVERY)
    return _mean(a[k - 1, : k - 1] - a.diagonal()[: k - 1])


def plasticity(matrix: Scores, k: int | None = None, *, limits: Limits = FRACTION) -> float:
    """Mean accuracy on each task right after it was learnt: what learning itself reaches.

    Definition: PL_k = (1/k) Σ_{j≤k} a_{j,j}

    With the average accuracy it adds up: AA_k = PL_k + (k−1)/k · BWT_k.
    """
    a = square(matrix, limits)
    k = trained(k, len(a))
    require(a, [(j, j) for j in range(k)], "plasticity", _EVERY)
    return float(a.diagonal()[:k].mean())


def intransigence(
    matrix: Scores, joint: Scores, k: int | None = None, *, limits: Limits = FRACTION
) -> float:
    """What learning in sequence costs on the newest task against joint training (IM).

    Definition: IM_k = a*_k − a_{k,k};  a*_k: a reference trained jointly on the data of tasks 1..k

    Args:
        matrix: Accuracies, row i after task i.
        joint: a*_1 … a*_K, accuracy on task k of the reference for k; NaN where it was not trained.
        k: Number of tasks trained so far.
        limits: Range of the score.
    """
    a = square(matrix, limits)
    k = trained(k, len(a))
    best = reference(joint, len(a), limits, "joint")
    require(a, [(k - 1, k - 1)], "intransigence", "evaluate each task right after its training")
    require(best, [(k - 1,)], "intransigence, joint", "train the joint reference on tasks 1..k")
    return float(best[k - 1] - a[k - 1, k - 1])


def forward_transfer(
    matrix: Scores, single: Scores, k: int | None = None, *, limits: Limits = FRACTION
) -> float:
    """What earlier tasks add to learning a task, against a fresh model (FWT); NaN for k = 1.

    Definition: FWT_k = (1/(k−1)) Σ_{j=2..k} (a_{j,j} − ã_j);  ã_j: fresh model trained on task j

    Args:
        matrix: Accuracies, row i after task i; only the diagonal is read.
        single: ã_1 … ã_K, accuracy on task j of a model trained on task j alone; ã_1 may be NaN.
        k: Number of tasks trained so far.
        limits: Range of the score.
    """
    a = square(matrix, limits)
    k = trained(k, len(a))
    fresh = reference(single, len(a), limits, "single")
    require(a, [(j, j) for j in range(1, k)], "forward_transfer", _EVERY)
    remedy = "train a fresh model on each task alone and measure it"
    require(fresh, [(j,) for j in range(1, k)], "forward_transfer, single", remedy)
    return _mean(a.diagonal()[1:k] - fresh[1:k])


def forward_transfer_gem(
    matrix: Scores, untrained: Scores, k: int | None = None, *, limits: Limits = FRACTION
) -> float:
    """Zero-shot gain on the next task over the untrained model; NaN for k = 1.

    Definition: FWT^GEM_k = (1/(k−1)) Σ_{j=2..k} (a_{j−1,j} − b_j);  b_j: the untrained model

    Args:
        matrix: Accuracies, row i after task i; only the first superdiagonal is read.
        untrained: b_1 … b_K, accuracy on task j before any training; b_1 may be NaN.
        k: Number of tasks trained so far.
        limits: Range of the score.
    """
    a = square(matrix, limits)
    k = trained(k, len(a))
    start = reference(untrained, len(a), limits, "untrained")
    remedy = "evaluate the next task before it is trained"
    require(a, [(j - 1, j) for j in range(1, k)], "forward_transfer_gem", remedy)
    remedy = "evaluate every task once before the first training step"
    require(start, [(j,) for j in range(1, k)], "forward_transfer_gem, untrained", remedy)
    return _mean(a.diagonal(1)[: k - 1] - start[1:k])


def _average(a: Array, k: int, name: str, weights: Array | None = None) -> float:
    require(a, [(k - 1, j) for j in range(k)], name, _EVERY)
    return float(np.average(a[k - 1, :k], weights=None if weights is None else weights[:k]))


def _curve(a: Array, k: int, name: str, weights: Array | None = None) -> Array:
    return np.array([_average(a, i, name, weights) for i in range(1, k + 1)], dtype=np.float64)


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else float("nan")

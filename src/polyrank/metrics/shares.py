"""Global and local forgetting: over all classes seen, and among the classes of a task alone.

Notation as in `polyrank.metrics.survey`; T_n are the classes of task n, T_{1:i} those of tasks 1..i
together. Tasks share no class.

Source: Smith, Tian, Halbe, Hsu, Kira, "A Closer Look at Rehearsal-Free Continual Learning",
arXiv:2203.17269, section 3; the sign of the local one as quoted by others.
"""

from polyrank.metrics._inputs import Limits, Scores, class_counts, require, square, trained
from polyrank.metrics.survey import FRACTION, backward_transfer


def global_forgetting(
    matrix: Scores, classes: Scores, k: int | None = None, *, limits: Limits = FRACTION
) -> float:
    """Drop of every task since it was learnt, after every task, by its share of classes (F^G).

    Definition: F^G_k = (1/(k−1)) Σ_{i=2..k} Σ_{n<i} |T_n|/|T_{1:i}| (a_{n,n} − a_{i,n})

    NaN for k = 1. With equally many classes each pair (i, n) weighs 1/i. Positive is forgetting.

    Args:
        matrix: Unrestricted accuracies, row i after task i.
        classes: Number of classes |T_n| of every task, > 0.
        k: Number of tasks trained so far.
        limits: Range of the score.
    """
    a = square(matrix, limits)
    k, sizes = trained(k, len(a)), class_counts(classes, len(a))
    remedy = "evaluate every task seen so far after each task"
    require(a, [(i, n) for i in range(k) for n in range(i + 1)], "global_forgetting", remedy)
    if k == 1:
        return float("nan")
    drops = [sizes[:i] / sizes[: i + 1].sum() @ (a.diagonal()[:i] - a[i, :i]) for i in range(1, k)]
    return float(sum(drops) / (k - 1))


def local_forgetting(matrix: Scores, k: int | None = None, *, limits: Limits = FRACTION) -> float:
    """Change of each earlier task among its own classes since it was learnt (F^L); NaN for k = 1.

    Definition: F^L_k = (1/(k−1)) Σ_{n<k} (A_{k,n} − A_{n,n}),  A: restricted to the classes T_n

    Negative is forgetting: it is the backward transfer of the restricted matrix.

    Args:
        matrix: Restricted accuracies, row i after task i.
        k: Number of tasks trained so far.
        limits: Range of the score.
    """
    return backward_transfer(matrix, k, limits=limits)

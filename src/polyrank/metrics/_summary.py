"""All metrics of one matrix at once, and the definitions to print beside the numbers."""

from collections.abc import Callable
from functools import partial

from polyrank.errors import ConfigError
from polyrank.metrics import routing, shares, survey, unlearning, variants
from polyrank.metrics._inputs import (
    Array,
    Limits,
    Scores,
    class_counts,
    reference,
    sample_counts,
    square,
    trained,
)

_FUNCTIONS: dict[str, Callable[..., object]] = {
    function.__name__: function
    for function in (
        survey.average_accuracy,
        survey.average_accuracy_curve,
        survey.average_incremental_accuracy,
        survey.weighted_average_accuracy,
        survey.weighted_average_incremental_accuracy,
        survey.forgetting,
        survey.forgetting_all,
        survey.forgetting_by_task,
        survey.backward_transfer,
        survey.plasticity,
        survey.intransigence,
        survey.forward_transfer,
        survey.forward_transfer_gem,
        variants.forgetting_mammoth,
        variants.forgetting_avalanche,
        variants.backward_transfer_avalanche,
        variants.forward_transfer_avalanche,
        variants.forgetting_pilot,
        variants.average_accuracy_pilot,
        shares.global_forgetting,
        shares.local_forgetting,
        unlearning.unlearning_score,
        routing.load_entropy,
    )
}
_MARK = "Definition: "


def definitions() -> dict[str, str]:
    """The printed formula of every metric, by function name; the text of its docstring.

    a_{k,j} is the accuracy on task j after training tasks 1..k, n_j the test samples of task j.
    """
    return {name: _definition(function) for name, function in _FUNCTIONS.items()}


def summary(
    matrix: Scores,
    counts: Scores,
    k: int | None = None,
    *,
    joint: Scores | None = None,
    single: Scores | None = None,
    untrained: Scores | None = None,
    classes: Scores | None = None,
    restricted: Scores | None = None,
    missing: str = "raise",
    limits: Limits = survey.FRACTION,
) -> dict[str, float]:
    """Every metric that the given inputs allow, by name.

    Args:
        matrix: Accuracies, row i after task i.
        counts: Number of test samples of every task, > 0.
        k: Number of tasks trained so far; None means all.
        joint: a*_k for `intransigence`; left out without it.
        single: ã_j for `forward_transfer`; left out without it.
        untrained: b_j for `forward_transfer_gem`; left out without it.
        classes: Number of classes of every task, for `global_forgetting`; left out without it.
        restricted: Accuracies among each task's own classes, for `local_forgetting`; left out
            without it.
        missing: "raise", or "nan" for a matrix of which only some rows were measured (joint
            training has only its last) or none (restricted scores of generated text): a metric
            that needs more is NaN there.
        limits: Range of the score.

    Returns:
        Metric name to value; NaN also where the metric is not defined (`forgetting` for k = 1).

    Raises:
        ConfigError: if an input is malformed, or a needed score is NaN and `missing` is "raise".
    """
    if missing not in ("raise", "nan"):
        raise ConfigError(f"missing: got {missing!r}, expected 'raise' or 'nan'; choose one")
    # What is malformed raises whatever `missing` says; only unmeasured scores may turn into NaN.
    a = square(matrix, limits)
    n, k = sample_counts(counts, len(a)), trained(k, len(a))
    wanted = _plain(n)
    if joint is not None:
        best = reference(joint, len(a), limits, "joint")
        wanted["intransigence"] = partial(survey.intransigence, joint=best)
    if single is not None:
        fresh = reference(single, len(a), limits, "single")
        wanted["forward_transfer"] = partial(survey.forward_transfer, single=fresh)
    if untrained is not None:
        start = reference(untrained, len(a), limits, "untrained")
        wanted["forward_transfer_gem"] = partial(survey.forward_transfer_gem, untrained=start)
    if classes is not None:
        sizes = class_counts(classes, len(a))
        wanted["global_forgetting"] = partial(shares.global_forgetting, classes=sizes)
    found = {name: _value(f, a, k, limits, missing) for name, f in wanted.items()}
    if restricted is not None:
        own = _alike(restricted, len(a), limits)
        found["local_forgetting"] = _value(shares.local_forgetting, own, k, limits, missing)
    return found


def _plain(counts: Array) -> dict[str, Callable[..., float]]:
    """What needs no more than a matrix and the number of test samples."""
    return {
        "average_accuracy": survey.average_accuracy,
        "average_incremental_accuracy": survey.average_incremental_accuracy,
        "forgetting": survey.forgetting,
        "backward_transfer": survey.backward_transfer,
        "plasticity": survey.plasticity,
        "weighted_average_accuracy": partial(survey.weighted_average_accuracy, counts=counts),
        "weighted_average_incremental_accuracy": partial(
            survey.weighted_average_incremental_accuracy, counts=counts
        ),
    }


def _alike(restricted: Scores, size: int, limits: Limits) -> Array:
    own = square(restricted, limits)
    if len(own) != size:
        raise ConfigError(
            f"restricted: got {len(own)} rows, expected {size} as in the matrix; pass both of the "
            "same run"
        )
    return own


def _value(
    function: Callable[..., float],
    a: Array,
    k: int,
    limits: Limits,
    missing: str,
) -> float:
    try:
        return function(a, k=k, limits=limits)
    except ConfigError:
        if missing == "raise":
            raise
        return float("nan")


def _definition(function: Callable[..., object]) -> str:
    lines = (function.__doc__ or "").splitlines()
    found = [line.strip() for line in lines if line.strip().startswith(_MARK)]
    return found[0].removeprefix(_MARK) if found else ""

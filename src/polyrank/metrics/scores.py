"""Scores of one task's predictions, of which more is better: what stands in the accuracy matrix.

| name | predictions and references | value |
|---|---|---|
| accuracy | classes | share of equal ones |
| f1 | classes | mean over classes of F1; classes that occur in neither are left out |
| matthews | classes | Matthews correlation; 0 if only one class is predicted, or right |
| exact_match | texts | equal in lower case, without ASCII punctuation and doubled blanks |
| choice_accuracy | texts | the same letter A to D is chosen |
| rouge_l | texts | F-measure of the longest common subsequence of words |
| sari | texts, with sources | how well the source was rewritten, n-grams of 1 to 4 words |
| edit_similarity | texts | 1 − edit distance / length of the longer text |
| pearson, spearman | numbers | correlation of values, of ranks; 0 if all predictions are equal |
| r2 | numbers | 1 − squared error / squared deviation of the references |
| negative_mse | numbers | −mean squared error |

Scores of texts are means over rows; an empty prediction counts like any other. A reference may be a
list of texts, of which the best counts; SARI uses all of them together. Percentages are fractions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from polyrank.errors import ConfigError, nearest
from polyrank.metrics import _texts
from polyrank.metrics._inputs import Array, Limits, vector

Values: TypeAlias = Any
_Rows: TypeAlias = list[Any]

_FRACTION: Limits = (0.0, 1.0)
_SIGNED: Limits = (-1.0, 1.0)
_BELOW_ZERO: Limits = (-math.inf, 0.0)


def score(
    name: str,
    predictions: Values,
    references: Values,
    sources: Sequence[str] | None = None,
) -> float:
    """One score of a task's predictions, within `RANGES[name]`.

    Args:
        name: One of `RANGES`, but for "negative_loss", which a model measures itself.
        predictions: One per row: class numbers or names, texts, or numbers.
        references: What was right, one per row; for texts also several each.
        sources: The text that was to be rewritten, one per row; for "sari" alone.

    Raises:
        ConfigError: if the name is unknown, numbers of rows differ or are 0, values are of another
            kind, or the score is not defined (a correlation with references that are all equal).
    """
    if name not in _SCORES:
        hint = nearest(name, _SCORES) or " choose one"
        raise ConfigError(f"score: got {name!r}, expected one of {', '.join(_SCORES)};{hint}")
    function, limits = _SCORES[name]
    ours, theirs = _rows(predictions, "predictions"), _rows(references, "references")
    origins = None if sources is None else _rows(sources, "sources")
    problems = _count_problems(len(ours), theirs, origins)
    if (origins is not None) != (name == "sari"):
        problems.append(
            "sources: got none, expected the text of each row before it was rewritten; pass them"
            if origins is None
            else f"sources: {name!r} reads none; leave them out"
        )
    if problems:
        raise ConfigError([f"{name}: {problem}" for problem in problems])
    value = function(name, ours, theirs, *([] if origins is None else [origins]))
    if not math.isfinite(value):
        raise ConfigError(
            f"{name}: got {value}, the predictions are too large to compare; training diverged"
        )
    # Rounding may leave a correlation a hair above 1.
    return float(min(max(value, limits[0]), limits[1]))


def _texts_score(
    compare: Callable[[str, str], float], name: str, ours: _Rows, theirs: _Rows
) -> float:
    predicted, wanted = _text_rows(name, ours, "predictions"), _lists(name, theirs)
    best = (
        max(compare(own, each) for each in several)
        for own, several in zip(predicted, wanted, strict=True)
    )
    return math.fsum(best) / len(ours)


def _exact(prediction: str, reference: str) -> float:
    return float(_texts.normalised(prediction) == _texts.normalised(reference))


def _choice(name: str, ours: _Rows, theirs: _Rows) -> float:
    wanted = [{_texts.choice(text) for text in several} for several in _lists(name, theirs)]
    if bad := [i for i, letters in enumerate(wanted) if None in letters]:
        raise ConfigError(
            f"{name}: references: got {theirs[bad[0]]!r:.60} in row {bad[0]}, expected an answer "
            "that chooses A, B, C or D; use exact_match for other answers"
        )
    chosen = [_texts.choice(text) for text in _text_rows(name, ours, "predictions")]
    right = sum(a in b for a, b in zip(chosen, wanted, strict=True))
    return right / len(ours)


def _sari(name: str, ours: _Rows, theirs: _Rows, origins: _Rows) -> float:
    rows = zip(
        _text_rows(name, origins, "sources"),
        _text_rows(name, ours, "predictions"),
        _lists(name, theirs),
        strict=True,
    )
    return math.fsum(_texts.sari(*row) for row in rows) / len(ours)


def _accuracy(name: str, ours: _Rows, theirs: _Rows) -> float:
    predicted, wanted = _classes(name, ours, theirs)
    right = sum(bool(a == b) for a, b in zip(predicted, wanted, strict=True))
    return right / len(ours)


def _f1(name: str, ours: _Rows, theirs: _Rows) -> float:
    from sklearn.metrics import f1_score

    predicted, wanted = _classes(name, ours, theirs)
    return float(f1_score(wanted, predicted, average="macro", zero_division=0.0))


def _matthews(name: str, ours: _Rows, theirs: _Rows) -> float:
    from sklearn.metrics import matthews_corrcoef

    predicted, wanted = _classes(name, ours, theirs)
    return float(matthews_corrcoef(wanted, predicted))


def _pearson(name: str, ours: _Rows, theirs: _Rows) -> float:
    return _correlation(*_numbers(name, ours, theirs, spread=True))


def _spearman(name: str, ours: _Rows, theirs: _Rows) -> float:
    from scipy.stats import rankdata

    predicted, wanted = _numbers(name, ours, theirs, spread=True)
    return _correlation(rankdata(predicted), rankdata(wanted))


def _r2(name: str, ours: _Rows, theirs: _Rows) -> float:
    from sklearn.metrics import r2_score

    predicted, wanted = _numbers(name, ours, theirs, spread=True)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(r2_score(wanted, predicted))


def _negative_mse(name: str, ours: _Rows, theirs: _Rows) -> float:
    from sklearn.metrics import mean_squared_error

    predicted, wanted = _numbers(name, ours, theirs, spread=False)
    with np.errstate(over="ignore", invalid="ignore"):
        return -float(mean_squared_error(wanted, predicted))


def _own(name: str, ours: _Rows, theirs: _Rows) -> float:
    raise ConfigError(
        f"{name}: is no comparison of predictions, but the mean log-likelihood of a token under "
        "the model; take that number itself"
    )


# Name to how it is made, and its range.
_SCORES: Mapping[str, tuple[Callable[..., float], Limits]] = MappingProxyType(
    {
        "accuracy": (_accuracy, _FRACTION),
        "exact_match": (partial(_texts_score, _exact), _FRACTION),
        "choice_accuracy": (_choice, _FRACTION),
        "edit_similarity": (partial(_texts_score, _texts.edit_similarity), _FRACTION),
        "f1": (_f1, _FRACTION),
        "matthews": (_matthews, _SIGNED),
        "negative_loss": (_own, _BELOW_ZERO),
        "negative_mse": (_negative_mse, _BELOW_ZERO),
        "pearson": (_pearson, _SIGNED),
        "r2": (_r2, (-math.inf, 1.0)),
        "rouge_l": (partial(_texts_score, _texts.rouge_l), _FRACTION),
        "sari": (_sari, _FRACTION),
        "spearman": (_spearman, _SIGNED),
    }
)
RANGES: Mapping[str, Limits] = MappingProxyType({name: r for name, (_, r) in _SCORES.items()})


def _rows(values: Values, what: str) -> _Rows:
    if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
        raise ConfigError(
            f"{what}: got {type(values).__name__}, expected a list with one value per row; "
            "put a single one into a list"
        )
    # Arrays and tensors come as plain numbers.
    return list(values.tolist() if hasattr(values, "tolist") else values)


def _count_problems(count: int, theirs: _Rows, origins: _Rows | None) -> list[str]:
    found = []
    if not count:
        found.append("predictions: got none, expected at least one; score a task that has rows")
    for what, rows in (("references", theirs), ("sources", origins)):
        if rows is not None and len(rows) != count:
            found.append(
                f"{what}: got {len(rows)}, expected {count}, one per prediction; align them"
            )
    return found


def _text_rows(name: str, rows: _Rows, what: str) -> list[str]:
    bad = [i for i, row in enumerate(rows) if not isinstance(row, str)]
    if bad:
        raise ConfigError(
            f"{name}: {what}: got {type(rows[bad[0]]).__name__} in row {bad[0]}, expected text; "
            "decode tokens first, and give an empty text for no answer"
        )
    return rows


def _lists(name: str, rows: _Rows) -> list[list[str]]:
    several = [[row] if isinstance(row, str) else row for row in rows]
    bad = [
        i
        for i, row in enumerate(several)
        if not isinstance(row, list | tuple) or not row or not all(map(_text, row))
    ]
    if bad:
        raise ConfigError(
            f"{name}: references: got {rows[bad[0]]!r:.60} in row {bad[0]}, expected a text or a "
            "list of at least one; correct the row"
        )
    return [list(row) for row in several]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _classes(name: str, ours: _Rows, theirs: _Rows) -> tuple[_Rows, _Rows]:
    kinds = {str if isinstance(row, str) else type(row) for row in (*ours, *theirs)}
    if kinds not in ({str}, {int}, {bool}):
        shown = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ConfigError(
            f"{name}: got values of {shown}, expected class numbers or class names throughout; "
            "convert them"
        )
    return ours, theirs


def _numbers(name: str, ours: _Rows, theirs: _Rows, *, spread: bool) -> tuple[Array, Array]:
    predicted, wanted = vector(ours, "predictions"), vector(theirs, "references")
    for values, what in ((predicted, "predictions"), (wanted, "references")):
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise ConfigError(
                f"{name}: {what}: got {values[bad[0]]} in row {bad[0]}, expected finite numbers; "
                "the model diverged, or the row has no target"
            )
    if spread and wanted.min() == wanted.max():
        raise ConfigError(
            f"{name}: references: got {len(wanted)} equal to {wanted[0]:g}, expected at least two "
            "different ones; use negative_mse"
        )
    return predicted, wanted


def _correlation(a: Array, b: Array) -> float:
    # Predictions that are all equal say nothing of the references; their covariance is 0.
    if a.min() == a.max():
        return 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.corrcoef(a, b)[0, 1])

"""Reading and checking what every metric takes: the accuracy matrix, k and reference accuracies."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from polyrank.errors import ConfigError

Array: TypeAlias = NDArray[np.float64]
Limits: TypeAlias = tuple[float, float]
# Nested lists, arrays and torch tensors; a tensor is recognised by what it can do, not by import.
Scores: TypeAlias = Any


def square(matrix: Scores, limits: Limits) -> Array:
    """A K x K copy in float64; rows of a ragged list are filled up with NaN (not measured).

    Raises:
        ConfigError: if the matrix is empty or not square, or a score lies outside `limits`.
    """
    rows = [vector(row, f"row {i}") for i, row in enumerate(_plain(matrix, "matrix"))]
    if not rows:
        raise ConfigError(
            "matrix: got no rows, expected one per trained task; evaluate a task first"
        )
    size = len(rows)
    long = [i for i, row in enumerate(rows) if len(row) > size]
    if long:
        raise ConfigError(
            f"matrix: got {size} rows and {len(rows[long[0]])} columns in row {long[0]}, expected "
            "as many columns as rows; add a row of NaN for every task that was not trained yet"
        )
    full = np.full((size, size), np.nan)
    for i, row in enumerate(rows):
        full[i, : len(row)] = row
    _check_limits(full, limits, "matrix")
    return full


def reference(values: Scores, size: int, limits: Limits, name: str) -> Array:
    """Accuracies of a reference model, one per task, as float64 of length K."""
    scores = vector(values, name)
    if len(scores) != size:
        raise ConfigError(
            f"{name}: got {len(scores)} values, expected {size}, one per task of the matrix; "
            "put NaN where a task was not measured"
        )
    _check_limits(scores, limits, name)
    return scores


def sample_counts(counts: Scores, size: int) -> Array:
    """Number of test samples per task, all finite and above 0."""
    return _amounts(
        counts,
        size,
        "counts",
        "give the number of test samples of every task",
        "a task without test samples has no accuracy, leave it out of the stream",
    )


def class_counts(classes: Scores, size: int) -> Array:
    """Number of classes per task, all finite and above 0."""
    return _amounts(
        classes,
        size,
        "classes",
        "give the number of classes of every task",
        "a task without classes has no share; leave `classes` out",
    )


def _amounts(amounts: Scores, size: int, name: str, all_of_them: str, above_zero: str) -> Array:
    values = vector(amounts, name)
    if len(values) != size:
        raise ConfigError(
            f"{name}: got {len(values)} values, expected {size}, one per task of the matrix; "
            f"{all_of_them}"
        )
    bad = [j for j, n in enumerate(values) if not (np.isfinite(n) and n > 0)]
    if bad:
        raise ConfigError(
            f"{name}: got {values[bad[0]]:g} for task {bad[0]}, expected a number above 0; "
            f"{above_zero}"
        )
    return values


def trained(k: int | None, size: int) -> int:
    """The number of trained tasks that a metric looks back on; None means all K."""
    if k is None:
        return size
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= size:
        raise ConfigError(
            f"k: got {k!r}, expected a whole number 1..{size}, the count of tasks trained so far; "
            "leave it out for all tasks"
        )
    return int(k)


def require(values: Array, cells: Sequence[tuple[int, ...]], name: str, remedy: str) -> None:
    """Raise if one of the cells that a metric needs was not measured.

    Raises:
        ConfigError: naming the metric, the first missing cells and the remedy.
    """
    missing = [cell for cell in cells if np.isnan(values[cell])]
    if missing:
        places = ", ".join(_place(cell) for cell in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ConfigError(f"{name}: got NaN at {places}{more}, expected a measured score; {remedy}")


def _place(cell: tuple[int, ...]) -> str:
    return f"row {cell[0]}, column {cell[1]}" if len(cell) == 2 else f"task {cell[0]}"


def _plain(values: Scores, name: str) -> Any:
    if hasattr(values, "detach"):
        # double() first: numpy has no bfloat16.
        values = values.detach().cpu().double().numpy()
    if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
        raise ConfigError(
            f"{name}: got {type(values).__name__}, expected a list, array or tensor of numbers; "
            "pass one row per trained task and one column per task"
        )
    return values


def vector(values: Scores, name: str) -> Array:
    """A copy of one-dimensional numbers in float64; None becomes NaN."""
    try:
        vector: Array = np.array(_plain(values, name), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{name}: {error}; expected one number per task, NaN or None where none was measured"
        ) from error
    if vector.ndim != 1:
        raise ConfigError(
            f"{name}: got {vector.ndim} dimensions, expected one; pass one number per task"
        )
    return vector


def _check_limits(values: Array, limits: Limits, name: str) -> None:
    low, high = limits
    if not low < high:
        raise ConfigError(f"limits: got {limits}, expected (low, high) with low < high; swap them")
    # An open range ends before infinity: differences of infinite scores have no value.
    inside = np.isfinite(values) & (values >= low) & (values <= high)
    outside = np.argwhere(~np.isnan(values) & ~inside)
    if not len(outside):
        return
    cell = tuple(int(i) for i in outside[0])
    value = float(values[cell])
    remedy = "pass limits=(low, high) if the score has another range"
    if np.isinf(value):
        remedy = "a score that is not finite says that the model diverged"
    elif (low, high) == (0.0, 1.0) and 1.0 < value <= 100.0:
        remedy = "these look like percent: divide by 100, or pass limits=(0, 100)"
    raise ConfigError(
        f"{name}: got {value:g} at {_place(cell)}, expected {low:g}..{high:g}; {remedy}"
    )

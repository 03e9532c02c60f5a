"""How many updates a run takes to a given training loss.

A loss is noted every few updates, as the mean since the entry before. One such mean is of few rows,
so that what counts at an entry is the mean of it and of the two before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from polyrank.metrics.statistics import mean

# Entries that are averaged; part of the updates after which the level is read.
WIDTH, SHARE = 3, 0.5
# Updates and the loss that is noted after them, ascending.
Curve = Sequence[tuple[int, float]]


def curve_of(line: Mapping[str, Any]) -> Curve:
    """Return the losses of a line of runs.jsonl; none if it does not say after which updates."""
    at, losses = line.get("loss_at") or (), line.get("loss") or ()
    # A loss that was not finite is written as null.
    found = [math.inf if loss is None else float(loss) for loss in losses]
    return tuple(zip(at, found, strict=True)) if at else ()


def level_of(curves: Sequence[Curve]) -> float | None:
    """Return the loss of some runs after half of their updates, their mean.

    Returns:
        The level; None if one of them has too few entries, or no finite loss there.
    """
    found = [_half(curve) for curve in curves]
    level = math.inf if None in found else mean(found)
    return level if math.isfinite(level) else None


def reached(curve: Curve, level: float) -> int | None:
    """Return the number of updates after which the loss is first at or below a level, or None."""
    return next((at for at, loss in _smooth(curve) if loss <= level), None)


def _half(curve: Curve) -> float | None:
    last = curve[-1][0] if curve else 0
    return next((loss for at, loss in _smooth(curve) if at >= SHARE * last), None)


def _smooth(curve: Curve) -> Iterator[tuple[int, float]]:
    losses = [loss for _, loss in curve]
    for end in range(WIDTH, len(curve) + 1):
        yield curve[end - 1][0], math.fsum(losses[end - WIDTH : end]) / WIDTH

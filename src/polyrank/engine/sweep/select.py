"""The best rate by validation, and how sure that is; a diverged run counts as the worst value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyrank.engine.sweep.grid import Grid
from polyrank.engine.sweep.pace import Curve, curve_of
from polyrank.engine.sweep.records import FINISHED, Line, Place
from polyrank.metrics.statistics import MARK, POINT, mean, plateau, standard_error

# Means that differ by rounding alone are tied.
_TIED = 1e-12
Own = Mapping[Place, Line]


@dataclass(frozen=True, kw_only=True)
class Level:
    """The finished runs at one rate.

    Attributes:
        index: number of the rate.
        scores: validation of each finished run, by seed.
        diverged: how many of them diverged.
        whole: whether the runs of all seeds are finished.
    """

    index: int
    scores: Mapping[int, float]
    diverged: int
    whole: bool


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is selected for one group.

    Attributes:
        levels: the rates that have runs, ascending.
        best: number of the best rate, None while no rate has the runs of all seeds.
        validation: scores at the best rate, one a seed.
        test: the same on test.
        curves: losses by updates at the best rate, one a seed.
        at_edge: whether the best rate is the smallest or the largest one tried.
        plateau: largest over smallest rate whose mean validation is within one point of the best,
            or within two of its standard errors if that is more.
        diverged: how many runs diverged, at all rates.
        errors: how many runs ended with an error.
        missing: how many runs are not finished.
        seconds: mean time of a run at the best rate.
        parameters: trainable parameters of a run at the best rate.
    """

    levels: tuple[Level, ...]
    best: int | None = None
    validation: tuple[float, ...] = ()
    test: tuple[float, ...] = ()
    curves: tuple[Curve, ...] = ()
    at_edge: bool = False
    plateau: float | None = None
    diverged: int = 0
    errors: int = 0
    missing: int = 0
    seconds: float | None = None
    parameters: int | None = None


def best_of(own: Own, tried: Sequence[int], seeds: Sequence[int]) -> list[int]:
    """Return the rates whose runs are all finished, best first.

    Better is the higher mean validation over seeds; of tied rates the smaller one.
    """
    means = {
        level.index: mean(list(level.scores.values()))
        for level in (level_of(own, index, seeds) for index in sorted(tried))
        if level.whole
    }
    found = []
    while means:
        top = max(means.values())
        found.append(min(index for index, value in means.items() if value >= top - _TIED))
        del means[found[-1]]
    return found


def level_of(own: Own, index: int, seeds: Sequence[int]) -> Level:
    """Return what is finished at one rate."""
    lines = {s: own[index, s] for s in seeds if (index, s) in own}
    done = {s: line for s, line in lines.items() if line["state"] in FINISHED}
    return Level(
        index=index,
        scores={s: float(line["validation"]) for s, line in done.items()},
        diverged=sum(line["state"] == "diverged" for line in done.values()),
        whole=len(done) == len(seeds),
    )


def choose(
    own: Own, grid: Grid, tried: Sequence[int], seeds: Sequence[int], span: Sequence[int] = ()
) -> Choice:
    """Select the best rate of a group.

    Args:
        own: its runs.
        grid: of its rates.
        tried: numbers of the rates that it has.
        seeds: of the runs at each rate.
        span: rates between whose ends the best may lie without being at an edge; `tried` if empty.
    """
    levels = tuple(level_of(own, index, seeds) for index in sorted(tried))
    places = [(index, seed) for index in tried for seed in seeds]
    states = [own[place]["state"] for place in places if place in own]
    counts: dict[str, Any] = {
        "diverged": states.count("diverged"),
        "errors": states.count("error"),
        "missing": len(places) - sum(state in FINISHED for state in states),
    }
    ranking = best_of(own, tried, seeds)
    if not ranking:
        return Choice(levels=levels, **counts)
    best = ranking[0]
    lines = [own[best, seed] for seed in seeds]
    ends = sorted(span or tried)
    seconds = [line["seconds"] for line in lines if line.get("seconds") is not None]
    return Choice(
        levels=levels,
        best=best,
        validation=tuple(float(line["validation"]) for line in lines),
        test=tuple(float(line["test"]) for line in lines),
        curves=tuple(curve_of(line) for line in lines),
        at_edge=len(ends) > 1 and best in (ends[0], ends[-1]),
        plateau=_plateau([level for level in levels if level.whole], best, grid),
        seconds=mean(seconds) if seconds else None,
        parameters=lines[0].get("parameters"),
        **counts,
    )


def _plateau(levels: Sequence[Level], best: int, grid: Grid) -> float:
    means = [mean(list(level.scores.values())) for level in levels]
    scores = next(list(level.scores.values()) for level in levels if level.index == best)
    error = standard_error(scores)
    width = max(POINT, MARK * error) if math.isfinite(error) else POINT
    return plateau([grid.rate(level.index) for level in levels], means, width + _TIED)

"""What a sweep has to do, and about how long it takes, without doing it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from polyrank.engine.sweep.grid import EXTRA
from polyrank.engine.sweep.records import FINISHED, Line, by_group
from polyrank.engine.sweep.runner import counted
from polyrank.engine.sweep.schedule import Group, missing, rates
from polyrank.engine.sweep.spec import Spec


def outline(
    groups: Sequence[Group], lines: Sequence[Line], updates: Callable[[Group], int]
) -> list[str]:
    """Return what there is to do as sentences: a line for each group, then the sums.

    Args:
        groups: of the sweep.
        lines: of runs.jsonl.
        updates: of one run of a group.
    """
    runs, left, most, steps, found = by_group(lines), 0, 0, 0, []
    for group in groups:
        tried = rates(group, groups, runs)
        absent = len(missing(group, tried, runs.get(group.id, {})))
        later = group.points * len(group.seeds) if group.probe and not tried else 0
        left, most = left + absent + later, most + _more(group, tried, absent)
        steps += (absent + later) * updates(group)
        found.append(_said(group, tried, absent, updates(group)))
    found.append(f"{counted(left, 'run')} left, {counted(steps, 'update')}{_beyond(most)}")
    rate = _seconds_per_update(lines)
    found.append(
        "time: no run is finished yet to tell from"
        if rate is None
        else f"time: about {_duration(rate * steps)} by the runs that are finished"
    )
    return found


def moved(spec: Spec) -> list[str]:
    """Return a sentence for every range whose ends, as the file says them, are no points."""
    found: dict[str, list[str]] = {}
    for name in spec.methods:
        asked, grid = spec.asked(name), spec.grid(name)
        ends = {"low": grid.rate(grid.first), "high": grid.rate(grid.last)}
        off = [end for end in ends if end in asked and not math.isclose(asked[end], ends[end])]
        if off:
            told = " and ".join(f"{end} {asked[end]:g}" for end in off)
            are = "is no point" if len(off) == 1 else "are no points"
            text = (
                f"{told} {are} {grid.anchor:g}·10^(i/{grid.per_decade}), so that rates from "
                f"{ends['low']:.4g} to {ends['high']:.4g} are run; `anchor: {asked[off[0]]:g}` "
                f"makes the {off[0]} end one"
            )
            found.setdefault(text, []).append(name)
    return [f"lr of {', '.join(names)}: {text}" for text, names in found.items()]


def _more(group: Group, tried: Sequence[int], absent: int) -> int:
    """Return how many runs may still be added at an edge, beside those that are missing now."""
    points = len(group.grid.indices())
    if not group.extend or points == 1 or not absent:
        return 0
    # Of one edge: where the best rate leaves the edge at which points are added, it is inside.
    return max(0, EXTRA - (len(tried) - points)) * len(group.seeds)


def _said(group: Group, tried: Sequence[int], absent: int, updates: int) -> str:
    name = f"{group.name}, {group.stage}" if group.stage == "probe" else group.name
    if not tried:
        what = f"the best {group.points} rates of the probe"
    else:
        ends = f"{group.grid.rate(tried[0]):.2e} to {group.grid.rate(tried[-1]):.2e}"
        what = f"{len(tried)} rates from {ends}" if len(tried) > 1 else f"one rate, {ends[:8]}"
    many = f"{counted(len(group.seeds), 'seed')}, {counted(updates, 'update')} a run"
    return f"{name}: {what}, {many}; {counted(absent, 'run')} left"


def _beyond(most: int) -> str:
    return (
        f"; at most {counted(most, 'run')} more where the best rate is at an edge" if most else ""
    )


def _seconds_per_update(lines: Sequence[Line]) -> float | None:
    timed = list(_timed(lines))
    return sum(s for s, _ in timed) / sum(n for _, n in timed) if timed else None


def _timed(lines: Sequence[Line]) -> Iterator[tuple[float, int]]:
    for line in lines:
        if line["state"] in FINISHED and line.get("seconds") and line.get("updates"):
            yield line["seconds"], line["updates"]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

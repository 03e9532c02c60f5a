"""Which runs a sweep consists of, as a function of what is recorded: no other state is kept.

A killed sweep therefore goes on as if nothing had happened, and its runs may come in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from polyrank.engine.sweep.grid import EXTRA, Grid
from polyrank.engine.sweep.records import FINISHED, Line, Place
from polyrank.engine.sweep.select import best_of
from polyrank.io.files import sha256_json

Runs = Mapping[str, Mapping[Place, Line]]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ by rate and seed alone: a row of the table, or the probe before one.

    Attributes:
        id: checksum of what the runs have in common, the version of the code included.
        label: name of the entry.
        stage: "full" or "probe".
        grid: of the rates.
        seeds: of the runs at each rate.
        extend: whether the grid grows while the best rate is at an edge.
        axes: values of the other axes, such as {"rank": 8}.
        config: what the runs have in common.
        fixed: why there is one rate.
        probe: id of the group whose best rates are run, if there is one.
        points: how many of them.
    """

    id: str
    label: str
    stage: str
    grid: Grid
    seeds: tuple[int, ...]
    extend: bool
    axes: Mapping[str, int]
    config: Mapping[str, Any] = field(default_factory=dict)
    fixed: str | None = None
    probe: str | None = None
    points: int = 0

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Group:
        """Return what `plain` made a mapping of."""
        grid, seeds = Grid(**values["grid"]), tuple(values["seeds"])
        return cls(**{**values, "grid": grid, "seeds": seeds})

    def plain(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self)

    @property
    def name(self) -> str:
        """The label with the values of the axes."""
        return " ".join([self.label, *(f"{key}={value}" for key, value in self.axes.items())])


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a sweep."""

    group: Group
    index: int
    seed: int

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.group.grid.rate(self.index)

    @property
    def id(self) -> str:
        """Checksum of everything that decides the run."""
        return sha256_json([self.group.id, self.rate, self.seed])[:16]

    def line(self) -> dict[str, Any]:
        """Return the beginning of the run's line in runs.jsonl."""
        return {
            "id": self.id,
            "group": self.group.id,
            "method": self.group.label,
            **self.group.axes,
            "stage": self.group.stage,
            "index": self.index,
            "rate": self.rate,
            "seed": self.seed,
        }


def rates(group: Group, groups: Sequence[Group], runs: Runs) -> list[int]:
    """Return the numbers of the rates that a group is to have by now, ascending.

    A grid that may grow gets one more point where its best rate is at an edge, once all runs of the
    points before are finished, and at most `EXTRA` on a side. A group after a probe has the best
    points of the finished probe, none before.
    """
    if group.probe is not None:
        before = next(other for other in groups if other.id == group.probe)
        tried, own = rates(before, groups, runs), runs.get(before.id, {})
        if missing(before, tried, own):
            return []
        return sorted(best_of(own, tried, before.seeds)[: group.points])
    below = above = 0
    own = runs.get(group.id, {})
    while True:
        tried = list(group.grid.indices(below, above))
        if not group.extend or len(tried) == 1 or missing(group, tried, own):
            return tried
        best = best_of(own, tried, group.seeds)[0]
        if best == tried[0] and below < EXTRA:
            below += 1
        elif best == tried[-1] and above < EXTRA:
            above += 1
        else:
            return tried


def missing(group: Group, tried: Sequence[int], own: Mapping[Place, Line]) -> list[Place]:
    """Return rate and seed of the runs that are not finished."""
    places = ((index, seed) for index in tried for seed in group.seeds)
    return [p for p in places if p not in own or own[p]["state"] not in FINISHED]


def pending(groups: Sequence[Group], runs: Runs) -> Iterator[Point]:
    """Yield the runs that can be made now."""
    for group in groups:
        for index, seed in missing(group, rates(group, groups, runs), runs.get(group.id, {})):
            yield Point(group=group, index=index, seed=seed)

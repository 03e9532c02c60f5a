"""What methods and strategies do between tasks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from polyrank.errors import ConfigError
from polyrank.frame import Boundary, Figure, Job, Method, Strategy, Workshop


class Aside(Boundary):
    """The boundary of a strategy: it stands beside the method's and trains nothing of its own."""

    def next(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> Job | None:
        """Return no work."""
        return None


class Append(Boundary):
    """Freezes the ranks of the last task into the bank and gives every layer fresh ones.

    Args:
        name: of the method, for the record.
        strict: whether more ranks than inputs are an error, or a warning; None if ranks need not
            be independent.
        early: grow as soon as a task ends and not when the next one begins, so that all that is
            evaluated and saved holds untrained ranks.
    """

    persistent = False

    def __init__(self, name: str, *, strict: bool | None = None, early: bool = False) -> None:
        self.name, self.strict, self.early = name, strict, early

    def finish(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> None:
        """Append, if this is early."""
        if self.early:
            workshop.append(self.name)

    def start(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> None:
        """Append from the second task on.

        Raises:
            ConfigError: if `strict` and the ranks of a layer outgrow its inputs.
        """
        full = []
        for layer in workshop.adapter.layers if self.strict is not None else ():
            bank = 0 if layer.bank is None else len(layer.bank[0])
            held = 0 if workshop.first else bank + len(layer.A)
            if held + layer.site.r > layer.site.d_in:
                full.append(
                    f"r at {layer.site.path}: {held} ranks are taken and {layer.site.r} are to "
                    "come, but "
                    f"of {layer.site.d_in} inputs no more can be independent; use a smaller r"
                )
        if full and self.strict:
            raise ConfigError(full)
        if full:
            warnings.warn(f"{full[0]} ({len(full)} layers)", stacklevel=2)
        if not workshop.first and not self.early:
            workshop.append(self.name)

    def figures(self, workshop: Workshop, routing: dict[str, Any] | None) -> list[Figure]:
        """Return whose ranks the test rows of each task read, where gates tell."""
        owners = [layer.owners for layer in workshop.adapter.layers]
        count = max(max(held) for held in owners) + 1
        if routing is None or count < 2:
            return []
        tasks = tuple(routing["tasks"])
        # Growing early leaves one more set of ranks than there are tasks.
        grown = (*tasks, "untrained") if len(tasks) < count else tasks
        if len(grown) < count:
            grown = tuple(f"ranks {n + 1}" for n in range(count))
        mass = np.zeros((len(tasks), len(owners), count))
        for row, layers in enumerate(routing["gate"]):
            for column, (gate, held) in enumerate(zip(layers, owners, strict=True)):
                np.add.at(mass[row, column], held, gate)
        others = mass.sum(-1)
        own = min(len(tasks), count)
        others[:own] -= np.einsum("tlt->tl", mass[:own, :, :own])
        return [
            Figure(
                name="reuse",
                title="Whose ranks a task reads",
                rows=tasks,
                columns=grown[:count],
                values=_rows(mass.mean(1)),
                unit="mean gate",
                note="Gates that test rows of a task (row) put on the ranks of another (column), "
                "summed over its ranks, mean over tokens and layers.",
            ),
            Figure(
                name="reuse-by-layer",
                title="Where ranks of other tasks are read",
                rows=tuple(routing["layers"]),
                columns=tasks,
                values=_rows(others.T),
                unit="mean gate",
                note="Gates that test rows of a task (column) put on ranks that are not its own.",
            ),
        ]


def _rows(values: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, row)) for row in values)


class Later(Strategy):
    """A strategy that acts from the second task on."""

    def unfit(self, method: Method, others: Sequence[Strategy]) -> Iterator[str]:
        """Refuse what makes one task of all."""
        for other in others:
            if other.pools:
                yield (
                    f"acts from the second task on, and {other.name} trains on all tasks at once; "
                    "drop one of the two"
                )

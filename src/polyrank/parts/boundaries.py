"""What methods and strategies do between tasks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from polyrank.errors import ConfigError
from polyrank.frame import Boundary, Figure, Job, Method, Strategy, Workshop

logger = logging.getLogger(__name__)


class Aside(Boundary):
    """The boundary of a strategy: it stands beside the method's and trains nothing of its own."""

    def next(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> Job | None:
        """Return no work."""
        return None


class Append(Boundary):
    """Freezes the ranks of the last task into the bank and gives every layer fresh ones.

    Ranks that compete for weight and have no value anywhere, as after a task of one class, are not
    frozen: they train on, and a growth is that of the last task that trained on it.

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
        if self.early and self._worth(workshop):
            workshop.append(self.name)

    def start(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> None:
        """Append from the second task on.

        Raises:
            ConfigError: if `strict` and the ranks of a layer outgrow its inputs.
        """
        grows = not workshop.first and not self.early and self._worth(workshop)
        full = []
        for layer in workshop.adapter.layers if self.strict is not None else ():
            bank = 0 if layer.bank is None else len(layer.bank[0])
            held = bank + len(layer.A) if grows else bank
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
        if grows:
            workshop.append(self.name)
        self._own(workshop)

    def _worth(self, workshop: Workshop) -> bool:
        """Say whether the live ranks may be frozen."""
        rivals = [layer for layer in workshop.adapter.layers if layer.core.competing]
        if not rivals or any(bool(layer.B.detach().any()) for layer in rivals):
            return True
        logger.info("%s: the last task gave its ranks no values; they train on", self.name)
        return False

    def _own(self, workshop: Workshop) -> None:
        """Note that the live ranks are those of the task that begins."""
        noted = workshop.memory(self.name)
        tasks = noted.get("tasks", 0)
        live = max(max(layer.owners) for layer in workshop.adapter.layers)
        # A bank that was there before the stream is nobody's.
        owners = [*noted.get("owners", ()), *[-1] * (live + 1)][: live + 1]
        owners[live] = tasks
        noted.update(tasks=tasks + 1, owners=owners)

    def figures(self, workshop: Workshop, routing: dict[str, Any] | None) -> list[Figure]:
        """Return whose ranks the test rows of each task read, where gates tell."""
        owners = [layer.owners for layer in workshop.adapter.layers]
        count = max(max(held) for held in owners) + 1
        if routing is None or count < 2:
            return []
        tasks = tuple(routing["tasks"])
        known = dict(enumerate(workshop.memory(self.name).get("owners", ())))
        names = {n: tasks[t] for n, t in known.items() if 0 <= t < len(tasks)}
        # Growing early leaves one more set of ranks than there are tasks.
        late = {n: "untrained" for n in range(count) if known and n not in known}
        grown = tuple((names | late).get(n, f"ranks {n + 1}") for n in range(count))
        mass = np.zeros((len(tasks), len(owners), count))
        for row, layers in enumerate(routing["gate"]):
            for column, (gate, held) in enumerate(zip(layers, owners, strict=True)):
                np.add.at(mass[row, column], held, gate)
        others = mass.sum(-1)
        for growth, task in known.items():
            if 0 <= task < len(tasks) and growth < count:
                others[task] -= mass[task, :, growth]
        return [
            Figure(
                name="reuse",
                title="Whose ranks a task reads",
                rows=tasks,
                columns=grown,
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

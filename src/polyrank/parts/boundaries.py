"""What methods and strategies do between tasks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from polyrank.errors import ConfigError
from polyrank.frame import Boundary, Job, Method, Strategy, Workshop


class Aside(Boundary):
    """The boundary of a strategy: it stands beside the method's and trains nothing of its own."""

    def next(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> Job | None:
        """Return no work."""
        return None


class Append(Boundary):
    """Freezes the ranks of the last task into the bank and gives every layer fresh ones.

    Args:
        name: of the method, for the record.
        r: ranks of a task.
        strict: whether more ranks than inputs are an error, or a warning.
    """

    persistent = False

    def __init__(self, name: str, r: int, *, strict: bool) -> None:
        self.name, self.r, self.strict = name, r, strict

    def start(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> None:
        """Append from the second task on.

        Raises:
            ConfigError: if `strict` and the ranks of a layer outgrow its inputs.
        """
        full = []
        for layer in workshop.adapter.layers:
            bank = 0 if layer.bank is None else len(layer.bank[0])
            held = 0 if workshop.first else bank + len(layer.A)
            if held + self.r > layer.site.d_in:
                full.append(
                    f"r at {layer.site.path}: {held} ranks are taken and {self.r} are to come, but "
                    f"of {layer.site.d_in} inputs no more can be independent; use a smaller r"
                )
        if full and self.strict:
            raise ConfigError(full)
        if full:
            warnings.warn(f"{full[0]} ({len(full)} layers)", stacklevel=2)
        if not workshop.first:
            workshop.append(self.name, self.r)


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

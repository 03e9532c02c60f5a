"""A threshold that rises by levels after a dense phase, and what it would do without gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import nn

from polyrank.errors import ConfigError
from polyrank.frame import Adapter, Step, Workshop
from polyrank.parts.gates import (
    FlatGates,
    Shrinkage,
    StaticGate,
    counted,
    gathered,
    kept_ranks,
    static_gates,
)

if TYPE_CHECKING:
    from torch.optim import Optimizer


def levels(total: int, dense: float, count: int, kappa_max: float) -> list[float]:
    """Return κ_t for t = 0 … total − 1, a function of these four numbers alone.

    The levels are `count` equal steps from 0 to κ_max. With D = dense · total and
    e = ⌊(total − D) / count⌋ the level at t is the number of multiples of e in [D, t], the last
    level if there are more; κ_t = 0 for t <= D. With e = 0 the level stays at 0, which is κ = 0.

    Args:
        total: updates of a task, >= 0.
        dense: share of them without a threshold, 0..1.
        count: number of levels, the first of them 0, >= 2.
        kappa_max: the last level, >= 0.
    """
    grid = np.linspace(0.0, kappa_max, count).tolist()
    first, every = dense * total, stride(total, dense, count)
    # e divides m · e exactly, so that the real bound may be rounded up to a whole number.
    below = -(-math.ceil(first) // every) - 1 if every else 0
    return [
        grid[min(t // every - below, count - 1)] if every and t > first else 0.0
        for t in range(total)
    ]


def stride(total: int, dense: float, count: int) -> int:
    """Return e, the updates between two levels; 0 if the task is too short for them."""
    return math.floor((total - dense * total) / count)


def too_short(total: int, dense: float, count: int) -> Iterator[str]:
    """Yield why no threshold would ever rise, nothing if one does."""
    if stride(total, dense, count):
        return
    longer = math.ceil(count / (1 - dense)) if dense < 1 else 0
    yield (
        f"levels: got {count} for the last {1 - dense:.0%} of {total} updates, expected one update "
        "each at least, or no gate ever shrinks; "
        + (f"train {longer} updates or more, " if longer else "")
        + "take fewer levels or a shorter dense phase, or allow it by idle=True"
    )


class TwinGate(StaticGate):
    """A static gate beside a twin: drawn equal, shrunk alike, without any gradient.

    What the twin keeps is what the draw and the thresholds alone decide.
    """

    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {"gate": ("rank",), "twin": ("rank",)}
    frozen = frozenset({"twin"})
    prunable = False

    def __init__(self, r: int, *, start: str = "normal") -> None:
        super().__init__(r, start=start)
        self.twin = nn.Parameter(torch.empty(r), requires_grad=False)

    def fill(self, rng: torch.Generator) -> None:
        """Draw the gates, and copy them."""
        super().fill(rng)
        self.twin.copy_(self.gate)


def twin_ranks(adapter: Adapter) -> dict[str, int]:
    """Return how many gates of each layer the thresholds alone would have left, by site path."""
    layers = [layer for layer, _ in static_gates(adapter) if isinstance(layer.core, TwinGate)]
    if not layers:
        return {}
    counts = counted([layer.core.get_parameter("twin") for layer in layers])
    return {layer.site.path: count for layer, count in zip(layers, counts, strict=True)}


def gate_figures(adapter: Adapter) -> dict[str, float]:
    """Return means over layers: ranks kept, those that twins kept if any; and over gates: |g|."""
    sizes = gathered([gate.detach().abs() for _, gate in static_gates(adapter)])
    found = {"kept_ranks": kept_ranks(adapter), "twin_ranks": twin_ranks(adapter)}
    means = {name: sum(ranks.values()) / len(ranks) for name, ranks in found.items() if ranks}
    return {**means, "gate_size": float(torch.cat(sizes).mean())}


class Ramp(Shrinkage):
    """Shrinks gates, and their twins, by `levels`.

    Args:
        dense, count, kappa_max: of `levels`.
        form: "soft" or "released", see `shrink`.
        idle: whether a task too short for the levels is trained all the same.
    """

    def __init__(
        self, dense: float, count: int, kappa_max: float, form: str, *, idle: bool
    ) -> None:
        super().__init__(self._at, form)
        self.dense, self.count, self.kappa_max, self.idle = dense, count, kappa_max, idle
        self.known: Sequence[float] = ()

    def bind(self, adapter: Adapter, optimizer: Optimizer, workshop: Workshop | None) -> None:
        """Gather gates and twins."""
        super().bind(adapter, optimizer, workshop)
        self.twins = FlatGates(adapter, "twin")

    def begin(self, step: Step) -> None:
        """See, before the first update, that there is a schedule.

        Raises:
            ConfigError: if the number of updates is unknown, or too small for the levels.
        """
        if not step.total:
            raise ConfigError(
                "total: got 0, expected the number of updates, over which the thresholds rise; "
                "pass total=... to polyrank.attach"
            )
        if step.index >= step.total:
            raise ConfigError(
                f"total: got update {step.index + 1}, expected {step.total} at most, as attach was "
                "told; detach before the next task, or attach with the number of all updates"
            )
        if len(self.known) == step.total:
            return
        problems = list(too_short(step.total, self.dense, self.count))
        if problems and not self.idle:
            raise ConfigError(problems)
        self.known = levels(step.total, self.dense, self.count, self.kappa_max)

    def _at(self, step: Step) -> float:
        self.begin(step)
        return self.known[step.index]

    @torch.no_grad()
    def after(self, step: Step) -> None:
        """Shrink all gates and all twins by the update's threshold."""
        super().after(step)
        if (threshold := self.threshold(step)) > 0:
            self.twins.shrink(threshold, self.form)

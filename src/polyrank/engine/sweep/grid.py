"""Learning rates anchor·10^{i/n} by their number i, so that a rate is known exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

# How many points a grid may grow by on each side.
EXTRA = 4
# Ends of a range belong to it, though 2e-4·10^{-4/4} is not quite 2e-5.
_SLACK = 1e-9


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Rates anchor·10^{i/per_decade} for i = first..last.

    Args:
        anchor: the rate of number 0, > 0.
        per_decade: points for a factor of ten, >= 1.
        first: number of the smallest rate.
        last: number of the largest rate; smaller than `first` if there is none.
    """

    anchor: float
    per_decade: int
    first: int
    last: int

    @classmethod
    def between(cls, low: float, high: float, *, per_decade: int, anchor: float) -> Grid:
        """Return the grid of all points in [low, high]."""
        first = math.ceil(per_decade * math.log10(low / anchor) - _SLACK)
        last = math.floor(per_decade * math.log10(high / anchor) + _SLACK)
        return cls(anchor=anchor, per_decade=per_decade, first=first, last=last)

    def rate(self, index: int) -> float:
        """Return the rate of a number, in full precision."""
        return self.anchor * 10 ** (index / self.per_decade)

    def rates(self) -> list[float]:
        """Return all rates, ascending."""
        return [self.rate(index) for index in self.indices()]

    def indices(self, below: int = 0, above: int = 0) -> range:
        """Return the numbers of all points, with so many more on each side."""
        return range(self.first - below, self.last + above + 1)

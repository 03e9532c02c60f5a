"""A method's own figures, ready to be shown: scale, words and the name of the file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyrank.io.runs import figure_files
from polyrank.reports import words


@dataclass(frozen=True)
class Heat:
    """One figure of one system; values are NaN where nothing was measured."""

    file: str
    system: str
    title: str
    rows: list[str]
    columns: list[str]
    values: np.ndarray
    unit: str
    note: str

    @property
    def low(self) -> float:
        """Where the scale begins: 0, or the lowest value if that is below."""
        return min(0.0, float(np.nanmin(self.values, initial=0.0)))

    @property
    def high(self) -> float:
        """Where the scale ends: the highest value, or 0 if that is above."""
        return max(0.0, float(np.nanmax(self.values, initial=0.0)))

    @property
    def gaps(self) -> bool:
        """Whether something was not measured."""
        return bool(np.isnan(self.values).any())

    def share(self, value: float) -> float:
        """Where a value lies between the ends of the scale, 0 if they are one."""
        return (value - self.low) / (self.high - self.low) if self.high > self.low else 0.0

    def text(self, value: float) -> str:
        """A value with as many digits as tell the figure's values apart; empty for NaN."""
        if math.isnan(value):
            return ""
        known = self.values[~np.isnan(self.values)]
        top = max(abs(self.low), abs(self.high))
        whole = bool((known == np.round(known)).all())
        # A last row of means does not make fractions of the counts above it.
        above = self.values[:-1][~np.isnan(self.values[:-1])]
        counts = above.size and bool((above == np.round(above)).all()) and value == round(value)
        digits = 0 if whole or counts or top >= 100 else 1 if top >= 10 else 2
        return words.fraction(value, digits)


def heats(results: Mapping[str, Any]) -> list[Heat]:
    """All figures of results.json, in the order of the systems."""
    return [
        Heat(
            file=file,
            system=system["label"],
            title=figure["title"],
            rows=words.trimmed(figure["rows"]),
            columns=words.trimmed(figure["columns"]),
            values=np.array(figure["values"], dtype=np.float64),
            unit=figure["unit"],
            note=figure["note"],
        )
        for file, (system, figure) in figure_files(results).items()
    ]

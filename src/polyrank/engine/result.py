"""What a run gives back."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyrank.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True, repr=False)
class Result:
    """Figures of one run, read from the same values that its folder holds.

    Attributes:
        path: the run folder.
        results: content of results.json, NaN for what was not measured.
        model: the adapted model of the method after the last task, in evaluation mode.
    """

    path: Path
    results: dict[str, Any]
    model: Any = None

    def __repr__(self) -> str:
        """Name the folder and the figure that counts, not a page of tables."""
        accuracy = self.metrics["average_accuracy"]
        label = self.system()["label"]
        return f"Result({label!r}, average_accuracy={accuracy:.3f}, {str(self.path)!r})"

    def system(self, name: str | None = None) -> dict[str, Any]:
        """Return one compared system by name; the method itself by default."""
        systems: list[dict[str, Any]] = self.results["systems"]
        names = [system["name"] for system in systems]
        if name is None:
            return next(system for system in systems if system["role"] == "method")
        if name not in names:
            raise ConfigError(
                f"system: got {name!r}, expected one of {', '.join(names)};"
                f"{nearest(name, names) or ' choose one'}"
            )
        return systems[names.index(name)]

    @property
    def matrix(self) -> np.ndarray:
        """Unrestricted accuracies (tasks, tasks): row after which task, column on which task."""
        return np.array(self.system()["unrestricted"], dtype=float)

    @property
    def restricted(self) -> np.ndarray:
        """The same among the classes of each task alone."""
        return np.array(self.system()["restricted"], dtype=float)

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the unrestricted matrix by name."""
        found: dict[str, float] = self.system()["metrics"]["unrestricted"]
        return found

    def report(self) -> Path:
        """Write report.html, matrix.png and matrix.csv into the folder; return the page's path."""
        # The one look upwards: reports read folders alone and must stay free of the engine.
        importlib.import_module("polyrank.reports").report(self.path)
        return self.path / "report.html"

"""What the page, the picture and the tables show, computed once from a run folder."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np

from polyrank import metrics
from polyrank.reports.heat import Heat, heats

# Metric name in results.json -> words for a heading, shown in this order.
WORDS = {
    "average_accuracy": "average accuracy",
    "average_incremental_accuracy": "average incremental accuracy",
    "forgetting": "forgetting",
    "global_forgetting": "global forgetting",
    "local_forgetting": "local forgetting",
    "backward_transfer": "backward transfer",
    "plasticity": "plasticity",
    "weighted_average_accuracy": "weighted average accuracy",
    "weighted_average_incremental_accuracy": "weighted average incremental accuracy",
    "intransigence": "intransigence",
    "forward_transfer": "forward transfer",
    "forward_transfer_gem": "forward transfer (GEM)",
}


@dataclass(frozen=True)
class System:
    """One system of the comparison, its matrices with NaN where nothing was measured."""

    name: str
    label: str
    role: str
    unrestricted: np.ndarray
    restricted: np.ndarray
    metrics: Mapping[str, Mapping[str, float]]
    curve: list[float]  # average accuracy after each task, NaN if a needed score is missing
    seconds: float | None
    trainable: int | None
    routing: Mapping[str, Any] | None
    general: tuple[float, ...] = ()  # held-out task, before the first task and after each
    extra_samples: float | None = None  # stored rows used for each update
    deploy: str = ""  # which of several models it is; its own one may have no name

    def metric(self, name: str, view: str = "unrestricted") -> float:
        """A metric's value, NaN if it was not computed."""
        return self.metrics[view].get(name, math.nan)


@dataclass(frozen=True)
class View:
    """A run as it is shown."""

    run: Mapping[str, Any]
    tasks: list[str]
    counts: list[int]
    systems: list[System]
    figures: list[Heat] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The label of the method that was asked for, else its name."""
        name = self.run["method"]["name"]
        return next((s.label for s in self.systems if s.name == name), name)

    @property
    def notes(self) -> list[str]:
        """Which model stands for a system that shows several."""
        return own_models(self.systems)

    @property
    def error(self) -> float:
        """Largest standard error of one accuracy, from the smallest test set: sqrt(1/4 / n)."""
        return 0.5 / math.sqrt(min(self.counts))

    @property
    def command(self) -> str:
        """The command that repeats the run, as one would type it."""
        words = [str(word) for word in self.run["command"]]
        if not words:
            return ""
        program = PurePath(words[0])
        if program.name == "__main__.py":
            words[:1] = ["python", "-m", program.parent.name]
        elif program.suffix == ".py":
            words.insert(0, "python")
        else:
            words[0] = program.name
        return shlex.join(words)

    @property
    def definitions(self) -> list[tuple[str, str]]:
        """Words and formula of every metric that a system reports."""
        used = {name for s in self.systems for name in s.metrics["unrestricted"]}
        formulas = metrics.definitions()
        return [(WORDS[name], formulas[name]) for name in WORDS if name in used]


def prepare(run: Mapping[str, Any], results: Mapping[str, Any]) -> View:
    """Prepare the contents of run.json and results.json, as `RunFolder` reads them."""
    return View(
        run=run,
        tasks=[task["name"] for task in results["tasks"]],
        counts=[task["n_test"] for task in results["tasks"]],
        systems=systems(results),
        figures=heats(results),
    )


def systems(results: Mapping[str, Any]) -> list[System]:
    """The systems of results.json in their order."""
    return [_system(system) for system in results["systems"]]


def own_models(shown: Sequence[System]) -> list[str]:
    """Say which model stands for a system that shows several."""
    several = {system.name.partition("@")[0] for system in shown if "@" in system.name}
    return [
        f"{s.label}: "
        + (f"the model {s.deploy!r}" if s.deploy else "the adapter as it is after its last phase")
        + "; the models in brackets were evaluated beside it."
        for s in shown
        if s.name in several
    ]


def _system(data: Mapping[str, Any]) -> System:
    unrestricted = np.array(data["unrestricted"], dtype=np.float64)
    return System(
        name=data["name"],
        label=data["label"],
        role=data["role"],
        unrestricted=unrestricted,
        restricted=np.array(data["restricted"], dtype=np.float64),
        metrics=data["metrics"],
        general=tuple(data.get("general") or ()),
        extra_samples=data.get("extra_samples"),
        deploy=data.get("deploy") or "",
        curve=[_average(unrestricted, k) for k in range(1, len(unrestricted) + 1)],
        seconds=data["seconds"],
        trainable=data["trainable"],
        routing=data["routing"],
    )


def _average(matrix: np.ndarray, k: int) -> float:
    # A reference trained once has only its last row; the gap is shown as a gap.
    if np.isnan(matrix[k - 1, :k]).any():
        return math.nan
    return metrics.average_accuracy(matrix, k, limits=(-math.inf, math.inf))

"""What a comparison shows: the systems of several run folders, each with its figures by seed."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyrank import metrics
from polyrank.errors import ConfigError, RunError, nearest
from polyrank.io import RunFolder
from polyrank.io.runs import RUN
from polyrank.reports.page import flat
from polyrank.reports.words import clipped

# Metrics of the headline matrix, and what is read beside it.
SCORES = ("average_accuracy", "forgetting", "backward_transfer", "average_incremental_accuracy")
GENERAL = "general_change"
COSTS = ("trainable", "seconds", "extra_samples")
# The same system in two runs must agree to this.
CLOSE = 1e-9
# Options of a stream that are no choice of its tasks: what was drawn, and where data lie.
_NO_CHOICE = frozenset({"seed", "root"})
# PEFT's word for no layer at all, in runs of methods that adapt blocks alone.
_NO_LAYERS = "dummy-target-modules"


@dataclass(frozen=True)
class Figures:
    """One system at one seed.

    Attributes:
        folder: of the run.
        views: kind of prediction to scores (tasks, tasks), NaN for what was not measured.
        values: by the names of `SCORES`, `GENERAL` and `COSTS`; NaN for what is not known.
        curve: headline average after each task.
    """

    folder: Path
    views: Mapping[str, np.ndarray]
    values: Mapping[str, float]
    curve: list[float]


@dataclass
class Compared:
    """One system over its seeds; `key` holds what makes it the same system in another run."""

    label: str
    name: str
    role: str
    key: Mapping[str, Any]
    seeds: dict[int, Figures]

    def by_seed(self, value: str) -> dict[int, float]:
        """The value at each seed, seeds ascending."""
        return {seed: self.seeds[seed].values[value] for seed in sorted(self.seeds)}


@dataclass(frozen=True)
class Comparison:
    """Everything that tables and picture need.

    Attributes:
        stream: name of the stream.
        scenario: its scenario.
        headline: kind of prediction that all figures are of.
        tasks: names of the tasks, or their numbers where the seeds order them differently.
        scored: names of the tasks' scores.
        systems: methods first, then references, in the order in which they were met.
        baseline: what differences are taken to.
        runs: names of the folders.
        notes: what the reader must know.
    """

    stream: str
    scenario: str
    headline: str
    tasks: list[str]
    scored: list[str]
    systems: list[Compared]
    baseline: Compared | None
    runs: list[str]
    notes: list[str]

    @property
    def seeds(self) -> list[int]:
        """All seeds, ascending."""
        return sorted({seed for system in self.systems for seed in system.seeds})

    @property
    def word(self) -> str:
        """What the score is called in headings."""
        return "accuracy" if self.scored == ["accuracy"] else "score"


def gather(
    paths: Iterable[str | os.PathLike[str]],
    baseline: str | None = None,
    *,
    restricted: bool = False,
) -> Comparison:
    """Read runs and put together what is the same system at several seeds.

    Args:
        paths: Run folders, or folders that hold some, at any depth.
        baseline: Label or name of a system; the sequential reference if left out.
        restricted: Whether to show predictions among a task's own classes, as a task-incremental
            stream always does.

    Raises:
        RunError: if there is no run, a run is not finished, or streams differ.
        ConfigError: if the baseline is none of the systems, or restricted predictions were asked
            for where they are no others.
    """
    folders = [RunFolder.open(path) for path in _folders([Path(path) for path in paths])]
    _finished(folders)
    _one_stream(folders)
    found = [(folder, folder.results()) for folder in folders]
    stream = folders[0].run["stream"]
    known = restricted or stream["scenario"] == "task-incremental"
    headline = "restricted" if known else "unrestricted"
    bases = _several_bases(folders)
    notes: list[str] = []
    systems: dict[str, Compared] = {}
    for folder, results in found:
        for entry in results["systems"]:
            key = _key(folder.run, entry, bases)
            system = systems.setdefault(
                json.dumps(key, sort_keys=True),
                Compared(entry["label"], entry["name"], entry["role"], key, {}),
            )
            figures = _figures(folder.path, entry, headline)
            notes += _added(system, folder.run["seed"], figures, results["tasks"])
    if restricted and all(np.isnan(f.views[headline]).all() for f in _all(systems.values())):
        raise ConfigError(
            f"restricted: stream {stream['name']!r} ({stream['scenario']}) has no restricted "
            "predictions, since all tasks share their classes; leave the option out"
        )
    ordered = sorted(systems.values(), key=lambda system: system.role != "method")
    _tell_apart(ordered)
    base = _baseline(ordered, baseline, notes)
    orders = {tuple(task["name"] for task in results["tasks"]) for _, results in found}
    numbers = [str(number) for number in range(1, len(found[0][1]["tasks"]) + 1)]
    scored = {t.get("metric", "accuracy") for _, results in found for t in results["tasks"]}
    return Comparison(
        stream=stream["name"],
        scenario=stream["scenario"],
        headline=headline,
        tasks=list(orders.pop()) if len(orders) == 1 else numbers,
        scored=sorted(scored),
        systems=ordered,
        baseline=base,
        runs=[folder.path.name for folder in folders],
        notes=[*notes, *_trained_differently(ordered)],
    )


def _all(systems: Iterable[Compared]) -> Iterator[Figures]:
    for system in systems:
        yield from system.seeds.values()


def _folders(paths: Sequence[Path]) -> list[Path]:
    """The run folders among and below the paths, each once, those below a path by name."""
    if not paths:
        raise RunError("runs: got none, expected at least one run folder; name one")
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise RunError(f"{path}: {what}, expected a run folder or a folder of runs; correct it")
        inside = list(_below(path))
        if not inside:
            raise RunError(
                f"{path}: holds no run at any depth, expected a run folder or a folder of runs; "
                "check the path"
            )
        for folder in inside:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _below(path: Path) -> Iterator[Path]:
    if (path / RUN).is_file():
        yield path
        return
    for child in sorted(path.iterdir()):
        if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
            yield from _below(child)


def _finished(folders: Sequence[RunFolder]) -> None:
    open_ones = [folder for folder in folders if folder.run["status"] != "done"]
    if open_ones:
        lines = [
            f"{folder.path}: is not finished (status {folder.run['status']!r}); "
            f"{_remedy(folder)}, or leave it out"
            for folder in open_ones
        ]
        raise RunError("\n".join(lines))


def _remedy(folder: RunFolder) -> str:
    waits = "wait for it, or " if folder.run["status"] == "running" else ""
    if folder.run["command"][:2] == ["polyrank", "run"]:
        return f"{waits}go on with `polyrank resume {folder.path}`"
    return f"{waits}go on by its call with out={str(folder.path)!r}"


def _one_stream(folders: Sequence[RunFolder]) -> None:
    first = folders[0]
    hashes: dict[int, RunFolder] = {}
    for folder in folders:
        here, there = _stream(folder.run), _stream(first.run)
        # Another name or scenario explains all other differences.
        named = [k for k in ("name", "scenario") if here.get(k) != there.get(k)]
        keys = named or sorted(k for k in {*here, *there} if here.get(k) != there.get(k))
        if not keys:
            earlier = hashes.setdefault(folder.run["seed"], folder)
            here, there = ({"hash": f.run["stream"].get("hash")} for f in (folder, earlier))
            keys = ["hash"] if here != there else []
        if keys:
            told = ", ".join(f"{k}: {here.get(k)} here, {there.get(k)} there" for k in keys[:3])
            raise RunError(
                f"{folder.path}: its stream is not that of {first.path} ({told}); compare runs of "
                "one stream at a time"
            )


def _stream(run: Mapping[str, Any]) -> dict[str, str]:
    stream = run["stream"]
    parts = {key: stream.get(key) for key in ("name", "scenario", "visible", "passes")}
    options = stream.get("options") or {}
    parts["options"] = {key: value for key, value in options.items() if key not in _NO_CHOICE}
    return {**dict(flat(parts)), "tasks": str(len(stream.get("tasks", ())))}


def _several_bases(folders: Sequence[RunFolder]) -> bool:
    """Whether weights of bases tell systems apart: else each seed may have made its own."""
    found: dict[int, set[str | None]] = {}
    for folder in folders:
        weights = folder.run["model"].get("fingerprint")
        found.setdefault(folder.run["seed"], set()).add(weights)
    return any(len(weights) > 1 for weights in found.values())


def _key(run: Mapping[str, Any], entry: Mapping[str, Any], bases: bool) -> dict[str, Any]:
    key: dict[str, Any] = {
        "label": entry["label"],
        "name": entry["name"],
        "role": entry["role"],
        "model": {k: v for k, v in run["model"].items() if bases or k != "fingerprint"},
    }
    # The probe reads frozen features; how the others train is nothing to it.
    if entry["name"] != "probe":
        targets = run.get("target_modules")
        key |= {"train": run["train"], "target_modules": None if targets == _NO_LAYERS else targets}
    if entry["role"] == "method":
        key |= {"method": run["method"], "strategies": run.get("strategies")}
    return key


def _added(
    system: Compared, seed: int, figures: Figures, tasks: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Add a system's figures unless its seed is there; yield how the two then differ."""
    shown = system.seeds.setdefault(seed, figures)
    if shown is not figures and (where := _unequal(shown, figures, [t["name"] for t in tasks])):
        yield (
            f"{system.label}, seed {seed}: {figures.folder.name} differs from "
            f"{shown.folder.name}, which is shown; {where}."
        )


def _figures(folder: Path, entry: Mapping[str, Any], headline: str) -> Figures:
    views = {v: np.array(entry[v], dtype=np.float64) for v in ("unrestricted", "restricted")}
    matrix = views[headline]
    found = entry["metrics"][headline]
    general = entry.get("general") or []
    values = {
        **{name: _number(found.get(name)) for name in SCORES},
        GENERAL: general[-1] - general[0] if len(general) > 1 else math.nan,
        **{name: _number(entry.get(name)) for name in COSTS},
    }
    return Figures(folder, views, values, [_average(matrix, k) for k in range(1, len(matrix) + 1)])


def _average(matrix: np.ndarray, k: int) -> float:
    # A reference trained once has only its last row; the gap is shown as a gap.
    if np.isnan(matrix[k - 1, :k]).any():
        return math.nan
    return metrics.average_accuracy(matrix, k, limits=(-math.inf, math.inf))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _unequal(first: Figures, second: Figures, tasks: Sequence[str]) -> str:
    """Where two runs of one system and seed differ first, in words; empty if they do not."""
    for view, here in second.views.items():
        there = first.views[view]
        far = np.abs(here - there) > CLOSE
        for i, j in np.argwhere(far | (np.isnan(here) != np.isnan(there))):
            pair = " against ".join(
                "nothing" if math.isnan(x) else f"{x:.9g}" for x in (here[i, j], there[i, j])
            )
            return f"{view} on {tasks[j]} after {tasks[i]}: {pair}"
    return ""


def _tell_apart(systems: Sequence[Compared]) -> None:
    """Give systems of one label the settings in which they differ as a part of it."""
    for label in {system.label for system in systems}:
        alike = [system for system in systems if system.label == label]
        if len(alike) < 2:
            continue
        facts = [dict(flat(system.key)) for system in alike]
        names = [
            name
            for name in dict.fromkeys(name for fact in facts for name in fact)
            if len({fact.get(name) for fact in facts}) > 1
        ]
        for system, fact in zip(alike, facts, strict=True):
            told = " ".join(
                f"{name.rpartition('.')[2]}={clipped(fact.get(name, '–'), 12)}" for name in names
            )
            system.label = f"{label} [{told}]"


def _trained_differently(systems: Sequence[Compared]) -> Iterator[str]:
    """Yield in what the training of systems differs, which is no merit of a method."""
    trained = [system for system in systems if "train" in system.key]
    parts = ("train", "model", "target_modules")
    facts = [dict(flat({key: system.key.get(key) for key in parts})) for system in trained]
    found = []
    for name in dict.fromkeys(name for fact in facts for name in fact):
        values: dict[str, list[Compared]] = {}
        for system, fact in zip(trained, facts, strict=True):
            if name == "target_modules" and system.key[name] is None:
                # That a method adapts blocks is the method's own.
                continue
            values.setdefault(fact.get(name, "–"), []).append(system)
        if len(values) > 1:
            # A name that stands at two values says nothing.
            names = [each for group in values.values() for each in {s.name for s in group}]
            told = [
                f"{clipped(value, 24)} ("
                + ", ".join(
                    dict.fromkeys(s.label if names.count(s.name) > 1 else s.name for s in group)
                )
                + ")"
                for value, group in values.items()
            ]
            word = name.removeprefix("train.").replace(".", " ")
            found.append(f"{word} {', '.join(told)}")
    if found:
        yield f"Trained differently: {'; '.join(found)}."


def _baseline(systems: Sequence[Compared], asked: str | None, notes: list[str]) -> Compared | None:
    wanted = "sequential" if asked is None else asked
    for found in (
        [system for system in systems if system.label == wanted],
        [system for system in systems if system.name == wanted],
    ):
        if len(found) == 1:
            return found[0]
        if found:
            several = f"{len(found)} systems are called {wanted!r}"
            choice = ", ".join(repr(system.label) for system in found)
            if asked is not None:
                raise ConfigError(f"baseline: {several}, expected one; use a label: {choice}")
            notes.append(
                f"No differences are shown: {several}; choose one by --baseline LABEL: {choice}."
            )
            return None
    labels = [system.label for system in systems]
    if asked is not None:
        raise ConfigError(
            f"baseline: got {asked!r}, expected one of {', '.join(map(repr, labels))};"
            f"{nearest(asked, [*labels, *(s.name for s in systems)]) or ' choose one'}"
        )
    choice = ", ".join(repr(label) for label in labels)
    notes.append(
        "No differences are shown: there is no sequential reference; choose what they are taken to "
        f"by --baseline LABEL, one of {choice}."
    )
    return None

"""The loop of a sweep: the next unfinished run, its line, and what is no longer needed deleted.

The loop keeps nothing in memory that the records do not hold, so a sweep that was killed anywhere
goes on by the same call.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyrank.engine.sweep.records import LOCK, RUNS, Line, Records, by_group
from polyrank.engine.sweep.schedule import Group, Point, Runs, missing, pending, rates
from polyrank.engine.sweep.select import best_of
from polyrank.errors import PolyrankError, RunError
from polyrank.io.files import write_json
from polyrank.io.runs import FOLDERS

# Makes, or continues, the run of a point in a folder; returns the end of its line.
One = Callable[[Point, Path], Mapping[str, Any]]
# What all methods have in common at one seed, by its key in a line.
SHARED = {"updates": "updates", "order": "data and settings", "base": "base model"}


def work(
    lock: Mapping[str, Any],
    folder: Path,
    one: One,
    *,
    keep: str = "best",
    say: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Make all runs that are left.

    Args:
        lock: what `spec.lock` is to hold, "groups" among it.
        folder: of the sweep.
        one: makes one run.
        keep: "best" deletes the weights of runs at other rates, "all" none.
        say: is told of every run.

    Returns:
        What went wrong in runs that ended with an error, a sentence each.

    Raises:
        RunError: if the folder holds something else or is in use, or if methods were not trained
            alike.
    """
    _check(folder)
    groups = [Group.read(values) for values in lock["groups"]]
    failed: dict[str, str] = {}
    with Records(folder) as records:
        write_json(folder / LOCK, lock)
        while True:
            runs = by_group(records.lines)
            if problems := unequal(groups, runs):
                raise RunError("\n".join(problems))
            if keep == "best":
                _delete_losers(groups, runs, folder)
            left = [point for point in pending(groups, runs) if point.id not in failed]
            if not left:
                break
            line = _line(left[0], folder, one)
            records.append(line)
            if line["state"] == "error":
                failed[left[0].id] = f"{_name(left[0])}: {line['error']}"
            say(f"{_name(left[0])}: {_said(line)}; {counted(len(left) - 1, 'run')} left")
    return list(failed.values())


def counted(number: int, word: str) -> str:
    """Return "1 run", "2 runs"."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def place(point: Point, folder: Path) -> Path:
    """Return the folder of one run."""
    return folder / "runs" / point.id


def unequal(groups: Sequence[Group], runs: Runs) -> list[str]:
    """Return where methods were not trained alike, as sentences.

    Runs of one seed, batch size and stage must agree in updates, data, settings and base model; a
    run that diverged may have stopped early, and its updates do not count.
    """
    return list(dict.fromkeys(_unequal(groups, runs)))


def _unequal(groups: Sequence[Group], runs: Runs) -> Iterator[str]:
    for key, what in SHARED.items():
        first: dict[tuple[Any, ...], tuple[str, Any]] = {}
        for group in groups:
            for (_, seed), line in sorted(runs.get(group.id, {}).items()):
                if line.get(key) is None or (key == "updates" and line["state"] != "ok"):
                    continue
                mark = (group.stage, group.axes.get("batch"), seed)
                name, value = first.setdefault(mark, (group.name, line[key]))
                if value != line[key]:
                    yield (
                        f"budget: {what}: got {line[key]} for {group.name!r} and {value} for "
                        f"{name!r} at seed {seed}, expected the same; sweep them in two files, or "
                        "give both the same phases"
                    )


def _check(folder: Path) -> None:
    """Refuse a folder that holds something else."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file, expected a folder; choose another by --out")
    names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if names and not names & {LOCK, RUNS}:
        shown = ", ".join(sorted(names)[:3])
        raise RunError(
            f"{folder}: holds files of something else ({shown}), expected a sweep, or nothing; "
            "choose another folder by --out"
        )


def _line(point: Point, folder: Path, one: One) -> Line:
    try:
        return {**point.line(), **one(point, place(point, folder))}
    except PolyrankError as error:
        # Anything else is a fault of the program or of the machine, and ends the sweep.
        return {**point.line(), "state": "error", "error": f"{type(error).__name__}: {error}"}


def _name(point: Point) -> str:
    probe = " (probe)" if point.group.stage == "probe" else ""
    return f"{point.group.name}{probe} lr={point.rate:.3g} seed {point.seed}"


def _said(line: Line) -> str:
    if line["state"] == "ok":
        return f"validation {line['validation']:.3f}"
    return f"{line['state']}: {line.get('why') or line.get('error')}"


def _delete_losers(groups: Sequence[Group], runs: Runs, folder: Path) -> None:
    """Delete the weights of runs at rates that can no longer become the best one."""
    for group in groups:
        own, tried = runs.get(group.id, {}), rates(group, groups, runs)
        ranking = best_of(own, tried, group.seeds)
        if group.stage == "full":
            losers = ranking[1:]
        else:
            losers = [] if missing(group, tried, own) else ranking
        for index in losers:
            for seed in group.seeds:
                run = place(Point(group=group, index=index, seed=seed), folder)
                for name in FOLDERS:
                    if (run / name).exists():
                        shutil.rmtree(run / name)

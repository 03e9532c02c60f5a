"""table.md, table.csv and lr.png of a learning-rate sweep, from spec.lock and runs.jsonl alone.

The order of the lines in runs.jsonl changes no byte of the tables.
"""

import csv
import io
import math
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from polyrank.engine.sweep.pace import level_of, reached
from polyrank.engine.sweep.records import LOCK, Line, by_group, read
from polyrank.engine.sweep.runner import unequal
from polyrank.engine.sweep.schedule import Group, Runs, rates
from polyrank.engine.sweep.select import Choice, choose
from polyrank.errors import RunError
from polyrank.io.files import read_json, write_bytes
from polyrank.metrics.statistics import Difference, mean, paired_difference, sample_deviation
from polyrank.reports import words
from polyrank.reports.sweep_notes import notes

_NONE = "–"
COLUMNS = (
    "method",
    "rank",
    "batch",
    "parameters",
    "rate",
    "validation",
    "validation_sd",
    "test",
    "test_sd",
    "test_low",
    "test_high",
    "difference",
    "difference_se",
    "marked",
    "plateau",
    "lowest_rate",
    "highest_rate",
    "rates",
    "level",
    "updates_to_level",
    "updates_to_level_sd",
    "runs_at_level",
    "at_edge",
    "one_rate",
    "probed",
    "diverged",
    "errors",
    "missing",
    "seeds",
    "seconds",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one value of the other axes.

    Attributes:
        group: its runs.
        choice: what was selected.
        difference: to the baseline on test, None for the baseline itself or without one.
        probe: the group and the choice of the probe before, None without one.
        level: loss that the baseline has after half of its updates, None without one.
        reached: for each seed, after how many updates the loss is that low; None if it never is.
    """

    group: Group
    choice: Choice
    difference: Difference | None = None
    probe: tuple[Group, Choice] | None = None
    level: float | None = None
    reached: tuple[int | None, ...] = ()

    @property
    def rate(self) -> float | None:
        """The selected rate."""
        return None if self.choice.best is None else self.group.grid.rate(self.choice.best)

    @property
    def arrived(self) -> list[float]:
        """Updates to the level of the runs that come to it."""
        return [float(count) for count in self.reached if count is not None]


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A sweep as it is shown.

    Attributes:
        lock: content of spec.lock.
        rows: of the table.
        unused: lines of runs.jsonl that belong to no group of the lock.
    """

    lock: Mapping[str, Any]
    rows: tuple[Row, ...]
    unused: int

    @property
    def baseline(self) -> str | None:
        """The entry that differences are taken to."""
        found: str | None = self.lock["baseline"]
        return found

    @property
    def score(self) -> str:
        """What rates are selected by, in words."""
        return f"{self.lock['score'].replace('_', ' ')} ({self.lock['view']})"


def report_sweep(path: str | os.PathLike[str]) -> tuple[Sheet, dict[str, Path]]:
    """Write table.md, table.csv and lr.png into the folder of a sweep, replacing older ones.

    Returns:
        (what is shown, file name to path).

    Raises:
        RunError: if the folder holds no sweep, or methods were not trained alike.
    """
    # Only here, as a picture takes a second to import and the tables need none.
    from polyrank.reports import sweep_picture

    folder, sheet = Path(path), prepare(path)
    made = {
        "table.md": markdown(sheet).encode(),
        "table.csv": table_csv(sheet).encode(),
        "lr.png": sweep_picture.draw(sheet),
    }
    return sheet, {name: write_bytes(folder / name, data) for name, data in made.items()}


def prepare(path: str | os.PathLike[str]) -> Sheet:
    """Read a sweep's folder.

    Raises:
        RunError: if it holds none, or methods were not trained alike.
    """
    folder = Path(path)
    if not (folder / LOCK).is_file():
        raise RunError(f"{folder}: holds no {LOCK}, so it is no sweep; check the path")
    return sheet_of(read_json(folder / LOCK), read(folder))


def sheet_of(lock: Mapping[str, Any], lines: Sequence[Line]) -> Sheet:
    """Select rates and compare methods, from the contents of spec.lock and runs.jsonl.

    Raises:
        RunError: if methods were not trained alike.
    """
    groups = [Group.read(values) for values in lock["groups"]]
    runs = by_group(lines)
    if problems := unequal(groups, runs):
        raise RunError("\n".join(problems))
    chosen = {group.id: _choice(group, groups, runs) for group in groups}
    by_id = {group.id: group for group in groups}
    rows = []
    for group in groups:
        if group.stage != "full":
            continue
        probe = None if group.probe is None else (by_id[group.probe], chosen[group.probe])
        same = [g for g in groups if g.stage == "full" and g.axes == group.axes]
        base = next((g for g in same if g.label == lock["baseline"]), None)
        found: dict[str, Any] = {} if base is None else _pace(chosen[group.id], chosen[base.id])
        if base not in (None, group):
            found["difference"] = _difference(group, base, chosen)
        rows.append(Row(group=group, choice=chosen[group.id], probe=probe, **found))
    unused = sum(line["group"] not in by_id for line in lines)
    return Sheet(lock=lock, rows=tuple(rows), unused=unused)


def _choice(group: Group, groups: Sequence[Group], runs: Runs) -> Choice:
    tried = rates(group, groups, runs)
    span: Sequence[int] = ()
    if group.probe is not None:
        before = next(other for other in groups if other.id == group.probe)
        span = rates(before, groups, runs)
    return choose(runs.get(group.id, {}), group.grid, tried, group.seeds, span)


def _difference(group: Group, base: Group, chosen: Mapping[str, Choice]) -> Difference | None:
    own, other = chosen[group.id], chosen[base.id]
    if own.best is None or other.best is None:
        return None
    first: dict[Hashable, float] = dict(zip(group.seeds, own.test, strict=True))
    second: dict[Hashable, float] = dict(zip(base.seeds, other.test, strict=True))
    return paired_difference(first, second)


def _pace(own: Choice, base: Choice) -> dict[str, Any]:
    level = level_of(base.curves)
    if level is None:
        return {}
    return {"level": level, "reached": tuple(reached(curve, level) for curve in own.curves)}


def cells(sheet: Sheet) -> list[list[str]]:
    """The table as text: the heads, then a list of cells for each row."""
    to = f" to {sheet.baseline}" if sheet.baseline else ""
    heads = ["method", "params", "best rate", "val", "test ± sd", f"Δ{to} ± SE", "plateau"]
    paced = ["updates to loss"] if any(row.level is not None for row in sheet.rows) else []
    rows = (_cells(row, paced=bool(paced)) for row in sheet.rows)
    return [[*heads, *paced, "flags", "time"], *rows]


def _cells(row: Row, *, paced: bool) -> list[str]:
    choice, rate = row.choice, row.rate
    if rate is None:
        return [row.group.name, *[_NONE] * (7 if paced else 6), _flags(row), _NONE]
    return [
        row.group.name,
        words.whole(choice.parameters),
        f"{rate:.2e}",
        words.fraction(mean(choice.validation)),
        _with(mean(choice.test), sample_deviation(choice.test)),
        _NONE if row.difference is None else _delta(row.difference),
        _NONE if choice.plateau is None else f"{choice.plateau:.3g}×",
        *([_arrival(row)] if paced else []),
        _flags(row),
        words.seconds(choice.seconds),
    ]


def _arrival(row: Row) -> str:
    """Mean and deviation of updates; only how many runs arrive, if some do not."""
    found, runs = row.arrived, len(row.reached)
    if not runs:
        return _NONE
    if len(found) < runs:
        return f"{len(found)} of {runs} runs"
    spread = sample_deviation(found)
    return f"{mean(found):.0f}" + ("" if math.isnan(spread) else f" ± {spread:.0f}")


def _with(value: float, spread: float) -> str:
    text = words.fraction(value)
    return text if math.isnan(spread) else f"{text} ± {words.fraction(spread)}"


def _delta(found: Difference) -> str:
    sign = "+" if found.mean >= 0.0005 else ""
    return f"{sign}{_with(found.mean, found.error)}" + ("*" if found.marked else "")


def _flags(row: Row) -> str:
    choice, found = row.choice, []
    if row.group.fixed is not None:
        found.append("one rate")
    if row.probe is not None:
        found.append("probed")
    if choice.at_edge:
        found.append("at edge")
    diverged = choice.diverged + (row.probe[1].diverged if row.probe else 0)
    absent = choice.missing + (row.probe[1].missing if row.probe else 0)
    errors = choice.errors + (row.probe[1].errors if row.probe else 0)
    found += [f"{n} {what}" for n, what in ((diverged, "diverged"), (errors, "failed")) if n]
    if absent or (choice.best is None and not absent):
        found.append(f"{absent} missing" if absent else "missing")
    return ", ".join(found)


def markdown(sheet: Sheet) -> str:
    """table.md: the table, and what its columns mean."""
    heads, *rows = [[cell.replace("|", "\\|") for cell in row] for row in cells(sheet)]
    lines = [
        f"# {sheet.lock['name']}",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'|'.join(['---'] * len(heads))}|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        *(f"- {note}" for note in notes(sheet)),
    ]
    return "\n".join(lines) + "\n"


def terminal_sweep(sheet: Sheet) -> Table:
    """The table for `Console().print`."""
    heads, *rows = cells(sheet)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, head in enumerate(heads):
        table.add_column(Text(head), justify="left" if number in (0, 7) else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def table_csv(sheet: Sheet) -> str:
    """table.csv: the table in full precision; empty where there is nothing."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in sheet.rows:
        found = _values(row)
        writer.writerow([_plain(found.get(name)) for name in COLUMNS])
    return sink.getvalue()


def _values(row: Row) -> dict[str, Any]:
    choice, found = row.choice, row.difference
    probe = row.probe[1] if row.probe else None
    counts = {
        name: getattr(choice, name) + (getattr(probe, name) if probe else 0)
        for name in ("diverged", "errors", "missing")
    }
    values: dict[str, Any] = {
        "method": row.group.label,
        **row.group.axes,
        "at_edge": choice.at_edge,
        "one_rate": row.group.fixed is not None,
        "probed": row.probe is not None,
        "seeds": len(row.group.seeds),
        **counts,
    }
    if choice.best is None:
        return values
    if found is not None:
        values |= {
            "difference": found.mean,
            "difference_se": found.error,
            "marked": found.marked,
        }
    tried = [row.group.grid.rate(level.index) for level in choice.levels]
    if row.level is not None:
        values |= {
            "level": row.level,
            "updates_to_level": mean(row.arrived),
            "updates_to_level_sd": sample_deviation(row.arrived),
            "runs_at_level": len(row.arrived),
        }
    return {
        **values,
        "parameters": choice.parameters,
        "rate": row.rate,
        "validation": mean(choice.validation),
        "validation_sd": sample_deviation(choice.validation),
        "test": mean(choice.test),
        "test_sd": sample_deviation(choice.test),
        "test_low": min(choice.test),
        "test_high": max(choice.test),
        "lowest_rate": tried[0],
        "highest_rate": tried[-1],
        "rates": len(tried),
        "plateau": choice.plateau,
        "seconds": choice.seconds,
    }


def _plain(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)

"""Reads the data of one task: its tables, which rows each role gets, and their labels by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from polyrank.errors import StreamError, nearest
from polyrank.streams import draw, loaders, templates
from polyrank.streams.kinds import KINDS
from polyrank.streams.loaders import Table
from polyrank.streams.review import source_of
from polyrank.streams.rows import Recipe
from polyrank.streams.scenarios import TRAINING_ROLES
from polyrank.streams.schema import ROLES, Part, TaskSpec, raw, shown


@dataclass(frozen=True)
class Piece:
    """Rows of a table, and the name of each one's label."""

    table: Table
    origin: np.ndarray
    names: np.ndarray | None

    def take(self, which: np.ndarray) -> "Piece":
        """The rows at these positions."""
        names = None if self.names is None else self.names[which]
        return replace(self, origin=self.origin[which], names=names)


@dataclass(frozen=True)
class Gathered:
    """One task before its classes are numbered."""

    name: str
    spec: TaskSpec
    columns: Mapping[str, str]
    labels: tuple[str, ...]
    parts: Mapping[str, Piece]
    domain: str | None = None


@dataclass
class Shelf:
    """Where data are looked for, and the tables that were read from there."""

    base: Path | None
    root: Path | None
    tables: dict[Any, Any] = field(default_factory=dict)

    def read(self, key: tuple[Any, ...], load: Callable[[], Any]) -> Any:
        """What is on the shelf under a key; it is loaded once."""
        if key not in self.tables:
            self.tables[key] = load()
        return self.tables[key]


def gather(task: TaskSpec, shelf: Shelf, seed: int) -> Gathered:
    """Read the data of a task.

    Raises:
        StreamError: with every fault, each beginning with the key it belongs to.
    """
    kind = KINDS[task.kind or ""]
    sources = _sources(task, shelf)
    columns = _columns(task, next(iter(sources.values()))[0])
    problems: list[str] = []
    for table, _ in sources.values():
        problems += _missing(task, columns, table)
    if problems:
        raise StreamError(list(dict.fromkeys(problems)))
    labels: tuple[str, ...] = ()
    names: dict[str, np.ndarray] = {}
    kept = {key: _kept(task, table) for key, (table, _) in sources.items()}
    if kind.labelled:
        labels, names = _labels(task, columns, {k: (t, kept[k]) for k, (t, _) in sources.items()})
        kept = {key: np.flatnonzero(names[key] != "") for key in kept}
    parts: dict[str, Piece] = {}
    for key, (table, roles) in sources.items():
        for role, origin in _drawn(task, key, kept[key], roles, names.get(key), seed).items():
            named = names[key][origin] if key in names else None
            parts[role] = Piece(table, origin, named)
    ordered = {role: parts[role] for role in ROLES if role in parts}
    return Gathered(task.name or "", task, columns, labels, ordered, task.domain)


def _sources(task: TaskSpec, shelf: Shelf) -> dict[str, tuple[Table, dict[str, Part]]]:
    """The tables by what the file calls them, each with the roles that read from it."""
    found: dict[str, tuple[Table, dict[str, Part]]] = {}
    named = task.roles or _default_roles(task, shelf)
    for role, part in named.items():
        source = source_of(task, role, part, shelf.base)
        if source not in found:
            try:
                found[source] = (_read(task, source, shelf), {})
            except StreamError as error:
                where = role if task.hub is None or role in task.roles else "hub"
                raise StreamError([f"{where}: {line}" for line in error.problems]) from error
        found[source][1][role] = part
    return found


def _default_roles(task: TaskSpec, shelf: Shelf) -> dict[str, Part]:
    if task.hub is not None:
        try:
            splits = _hub(task, shelf, None)
        except StreamError as error:
            raise StreamError([f"hub: {line}" for line in error.problems]) from error
        there, what = list(splits), f"splits of {task.hub!r}"
    else:
        folder = (shelf.base or Path()) / (task.path or "")
        there = [role for role in ROLES if folder.is_dir() and _entry(folder, role)]
        what = f"path: {task.path!r}"
        splits = {}
    roles = {role: Part() for role in ROLES if role in there}
    if not roles:
        got = f", got {', '.join(splits)}" if splits else ""
        raise StreamError(
            f"{what}: no role is named{got}; say which rows are which, for example "
            "train: 0.8 and test: 0.2"
        )
    return roles


def _read(task: TaskSpec, source: str, shelf: Shelf) -> Table:
    if task.hub is not None:
        splits = _hub(task, shelf, None if not task.roles else source)
        found: Table = splits[source]
        return found
    path = (shelf.base or Path()) / (task.path or "")
    if source:
        path = (_entry(path, source) if path.is_dir() else None) or path / source
    unit = task.sample_by or "line"
    key = (str(path), task.format, task.header, unit)
    table: Table = shelf.read(
        key, lambda: loaders.local(path, kind=task.format, header=task.header, unit=unit)
    )
    return table


def _hub(task: TaskSpec, shelf: Shelf, split: str | None) -> dict[str, Table]:
    key = ("hub", task.hub, task.config, task.revision, split)
    found: dict[str, Table] = shelf.read(
        key,
        lambda: loaders.hub(task.hub or "", task.config, task.revision, shelf.root, split),
    )
    return found


def _entry(folder: Path, name: str) -> Path | None:
    """A file or folder by its name, or by its name without the ending."""
    if (folder / name).exists():
        return folder / name
    fits = [p for p in sorted(folder.iterdir()) if p.stem == name and loaders.format_of(p)]
    return fits[0] if len(fits) == 1 else None


def _columns(task: TaskSpec, table: Table) -> dict[str, str]:
    """For each field its column: the one that is named, or one of the field's own name."""
    kind = KINDS[task.kind or ""]
    given = {} if task.columns is None else task.columns.model_dump(exclude_none=True)
    found: dict[str, str] = {}
    for name in (*kind.fields, *kind.optional):
        if name in given:
            found[name] = given[name]
        elif name in kind.fields or name in table.columns:
            found[name] = name
    return found


def _missing(task: TaskSpec, columns: Mapping[str, str], table: Table) -> list[str]:
    prompted = KINDS[task.kind or ""].prompted
    recipe = Recipe(
        kind=task.kind or "",
        task=0,
        columns=columns,
        prompt=task.prompt if prompted else None,
    )
    problems = []
    for place, name in recipe.missing(table.columns):
        hint = nearest(name, table.columns) or " correct the name"
        problems.append(
            f"{place}: got {name!r}, which is no column of {table.where}, expected one of "
            f"{', '.join(table.columns)};{hint}"
        )
    if prompted and task.prompt is None and not {"prompt", "text"} & set(columns):
        problems.append(
            f"prompt: is missing, expected a template with columns of {table.where} in it "
            f"({', '.join(table.columns)}); add it"
        )
    for name in task.where or ():
        if name not in table.columns:
            hint = nearest(name, table.columns) or " correct the name"
            problems.append(
                f"where.{name}: is no column of {table.where}, expected one of "
                f"{', '.join(table.columns)};{hint}"
            )
    return problems


def _kept(task: TaskSpec, table: Table) -> np.ndarray:
    kept = np.ones(len(table), dtype=bool)
    for name, values in (task.where or {}).items():
        kept &= np.array([raw(value) in values for value in table.column(name)], dtype=bool)
    return np.flatnonzero(kept)


def values(table: Table, name: str) -> list[Any]:
    """A column, or what a path such as `meta.label` finds in one."""
    if name in table.columns:
        return table.column(name)
    head = templates.column(name, table.columns) or name
    return [templates.lookup(name, {head: value}) for value in table.column(head)]


def _labels(
    task: TaskSpec, columns: Mapping[str, str], sources: Mapping[str, tuple[Table, np.ndarray]]
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """The label names in their order, and for each source the name of each row, "" for none."""
    codes = {key: [raw(v) for v in values(t, columns["label"])] for key, (t, _) in sources.items()}
    seen = {code for key, (_, rows) in sources.items() for code in (codes[key][i] for i in rows)}
    seen -= set(task.drop or ())
    if task.labels is None and "label_name" in columns:
        known = _by_column(columns, sources, codes)
    elif isinstance(task.labels, dict):
        known = task.labels
    else:
        known = _by_order(task.labels or _own_names(columns["label"], sources), seen)
    if unknown := sorted(seen - set(known)):
        names = ", ".join(dict.fromkeys(known.values()))
        raise StreamError(
            f"labels: got {', '.join(map(shown, unknown[:5]))} in column {columns['label']!r}, "
            f"expected one of {shown(names, 200)}; add them to `labels`, or list them in `drop`"
        )
    rows = {}
    for key, (_, kept) in sources.items():
        found = np.full(len(codes[key]), "", dtype=object)
        for i in kept:
            found[i] = known[codes[key][i]] if codes[key][i] in seen else ""
        rows[key] = found
    if task.labels is None:
        known = {code: name for code, name in known.items() if code in seen}
    return tuple(dict.fromkeys(known.values())), rows


def _own_names(
    column: str, sources: Mapping[str, tuple[Table, np.ndarray]]
) -> Sequence[str] | None:
    return next((t.names[column] for t, _ in sources.values() if column in t.names), None)


def _by_order(names: Sequence[str] | None, seen: set[str]) -> dict[str, str]:
    if names is None:
        return {code: code for code in _sorted(seen)}
    same = {name: name for name in names}
    numbered = {str(i): name for i, name in enumerate(names)}
    if len(names) == 2:
        numbered |= {"false": names[0], "true": names[1]}
    # Names come first where they are numbers themselves.
    return same if seen <= set(same) else {**same, **numbered}


def _by_column(
    columns: Mapping[str, str],
    sources: Mapping[str, tuple[Table, np.ndarray]],
    codes: Mapping[str, list[str]],
) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, (table, _) in sources.items():
        for code, name in zip(codes[key], values(table, columns["label_name"]), strict=True):
            if found.setdefault(code, raw(name)) != raw(name):
                raise StreamError(
                    f"columns.label_name: {code!r} is called {found[code]!r} and {raw(name)!r}, "
                    "expected one name for each label; correct the rows"
                )
    if len(set(found.values())) < len(found):
        double = sorted(n for n in found.values() if list(found.values()).count(n) > 1)
        raise StreamError(
            f"columns.label_name: two labels are called {double[0]!r}, expected names of their "
            "own; give them with `labels`"
        )
    return {code: found[code] for code in _sorted(found)}


def _sorted(codes: set[str] | dict[str, str]) -> list[str]:
    try:
        return sorted(codes, key=float)
    except ValueError:
        return sorted(codes)


def _drawn(
    task: TaskSpec,
    source: str,
    rows: np.ndarray,
    roles: Mapping[str, Part],
    names: np.ndarray | None,
    seed: int,
) -> dict[str, np.ndarray]:
    """The rows of each role: its fraction of the source, of which at most so many."""
    key = (seed, task.name or "")
    shares = {role: part.fraction for role, part in roles.items() if part.fraction is not None}
    shared = draw.fractions(rows, shares, *key, source) if shares else {}
    found = {}
    for role, part in roles.items():
        chosen = shared.get(role, rows)
        if part.per_class is not None and names is not None:
            classes = list(names[chosen])
            chosen = draw.per_class(chosen, classes, part.per_class, *key, role, "class")
        if part.rows is not None:
            chosen = draw.at_most(chosen, part.rows, *key, role, "rows")
        if role in TRAINING_ROLES:
            chosen = chosen[draw.permutation(len(chosen), *key, role, "order")]
        found[role] = chosen
    return found

"""Divides one source into tasks: by its classes, by rows, or by the values of a column."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from polyrank.errors import StreamError, nearest
from polyrank.streams import draw
from polyrank.streams.gather import Gathered, Piece, values
from polyrank.streams.scenarios import SCENARIOS, TRAINING_ROLES
from polyrank.streams.schema import Split, raw
from polyrank.streams.split import class_order, share_out


def divide(whole: Gathered, split: Split, scenario: str, seed: int) -> list[Gathered]:
    """The tasks of a source, in their order; together they have all of its rows.

    Raises:
        StreamError: if it cannot be divided so; the message begins with the key.
    """
    seed = seed if split.seed is None else split.seed
    if split.by == "label":
        return _by_label(whole, split, seed)
    if split.by == "rows":
        return _by_rows(whole, split.tasks or 1, seed)
    return _by_column(whole, split, scenario, seed)


def _by_label(whole: Gathered, split: Split, seed: int) -> list[Gathered]:
    shown = _ordered(whole.labels, split.order, seed)
    groups = _groups(shown, split.tasks or 1, split.remainder)
    home = {label: task for task, group in enumerate(groups) for label in group}
    places = {
        role: np.array([home[name] for name in _names(piece)], dtype=int)
        for role, piece in whole.parts.items()
    }
    for role in set(TRAINING_ROLES) & set(places):
        names = _names(whole.parts[role])
        places[role] = _blurred(names, places[role], split.blur, len(groups), (seed, role))
    made = []
    for task, group in enumerate(groups):
        parts = {
            role: p.take(np.flatnonzero(places[role] == task)) for role, p in whole.parts.items()
        }
        trained = {n for role in set(TRAINING_ROLES) & set(parts) for n in _names(parts[role])}
        labels = (*group, *(name for name in shown if name in trained - set(group)))
        made.append(replace(whole, name=_joined(group), labels=labels, parts=parts))
    return made


def _by_rows(whole: Gathered, tasks: int, seed: int) -> list[Gathered]:
    places = {}
    for role in set(TRAINING_ROLES) & set(whole.parts):
        piece = whole.parts[role]
        if len(piece.origin) < tasks:
            raise StreamError(
                f"split.tasks: got {tasks} for {len(piece.origin)} rows of role {role!r}, expected "
                "at least one row each; lower it"
            )
        places[role] = _dealt(piece, tasks, (seed, "rows", role))
    made = []
    for task in range(tasks):
        parts = {
            role: p.take(np.flatnonzero(places[role] == task)) if role in places else p
            for role, p in whole.parts.items()
        }
        made.append(replace(whole, name=f"part {task + 1}", parts=parts))
    return made


def _by_column(whole: Gathered, split: Split, scenario: str, seed: int) -> list[Gathered]:
    column = split.by
    for piece in whole.parts.values():
        if column not in piece.table.columns:
            known = ("label", "rows", *piece.table.columns)
            hint = nearest(column, known) or " correct the name"
            raise StreamError(
                f"split.by: got {column!r}, expected one of {', '.join(known)} of "
                f"{piece.table.where};{hint}"
            )
    found = {role: _column(piece, column) for role, piece in whole.parts.items()}
    training = [role for role in found if role in TRAINING_ROLES]
    there = sorted({value for role in training for value in found[role]})
    shown = _ordered(there, split.order, seed)
    made = []
    for group in _groups(shown, split.tasks or len(shown), split.remainder):
        parts = {
            role: piece.take(np.flatnonzero(np.isin(found[role], group)))
            for role, piece in whole.parts.items()
        }
        name = _joined(group)
        labels = whole.labels
        if SCENARIOS[scenario].classes != "equal" and labels:
            trained = {n for role in training for n in _names(parts[role])}
            labels = tuple(label for label in labels if label in trained)
        made.append(replace(whole, name=name, labels=labels, parts=parts, domain=name))
    return made


def _groups(shown: Sequence[str], tasks: int, remainder: str) -> list[list[str]]:
    try:
        sizes = share_out(len(shown), tasks, remainder)
    except StreamError as error:
        raise StreamError([f"split.{line}" for line in error.problems]) from error
    return [list(shown[a:b]) for a, b in pairwise(np.cumsum([0, *sizes]))]


def _ordered(known: Sequence[str], order: str | Sequence[str], seed: int) -> list[str]:
    if not isinstance(order, str):
        if set(order) != set(known) and set(order) == {str(i) for i in range(len(known))}:
            order = [known[int(number)] for number in order]
        if sorted(order) != sorted(known):
            odd = sorted(set(order) ^ set(known))
            raise StreamError(
                f"split.order: got {', '.join(order)}, expected all of {', '.join(known)} once; "
                f"add or drop {', '.join(odd)}"
            )
        return list(order)
    try:
        return [known[i] for i in class_order(len(known), order, seed)]
    except StreamError as error:
        raise StreamError([f"split.{line}" for line in error.problems]) from error


def _dealt(piece: Piece, tasks: int, key: tuple[int | str, ...]) -> np.ndarray:
    """Which task each row goes to: equally many to each, and of each class too."""
    names = _names(piece) if piece.names is not None else np.full(len(piece.origin), "", object)
    places, turn = np.zeros(len(names), dtype=int), 0
    for label in dict.fromkeys(names):
        rows = np.flatnonzero(names == label)
        drawn = rows[draw.permutation(len(rows), *key, str(label))]
        places[drawn] = (turn + np.arange(len(rows))) % tasks
        turn += len(rows)
    return places


def _blurred(
    names: np.ndarray, places: np.ndarray, blur: float, tasks: int, key: tuple[int | str, ...]
) -> np.ndarray:
    """Where rows go if a share of each class is moved to another task, one drawn for the class."""
    moved = places.copy()
    if not blur or tasks < 2:
        return moved
    for label in dict.fromkeys(names):
        rows = np.flatnonzero(names == label)
        drawn = rows[draw.permutation(len(rows), *key, "blur", str(label))]
        home = places[rows[0]]
        other = (home + 1 + draw.permutation(tasks - 1, *key, "task", str(label))[0]) % tasks
        moved[drawn[: round(blur * len(rows))]] = other
    return moved


def _names(piece: Piece) -> np.ndarray:
    return np.array([], dtype=object) if piece.names is None else piece.names


def _column(piece: Piece, name: str) -> np.ndarray:
    column = values(piece.table, name)
    return np.array([raw(column[i]) for i in piece.origin], dtype=object)


def _joined(names: Sequence[str]) -> str:
    """A short name for a group: all of it, or its first, last and size."""
    if len(names) <= 3:
        return "-".join(names)
    return f"{names[0]} … {names[-1]} ({len(names)})"

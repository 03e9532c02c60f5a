"""What makes a stream impossible to run; every fault is found before any work starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from polyrank.errors import nearest
from polyrank.streams.data import labels_of
from polyrank.streams.scenarios import HELD_OUT_ROLES, SCENARIOS, TRAINING_ROLES

if TYPE_CHECKING:
    from polyrank.streams.base import Stream, Task

# Small base models that a stream may be meant for.
BASES = ("", "vit", "minilm", "causal")
_ROLES = (*TRAINING_ROLES, *HELD_OUT_ROLES)
# Roles whose rows may show classes of earlier tasks.
_EARLIER = frozenset({"retain", "old", "test", "validation"})


def stream_problems(stream: Stream) -> list[str]:
    """Every fault, each with what was got, what was expected and a remedy."""
    tasks = stream.tasks
    if not tasks:
        return ["tasks: got none, expected at least one; add a task"]
    found = list(_order(tasks))
    if stream.passes is not None and (type(stream.passes) is not int or stream.passes < 1):
        found.append(f"passes: got {stream.passes!r}, expected at least 1; leave it out for any")
    relation = SCENARIOS[stream.scenario].classes
    seen: set[int] = set()
    for task in tasks:
        new = set(task.classes)
        found += [f"task {task.name!r}: {fault}" for fault in _task(task, stream.scenario, seen)]
        seen |= new
    found += _names(tasks, relation)
    found += _relation(tasks, relation, stream.scenario)
    for what, beside in (("pretraining", stream.pretraining), ("general", stream.general)):
        if beside is not None:
            faults = _task(beside, "base", set())
            found += [f"{what} {beside.name!r}: {fault}" for fault in faults]
    if stream.base not in BASES:
        hint = nearest(str(stream.base), BASES) or " leave it out"
        words = ", ".join(filter(None, BASES))
        found.append(f"base: got {stream.base!r}, expected one of {words};{hint}")
    return found


def _order(tasks: Sequence[Task]) -> Iterator[str]:
    indices = [task.index for task in tasks]
    if indices != list(range(len(tasks))):
        yield (
            f"task indices: got {indices}, expected 0..{len(tasks) - 1} in order; "
            "number the tasks by their position"
        )
    names = [task.name for task in tasks]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield f"task names: got {name!r} twice, expected unique names; rename one"


def _task(task: Task, scenario: str, seen: set[int]) -> Iterator[str]:
    if len(task.labels) != len(task.classes):
        yield (
            f"got {len(task.labels)} label names for {len(task.classes)} classes, expected one "
            "name per class; give the names in the order of the classes"
        )
    if any(type(c) is not int or c < 0 for c in task.classes):
        yield f"classes: got {task.classes}, expected whole numbers from 0; number the classes"
    elif len(set(task.classes)) != len(task.classes):
        yield f"classes: got {task.classes}, expected each class once; drop the repetition"
    else:
        fresh = sorted(set(task.classes) - seen)
        # Unlearning takes classes away in any order.
        if scenario != "unlearning" and fresh != list(range(len(seen), len(seen) + len(fresh))):
            yield (
                f"new classes: got {fresh}, expected {len(seen)}.."
                f"{len(seen) + len(fresh) - 1}; number classes in the order they are first seen"
            )
    yield from _roles(task, scenario)
    for role, rows in task.data.items():
        if role in _ROLES:
            earlier = seen if role in _EARLIER and scenario == "unlearning" else set()
            yield from _rows(task, role, len(rows), labels_of(rows), earlier)


def _roles(task: Task, scenario: str) -> Iterator[str]:
    for role in task.data:
        if role not in _ROLES:
            hint = nearest(role, _ROLES) or " rename it"
            yield f"role {role!r}: expected one of {', '.join(_ROLES)};{hint}"
    needed = {"unlearning": ("forget", "retain", "test"), "pretraining": ("text",)}
    for role in needed.get(scenario, ("train", "test")):
        if role not in task.data:
            yield f"role {role!r} is missing, got {sorted(task.data)}; add its data"


def _rows(
    task: Task, role: str, count: int, labels: np.ndarray | None, earlier: set[int]
) -> Iterator[str]:
    if count == 0:
        yield f"role {role!r}: got no rows, expected at least one; drop the task or the role"
        return
    if not task.classes:
        return
    if labels is None:
        yield f"role {role!r}: rows have no 'label', expected a class number; add the column"
        return
    if labels.dtype.kind not in "iu":
        yield f"role {role!r}: got labels of type {labels.dtype}, expected class numbers; map them"
        return
    found = {int(c) for c in np.unique(labels)}
    allowed = set(task.classes) | earlier
    if found - allowed:
        yield (
            f"role {role!r}: got labels {sorted(found - allowed)}, expected only "
            f"{sorted(allowed)}; move these rows to the task they belong to"
        )
    missing = sorted(set(task.classes) - found)
    if role == "train" and missing:
        yield f"role 'train': no row of classes {missing}; add rows or drop the classes"


def _names(tasks: Sequence[Task], relation: str) -> Iterator[str]:
    owner: dict[str, int] = {}
    for task in tasks:
        if len(task.labels) != len(task.classes):
            continue
        for name, number in zip(task.labels, task.classes, strict=True):
            if owner.setdefault(name, number) != number:
                yield (
                    f"class name {name!r}: got it for classes {owner[name]} and {number}, expected "
                    "one name per class; rename one"
                )
    numbers = {number: name for name, number in owner.items()}
    if len(numbers) != len(owner) and relation != "any":
        double = sorted(name for name, number in owner.items() if numbers[number] != name)
        yield f"class names: got {double} beside another name of the same class; use one name"


def _relation(tasks: Sequence[Task], relation: str, scenario: str) -> Iterator[str]:
    sets = [set(task.classes) for task in tasks]
    pairs = [(i, j) for j in range(len(sets)) for i in range(j)]
    if relation == "disjoint":
        for i, j in pairs:
            if both := sorted(sets[i] & sets[j]):
                yield (
                    f"tasks {tasks[i].name!r} and {tasks[j].name!r} share classes {both}, "
                    f"expected none in a {scenario} stream; split them, or declare 'blurry'"
                )
    elif relation == "equal":
        for j in range(1, len(sets)):
            if sets[j] != sets[0]:
                yield (
                    f"task {tasks[j].name!r} has classes {sorted(sets[j])}, expected those of the "
                    f"first task in a {scenario} stream, {sorted(sets[0])}; make them equal"
                )
    elif relation == "overlap" and len(sets) > 1:
        if not any(sets[i] & sets[j] for i, j in pairs):
            yield "no two tasks share a class, expected some in a blurry stream; declare another"
        if all(sets[i] == sets[j] for i, j in pairs):
            yield "all tasks have the same classes, expected different ones in a blurry stream"

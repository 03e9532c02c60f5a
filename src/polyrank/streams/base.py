"""The contract of a stream: ordered tasks, each with its data by role, checked when it is built."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

from polyrank.errors import StreamError, nearest
from polyrank.streams.checks import stream_problems
from polyrank.streams.data import Dataset, OnePass, fingerprint_of
from polyrank.streams.scenarios import SCENARIOS, TRAINING_ROLES, Visible


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """One task: its classes and its data by role.

    Args:
        index: Position in the stream, from 0.
        name: Short name for tables, unique in the stream.
        kind: What kind of task it is, one of `kinds.KINDS`; None if that is not known.
        labels: Name of each class, in the order of `classes`; empty for text.
        classes: Class numbers in the order in which the stream shows them first: a head that has
            grown to n classes has exactly the rows 0..n-1. Empty for text.
        data: Dataset of each role: "train", "validation", "test"; "forget", "retain", "old" for
            unlearning; "text" for pretraining.
        metric: Name of the score, of which more is better.
        prompt: Template that turns a row into text, for language models.
        domain: Name of the domain, for domain-incremental streams.
    """

    index: int
    name: str
    labels: tuple[str, ...]
    classes: tuple[int, ...]
    data: Mapping[str, Dataset]
    metric: str = "accuracy"
    prompt: str | None = None
    domain: str | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "data", MappingProxyType(dict(self.data)))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), _fields(self))

    def size(self, role: str) -> int:
        """Number of rows of a role, 0 if the task has none of it."""
        return len(self.data[role]) if role in self.data else 0

    def describe(self) -> dict[str, Any]:
        """Everything but the rows, for run.json and results.json."""
        return {
            "name": self.name,
            "kind": self.kind,
            "labels": list(self.labels),
            "classes": list(self.classes),
            "metric": self.metric,
            "prompt": self.prompt,
            "domain": self.domain,
            "n_train": sum(self.size(role) for role in TRAINING_ROLES),
            "n_validation": self.size("validation"),
            "n_test": self.size("test"),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """Tasks in their order; building one checks everything and reports all problems together.

    Args:
        name: Short name for tables.
        scenario: One of `SCENARIOS`.
        tasks: The tasks, indices 0..K-1.
        seed: What the order of classes and rows was drawn from, None if nothing was drawn.
        visible: What a method may depend on; the scenario's choice if left out.
        passes: How often a training row may be read; the scenario's choice if left out.
        pretraining: Data for a base model that is made on the spot, no part of the stream.
        general: Held-out rows that no task trains on, to see what a base model keeps of its
            general ability; may be `pretraining`.
        base: The small base model that the stream is meant for: "vit", "minilm", "causal", or ""
            if it names none.
        options: How the stream was made, for the record.

    Raises:
        StreamError: listing every fault.
    """

    name: str
    scenario: str
    tasks: tuple[Task, ...]
    seed: int | None = None
    visible: Visible = None  # type: ignore[assignment]  # filled in from the scenario
    passes: int | None = None
    pretraining: Task | None = None
    general: Task | None = None
    base: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kind = SCENARIOS.get(self.scenario)
        if kind is None:
            raise StreamError(
                f"stream {self.name!r}: scenario: got {self.scenario!r}, expected one of "
                f"{', '.join(SCENARIOS)};{nearest(self.scenario, SCENARIOS) or ' choose one'}"
            )
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "visible", self.visible or kind.visible)
        object.__setattr__(self, "passes", self.passes or kind.passes)
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))
        if problems := stream_problems(self):
            raise StreamError([f"stream {self.name!r}: {problem}" for problem in problems])
        if self.passes == 1:
            object.__setattr__(self, "tasks", tuple(map(_once, self.tasks)))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), _fields(self))

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __getitem__(self, index: int) -> Task:
        return self.tasks[index]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of every class of the stream, by class number."""
        names = {c: n for t in self.tasks for c, n in zip(t.classes, t.labels, strict=True)}
        return tuple(names[c] for c in sorted(names))

    def seen(self, index: int) -> tuple[int, ...]:
        """Classes of tasks 0..index, which are 0..n-1."""
        return tuple(sorted({c for task in self.tasks[: index + 1] for c in task.classes}))

    def task_id(self, index: int, when: str) -> int:
        """The id of a task as a method may see it, `when` is "train" or "test".

        Raises:
            StreamError: if the scenario hides it.
        """
        flags = {"train": self.visible.task_id_train, "test": self.visible.task_id_test}
        if not flags[when]:
            raise StreamError(
                f"stream {self.name!r}: the task id was asked for at {when}, but the scenario "
                f"{self.scenario!r} hides it; use a method that does not need it, or declare "
                f"visible=Visible(task_id_{when}=True)"
            )
        return self.tasks[index].index

    def fresh(self) -> "Stream":
        """The stream for another run: one that may be read once can be read once again."""
        return self if self.passes != 1 else dataclasses.replace(self)

    @cached_property
    def hash(self) -> str:
        """Checksum of scenario, tasks and every row; equal streams have equal hashes.

        The base model is no part of it.
        """
        parts = [_identity(task) for task in self.tasks]
        base = None if self.pretraining is None else _identity(self.pretraining)
        whole = [self.scenario, dataclasses.asdict(self.visible), self.passes, parts, base]
        general = None if self.general is None else _identity(self.general)
        if general not in (None, base):
            whole.append(general)
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Everything but the rows, for run.json."""
        return {
            "name": self.name,
            "scenario": self.scenario,
            "hash": self.hash,
            "seed": self.seed,
            "options": dict(self.options),
            "visible": dataclasses.asdict(self.visible),
            "passes": self.passes,
            "base": self.base,
            "general": None if self.general is None else self.general.describe(),
            "tasks": [task.describe() for task in self.tasks],
        }


def _identity(task: Task) -> dict[str, Any]:
    prints = {role: fingerprint_of(rows) for role, rows in task.data.items()}
    return {**task.describe(), "data": prints}


def _once(task: Task) -> Task:
    data = dict(task.data)
    for role in set(TRAINING_ROLES) & set(data):
        rows = data[role]
        inner = rows.inner if isinstance(rows, OnePass) else rows
        data[role] = OnePass(inner, f"task {task.name!r}, {role}")
    return dataclasses.replace(task, data=data)


def _fields(value: Task | Stream) -> dict[str, Any]:
    # A read-only view of a mapping cannot be pickled.
    parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {k: dict(v) if isinstance(v, MappingProxyType) else v for k, v in parts.items()}


def _rebuilt(kind: type, parts: dict[str, Any]) -> Any:
    return kind(**parts)

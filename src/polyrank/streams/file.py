r"""Streams from a YAML file: tasks named by files here or by data sets of the Hugging Face hub.

    name: shop
    kind: text-to-label
    scenario: text
    prompt: "{text}\nTopic ({options}):"
    tasks:
      - {name: news, path: news.jsonl, train: 0.8, test: 0.2}
      - {name: mail, train: mail/train.csv, test: mail/test.csv}
      - {name: wiki, hub: fancyzhx/dbpedia_14, columns: {text: content}}

Paths are relative to the file. `schema` lists the keys, `kinds` the kinds of tasks and what their
rows hold. Every fault is reported at once: those of the file itself together with those of all
local data that can be read; data of the hub are asked for only once the file has no fault.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polyrank.errors import StreamError, nearest
from polyrank.streams import draw
from polyrank.streams.base import Stream, Task
from polyrank.streams.data import Dataset
from polyrank.streams.divide import divide
from polyrank.streams.document import Faults, document
from polyrank.streams.gather import Gathered, Shelf, gather
from polyrank.streams.kinds import KINDS
from polyrank.streams.ready import FOLDER, ready
from polyrank.streams.review import review
from polyrank.streams.rows import FileRows, Recipe
from polyrank.streams.scenarios import SCENARIOS
from polyrank.streams.schema import Path as Key
from polyrank.streams.schema import TaskSpec, merged, read

CLASS_PROMPT = "a photo of a {label}."


class Outline(NamedTuple):
    """What a file says of a task, for people."""

    name: str
    kind: str
    metric: str
    labels: tuple[str, ...]
    source: str


class Definition:
    """A stream's file, read and checked but for the data.

    Attributes:
        path: The file.
        spec: What stands in it.
        faults: What is wrong with it.
        ready: Whether it is shipped with polyrank.
    """

    def __init__(self, path: Path, root: str | Path | None = None) -> None:
        self.path = path
        self.ready = path.parent == FOLDER
        self.faults = Faults(path.name)
        self.spec, found, self.faults.silent = read(document(path))
        for key, message in found:
            self.faults.note(key, message)
        self.root = self._root(root)
        for key, message in review(self.spec, self._base):
            self.faults.add(key, message)

    @classmethod
    def open(cls, source: str | Path, root: str | Path | None = None) -> "Definition":
        """Read a file, or the ready definition of that name.

        Raises:
            StreamError: if there is none, or it is no YAML.
        """
        return cls(ready().get(str(source), Path(source)), root)

    @property
    def name(self) -> str:
        """The stream's name, that of the file unless it says another."""
        return self.spec.name or self.path.stem

    @property
    def tasks(self) -> list[TaskSpec]:
        """The tasks as they are listed, each with what holds for all of them."""
        return [merged(self.spec, task) for task in self.spec.tasks or ()]

    @property
    def inner(self) -> "Definition":
        """The ready definition that the file uses with options of its own, else itself."""
        if self.faults.lines or self.spec.use not in ready():
            return self
        return Definition.open(self.spec.use or "", self.used.get("root", self.root))

    @property
    def used(self) -> dict[str, Any]:
        """The options for the stream that the file uses; a root starts from the file's folder."""
        options = dict(self.spec.options or {})
        if isinstance(options.get("root"), str):
            options["root"] = str(self.path.parent.absolute() / options["root"])
        return options

    @property
    def unread(self) -> bool:
        """Whether it is sound, but its data are at the hub or in a folder that is not named."""
        found = self.tasks or [merged(self.spec, TaskSpec())]
        remote = any(task.hub is not None for task in found)
        return self.root is None and (
            self.faults.keys == {("root",)} or (remote and not self.faults.lines)
        )

    def outlined(self) -> list[Outline]:
        """The tasks as far as they are known without their data."""
        split = self.spec.split
        name = "all" if split is None else f"{split.tasks or 'one'} by {split.by}"
        found = []
        for task in self.tasks or [merged(self.spec, TaskSpec(name=name))]:
            metric = task.metric or (KINDS[task.kind].metrics[0] if task.kind else "-")
            labels = task.labels.values() if isinstance(task.labels, dict) else task.labels or ()
            inner = "" if task.config is None else f" ({task.config})"
            files = dict.fromkeys(part.source for part in task.roles.values() if part.source)
            source = task.hub or task.path or ", ".join(files)
            found.append(
                Outline(task.name or "-", task.kind or "-", metric, tuple(labels), source + inner)
            )
        return found

    def stream(
        self, seed: int | None = None, order: str | int | Sequence[str] | None = None
    ) -> Stream:
        """Read the data and build the stream.

        Args:
            seed: Key of every draw, where the file names none.
            order: Instead of the file's: "listed", "seed", a key or number of its `orders`, or
                names of tasks.

        Raises:
            StreamError: with every fault.
        """
        spec = self.spec
        drawn_from = spec.seed if spec.seed is not None else seed or 0
        shelf = Shelf(self._base, self.root)
        keys, chosen = self._listed(order, drawn_from)
        pairs = zip(keys, chosen, strict=True)
        found = [self._gathered(key, task, shelf, drawn_from) for key, task in pairs]
        base = None
        if spec.pretraining is not None:
            task = merged(spec, spec.pretraining)
            base = self._gathered(("pretraining",), task, shelf, drawn_from)
        if spec.split is not None and not spec.tasks and found and found[0] is not None:
            found = list(self._divided(found[0], drawn_from))
        self.faults.stop()
        whole = [task for task in found if task is not None]
        return self._built(whole, base, drawn_from, order)

    def _listed(
        self, order: str | int | Sequence[str] | None, seed: int
    ) -> tuple[list[Key], list[TaskSpec]]:
        tasks = self.tasks
        if not tasks:
            if self.spec.split is None:
                return [], []
            return [()], [merged(self.spec, TaskSpec(name=self.name))]
        names = [task.name for task in tasks]
        if self.faults.lines:
            # What to build is in doubt: every task is read, to see what else is wrong.
            indices: Sequence[int] = range(len(tasks))
        else:
            indices = [names.index(n) for n in self._order(order, [n or "" for n in names], seed)]
        return [("tasks", i) for i in indices], [tasks[i] for i in indices]

    def _order(
        self, order: str | int | Sequence[str] | None, names: Sequence[str], seed: int
    ) -> Sequence[str]:
        orders = dict(self.spec.orders or {})
        asked: Any = self.spec.order if order is None else order
        if isinstance(asked, int):
            asked = str(asked)
        if isinstance(asked, str):
            if asked == "listed":
                return names
            if asked == "seed":
                return [names[i] for i in draw.permutation(len(names), seed, "tasks")]
            if asked not in orders:
                known = ("listed", "seed", *orders)
                raise StreamError(
                    f"order: got {asked!r}, expected one of {', '.join(known)};"
                    f"{nearest(asked, known) or ' choose one'}"
                )
            return orders[asked]
        odd = [name for name in asked if name not in names]
        if odd or not asked or len(set(asked)) != len(asked):
            raise StreamError(
                f"order: got {', '.join(map(str, asked)) or 'no names'}, expected names of tasks, "
                f"each at most once: {', '.join(names)}; correct it"
            )
        return list(asked)

    def _gathered(self, key: Key, task: TaskSpec, shelf: Shelf, seed: int) -> Gathered | None:
        """The data of a task, None if it has faults; the hub is left alone once there are any."""
        if self.faults.touch(key) or (self.faults.lines and task.hub and self.root is None):
            return None
        try:
            return gather(task, shelf, seed)
        except StreamError as error:
            self.faults.repeat(key, error)
            return None

    def _divided(self, whole: Gathered, seed: int) -> list[Gathered]:
        assert self.spec.split is not None
        if self.faults.lines or self.spec.scenario is None:
            return []
        try:
            return divide(whole, self.spec.split, self.spec.scenario, seed)
        except StreamError as error:
            self.faults.repeat((), error)
            return []

    def _built(
        self, found: Sequence[Gathered], base: Gathered | None, seed: int, order: Any
    ) -> Stream:
        spec = self.spec
        assert spec.scenario is not None
        numbers: dict[str, int] = {}
        tasks = [_task(i, task, numbers) for i, task in enumerate(found)]
        options: dict[str, Any] = {"file": self.path.name}
        if (asked := spec.order if order is None else order) != "listed":
            options["order"] = asked if isinstance(asked, str | int) else list(asked)
        visible = SCENARIOS[spec.scenario].visible
        if spec.visible is not None:
            visible = dataclasses.replace(visible, **spec.visible.model_dump(exclude_none=True))
        return Stream(
            name=self.name,
            scenario=spec.scenario,
            tasks=tuple(tasks),
            seed=seed,
            visible=visible,
            passes=spec.passes,
            pretraining=None if base is None else _task(0, base, {}),
            options=options,
        )

    def _root(self, given: str | Path | None) -> Path | None:
        if given is not None:
            root = Path(given).absolute()
        elif self.spec.root is not None:
            root = self.path.parent.absolute() / self.spec.root
        else:
            return None
        if not root.is_dir():
            self.faults.add(("root",), f"got {str(root)!r}, which is no folder; correct the path")
        return root

    @property
    def _base(self) -> Path | None:
        """What relative paths start from: the root, else the file's folder."""
        if self.root is not None:
            return self.root
        return None if self.ready else self.path.parent.absolute()


def _task(index: int, found: Gathered, numbers: dict[str, int]) -> Task:
    """A task with its classes numbered in the order in which the stream shows them first."""
    spec, kind = found.spec, KINDS[found.spec.kind or ""]
    for label in found.labels:
        numbers.setdefault(label, len(numbers))
    classes = tuple(numbers[label] for label in found.labels)
    prompt = spec.prompt
    if prompt is None and spec.kind == "image-text":
        prompt = CLASS_PROMPT
    recipe = Recipe(
        kind=spec.kind or "",
        task=index,
        columns=dict(found.columns),
        prompt=spec.prompt if kind.prompted else None,
        options=found.labels,
        channels=spec.channels or 3,
    )
    answers = dict(zip(classes, found.labels, strict=True))
    data: dict[str, Dataset] = {}
    for role, piece in found.parts.items():
        labels = None
        if piece.names is not None:
            labels = np.array([numbers[name] for name in piece.names], dtype=np.int64)
        data[role] = FileRows(piece.table, piece.origin, recipe, labels, answers)
    return Task(
        index=index,
        name=found.name,
        kind=spec.kind,
        labels=found.labels,
        classes=classes,
        data=data,
        metric=spec.metric or kind.metrics[0],
        prompt=prompt,
        domain=found.domain,
    )

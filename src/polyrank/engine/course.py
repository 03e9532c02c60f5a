"""One system's way through the stream: a state machine whose position can be saved anywhere.

    begin     the head grows; strategies, then the method, prepare
    work      phases and jobs of the method, then the jobs of strategies
    close     strategies finish, then the method; every task seen is evaluated

`begin` and `close` are repeated as a whole after a kill; `work` goes on from the update or the call
of a job that was saved last.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from polyrank.engine.data import train_rows
from polyrank.engine.marks import Marks
from polyrank.engine.phase import Training, first_rate, run_phase, updates
from polyrank.engine.reading import Reader
from polyrank.engine.replay import RowBuffer
from polyrank.engine.state import model_state, restore_model
from polyrank.engine.workshop import TaskWorkshop
from polyrank.errors import CheckpointError
from polyrank.frame import Boundary, Job, Phase
from polyrank.layers import adapter_of, grow_head
from polyrank.streams import Stream, Task

if TYPE_CHECKING:
    from polyrank.engine.plan import Plan, System
    from polyrank.engine.progress import Watch


@dataclass(kw_only=True)
class Services:
    """What the engine lends to every course.

    Attributes:
        pause: called where the state may be saved, or with True must be; it asks for the state only
            if it saves.
        reader: returns a reader of a course's own, given its model.
        general: scores a model on the held-out task, or None.
    """

    plan: Plan
    reader: Callable[[nn.Module], Reader]
    watch: Watch
    pause: Callable[..., None]
    general: Callable[[nn.Module], float] | None = None


class Course:
    """One system on its way.

    Args:
        services: the engine's.
        system: what goes through the stream.
        model: the adapted model.
    """

    def __init__(self, services: Services, system: System, model: nn.Module) -> None:
        self.services, self.system, self.model = services, system, model
        self.plan, self.reader = services.plan, services.reader(model)
        self.stream: Stream = self.plan.stream
        count = len(self.stream)
        everything = list(range(count))
        self.flowing = not self.stream.visible.boundary and not system.pooled
        whole = system.pooled or self.flowing
        self.groups = [everything] if whole else [[index] for index in everything]
        self.group, self.stage, self.owner = 0, "begin", 0
        self.states: list[dict[str, Any]] = []
        self.boundaries: list[Boundary] = []
        self.memories: dict[str, dict[str, Any]] = {}
        self.marks = Marks(self.plan, self.reader, services.watch, services.general)
        self.before: dict[str, float] = {}
        self.seconds, self.updates, self.absorbed = 0.0, 0, False
        # The most weights that a phase has trained: later ones may train fewer.
        self.trained = 0
        self.carried: dict[str, Any] | None = None
        self.phases: list[str] = []
        self.phase: dict[str, Any] | None = None
        self.buffer = self._buffer()
        self.started = time.perf_counter()

    # --- the whole way ---------------------------------------------------------------------------

    def run(self) -> None:
        """Go on to the end of the stream."""
        self.started = time.perf_counter()
        if self.group == 0 and self.stage == "begin":
            self.before = self.system.method.vital_sign(adapter_of(self.model))
            self.marks.score_general(self.model)
        while self.group < len(self.groups):
            if self.stage == "begin":
                self._begin()
            self._work()
            self._close()
            self.group, self.stage = self.group + 1, "begin"
            self.services.pause(self.state, True)

    def _begin(self) -> None:
        group = self.groups[self.group]
        self.boundaries = self._boundaries()
        self.states = [{} for _ in self.boundaries]
        self.owner, self.carried, self.phase, self.phases = 0, None, None, []
        for index in group:
            self.reader.see(self.stream[index])
        names = self._fresh_names(group)
        self.services.watch("task_start", {**self.where(), "classes": names})
        if names:
            grow_head(self.model, names, seed=self.plan.seed)
        workshop = self._workshop()
        # Strategies look at a start that is whole; a bank that grew wants another one.
        self._initialise(workshop)
        # Strategies first: they look at the model as the last task left it.
        for number in [*range(1, len(self.boundaries)), 0]:
            self.boundaries[number].start(self._shown(), workshop, self.states[number])
        self._initialise(workshop)
        self.absorbed |= workshop.absorbed
        self.stage = "work"

    def _initialise(self, workshop: TaskWorkshop) -> None:
        wants = self.system.method.starting().wants
        rate = self._first_rate(workshop) if "rate" in wants else self.plan.settings.lr
        if workshop.initialise(rate):
            self.services.watch("job", {**self.where(), "job": "start"})

    def _first_rate(self, workshop: TaskWorkshop) -> float:
        """Return the learning rate of the first update that moves anything."""
        settings = self.plan.settings
        # A copy of the state, so that the phase is given again when its time has come.
        state = copy.deepcopy(self.states[0])
        work = self.boundaries[0].next(self._shown(), workshop, state)
        phase = work if isinstance(work, Phase) else None
        rows = sum(len(train_rows(self.stream[i])) for i in self.groups[self.group])
        rows *= settings.epochs if self.flowing else 1
        steps = updates(rows, settings, phase, repeated=self.flowing)
        return first_rate(settings, steps, phase) or settings.lr

    def _work(self) -> None:
        workshop = self._workshop()
        while self.owner < len(self.boundaries):
            state = self.states[self.owner]
            before = copy.deepcopy(state)
            work = self.boundaries[self.owner].next(self._shown(), workshop, state)
            if work is None:
                self.owner += 1
            elif isinstance(work, Job):
                self._job(work, workshop, state)
            else:
                self._phase(work, workshop, before)
        self.absorbed |= workshop.absorbed

    def _job(self, job: Job, workshop: TaskWorkshop, state: dict[str, Any]) -> None:
        self.services.watch("job", {**self.where(), "job": job.name})
        while not job.step(workshop, state):
            self.services.pause(self.state)
        self.services.pause(self.state)

    def _phase(self, phase: Phase, workshop: TaskWorkshop, before: dict[str, Any]) -> None:
        owner, resume, self.phase = self.owner, self.phase, None
        if resume is not None and resume["phase"] != phase.name:
            raise CheckpointError(
                f"phase: the checkpoint stands in {resume['phase']!r}, but the boundary of "
                f"{self.system.method.name!r} gives {phase.name!r} from the same state; its next() "
                "must depend on the state alone"
            )
        boundary, after = self.boundaries[owner], self.states[owner]

        def kept(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            # `next` has marked the phase as given; a resumed run must be given it again.
            self.states[owner], self.phase = before, make()
            try:
                return self.state()
            finally:
                self.states[owner], self.phase = after, None

        training = Training(
            model=self.model,
            reader=self.reader,
            method=self.system.method,
            strategies=self.system.strategies,
            settings=self.plan.settings,
            parts=[train_rows(self.stream[index]) for index in self.groups[self.group]],
            task=self.groups[self.group][-1],
            shown=self._number(),
            seed=self.plan.seed,
            workshop=workshop,
            watch=self.services.watch,
            stepped=self._stepped,
            where=self.where(),
            hidden=not self.stream.visible.task_id_train,
            buffer=self.buffer,
            ends=self._part_done if self.flowing else None,
            carried=self.carried,
            names=tuple(self.phases),
            validate=self._validate(),
            check=lambda: boundary.check(workshop.checked, after),
            pause=lambda make: self.services.pause(lambda: kept(make)),
        )
        loss = run_phase(training, phase, resume)
        self.trained = max(self.trained, training.trained)
        self.carried = training.carried
        self.phases.append(phase.name)
        self.services.watch("task_end", {**self.where(), "phase": phase.name, "loss": loss})
        self.services.pause(self.state)

    def _close(self) -> None:
        group, workshop = self.groups[self.group], self._workshop()
        # Before anything is absorbed or redrawn.
        adapter = adapter_of(self.model)
        # A first task of a single class has nothing to learn, so that only the end tells.
        last = self.group == len(self.groups) - 1
        sign = adapter.check_alive(self.before) if last else adapter.method.vital_sign(adapter)
        self.services.watch("vital_sign", {**self.where(), **sign})
        strategies = [s for s in self.system.strategies if s.boundary() is not None]
        numbers = range(1, len(self.boundaries))
        for number in sorted(numbers, key=lambda n: strategies[n - 1].structural):
            self.boundaries[number].finish(self._shown(), workshop, self.states[number])
        self.boundaries[0].finish(self._shown(), workshop, self.states[0])
        self.absorbed |= workshop.absorbed
        if self.buffer is not None:
            self.buffer.close_task()
        if not self.flowing:
            self._score(group[-1])

    def closing(self) -> tuple[list[Boundary], TaskWorkshop]:
        """Return fresh boundaries, and the workshop of the last task, once the stream has ended.

        What they know is in `workshop.memory`, as in a course that was resumed at its end.
        """
        self.group = len(self.groups) - 1
        try:
            return self._boundaries(), self._workshop()
        finally:
            self.group += 1

    # --- what it looks like from outside ---------------------------------------------------------

    def where(self) -> dict[str, Any]:
        """Return system and task, for events."""
        names = [self.stream[index].name for index in self.groups[self.group]]
        return {"system": self.system.label, "task": " + ".join(names)}

    def extra_samples(self) -> float:
        """Return how many stored rows were used for each update."""
        return 0.0 if self.buffer is None else self.buffer.drawn / max(1, self.updates)

    def state(self) -> dict[str, Any]:
        """Return all that a resumed course needs."""
        return {
            "group": self.group,
            "stage": self.stage,
            "owner": self.owner,
            "states": list(self.states),
            "memories": self.memories,
            "marks": self.marks.state(),
            "before": self.before,
            "seconds": self.seconds + time.perf_counter() - self.started,
            "updates": self.updates,
            "trained": self.trained,
            "absorbed": self.absorbed,
            "carried": self.carried,
            "phase": self.phase,
            "phases": list(self.phases),
            "buffer": None if self.buffer is None else self.buffer.state(),
            "model": model_state(self.model, base=self.absorbed),
        }

    @classmethod
    def restored(
        cls, services: Services, system: System, base: nn.Module, state: dict[str, Any]
    ) -> Course:
        """Return a course that stands where `state` was taken.

        Args:
            services: the engine's.
            system: the same as then.
            base: a fresh copy of the same base model.
            state: what `state` gave.
        """
        device = next(base.parameters()).device
        course = cls(services, system, restore_model(base, state["model"]).to(device))
        course.group, course.stage, course.owner = state["group"], state["stage"], state["owner"]
        course.states, course.memories = state["states"], state["memories"]
        course.marks.restore(state["marks"])
        course.before, course.seconds = state["before"], state["seconds"]
        course.updates, course.trained = state["updates"], state.get("trained", 0)
        course.absorbed = state["absorbed"]
        course.carried, course.phase = state["carried"], state["phase"]
        course.phases = list(state.get("phases", ()))
        if course.buffer is not None:
            course.buffer.restore(state["buffer"])
        begun = course.groups[: course.group + (course.stage == "work")]
        for index in (i for group in begun for i in group):
            course.reader.see(course.stream[index])
        if course.stage == "work":
            course.boundaries = course._boundaries()
        return course

    # --- pieces ----------------------------------------------------------------------------------

    def _boundaries(self) -> list[Boundary]:
        found = [strategy.boundary() for strategy in self.system.strategies]
        return [self.system.method.boundary(), *(b for b in found if b is not None)]

    def _buffer(self) -> RowBuffer | None:
        wanted = [r for s in self.system.strategies if (r := s.replay()) is not None]
        if not wanted:
            return None
        parts = [train_rows(task) for task in self.stream]
        # Stored samples are the run's own copies: a stream that may be read once is not read again.
        inner = [getattr(part, "inner", part) for part in parts]
        rows = sum(map(len, parts))

        def read(task: int, row: int) -> dict[str, Any]:
            found: dict[str, Any] = inner[task][row]
            return found

        return RowBuffer(wanted[0], rows, read, self.reader.collate, self.plan.seed)

    def _number(self) -> int:
        """Return the task's number as the scenario shows it."""
        return self.groups[self.group][-1] if self.stream.visible.boundary else 0

    def _shown(self) -> Task | None:
        """Return the task as boundaries see it: none, where there are no boundaries to see."""
        return self.stream[self.groups[self.group][-1]] if self.stream.visible.boundary else None

    def _fresh_names(self, group: Sequence[int]) -> list[str]:
        """Return the head's new rows: classes that no task showed before, each by its own name."""
        if not self.reader.growing:
            return list(self.reader.outputs) if self.group == 0 else []
        seen = {c for g in self.groups[: self.group] for i in g for c in self.stream[i].classes}
        head = adapter_of(self.model).head
        taken = set() if head is None else set(head.names)
        names = []
        for task in (self.stream[index] for index in group):
            for number, label in zip(task.classes, task.labels, strict=True):
                if number in seen:
                    continue
                name = label if label not in taken else f"{task.name}/{label}"
                seen.add(number)
                taken.add(name)
                names.append(name)
        return names

    def _workshop(self) -> TaskWorkshop:
        group = self.groups[self.group]
        parts: dict[str, list[Any]] = {}
        for index in group:
            for role, rows in self.stream[index].data.items():
                parts.setdefault(role, []).append(rows)
        earlier = {c for g in self.groups[: self.group] for i in g for c in self.stream[i].classes}
        return TaskWorkshop(
            self.model,
            self.reader,
            parts,
            seed=self.plan.seed,
            task=self._number(),
            size=self.plan.settings.batch_size,
            memories=self.memories,
            buffer=self.buffer,
            classes=tuple(c for index in group for c in self.stream[index].classes),
            known=len(earlier),
            first=self.group == 0 and not self.flowing,
            flowing=self.flowing,
        )

    def _stepped(self) -> None:
        self.updates += 1

    def _validate(self) -> Callable[[], float] | None:
        tasks = [self.stream[i] for i in self.groups[self.group]]
        held = [task for task in tasks if task.size("validation")]
        if not held:
            return None

        def score() -> float:
            self.model.eval()
            size = self.plan.settings.eval_batch_size
            found = [
                self.reader.score(self.model, t, t.data["validation"], size).unrestricted
                for t in held
            ]
            return sum(found) / len(found)

        return score

    def _part_done(self, part: int) -> None:
        self._score(part)

    def _score(self, row: int) -> None:
        workshop = self._workshop()
        self.marks.score(self.model, row, self.boundaries, workshop, self.where())

"""What a run is decided by, checked before anything is loaded or written, and what it compares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from polyrank.engine.data import train_rows
from polyrank.engine.settings import Settings
from polyrank.errors import ConfigError, nearest
from polyrank.frame import Method, Strategy, combination_problems
from polyrank.frame import method as make
from polyrank.streams import SCENARIOS, Stream
from polyrank.streams import stream as find_stream
from polyrank.streams.kinds import METRICS

REFERENCES = ("sequential", "joint", "probe")


@dataclass(frozen=True, kw_only=True)
class System:
    """One of the compared systems."""

    name: str
    label: str
    role: str
    method: Method
    strategies: tuple[Strategy, ...] = ()

    @property
    def pooled(self) -> bool:
        """Whether all tasks are trained on at once."""
        return any(strategy.pools for strategy in self.strategies)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides a run, but for the base model."""

    stream: Stream
    method: Method
    strategies: tuple[Strategy, ...]
    references: tuple[str, ...]
    settings: Settings
    target_modules: list[str] | str | None
    seed: int
    validate: bool = False

    @classmethod
    def build(
        cls,
        stream: Stream | str,
        method: Method | str,
        strategies: Iterable[Strategy | str],
        references: Sequence[str] | None,
        train: Settings | dict[str, Any] | None,
        target_modules: list[str] | str | None,
        seed: int,
        validate: bool = False,
    ) -> Plan:
        """Look up what is given by name and check how all of it fits together.

        Raises:
            ConfigError: naming everything that does not.
        """
        problems: list[str] = []

        def found(make: Callable[..., Any], *words: Any, **options: Any) -> Any:
            try:
                return make(*words, **options)
            except ConfigError as error:
                problems.extend(error.problems)
                return None

        named = {"seed": seed} if isinstance(stream, str) else {}
        tasks = found(find_stream, stream, **named)
        chosen = found(make, method) if isinstance(method, str) else method
        combined = [found(make, s) if isinstance(s, str) else s for s in strategies]
        settings = (
            train if isinstance(train, Settings) else found(Settings.build, dict(train or {}))
        )
        problems += _kinds(chosen, combined)
        if references is None:
            references = REFERENCES if tasks is None else fitting(tasks)
        problems += unknown(references)
        plan = cls(
            stream=tasks,
            method=chosen,
            strategies=tuple(combined),
            references=tuple(references),
            settings=settings,
            target_modules=target_modules,
            seed=seed,
            validate=validate,
        )
        whole = isinstance(chosen, Method) and all(isinstance(s, Strategy) for s in combined)
        if whole and tasks is not None and settings is not None:
            problems += plan._problems()
        if problems:
            raise ConfigError(problems)
        return plan

    def _problems(self) -> Iterator[str]:
        stream = self.stream
        for entry in (self.method, *self.strategies):
            yield from (f"{entry.name}: {problem}" for problem in entry.checks())
        yield from (f"train: {problem}" for problem in self.settings.problems())
        if self.target_modules is not None and not self.method.linear:
            yield f"target_modules: {self.method.name} adapts no linear layers; leave it out"
        yield from combination_problems(self.method, self.strategies)
        if stream.scenario == "unlearning":
            yield f"stream: {stream.name!r} is {stream.scenario}, which has no engine yet"
        yield from self._readings()
        yield from self._lengths()
        offers = offered(stream)
        for entry in (self.method, *self.strategies):
            for need in sorted(entry.needs - offers):
                yield (
                    f"{entry.name}: needs {need.replace('_', ' ')}, which stream {stream.name!r} "
                    f"({stream.scenario}) does not give; choose another method or another stream"
                )
        if "probe" in self.references and "probe" not in fitting(stream):
            yield (
                f"references: the probe needs classes, and stream {stream.name!r} has none; "
                "leave it out"
            )
        if self.validate and (bare := [t.name for t in stream if not t.size("validation")]):
            yield (
                f"validate: tasks {', '.join(bare[:3])} have no validation rows; give the stream "
                "some, or leave validation out"
            )

    def _lengths(self) -> Iterator[str]:
        """Yield what finds a task too short; with several processes it may be shorter still."""
        entries = (self.method, *self.strategies)
        rows = {task.name: len(train_rows(task)) for task in self.stream}
        if any(strategy.pools for strategy in self.strategies):
            rows = {"all": sum(rows.values())}
        wanted = self.method.starting().samples
        if few := [name for name, count in rows.items() if count < wanted]:
            yield (
                f"{self.method.name}: its start looks at {wanted} rows, and task {few[0]!r} has "
                f"{rows[few[0]]}; let it look at fewer, or give the task more"
            )
        for entry in entries:
            yield from (f"{entry.name}: {p}" for p in entry.too_long(len(rows)))
        size = self.settings.batch_size * self.settings.accumulation
        updates = {name: -(-count // size) * self.settings.epochs for name, count in rows.items()}
        # Tasks of one length say the same.
        tasks = {count: name for name, count in reversed(updates.items())}
        for count, name in sorted(tasks.items()):
            for entry in entries:
                yield from (f"{entry.name}: task {name!r}: {p}" for p in entry.too_short(count))
        given = [*rows.items()]
        for first, part in ((True, given[:1]), (False, given[1:])):
            for count, name in sorted({count: name for name, count in reversed(part)}.items()):
                for entry in entries:
                    found = entry.too_few(count, first=first)
                    yield from (f"{entry.name}: task {name!r}: {p}" for p in found)

    def _readings(self) -> Iterator[str]:
        """Yield what would read a training row more often than the stream allows."""
        if self.stream.passes != 1:
            return
        if wants := self.method.starting().wants & {"weight_grad", "input", "output"}:
            yield (
                f"{self.method.name}: its start wants {', '.join(sorted(wants))}, and every row of "
                f"stream {self.stream.name!r} ({self.stream.scenario}) may be read once; choose "
                "another start or another stream"
            )
        if self.settings.epochs != 1:
            yield (
                f"train: epochs: got {self.settings.epochs}, but every row of stream "
                f"{self.stream.name!r} ({self.stream.scenario}) may be read once; use epochs=1"
            )

    def restricts(self) -> bool:
        """Say whether a choice among a task's own classes differs from one among all."""
        return SCENARIOS[self.stream.scenario].classes != "equal"

    def limits(self) -> tuple[float, float]:
        """Return the range of the stream's scores."""
        ranges = [METRICS[task.metric] for task in self.stream if task.metric in METRICS]
        if not ranges:
            return (0.0, 1.0)
        return min(low for low, _ in ranges), max(high for _, high in ranges)

    def systems(self) -> list[System]:
        """Return what is compared: the method, and LoRA of equal rank unless it is that itself."""
        method, active = self.method, getattr(self.method, "k", None)
        sized = f" r={method.r}" if method.sized else ""
        label = f"{method.name}{sized}" + (f" k={active}" if active else "")
        borrowed = (("start", method.init_by), ("optimiser", method.optim_by))
        label += "".join(f" + {word} {lender}" for word, lender in borrowed if lender)
        label += "".join(f" + {s.name}" for s in self.strategies)
        own = System(
            name=method.name,
            label=label,
            role="method",
            method=method,
            strategies=self.strategies,
        )
        found = [own]
        plain = cast("Method", make("lora", r=method.r))
        for name in ("sequential", "joint"):
            if name not in self.references:
                continue
            system = System(
                name=name,
                label=f"{name} lora r={method.r}",
                role="reference",
                method=plain,
                strategies=(cast("Strategy", make(name)),),
            )
            if self.strategies or method != plain or system.pooled != own.pooled:
                found.append(system)
        return found

    def record(self, model: dict[str, Any], targets: list[str] | str) -> dict[str, Any]:
        """Return what identifies the run in run.json; `model` describes the base."""
        return {
            "method": {"name": self.method.name, "options": self.method.options()},
            "strategies": [{"name": s.name, "options": s.options()} for s in self.strategies],
            "references": list(self.references),
            "stream": self.stream.describe(),
            "model": model,
            "target_modules": targets,
            "seed": self.seed,
            "train": asdict(self.settings),
            "validate": self.validate,
        }


def _kinds(method: Any, strategies: Sequence[Any]) -> Iterator[str]:
    """Yield what stands in the place of the other kind."""
    if method is not None and not isinstance(method, Method):
        what = getattr(method, "name", type(method).__name__)
        yield f"method: {what!r} is no method; strategies go into strategies=[...]"
    for entry in strategies:
        if entry is not None and not isinstance(entry, Strategy):
            what = getattr(entry, "name", type(entry).__name__)
            yield f"strategies: {what!r} is no strategy; a method goes into method=..."


def unknown(references: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for every reference that is none."""
    for name in references:
        if name not in REFERENCES:
            words = f"{', '.join(REFERENCES)};{nearest(name, REFERENCES) or ' choose one'}"
            yield f"references: got {name!r}, expected {words}"


def offered(stream: Stream) -> set[str]:
    """Return what a method may need of a stream."""
    offers = {"class_names", "replay"}
    if stream.visible.task_id_train and stream.visible.task_id_test:
        offers.add("task_id")
    if stream.visible.boundary:
        offers.add("boundary")
    if stream.passes is None:
        offers.add("passes")
    if all(task.classes for task in stream):
        offers.add("classes")
    if all(task.size("validation") for task in stream):
        offers.add("validation_rows")
    return offers


def fitting(stream: Stream) -> tuple[str, ...]:
    """Return the references that a stream has a meaning for."""
    labelled = all(task.classes for task in stream)
    return REFERENCES if labelled else ("sequential", "joint")

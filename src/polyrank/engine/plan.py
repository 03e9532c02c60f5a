"""What a run is decided by, checked before anything is loaded or written, and what it compares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from polyrank.engine.settings import Settings
from polyrank.errors import ConfigError, nearest
from polyrank.frame import Boundary, Method, Strategy
from polyrank.frame import method as make
from polyrank.streams import Stream
from polyrank.streams import stream as find_stream

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
    target_modules: list[str] | str
    seed: int

    @classmethod
    def build(
        cls,
        stream: Stream | str,
        method: Method | str,
        strategies: Iterable[Strategy | str],
        references: Sequence[str],
        train: Settings | dict[str, Any] | None,
        target_modules: list[str] | str,
        seed: int,
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
        problems += unknown(references)
        plan = cls(
            stream=tasks,
            method=chosen,
            strategies=tuple(combined),
            references=tuple(references),
            settings=settings,
            target_modules=target_modules,
            seed=seed,
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
        yield from _unserved(self.method)
        for strategy in self.strategies:
            yield from _unserved(strategy)
        if stream.scenario != "class-incremental":
            yield (
                f"stream: {stream.name!r} is {stream.scenario}; "
                "class-incremental streams can be run"
            )
        yield from _unfit(stream)
        offers = {"class_names"}
        if stream.visible.task_id_train and stream.visible.task_id_test:
            offers.add("task_id")
        for entry in (self.method, *self.strategies):
            for need in sorted(entry.needs - offers):
                yield (
                    f"{entry.name}: needs {need.replace('_', ' ')}, which stream {stream.name!r} "
                    f"({stream.scenario}) does not give; choose another method or another stream"
                )

    def systems(self) -> list[System]:
        """Return what is compared: the method, and LoRA of equal rank unless it is that itself."""
        method, active = self.method, getattr(self.method, "k", None)
        label = f"{method.name} r={method.r}" + (f" k={active}" if active else "")
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

    def record(self, model: dict[str, Any]) -> dict[str, Any]:
        """Return what identifies the run in run.json; `model` describes the base."""
        return {
            "method": {"name": self.method.name, "options": self.method.options()},
            "strategies": [{"name": s.name, "options": s.options()} for s in self.strategies],
            "references": list(self.references),
            "stream": self.stream.describe(),
            "model": model,
            "target_modules": self.target_modules,
            "seed": self.seed,
            "train": asdict(self.settings),
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
            words = f"{', '.join(REFERENCES)};{nearest(name, REFERENCES)}"
            yield f"references: got {name!r}, expected {words}"


def _unserved(entry: Method | Strategy) -> Iterator[str]:
    """Yield the slots that a method fills and this engine does not run yet: none is passed over."""
    if entry.losses():
        yield f"{entry.name}: fills the slot 'losses', which the engine does not evaluate yet"
    if not isinstance(entry, Method):
        return
    boundary = type(entry.boundary())
    for verb in ("check", "deploys"):
        if getattr(boundary, verb) is not getattr(Boundary, verb):
            yield f"{entry.name}: its boundary defines {verb!r}, which the engine does not call yet"
    if wants := entry.init().wants:
        yield (
            f"{entry.name}: its start wants {sorted(wants)}, which the engine does not gather yet"
        )


def _unfit(stream: Stream) -> Iterator[str]:
    """Yield what says that rows are not what models get here: "pixel_values", ready-made."""
    odd: dict[str, list[str]] = {}
    for task in stream:
        rows: Any = task.data.get("train")
        # A row of an online stream may be read once, and this look is none of its readings.
        rows = getattr(rows, "inner", rows)
        if rows is not None and "pixel_values" not in rows[0]:
            odd.setdefault(task.kind or "unknown", []).append(task.name)
    for kind, names in odd.items():
        yield (
            f"stream: {stream.name!r} has tasks of kind {kind} ({', '.join(names)}), whose rows "
            "are text or stored images; rows with pixel_values can be run, as those of digits"
        )

"""A sweep's file with everything in it looked up: the groups of runs, and what each trains."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from polyrank._version import __version__
from polyrank.engine.plan import Plan
from polyrank.engine.settings import Settings
from polyrank.engine.sweep.schedule import Group
from polyrank.engine.sweep.spec import Fault, Probe, Spec, load, told
from polyrank.errors import ConfigError
from polyrank.frame import Method, Strategy
from polyrank.frame import method as make
from polyrank.io import environment
from polyrank.io.files import plain, sha256_json
from polyrank.streams import Stream, names
from polyrank.streams import stream as find_stream
from polyrank.streams.schema import Path as Key

SCHEMA = 1
# Folders of the package that decide what a run gives.
_DECIDING = ("ops", "frame", "layers", "parts", "methods", "streams", "metrics", "engine")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the runs of a group train."""

    method: Method
    strategies: tuple[Strategy, ...]
    settings: Settings


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep, ready to be run.

    Attributes:
        path: the file.
        spec: what stands in it.
        groups: of runs.
        recipes: what a group trains, by its id.
        stream: for seed 0; other seeds draw another order of its rows.
        worst: the score of a run that diverged.
    """

    path: Path
    spec: Spec
    groups: tuple[Group, ...]
    recipes: dict[str, Recipe]
    stream: Stream
    worst: float

    def stream_for(self, seed: int) -> Stream:
        """Return the stream as a run with this seed sees it.

        General ability is left out: no table of a sweep shows it, and on small tasks measuring it
        takes as long as training.
        """
        return replace(find_stream(_source(self.spec, self.path), seed=seed), general=None)

    @property
    def model(self) -> str | None:
        """Folder or hub id of the base model."""
        if self.spec.model is None:
            return None
        beside = self.path.parent / self.spec.model
        return str(beside) if beside.is_dir() else self.spec.model

    def lock(self) -> dict[str, Any]:
        """Return the content of spec.lock: everything resolved, versions, hardware."""
        spec = self.spec.model_dump()
        return {
            "schema": SCHEMA,
            "name": self.path.stem,
            "spec": {**spec, "lr": {n: asdict(self.spec.grid(n)) for n in self.spec.methods}},
            "stream": self.stream.describe(),
            "worst": self.worst,
            "baseline": self.spec.reference,
            "score": self.spec.score,
            "view": self.spec.view,
            "groups": [group.plain() for group in self.groups],
            "code": code_version(),
            "versions": environment.versions(),
            "commit": environment.commit(),
            "hardware": environment.hardware(),
        }

    def updates(self, group: Group) -> int:
        """Return how many updates a run of a group makes, if its tasks have one phase each."""
        recipe = self.recipes[group.id]
        rows = recipe.settings.batch_size * recipe.settings.accumulation
        sizes = [task.size("train") for task in self.stream]
        if any(strategy.pools for strategy in recipe.strategies):
            sizes = [sum(sizes)]
        return sum(recipe.settings.epochs * -(-size // rows) for size in sizes)


def resolve(path: Path, *, probe: bool = False) -> Sweep:
    """Read a sweep's file and look up all that it names; nothing is loaded or written.

    Args:
        path: the file.
        probe: whether to probe even if the file does not say so.

    Raises:
        ConfigError: naming every fault, a line each.
    """
    spec, faults, silent = load(path)
    if probe and spec.probe is None:
        spec = spec.model_copy(update={"probe": Probe()})
    if () in silent:
        raise ConfigError(told(path, faults))
    found = _Finder(spec, path, faults)
    groups = list(found.groups())
    if found.faults:
        raise ConfigError(told(path, found.faults))
    assert found.stream is not None
    worst = found.plans[0].limits()[0]
    every = tuple(group for group, _ in groups)
    recipes = {group.id: recipe for group, recipe in groups}
    return Sweep(
        path=path, spec=spec, groups=every, recipes=recipes, stream=found.stream, worst=worst
    )


def code_version() -> str:
    """Return the version and a checksum of all sources that decide what a run gives."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for name in _DECIDING:
        for path in sorted((root / name).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"


def _source(spec: Spec, path: Path) -> str:
    beside = path.parent / spec.stream
    return spec.stream if spec.stream in names() or not beside.is_file() else str(beside)


class _Finder:
    """Looks up methods, strategies, settings and the stream, and notes every fault."""

    def __init__(self, spec: Spec, path: Path, faults: list[Fault]) -> None:
        self.spec, self.path, self.faults = spec, path, faults
        self.plans: list[Plan] = []
        self.known: dict[str, str] = {}
        self.stream: Stream | None = self._try(
            ("stream",), find_stream, _source(spec, path), seed=0
        )
        self.code = code_version()

    def _try(self, key: Key, find: Callable[..., Any], /, *words: Any, **options: Any) -> Any:
        try:
            return find(*words, **options)
        except ConfigError as error:
            self.faults += [(key, problem) for problem in error.problems]
            return None

    def groups(self) -> Iterator[tuple[Group, Recipe]]:
        """Yield every group with its recipe, a probe before the group that it is for."""
        if self.stream is not None:
            bare = [task.name for task in self.stream if not task.size("validation")]
            if bare:
                message = (
                    f"tasks {', '.join(bare)} have no validation rows, by which rates are to be "
                    "selected; divide the test rows in the stream's file: validation: {from: test, "
                    "fraction: 0.5}, test: {from: test, fraction: 0.5}"
                )
                self.faults.append((("stream",), message))
        for name, axes in product(self.spec.methods, self._axes()):
            recipe = self._recipe(name, axes)
            if recipe is None or self.faults:
                continue
            for group, made in self._staged(name, axes, recipe):
                same = self.known.setdefault(group.id, name)
                if same != name:
                    message = f"trains the same as {same!r}, expected another run; leave one out"
                    self.faults.append((("methods", name), message))
                yield group, made

    def _axes(self) -> list[dict[str, int]]:
        given = {k: v for k, v in self.spec.axes.model_dump().items() if v is not None}
        return [dict(zip(given, values, strict=True)) for values in product(*given.values())]

    def _recipe(self, name: str, axes: dict[str, int]) -> Recipe | None:
        entry, key = self.spec.methods[name], ("methods", name)
        rank = {"r": axes["rank"]} if "rank" in axes else {}
        batch = {"batch_size": axes["batch"]} if "batch" in axes else {}
        place = (*key, "options") if entry.options else key
        method = self._try(place, make, entry.method or name, **{**entry.options, **rank})
        strategies = [
            self._try((*key, "strategies"), make, word, **options)
            for word, options in entry.strategies
        ]
        train = {k: v for k, v in self.spec.train.items() if k != "lr"}
        settings = self._try((), Settings.build, {**train, **batch})
        if None in (method, settings, *strategies) or self.stream is None:
            return None
        plan = self._try(
            key,
            Plan.build,
            stream=self.stream,
            method=method,
            strategies=strategies,
            references=(),
            train=settings,
            target_modules=self.spec.target_modules,
            seed=0,
        )
        if plan is None:
            return None
        self.plans.append(plan)
        return Recipe(method=method, strategies=tuple(strategies), settings=settings)

    def _staged(
        self, name: str, axes: dict[str, int], recipe: Recipe
    ) -> Iterator[tuple[Group, Recipe]]:
        probe, grid = self.spec.probe, self.spec.grid(name)
        if probe is None or grid.first == grid.last:
            yield self._group(name, axes, recipe, "full"), recipe
            return
        settings = recipe.settings
        epochs = max(1, round(probe.share * settings.epochs))
        if epochs >= settings.epochs:
            message = f"got {settings.epochs} epochs, expected at least 2; leave probe out"
            self.faults.append((("train", "epochs"), message))
            return
        short = replace(recipe, settings=replace(settings, epochs=epochs))
        first = self._group(name, axes, short, "probe")
        yield first, short
        full = self._group(name, axes, recipe, "full")
        yield replace(full, extend=False, probe=first.id, points=probe.points), recipe

    def _group(self, name: str, axes: dict[str, int], recipe: Recipe, stage: str) -> Group:
        assert self.stream is not None
        grid = self.spec.grid(name)
        train = {k: v for k, v in asdict(recipe.settings).items() if k != "lr"}
        config = {
            "method": {"name": recipe.method.name, "options": recipe.method.options()},
            "strategies": [{"name": s.name, "options": s.options()} for s in recipe.strategies],
            "stream": {"name": self.stream.name, "hash": self.stream.hash},
            "model": self.spec.model,
            "target_modules": self.spec.target_modules,
            "train": train,
            "score": [self.spec.score, self.spec.view],
            "code": self.code,
            "sources": _sources([recipe.method, *recipe.strategies]),
        }
        return Group(
            id=sha256_json(config)[:16],
            label=name,
            stage=stage,
            grid=grid,
            seeds=self.spec.seeds,
            extend=self.spec.extend,
            axes=axes,
            config=plain(config),
            fixed=self.spec.reason(name) if grid.first == grid.last else None,
        )


def _sources(entries: Sequence[Any]) -> dict[str, str]:
    """Return checksums of the files of methods that are not polyrank's own."""
    foreign = [type(e) for e in entries if not type(e).__module__.startswith("polyrank.methods.")]
    files = {kind.__name__: inspect.getsourcefile(kind) for kind in foreign}
    return {
        name: hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
        for name, file in sorted(files.items())
        if file is not None
    }

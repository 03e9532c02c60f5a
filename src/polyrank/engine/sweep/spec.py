r"""What may stand in a sweep's YAML file; every fault with its key, all of them at once.

    stream: digits
    lr: {low: 3e-4, high: 3e-2}
    seeds: [0, 1, 2]
    train: {epochs: 5}

Methods:
      lora:
      smora: {options: {k: 4}, lr: {low: 1e-3}}
      lora-plus: {method: lora, options: {lr_ratio: 16}}
      sequential: {method: lora, strategies: [sequential]}
    axes: {rank: [4, 8]}

Methods train alike: the stream, the settings and the seeds stand once for all of them. Paths are
relative to the file.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainValidator

from polyrank.engine.fields import Named, Seed, combined, distinct, layers, numbers
from polyrank.engine.sweep.grid import Grid
from polyrank.errors import ConfigError, StreamError, nearest
from polyrank.streams.document import document
from polyrank.streams.schema import Count, Model, Word, read_as, refuse, shown, written
from polyrank.streams.schema import Path as Key

LOW, HIGH, PER_DECADE, ANCHOR = 1e-5, 2e-3, 4, 2e-4
SEEDS = (0, 1, 2)
# Of which more is better; the worst value of each is 0.
SCORES = (
    "average_accuracy",
    "average_incremental_accuracy",
    "weighted_average_accuracy",
    "weighted_average_incremental_accuracy",
)
VIEWS = ("unrestricted", "restricted")
KEEP = ("best", "all")
Fault = tuple[Key, str]


def _choice(known: tuple[str, ...]) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value not in known:
            hint = nearest(str(value), known) or " choose one"
            refuse(f"got {shown(value)}, expected one of {', '.join(known)};{hint}")
        return value

    return BeforeValidator(check)


def _empty(value: Any) -> Any:
    return {} if value is None else value


def _switch(value: Any) -> Any:
    return ({} if value else None) if isinstance(value, bool) else value


def _rates(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"low": value, "high": value, "anchor": value}
    return value


Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Rates(Model):
    """A range of learning rates; a number alone is one rate."""

    low: Rate | None = None
    high: Rate | None = None
    per_decade: int | None = Field(default=None, ge=2, le=8)
    anchor: Rate | None = None


class Entry(Model):
    """One method of the comparison.

    Args:
        method: its registered name; the entry's own if left out.
        options: of the method.
        strategies: combined with it, as names or {name: options}.
        lr: where its range differs from the common one.
        lr_fixed_because: why it has one rate.
    """

    method: Word | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    strategies: Annotated[Named, PlainValidator(combined)] = ()
    lr: Annotated[Rates, BeforeValidator(_rates)] = Rates()
    lr_fixed_because: Word | None = None


class Axes(Model):
    """Other axes, each combined with every method and with each other."""

    rank: Annotated[tuple[Count, ...] | None, BeforeValidator(distinct)] = None
    batch: Annotated[tuple[Count, ...] | None, BeforeValidator(distinct)] = None


class Probe(Model):
    """Short runs for the whole grid, full ones for the best points.

    Args:
        share: of the epochs that a short run gets, at least one of them.
        points: how many rates get full runs.
    """

    share: float = Field(default=0.1, gt=0, lt=1)
    points: Count = 3


class Spec(Model):
    """The whole file.

    Args:
        methods: what is compared, by the name that the table shows.
        stream: a name, or a YAML file.
        model: folder or hub id of the base; the stream's own small one if left out.
        target_modules: layers to adapt; what suits the stream's small base if left out.
        lr: common range of rates.
        lr_fixed_because: why methods have one rate.
        extend: whether a grid grows while its best point is at an edge.
        seeds: of the runs at each rate.
        train: settings of each task's training but the rate.
        axes: rank and batch size.
        baseline: entry that differences are taken to; "lora" if there is one.
        score: metric that rates are selected by.
        view: whether all classes compete, or those of the task alone.
        keep: "best" deletes adapters and checkpoints of other rates.
        probe: true, or its share and points.
    """

    methods: dict[Word, Annotated[Entry, BeforeValidator(_empty)]] = Field(default_factory=dict)
    stream: Word = "digits"
    model: Word | None = None
    target_modules: Annotated[str | list[str] | None, PlainValidator(layers)] = None
    lr: Annotated[Rates, BeforeValidator(_rates)] = Rates()
    lr_fixed_because: Word | None = None
    extend: bool = True
    seeds: Annotated[tuple[Seed, ...], BeforeValidator(distinct)] = SEEDS
    train: dict[str, Any] = Field(default_factory=dict)
    axes: Axes = Axes()
    baseline: Word | None = None
    score: Annotated[str, _choice(SCORES)] = SCORES[0]
    view: Annotated[str, _choice(VIEWS)] = VIEWS[0]
    keep: Annotated[str, _choice(KEEP)] = KEEP[0]
    probe: Annotated[Probe | None, BeforeValidator(_switch)] = None

    def asked(self, name: str) -> dict[str, Any]:
        """Return what the file says of a method's rates: its own where it has them, else common."""
        own = self.methods[name].lr.model_dump(exclude_none=True)
        return {**self.lr.model_dump(exclude_none=True), **own}

    def grid(self, name: str) -> Grid:
        """Return a method's grid: its own range where it has one, else the common one."""
        found = {"low": LOW, "high": HIGH, "per_decade": PER_DECADE, "anchor": ANCHOR}
        return Grid.between(**{**found, **self.asked(name)})

    def reason(self, name: str) -> str | None:
        """Return why a method has one rate, if that is said."""
        return self.methods[name].lr_fixed_because or self.lr_fixed_because

    @property
    def reference(self) -> str | None:
        """The entry that differences are taken to."""
        return self.baseline or ("lora" if "lora" in self.methods else None)


def load(path: Path) -> tuple[Spec, list[Fault], set[Key]]:
    """Read a file and check what can be checked without looking anything up.

    Returns:
        (the specification with what is at fault left out, faults, keys that nothing more is to be
        said about).

    Raises:
        ConfigError: if the file cannot be read or is no YAML.
    """
    try:
        found = numbers(document(path, "sweep"))
    except StreamError as error:
        raise ConfigError(error.problems) from error
    spec, faults, silent = read_as(Spec, found, "methods", _keys)
    if () in silent:
        return spec, faults, silent
    every = (fault for check in _CHECKS for fault in check(spec))
    known = {key[:n] for key in silent for n in range(1, len(key) + 1)}
    return spec, [*faults, *(fault for fault in every if fault[0] not in known)], silent


def told(path: Path, faults: list[Fault]) -> list[str]:
    """Return faults as lines: file, key, message."""
    lines = (": ".join(part for part in (path.name, written(k), m) if part) for k, m in faults)
    return list(dict.fromkeys(lines))


def _keys(where: Key) -> list[str]:
    inside: dict[str | int, type[Model]] = {"lr": Rates, "axes": Axes, "probe": Probe}
    entry = len(where) == 3 and where[0] == "methods"
    owner = where[-2] if len(where) > 1 else ""
    return list(inside.get(owner, Entry if entry else Spec).model_fields)


def _named(spec: Spec) -> Iterator[Fault]:
    if not spec.methods:
        yield ("methods",), "are missing; name at least one, such as `methods: {lora: , smora: }`"
    if spec.baseline is not None and spec.baseline not in spec.methods:
        hint = nearest(spec.baseline, spec.methods) or " choose one"
        names = ", ".join(spec.methods)
        yield ("baseline",), f"got {spec.baseline!r}, expected one of {names};{hint}"


def _ranges(spec: Spec) -> Iterator[Fault]:
    single = False
    for name, entry in spec.methods.items():
        own = entry.lr != Rates()
        key: Key = ("methods", name, "lr") if own else ("lr",)
        grid = spec.grid(name)
        if grid.last < grid.first:
            rate = grid.rate(grid.first)
            yield key, f"holds no point of the grid ({rate:.4g} is the next above); widen the range"
        elif grid.first == grid.last:
            single = True
            if spec.reason(name) is None:
                message = (
                    f"holds one rate ({grid.rate(grid.first):.4g}), at which methods cannot be "
                    'compared; widen the range, or say lr_fixed_because: "…", which is printed'
                )
                yield key, message
        if entry.lr_fixed_because and grid.first < grid.last:
            place = ("methods", name, "lr_fixed_because")
            yield place, f"{name} has several rates, expected one; leave it out"
    if spec.lr_fixed_because and spec.methods and not single:
        yield ("lr_fixed_because",), "every method has several rates, expected one; leave it out"


def _twice(spec: Spec) -> Iterator[Fault]:
    if "lr" in spec.train:
        rate = shown(spec.train["lr"])
        yield ("train", "lr"), f"got {rate}, but rates are swept; leave it out, and write lr: {{…}}"
    if spec.axes.batch and "batch_size" in spec.train:
        yield ("train", "batch_size"), "stands in axes.batch as well; leave one out"
    for name, entry in spec.methods.items():
        if spec.axes.rank and "r" in entry.options:
            yield ("methods", name, "options", "r"), "stands in axes.rank as well; leave one out"


_CHECKS = (_named, _ranges, _twice)

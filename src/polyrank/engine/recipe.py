"""A recipe: what `polyrank run` is asked for, in a YAML file; every fault with its key, at once.

    method: smora
    options: {r: 16, k: 4}
    strategies: [replay: {capacity: 0.1}]
    stream: digits
    train: {epochs: 15, lr: 3e-3}
    references: [sequential, probe]
    seeds: [0, 1, 2]
    smoke:
      train: {epochs: 1}
      seeds: [0]

What is left out is left to `polyrank run`. `smoke` overrides the rest for a run of a few seconds.
Paths are relative to the file.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainValidator

from polyrank.engine.fields import Named, Seed, combined, distinct, layers, numbers
from polyrank.errors import ConfigError, StreamError
from polyrank.streams.document import document
from polyrank.streams.schema import Model, Word, read_as, refuse, shown, written
from polyrank.streams.schema import Path as Key


def _references(value: Any) -> tuple[str, ...]:
    words = value if isinstance(value, list) else [value]
    if any(not isinstance(word, str) or not word for word in words):
        refuse(f"got {shown(value)}, expected names, or none; write [sequential, probe], or []")
    return tuple(word for word in words if word != "none")


class Wanted(Model):
    """What a run is asked for; None leaves it to the run.

    Args:
        method: registered name.
        options: of the method.
        strategies: combined with it, as names or {name: options}.
        stream: a name, or a YAML file.
        model: folder or hub id of the base.
        target: layers to adapt.
        train: settings of each task's training.
        references: what stands beside the method.
        seeds: keys of random draws; several make a run each.
    """

    method: Word | None = None
    options: dict[str, Any] | None = None
    strategies: Annotated[Named | None, PlainValidator(combined)] = None
    stream: Word | None = None
    model: Word | None = None
    target: Annotated[str | list[str] | None, PlainValidator(layers)] = None
    train: dict[str, Any] | None = None
    references: Annotated[tuple[str, ...] | None, PlainValidator(_references)] = None
    seeds: Annotated[tuple[Seed, ...] | None, BeforeValidator(distinct)] = None

    def over(self, other: "Wanted") -> "Wanted":
        """Return `other` with what is given here in its place.

        Options and settings are replaced one by one; another method takes its own options alone.
        """
        given = {key: getattr(self, key) for key in Wanted.model_fields}
        given = {key: value for key, value in given.items() if value is not None}
        same = self.method is None or _slug(self.method) == _slug(other.method or "")
        for key in ("options", "train"):
            old = getattr(other, key)
            if old and (key == "train" or same):
                given[key] = {**old, **given.get(key, {})}
            elif key == "options" and not same:
                given.setdefault(key, {})
        found = {key: getattr(other, key) for key in Wanted.model_fields}
        return Wanted.model_construct(**{**found, **given})


class Recipe(Wanted):
    """The whole file.

    Args:
        smoke: the same keys, for a run of a few seconds.
    """

    smoke: Wanted | None = None


def read(path: Path, *, smoke: bool = False) -> Wanted:
    """Read a recipe.

    Args:
        path: of the file.
        smoke: whether its `smoke` overrides the rest.

    Raises:
        ConfigError: if the file cannot be read, or naming every fault in it, a line each.
    """
    try:
        found = numbers(document(path, "recipe"))
    except StreamError as error:
        raise ConfigError(error.problems) from error
    recipe, faults, _ = read_as(Recipe, found, "method", _keys)
    if smoke and recipe.smoke is None and not faults:
        faults = [(("smoke",), "is missing, expected what differs in a short run; add it")]
    if faults:
        lines = (": ".join(part for part in (path.name, written(k), m) if part) for k, m in faults)
        raise ConfigError(list(dict.fromkeys(lines)))
    wanted = recipe.smoke.over(recipe) if smoke and recipe.smoke is not None else recipe
    return Wanted.model_construct(**{**dict(wanted.over(Wanted())), **_placed(wanted, path)})


def _placed(wanted: Wanted, path: Path) -> dict[str, str]:
    """Return a stream's file and a model's folder by their places beside the recipe."""
    found = {}
    if wanted.stream is not None and Path(wanted.stream).suffix.lower() in (".yaml", ".yml"):
        found["stream"] = str(path.parent / wanted.stream)
    if wanted.model is not None and (path.parent / wanted.model).is_dir():
        found["model"] = str(path.parent / wanted.model)
    return found


def _slug(name: str) -> str:
    # The registry's own would load torch, which faults of a file need not wait for.
    return name.strip().lower().replace("_", "-")


def _keys(where: Key) -> list[str]:
    inner = len(where) > 1 and where[0] == "smoke"
    return list((Wanted if inner else Recipe).model_fields)

"""Methods and strategies by name, found lazily: shipped, in entry points, in one's own file."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from dataclasses import MISSING, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from polyrank.errors import ConfigError, nearest
from polyrank.frame.method import Method, Strategy

GROUP = "polyrank.methods"
PACKAGE = "polyrank.methods"
Entry = type[Method] | type[Strategy]
T = TypeVar("T", bound=Entry)

_found: dict[str, Entry] = {}


def slug(name: str) -> str:
    """Return the registered spelling of a name: lower case with dashes."""
    return name.strip().lower().replace("_", "-")


def register(cls: T) -> T:
    """Register a method class under its file's stem.

    Raises:
        ConfigError: if another class holds the name.
    """
    name = slug(Path(inspect.getfile(cls)).stem)
    held = _found.get(name)
    if held is not None and (held.__module__, held.__qualname__) != (
        cls.__module__,
        cls.__qualname__,
    ):
        raise ConfigError(
            f"method {name!r}: registered twice, by {held.__module__} and by {cls.__module__}; "
            "rename one of the files"
        )
    cls.name = name
    _found[name] = cls
    return cls


def _shipped() -> list[str]:
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    return [
        slug(info.name) for info in pkgutil.iter_modules(places) if not info.name.startswith("_")
    ]


def names() -> list[str]:
    """Return all known names, sorted, without importing what they name."""
    installed = [slug(point.name) for point in entry_points(group=GROUP)]
    return sorted({*_shipped(), *installed, *_found})


def get(name: str) -> Entry:
    """Return the class registered under a name.

    Raises:
        ConfigError: if no method has the name; the nearest one is suggested.
    """
    key = slug(str(name))
    if key not in _found:
        if key in _shipped():
            importlib.import_module(f"{PACKAGE}.{key.replace('-', '_')}")
        else:
            for point in entry_points(group=GROUP):
                if slug(point.name) == key:
                    _found.setdefault(key, point.load())
                    _found[key].name = key
    if key not in _found:
        raise ConfigError(
            f"method: got {name!r}, expected one of {', '.join(names())};{nearest(key, names())} "
            "`polyrank methods` lists them, --method-file loads your own"
        )
    return _found[key]


def method(name: str, /, **options: Any) -> Any:
    """Build a method or strategy from its name and options, checking all of them at once.

    `preset` names a set of options that the class keeps; what is given beside it wins.

    Raises:
        ConfigError: naming every unknown option and every value out of range.
    """
    cls = get(name)
    known = {spec.name: spec for spec in fields(cls)}
    options, problems = _preset(cls, options)
    problems += [
        f"{cls.name}: unknown option {key!r}, expected one of {', '.join(known)};"
        f"{nearest(key, known) or ' choose one'}"
        for key in options
        if key not in known
    ]
    problems += [
        f"{cls.name}: option {key!r} is missing"
        for key, spec in known.items()
        if spec.default is MISSING and spec.default_factory is MISSING and key not in options
    ]
    if not any("is missing" in problem for problem in problems):
        made = cls(**{key: value for key, value in options.items() if key in known})
        problems += [f"{cls.name}: {problem}" for problem in made.checks()]
        if not problems:
            return made
    raise ConfigError(problems)


def _preset(cls: Entry, options: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the options with those of a preset below them, and what is wrong with it."""
    word, rest = options.get("preset"), {k: v for k, v in options.items() if k != "preset"}
    if word is None:
        return rest, []
    if isinstance(word, str) and word in cls.presets:
        return {**cls.presets[word], **rest}, []
    expected = f"one of {', '.join(cls.presets)};" if cls.presets else "none: it has no presets;"
    guess = nearest(str(word), cls.presets) or " leave it out and give the options"
    return rest, [f"{cls.name}: preset: got {word!r}, expected {expected}{guess}"]


def load_file(path: str | Path) -> Entry:
    """Import one's own method from a Python file and return its class.

    The file runs as code, so load only what you trust. It must hold one class marked with
    `@register`.

    Raises:
        ConfigError: if the file is missing, cannot be imported or registers nothing.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(
            f"method file: got {str(path)!r}, expected an existing .py file; check the path, "
            "or write a first one with `polyrank new-method NAME`"
        )
    name = slug(file.stem)
    if name in _shipped():
        raise ConfigError(
            f"method file: {file.name} has the name of a shipped method, {name!r}; rename the file"
        )
    module_name = f"polyrank_method_{name.replace('-', '_')}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(
            f"method file: got {file.name!r}, expected a Python file ending in .py; rename it"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(module_name, None)
        raise ConfigError(
            f"method file: {file.name} failed to import with {type(error).__name__}: {error}; "
            "run `python` on the file to see the traceback"
        ) from error
    if name not in _found:
        raise ConfigError(
            f"method file: {file.name} registers nothing under {name!r}; "
            "put @register from polyrank.frame above its dataclass"
        )
    return _found[name]

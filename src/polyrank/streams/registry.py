"""Streams by name, or from a file."""

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from polyrank.errors import StreamError, nearest
from polyrank.streams.base import Stream
from polyrank.streams.digits import digits
from polyrank.streams.ready import ready
from polyrank.streams.stdlib import stdlib
from polyrank.streams.stdlib_lm import stdlib_lm


@dataclass(frozen=True, kw_only=True)
class BuiltIn:
    """A stream whose data come with polyrank or what it needs: how to make it, and what it is."""

    make: Callable[..., Stream]
    scenario: str
    kind: str
    about: str


BUILT_IN: Mapping[str, BuiltIn] = MappingProxyType(
    {
        "digits": BuiltIn(
            make=digits,
            scenario="class-incremental",
            kind="image-classification",
            about="handwritten digits, installed with scikit-learn; no network",
        ),
        "stdlib": BuiltIn(
            make=stdlib,
            scenario="class-incremental",
            kind="sequence-classification",
            about="functions of Python's own library, by package; no network",
        ),
        "stdlib-lm": BuiltIn(
            make=stdlib_lm,
            scenario="text",
            kind="language-modelling",
            about="source code of Python's own library, by kind; no network",
        ),
    }
)
_FILES = (".yaml", ".yml", ".json", ".jsonl", ".csv", ".parquet", ".txt")
_OPTIONS = ("seed", "order", "root")


def names() -> list[str]:
    """The streams that `stream` knows by name: built-in ones first, then ready definitions."""
    return [*sorted(BUILT_IN), *sorted(ready())]


def stream(source: str | os.PathLike[str] | Stream, /, **options: Any) -> Stream:
    """A stream by its name or from its file, or the stream itself if it is one already.

    Args:
        source: A name of `names()`, the path of a YAML file as `file` describes it, or a `Stream`.
        **options: Of the named stream, for example `seed=1`. For a file or a ready definition
            `seed`, used where the file names none; `order`, one of its orders or names of tasks;
            `root`, a folder that holds copies of its data sets.

    Raises:
        StreamError: listing every fault.
    """
    known = ", ".join(names())
    if isinstance(source, Stream):
        if options:
            raise StreamError(
                f"stream {source.name!r}: got the options {sorted(options)} for a stream that is "
                "built already, expected none; build it with them"
            )
        return source
    if not isinstance(source, str | os.PathLike):
        raise StreamError(
            f"stream: got {type(source).__name__}, expected a name ({known}), a file or a Stream; "
            "build one with polyrank.streams.Stream"
        )
    word = os.fspath(source)
    if word in BUILT_IN:
        make = BUILT_IN[word].make
        _check(word, options, inspect.signature(make).parameters)
        return make(**options)
    if word in ready() or isinstance(source, os.PathLike) or _is_path(word):
        return _from_file(word, options)
    hint = nearest(word, names()) or " choose one"
    raise StreamError(f"stream: got {word!r}, expected a file or one of: {known};{hint}")


def _from_file(source: str, options: dict[str, Any]) -> Stream:
    # A built-in stream needs neither pydantic nor PyYAML.
    from polyrank.streams.file import Definition

    if source not in ready() and Path(source).suffix.lower() not in (".yaml", ".yml"):
        raise StreamError(
            f"stream: got the path {source!r}, expected a YAML file that describes the stream; "
            "name the data in one, `polyrank streams --help` shows how"
        )
    definition = Definition.open(source, options.get("root"))
    inner = definition.spec.use
    if inner is None or definition.faults.lines:
        _check(source, options, _OPTIONS)
        return definition.stream(options.get("seed"), options.get("order"))
    own = definition.used
    seed = definition.spec.seed if definition.spec.seed is not None else options.pop("seed", None)
    _check(source, options, ("seed",))
    if inner not in names():
        hint = nearest(inner, names()) or " choose one"
        raise StreamError(
            f"{definition.path.name}: use: got {inner!r}, expected one of {', '.join(names())};"
            f"{hint}"
        )
    made = stream(inner, **{**({} if seed is None else {"seed": seed}), **own})
    return made if definition.spec.name is None else replace(made, name=definition.spec.name)


def _check(source: str, options: dict[str, Any], accepted: Iterable[str]) -> None:
    accepted = list(accepted)
    unknown = [
        f"stream {source!r}: unknown option {key!r}, expected one of {', '.join(accepted)};"
        f"{nearest(key, accepted) or ' leave it out'}"
        for key in options
        if key not in accepted
    ]
    if unknown:
        raise StreamError(unknown)


def _is_path(source: str) -> bool:
    return "/" in source or os.sep in source or source.lower().endswith(_FILES)

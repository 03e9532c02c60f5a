"""Fields that the YAML files of the engine share: each refuses with what was got and expected."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from polyrank.streams.schema import refuse, shown

# YAML reads 1e-4 as text, since it wants a point.
_NUMBER = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Named = tuple[tuple[str, dict[str, Any]], ...]


def combined(value: Any) -> Named:
    """Names and options out of [a, b: {x: 1}] or {a: {}, b: {x: 1}}."""
    found: list[tuple[str, dict[str, Any]]] = []
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, str) and entry:
            found.append((entry, {}))
            continue
        pair = list(entry.items()) if isinstance(entry, dict) else []
        if len(pair) != 1 or not isinstance(pair[0][0], str) or not isinstance(pair[0][1], dict):
            refuse(f"got {shown(entry)}, expected a name, or name: options; write [a, b: {{x: 1}}]")
        found.append(pair[0])
    return tuple(found)


def layers(value: Any) -> Any:
    """A word of PEFT, or names of layers."""
    words = value if isinstance(value, list) and value else [value]
    if any(not isinstance(word, str) or not word for word in words):
        refuse(f"got {shown(value)}, expected names of layers; write all-linear, or [q, v]")
    return value


def distinct(value: Any) -> Any:
    """Numbers, each once."""
    if not isinstance(value, list) or not value:
        refuse(f"got {shown(value)}, expected a list of at least one number; write [0, 1, 2]")
    if double := [n for i, n in enumerate(value) if n in value[:i]]:
        refuse(f"got {double[0]} twice, expected each once; leave one out")
    return tuple(value)


def numbers(value: Any) -> Any:
    """What was read from a file, with 1e-4 as a number."""
    if isinstance(value, Mapping):
        return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [numbers(item) for item in value]
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value

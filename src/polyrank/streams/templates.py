r"""Templates such as "Title: {title}\nText: {text}": names in braces, and nothing else.

A name is a column, or a path into one: `{answers.text.0}` is the first entry of the list "text" of
the column "answers". Attributes of objects cannot be reached, format codes are refused; `{{` and
`}}` stand for braces.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from string import Formatter
from typing import Any


@cache
def parts(template: str) -> tuple[tuple[str, str | None], ...]:
    """The template as pairs of (text before, name or None).

    Raises:
        ValueError: if a brace is left open, a name is missing or has a format code.
    """
    try:
        found = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{error}; write {{{{ or }}}} for a brace that is meant as one") from None
    for _, name, code, conversion in found:
        if name == "":
            raise ValueError("{} names no column; write one between the braces")
        if code or conversion:
            raise ValueError(f"{{{name}}} has a format code; write the name alone")
    return tuple((before, name) for before, name, _, _ in found)


def names(template: str) -> list[str]:
    """The names that a template asks for, in their order."""
    return [name for _, name in parts(template) if name is not None]


def render(template: str, *sources: Mapping[str, Any]) -> str:
    """The template filled in; each name comes from the first source that has it.

    Raises:
        KeyError: with the name, if no source has it.
    """
    text = []
    for before, name in parts(template):
        text.append(before)
        if name is not None:
            value = lookup(name, *sources)
            if value is None:
                raise KeyError(name)
            text.append(str(value))
    return "".join(text)


def lookup(name: str, *sources: Mapping[str, Any]) -> Any:
    """The value of a name: an exact one first, then a path of keys and numbers.

    Raises:
        KeyError: if there is none.
    """
    for source in sources:
        if name in source:
            return source[name]
    head, *steps = name.split(".")
    for source in sources:
        if steps and head in source:
            return _walk(source[head], steps, name)
    raise KeyError(name)


def column(name: str, columns: Sequence[str]) -> str | None:
    """The column that a name begins at, None if there is no such column."""
    if name in columns:
        return name
    head = name.split(".")[0]
    return head if head in columns else None


def _walk(value: Any, steps: Sequence[str], name: str) -> Any:
    for step in steps:
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list | tuple) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise KeyError(name)
    return value

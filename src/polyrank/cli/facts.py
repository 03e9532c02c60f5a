"""What the docstrings of a method say of it: its summary and its options; and how it merges."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

# What a docstring is filled to where a terminal is wider: longer lines are hard to read.
WIDEST = 100


def summary(cls: Any) -> str:
    """Return the first sentence of the module that holds a method."""
    text = inspect.getdoc(sys.modules[cls.__module__]) or ""
    first = text.split("\n\n")[0].replace("\n", " ")
    return first.partition(": ")[2].rstrip(".") or text.split("\n")[0]


def description(cls: Any, width: int) -> str:
    """Return what the module that holds a method says, its paragraphs filled to a width."""
    text = inspect.getdoc(sys.modules[cls.__module__]) or ""
    return "\n".join(_filled(text.split("\n"), min(width, WIDEST)))


def _filled(lines: list[str], width: int) -> Iterator[str]:
    """Yield paragraphs, each a line and those after it that are indented, filled anew."""
    found: list[str] = []
    for line in lines:
        if found and found[-1] and line.startswith(" "):
            found[-1] += " " + line.strip()
        else:
            found.append(line)
    for number, paragraph in enumerate(found):
        # Neither a formula's minus nor a long path is a place to break.
        yield textwrap.fill(
            paragraph, width, subsequent_indent="    " if number else "",
            break_on_hyphens=False, break_long_words=False,
        )  # fmt: skip


def merging(cls: Any) -> str:
    """Return how the method's samples merge: one word, or several."""
    return ", ".join(sorted({sample.merges for sample in cls.samples()}))


def arguments(cls: Any) -> dict[str, str]:
    """Return the meaning of every option from the docstrings of the class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        block = (inspect.cleandoc(base.__doc__ or "").partition("Args:\n")[2]).split("\n\n")[0]
        key = ""
        for line in block.split("\n"):
            name, sign, text = line.strip().partition(": ")
            indent = len(line) - len(line.lstrip())
            if indent == 4 and sign and name.isidentifier():
                key, found[name] = name, text
            elif key and line.strip():
                found[key] += " " + line.strip()
    return found


def presets(cls: Any) -> list[str]:
    """Return one line for every named set of options."""
    return [
        f"preset={word}: " + " ".join(f"{key}={value}" for key, value in options.items())
        for word, options in cls.presets.items()
    ]

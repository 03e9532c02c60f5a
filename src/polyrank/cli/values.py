"""NAME=VALUE pairs of the command line, and flags that take several of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from polyrank.errors import ConfigError

# Options that take several values behind one flag, as in `--set r=16 k=4`.
MANY = ("--set", "--train", "--with", "--references", "--seed", "--target")

# The words of the command that is being run, for its record.
TYPED: list[str] = []


def value(text: str) -> Any:
    """Read a number, true, false, null, a JSON list or object; anything else is a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    try:
        return float(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def pairs(words: Iterable[str], flag: str) -> dict[str, Any]:
    """Turn ["r=16", "k=4"] into {"r": 16, "k": 4}.

    Raises:
        ConfigError: naming every word that is no pair, and every name given twice.
    """
    found: dict[str, Any] = {}
    problems = []
    for word in words:
        name, sign, text = word.partition("=")
        if not sign or not name.isidentifier():
            problems.append(
                f"{flag}: got {word!r}, expected NAME=VALUE, for example {flag} r=16 k=4"
            )
        elif name in found:
            problems.append(f"{flag}: {name!r} is given twice; leave one out")
        else:
            found[name] = value(text)
    if problems:
        raise ConfigError(problems)
    return found


def spread(arguments: Sequence[str]) -> list[str]:
    """Repeat a flag before each of its values: `--set r=16 k=4` becomes `--set r=16 --set k=4`.

    Raises:
        ConfigError: if such a flag has no value.
    """
    found: list[str] = []
    flag, used = None, True
    for word in [*arguments, "-"]:
        if word.startswith("-"):
            if not used:
                raise ConfigError(f"{flag}: got no value, expected at least one; or leave it out")
            flag = word if word in MANY else None
            used = flag is None
            if used:
                found.append(word)
        elif flag is not None:
            found += [flag, word]
            used = True
        else:
            found.append(word)
    return found[:-1]

"""NAME=VALUE pairs, wherever somebody types them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from polyrank.errors import ConfigError


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


def pairs(words: Iterable[str], where: str, example: str) -> dict[str, Any]:
    """Turn ["r=16", "k=4"] into {"r": 16, "k": 4}.

    Args:
        words: the pairs.
        where: what they were given to, for the message.
        example: how it is written, for the message.

    Raises:
        ConfigError: naming every word that is no pair, and every name given twice.
    """
    found: dict[str, Any] = {}
    problems = []
    for word in words:
        name, sign, text = word.strip().partition("=")
        if not sign or not name.isidentifier():
            problems.append(f"{where}: got {word!r}, expected NAME=VALUE, for example {example}")
        elif name in found:
            problems.append(f"{where}: {name!r} is given twice; leave one out")
        else:
            found[name] = value(text)
    if problems:
        raise ConfigError(problems)
    return found


def split(text: str) -> list[str]:
    """Split at commas that stand outside of brackets and double quotes."""
    parts, depth, quoted, escaped = [""], 0, False, False
    for letter in text:
        if letter == "," and not depth and not quoted:
            parts.append("")
            continue
        if letter == '"' and not escaped:
            quoted = not quoted
        elif not quoted:
            depth += (letter in "[{") - (letter in "]}" and depth > 0)
        escaped = letter == "\\" and not escaped
        parts[-1] += letter
    return parts


def worded(text: str, where: str = "") -> tuple[str, dict[str, Any]]:
    """Split "lora-ga:direction=ArBr,gamma=64" into a name and its options.

    Args:
        text: the words.
        where: what they were given to, for the message; the name itself unless told.

    Raises:
        ConfigError: naming every part that is no pair, and every option given twice.
    """
    name, _, rest = text.partition(":")
    name = name.strip()
    example = f"{name}:option=value,option=value"
    return name, pairs(split(rest), where or name, example) if rest else {}

"""Methods as words: NAME:OPTION=VALUE,OPTION=VALUE."""

from __future__ import annotations

import json
from typing import Any

from polyrank.errors import ConfigError


def worded(text: str) -> tuple[str, dict[str, Any]]:
    """Split "lora-ga:direction=ArBr,gamma=64" into a name and its options.

    A value is a number, true, false, null, a JSON list or object; anything else is a string.

    Raises:
        ConfigError: naming every part that is no pair, and every option given twice.
    """
    name, _, rest = text.partition(":")
    found: dict[str, Any] = {}
    problems = []
    for part in split(rest) if rest else ():
        key, sign, value = part.strip().partition("=")
        if not sign or not key.isidentifier():
            problems.append(
                f"got {part!r}, expected OPTION=VALUE; write {name}:option=value,option=value"
            )
        elif key in found:
            problems.append(f"{key!r} is given twice; leave one out")
        else:
            found[key] = _value(value)
    if problems:
        raise ConfigError(problems)
    return name.strip(), found


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


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)

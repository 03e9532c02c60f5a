"""Options that take several values, written with commas."""

from __future__ import annotations

from typing import Any

from polyrank.pairs import value


def holds_list(declared: object) -> bool:
    """Say whether an option of this declared type takes several values."""
    return "tuple[" in str(declared) or "list[" in str(declared)


def several(given: Any, declared: object) -> Any:
    """Turn "1,3" and 1 into [1, 3] and [1] for an option that takes several values.

    Words stay as they are: where an option takes a word too, it is no list.
    """
    if not holds_list(declared) or isinstance(given, bool):
        return given
    if isinstance(given, int | float):
        # One of several: "0.1" for "list of floats" is a list, for "str | list" as well.
        return [given]
    if not isinstance(given, str) or "," not in given:
        return given
    found = [value(part.strip()) for part in given.strip().strip(",").split(",")]
    numeric = all(isinstance(x, int | float) and not isinstance(x, bool) for x in found)
    return found if numeric else given

"""How two entries get on, why they do not, and with which options they would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

FITS, SOMETIMES, NEVER = "✓", "~", "·"


class Answer(NamedTuple):
    """How two entries get on.

    Attributes:
        mark: "✓" as they are, "~" with some of their options, "·" never.
        reason: what stands against the pair as it is, "" if nothing does.
        remedy: options with which it works, where some do.
    """

    mark: str
    reason: str = ""
    remedy: str = ""


def _changed(entry: Any) -> dict[str, Any]:
    """Return the options that are not the defaults of an entry."""
    kept = type(entry)().options()
    return {key: value for key, value in entry.options().items() if kept[key] != value}


def _told(pair: Sequence[Any], works: Callable[..., bool]) -> str:
    """Return as words the options of two entries that they need to work together, and no more."""
    needed = [_changed(entry) for entry in pair]
    for number, options in enumerate(needed):
        for key in list(options):
            fewer = {k: v for k, v in options.items() if k != key}
            tried = [{**o} for o in needed]
            tried[number] = fewer
            made = [type(entry)(**o) for entry, o in zip(pair, tried, strict=True)]
            if not any(entry.checks() for entry in made) and works(*made):
                options.pop(key)
    return " and ".join(
        f"{entry.name}:" + ",".join(f"{key}={value}" for key, value in options.items())
        for entry, options in zip(pair, needed, strict=True)
        if options
    )


def answer(one: Any, other: Any) -> Answer:
    """Return how two classes get on, at least one of them a strategy; a method stands alone."""
    from polyrank.frame import combination_problems, method

    plain = method("lora")

    def problems(*entries: Any) -> list[str]:
        methods = [entry for entry in entries if entry.kind == "method"]
        strategies = [entry for entry in entries if entry.kind == "strategy"]
        return combination_problems(methods[0] if methods else plain, strategies)

    found = problems(one(), other())
    if not found:
        return Answer(FITS)
    fitting = [p for p in product(one.samples(), other.samples()) if not problems(*p)]
    if not fitting:
        return Answer(NEVER, found[0])
    told = [_told(pair, lambda *made: not problems(*made)) for pair in fitting]
    return Answer(SOMETIMES, found[0], min(told, key=len))

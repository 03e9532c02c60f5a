"""Which methods and strategies work together, as a table and as sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from polyrank.cli.pairing import FITS, NEVER, SOMETIMES, answer


def show(console: Console, entries: Sequence[Any], name: str | None) -> None:
    """Print strategies against everything, then the reasons: all, or those of one name."""
    columns = sorted(entries, key=lambda cls: cls.kind)
    numbers = range(1, len(columns) + 1)
    wide = max(len(f"{n} {cls.name}") for n, cls in zip(numbers, columns, strict=True)) + 2
    # Tens above units, so that the columns are narrow and numbered as the rows are.
    for digits in ([n // 10 or " " for n in numbers], [n % 10 for n in numbers]):
        console.print(" " * wide + " ".join(map(str, digits[:-1])), style="bold")
    reasons = []
    for number, cls in enumerate(columns, 1):
        cells = []
        for place, other in enumerate(columns, 1):
            if place >= number or "strategy" not in (cls.kind, other.kind):
                cells.append(" ")
                continue
            found = answer(other, cls)
            cells.append(found.mark)
            if found.reason and name in (None, cls.name, other.name):
                reason = found.reason.removeprefix(f"{cls.name}: ").removeprefix(f"{other.name}: ")
                works = f" It works with {found.remedy}." if found.remedy else ""
                reasons.append(f"{found.mark} {other.name} + {cls.name}: {reason}.{works}")
        console.print(f"{number} {cls.name}".ljust(wide) + " ".join(cells).rstrip(), markup=False)
    console.print(f"\n{FITS} work together · {SOMETIMES} with some options · {NEVER} never\n")
    for reason in reasons:
        console.print(reason, markup=False)

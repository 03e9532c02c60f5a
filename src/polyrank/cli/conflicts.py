"""Which methods and strategies work together, as a table and as sentences."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

FITS, SOMETIMES, NEVER = "✓", "~", "·"


class Answer(NamedTuple):
    """How two entries get on.

    Attributes:
        mark: "✓" as they are, "~" with some of their options, "·" never.
        reason: what stands against the pair as it is, "" if nothing does.
    """

    mark: str
    reason: str = ""


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
    some = any(not problems(*pair) for pair in product(one.samples(), other.samples()))
    return Answer(SOMETIMES if some else NEVER, found[0])


def show(console: Console, entries: Sequence[Any], name: str | None) -> None:
    """Print strategies against everything, then the reasons: all, or those of one name."""
    columns = sorted(entries, key=lambda cls: cls.kind)
    table = Table(box=box.SIMPLE, header_style="bold", padding=(0, 0))
    table.add_column("", no_wrap=True)
    for number, _ in enumerate(columns, 1):
        table.add_column(f"{number:>3}", justify="right")
    reasons = []
    for number, cls in enumerate(columns, 1):
        cells = []
        for place, other in enumerate(columns, 1):
            if place >= number or "strategy" not in (cls.kind, other.kind):
                cells.append("")
                continue
            found = answer(other, cls)
            cells.append(found.mark)
            if found.reason and name in (None, cls.name, other.name):
                reason = found.reason.removeprefix(f"{cls.name}: ").removeprefix(f"{other.name}: ")
                reasons.append(f"{found.mark} {other.name} + {cls.name}: {reason}")
        table.add_row(f"{number} {cls.name}", *cells)
    console.print(table)
    console.print(f"{FITS} work together · {SOMETIMES} with some options · {NEVER} never\n")
    for reason in reasons:
        console.print(reason, markup=False)

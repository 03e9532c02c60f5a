"""What the pages about speed read: the committed tables, and single figures of them."""

import csv
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def table(name):
    """Rows of a table in bench/results."""
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def measured(name):
    """Whether a table has been made yet."""
    return (RESULTS / f"{name}.csv").exists()


def markdown(head, rows):
    """A table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def found(name, column, **where):
    """One figure of a table; None while that, or such a row, is missing."""
    rows = table(name) if measured(name) else []
    rows = [r for r in rows if all(r[key] == value for key, value in where.items())]
    return float(rows[0][column]) if rows else None

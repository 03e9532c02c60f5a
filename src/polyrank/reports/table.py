"""The tables a terminal shows at the end of a run; plain text when piped."""

import io
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from polyrank.reports.view import System, own_models, systems
from polyrank.reports.words import fraction

# Beyond this many tasks the matrices no longer fit beside each other; the averages stay.
_WIDE = 6
_MISSING = "-"
NAN = float("nan")


def terminal_table(results: Mapping[str, Any]) -> Group:
    """Accuracy after each task, average accuracy and forgetting of every system.

    Args:
        results: Content of results.json as `RunFolder.results` gives it.

    Returns:
        A rich renderable for `Console().print`, which writes no escape codes into a pipe.
    """
    tasks = [task["name"] for task in results["tasks"]]
    shown = systems(results)
    first = _matrices(tasks, shown) if len(tasks) <= _WIDE else _curves(tasks, shown)
    head = (
        "Accuracy on each task after each task (all classes seen so far compete)"
        if len(tasks) <= _WIDE
        else f"Average accuracy over the tasks seen, after each of {len(tasks)} tasks"
    )
    notes = [Text(line) for line in own_models(shown)]
    return Group(_head(head), first, Text(), _head("After the last task"), _summary(shown), *notes)


def terminal_text(results: Mapping[str, Any], width: int = 100) -> str:
    """`terminal_table` as plain text without escape codes, trailing spaces removed."""
    sink = io.StringIO()
    console = Console(file=sink, width=width, force_terminal=False, color_system=None)
    console.print(terminal_table(results))
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines()) + "\n"


def _head(text: str) -> Text:
    return Text(text, style="bold")


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)


def _matrices(tasks: list[str], shown: list[System]) -> Table:
    table = _table()
    table.add_column("system", overflow="fold")
    table.add_column("after")
    for task in tasks:
        table.add_column(Text(f"on {task}"), justify="right")
    table.add_column("average", justify="right")
    for system in shown:
        measured = [i for i in range(len(tasks)) if not all(map(_nan, system.unrestricted[i]))]
        for i in measured:
            cells = [fraction(a, missing=_MISSING) for a in system.unrestricted[i]]
            # What comes after the newest task was not learnt yet.
            row = [Text(c, style="" if j <= i else "dim") for j, c in enumerate(cells)]
            name = Text(system.label if i == measured[0] else "", style=_style(system))
            average = Text(fraction(system.curve[i], missing=_MISSING), style="bold")
            last = i == measured[-1]
            table.add_row(name, Text(tasks[i]), *row, average, end_section=last)
    return table


def _curves(tasks: list[str], shown: list[System]) -> Table:
    table = _table()
    table.add_column("after")
    for system in shown:
        table.add_column(Text(system.label), justify="right", overflow="fold", style=_style(system))
    for i, task in enumerate(tasks):
        table.add_row(Text(task), *(fraction(s.curve[i], missing=_MISSING) for s in shown))
    return table


def _summary(shown: list[System]) -> Table:
    """One line a system; a column that no system has a value for is left out."""
    columns: dict[str, list[float]] = {
        "average\naccuracy": [s.metric("average_accuracy") for s in shown],
        "average\nincremental": [s.metric("average_incremental_accuracy") for s in shown],
        "\nforgetting": [s.metric("forgetting") for s in shown],
        "backward\ntransfer": [s.metric("backward_transfer") for s in shown],
        "restricted\naccuracy": [s.metric("average_accuracy", "restricted") for s in shown],
        "general\nbefore": [s.general[0] if s.general else NAN for s in shown],
        "general\nafter": [s.general[-1] if s.general else NAN for s in shown],
        "replayed\nper update": [s.extra_samples or NAN for s in shown],
    }
    used = {head: values for head, values in columns.items() if not all(map(_nan, values))}
    table = _table()
    table.add_column("\nsystem", overflow="fold")
    for head in used:
        table.add_column(head, justify="right")
    for number, system in enumerate(shown):
        cells = [fraction(v[number], missing=_MISSING).replace("−", "-") for v in used.values()]
        style = _style(system)
        table.add_row(Text(system.label, style=style), *(Text(cell) for cell in cells))
    return table


def _style(system: System) -> str:
    return "bold cyan" if system.role == "method" else ""


def _nan(value: float) -> bool:
    return value != value

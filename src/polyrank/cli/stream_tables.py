"""What `polyrank streams` prints: the catalogue, a stream with its sizes, a definition without."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from polyrank.streams import Stream
    from polyrank.streams.file import Definition


def catalogue() -> Table:
    """Return all streams with what they are."""
    from polyrank.streams import file, names
    from polyrank.streams.registry import BUILT_IN

    table = _table("name", "scenario", "kind", "what it is")
    for name in names():
        spec = BUILT_IN[name] if name in BUILT_IN else file.Definition.open(name).spec
        table.add_row(name, spec.scenario, spec.kind, spec.about)
    return table


def built(console: Console, stream: Stream) -> None:
    """Print a stream whose data were read."""
    _head(console, stream.name, stream.scenario, None)
    table = _table("task", "kind", "metric", "classes", "rows by role")
    for task in stream:
        sizes = ", ".join(f"{role} {len(rows)}" for role, rows in task.data.items())
        table.add_row(task.name, task.kind or "-", task.metric, _classes(task.labels), sizes)
    console.print(table)


def outline(console: Console, definition: Definition) -> None:
    """Print what a definition says, without reading its data."""
    spec = definition.spec
    _head(console, definition.name, spec.scenario or "-", spec.about)
    table = _table("task", "kind", "metric", "classes", "data")
    for task in definition.outlined():
        table.add_row(task.name, task.kind, task.metric, _classes(task.labels), task.source)
    console.print(table)
    for name, order in (spec.orders or {}).items():
        console.print(f"{name}: {', '.join(order)}")
    console.print("sizes: --validate reads the data; --root FOLDER takes copies instead of the hub")


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE, header_style="bold")
    for column in columns:
        last = column in columns[3:]
        table.add_column(column, overflow="fold", no_wrap=not last)
    return table


def _head(console: Console, name: str, scenario: str, about: str | None) -> None:
    console.print(f"{name} ({scenario})", style="bold", markup=False)
    if about:
        console.print(about, markup=False)


def _classes(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    return f"{len(names)}: {shown}" if names else "-"

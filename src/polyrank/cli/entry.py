"""One method or strategy with all that it says of itself."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from polyrank.cli.facts import arguments, description, merging, presets
from polyrank.cli.lists import holds_list
from polyrank.cli.unread import unread

_HOW = {
    "method": "polyrank run --method {} --set OPTION=VALUE OPTION=VALUE",
    "strategy": "polyrank run --with {}:OPTION=VALUE,OPTION=VALUE",
}


def show_entry(console: Console, cls: Any) -> None:
    """Print docstring, options and how they are written, presets and capabilities."""
    console.print(f"{cls.name} ({cls.kind})\n", style="bold")
    console.print(description(cls, console.width), markup=False)
    table = Table(box=box.SIMPLE, header_style="bold", title="options", title_justify="left")
    for column in ("option", "default", "meaning"):
        table.add_column(column, overflow="fold")
    meanings, hidden = arguments(cls), unread(cls)
    for spec in fields(cls):
        if spec.name in hidden:
            continue
        more = f" Several: --set {spec.name}=1,3." if holds_list(spec.type) else ""
        table.add_row(spec.name, repr(spec.default), meanings.get(spec.name, "") + more)
    if table.row_count:
        console.print(table)
        console.print(_HOW[cls.kind].format(cls.name), markup=False)
    if hidden:
        console.print(f"not read, and refused: {', '.join(hidden)}")
    for line in presets(cls):
        console.print(line, markup=False)
    if cls.kind == "method":
        sample = cls.samples()[0]
        console.print(
            f"merges: {merging(cls)} · neutral at start: {'yes' if sample.neutral else 'no'} · "
            f"trains: {', '.join(sorted(sample.trains))} · "
            f"needs: {', '.join(sorted(sample.needs)) or 'nothing'}"
        )

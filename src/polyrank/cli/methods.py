"""`polyrank methods`: the catalogue, and one method with all that it says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from polyrank.cli.conflicts import show
from polyrank.cli.entry import show_entry
from polyrank.cli.facts import merging, summary

HELP = """List all methods, or show one with its options, formula, source and capabilities.

\b
  polyrank methods
  polyrank methods smora
  polyrank methods --conflicts
"""


def command(
    name: Annotated[str | None, typer.Argument(help="A method or strategy.")] = None,
    method_file: Annotated[
        Path | None, typer.Option(help="A Python file with your own method.")
    ] = None,
    conflicts: Annotated[
        bool, typer.Option("--conflicts", help="Which ones work together, and why others do not.")
    ] = False,
) -> None:
    """Print the catalogue, one entry, or what works together."""
    from polyrank import frame

    console = Console(highlight=False)
    if method_file is not None:
        name = frame.load_file(method_file).name
    if conflicts:
        chosen = None if name is None else frame.get(name).name
        show(console, [frame.get(each) for each in frame.names()], chosen)
        return
    if name is not None:
        show_entry(console, frame.get(name))
        return
    table = Table(box=box.SIMPLE, header_style="bold")
    for column in ("name", "kind", "merges", "what it is"):
        table.add_column(column, overflow="fold")
    for each in frame.names():
        cls = frame.get(each)
        merges = "-" if cls.kind == "strategy" else merging(cls)
        table.add_row(each, cls.kind, merges, summary(cls))
    console.print(table)
    console.print("polyrank methods NAME shows one of them; polyrank run --method NAME runs it.")

"""`polyrank methods`: the catalogue, and one method with all that it says of itself."""

from __future__ import annotations

import inspect
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from polyrank.cli.conflicts import show
from polyrank.cli.facts import arguments, merging, presets, summary

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
        _show(console, frame.get(name))
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


def _show(console: Console, cls: Any) -> None:
    console.print(f"{cls.name} ({cls.kind})\n", style="bold")
    console.print(inspect.getdoc(sys.modules[cls.__module__]) or "", markup=False)
    table = Table(box=box.SIMPLE, header_style="bold", title="options", title_justify="left")
    for column in ("option", "default", "meaning"):
        table.add_column(column, overflow="fold")
    meanings = arguments(cls)
    for spec in fields(cls):
        table.add_row(spec.name, repr(spec.default), meanings.get(spec.name, ""))
    if fields(cls):
        console.print(table)
    for line in presets(cls):
        console.print(line, markup=False)
    if cls.kind == "method":
        sample = cls.samples()[0]
        console.print(
            f"merges: {merging(cls)} · neutral at start: {'yes' if sample.neutral else 'no'} · "
            f"trains: {', '.join(sorted(sample.trains))} · "
            f"needs: {', '.join(sorted(sample.needs)) or 'nothing'}"
        )

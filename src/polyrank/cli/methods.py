"""`polyrank methods`: the catalogue, and one method with its options, formula, source and capabilities."""

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

HELP = """List all methods, or show one with its options, formula, source and capabilities.

  polyrank methods
  polyrank methods smora
"""


def command(
    name: Annotated[str | None, typer.Argument(help="A method or strategy.")] = None,
    method_file: Annotated[
        Path | None, typer.Option(help="A Python file with your own method.")
    ] = None,
) -> None:
    """Print the catalogue or one entry."""
    from polyrank import frame

    console = Console(highlight=False)
    if method_file is not None:
        name = frame.load_file(method_file).name
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


def summary(cls: Any) -> str:
    """Return the first sentence of the module that holds a method."""
    text = inspect.getdoc(sys.modules[cls.__module__]) or ""
    return (
        text.split("\n\n")[0].replace("\n", " ").partition(": ")[2].rstrip(".")
        or text.split("\n")[0]
    )


def merging(cls: Any) -> str:
    """Return how the method's samples merge: one word, or several."""
    return ", ".join(sorted({sample.merges for sample in cls.samples()}))


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
    if cls.kind == "method":
        sample = cls.samples()[0]
        console.print(
            f"merges: {merging(cls)} · neutral at start: {'yes' if sample.neutral else 'no'} · "
            f"trains: {', '.join(sorted(sample.trains))} · needs: {', '.join(sorted(sample.needs)) or 'nothing'}"
        )


def arguments(cls: Any) -> dict[str, str]:
    """Return the meaning of every option from the docstrings of the class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        block = (inspect.cleandoc(base.__doc__ or "").partition("Args:\n")[2]).split("\n\n")[0]
        key = ""
        for line in block.split("\n"):
            name, sign, text = line.strip().partition(": ")
            if (
                line.startswith("    ")
                and not line.startswith("     ")
                and sign
                and name.isidentifier()
            ):
                key, found[name] = name, text
            elif key and line.strip():
                found[key] += " " + line.strip()
    return found

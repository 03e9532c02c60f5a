"""The steps of `polyrank sweep`: find the file, say what there is to do, do it, show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.measure import Measurement


def outline(path: Path, folder: Path, *, probe: bool) -> None:
    """Check a file and print what there is to do."""
    from polyrank.engine.sweep.outline import moved
    from polyrank.engine.sweep.outline import outline as lines_of
    from polyrank.engine.sweep.records import read
    from polyrank.engine.sweep.resolve import resolve

    sweep = resolve(path, probe=probe)
    for line in moved(sweep.spec):
        typer.echo(line, err=True)
    for line in lines_of(sweep.groups, read(folder), sweep.updates):
        typer.echo(line)


def run(path: Path, folder: Path, *, probe: bool) -> list[str]:
    """Make the runs that are left; return what went wrong in some of them."""
    from polyrank.engine.sweep.outline import moved
    from polyrank.engine.sweep.resolve import resolve
    from polyrank.engine.sweep.runner import work

    sweep = resolve(path, probe=probe)
    makers: list[Any] = []

    def one(point: Any, place: Path) -> Any:
        if not makers:
            # A finished sweep need not wait for transformers and PEFT.
            from polyrank.engine.sweep.once import Once

            makers.append(Once(sweep, folder))
        return makers[0](point, place)

    def say(text: str) -> None:
        typer.echo(text, err=True)

    for line in moved(sweep.spec):
        say(line)
    return work(sweep.lock(), folder, one, keep=sweep.spec.keep, say=say)


def report(folder: Path) -> None:
    """Write the tables and the picture, and print the table."""
    from polyrank.reports.sweep import report_sweep, terminal_sweep

    sheet, written = report_sweep(folder)
    table, console = terminal_sweep(sheet), Console(highlight=False)
    # A row stays one line, also in a pipe, which would count as 80 letters wide.
    wide = Measurement.get(console, console.options.update(width=1000), table).maximum
    Console(highlight=False, width=max(wide, console.width)).print(table)
    for file in written.values():
        console.print(str(file), soft_wrap=True)

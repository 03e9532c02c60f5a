"""`polyrank report`: the page, the picture and the table of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

HELP = """Write report.html, matrix.png, matrix.csv and a picture a figure of the method into a run
folder, and print its tables.
"""


def command(run: Annotated[Path, typer.Argument(help="Folder that `polyrank run` wrote.")]) -> None:
    """Read the folder, write the files, print."""
    from polyrank.io import RunFolder
    from polyrank.reports import report, terminal_table

    written = report(run)
    # A pipe has no width of its own, and 80 columns would break the heads.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(terminal_table(RunFolder.open(run).results()))
    for path in written.values():
        console.print(str(path), soft_wrap=True)

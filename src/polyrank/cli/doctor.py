"""`polyrank doctor`: what is installed, and whether the parts work together."""

from __future__ import annotations

from collections.abc import Callable

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from polyrank.cli.checks import CHECKS

HELP = "Check the installation: versions, devices, PEFT's plug-in point, training, save and load."


def command() -> None:
    """Run every check and exit with 1 if one fails."""
    from polyrank.io.environment import hardware, versions

    console = Console(highlight=False)
    table = Table(box=box.SIMPLE, show_header=False)
    for name, version in {**versions(), **{k: str(v) for k, v in hardware().items()}}.items():
        table.add_row(name, str(version))
    console.print(table)
    failed = sum(not _passes(console, name, check) for name, check in CHECKS.items())
    if failed:
        console.print(
            f"{failed} of {len(CHECKS)} checks failed; "
            "reinstall with the tested versions in constraints.txt"
        )
        raise typer.Exit(1)


def _passes(console: Console, name: str, check: Callable[[], str]) -> bool:
    # Whatever a check raises is reported, and the next one runs.
    try:
        console.print(f"ok      {name}: {check()}")
    except Exception as error:
        console.print(f"FAILED  {name}: {type(error).__name__}: {error}", soft_wrap=True)
        return False
    return True

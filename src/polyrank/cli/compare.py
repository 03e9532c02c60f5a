"""`polyrank compare`: several runs in one table, over seeds, and one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HELP = """Compare finished runs of one stream, over seeds, and print the table.

Writes compare.md, compare.csv and compare.png. The same system at several seeds is one line: mean
and sample deviation, and the difference to a baseline, paired by seed.

\b
  polyrank compare runs
  polyrank compare runs/smora-0 runs/smora-1 runs/lora-0 runs/lora-1 --out smora-or-lora
  polyrank compare runs --baseline "joint lora r=16" --restricted
"""


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run folders, or folders that hold some."),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(help="Label or name of a system; else the sequential reference."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the three files.")] = Path("compare"),
    restricted: Annotated[
        bool, typer.Option("--restricted", help="Let only the tested task's classes compete.")
    ] = False,
) -> None:
    """Read the runs, write the files, print the tables."""
    from polyrank.reports import compare

    written = compare(runs, baseline=baseline, out=out, restricted=restricted)
    typer.echo(written["compare.md"].read_text(encoding="utf-8"))
    for path in written.values():
        typer.echo(str(path))

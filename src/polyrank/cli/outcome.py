"""What `polyrank run` prints and writes when its runs are done."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console


def show(results: Sequence[Any], report: bool, out: Path | None) -> None:
    """Print the tables of every run, and of several the comparison over seeds."""
    from polyrank.reports import compare, terminal_table

    # A pipe has no width of its own, and 80 columns would break the heads.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for result in results:
        console.print(terminal_table(result.results))
        where = f"report: {result.report()}" if report else f"run: {result.path}"
        console.print(where, soft_wrap=True)
    if len(results) > 1:
        folder = out if out is not None else results[0].path.parent / f"{results[0].path.name}-all"
        written = compare([result.path for result in results], out=folder)
        console.print(written["compare.md"].read_text(encoding="utf-8"), soft_wrap=True)
        for path in written.values():
            console.print(str(path), soft_wrap=True)

"""`polyrank resume`: a run that was stopped goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polyrank.errors import RunError

HELP = """Continue a run that was stopped, from its last checkpoint, to the same bits.

It repeats the command that the run's folder holds, in the folder you are in: relative paths of that
command (a stream, a model, a method file) must be valid here.
"""


def command(run: Annotated[Path, typer.Argument(help="Folder that `polyrank run` wrote.")]) -> None:
    """Read the command of the run and give it again."""
    from polyrank.cli.main import main
    from polyrank.io import RunFolder

    folder = RunFolder.open(run)
    program, *words = folder.run["command"] or [""]
    if program != "polyrank" or words[:1] != ["run"]:
        raise RunError(
            f"{run}: was not started by `polyrank run`, so its command cannot be repeated; call "
            "polyrank.run(...) with the same arguments and out= again"
        )
    main([*words, "--out", str(run)])

"""`polyrank sweep`: learning rates of several methods, compared at the best one of each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polyrank.errors import ConfigError

HELP = """Sweep the learning rate of every method; select on validation, report on test.

SPEC is a YAML file, or the name of a recipe: sweep-digits. The same call again goes on where a
sweep was stopped. Results: table.md, table.csv and lr.png in the folder.

\b
  polyrank sweep sweep-digits
  polyrank sweep mine.yaml --dry
  polyrank sweep mine.yaml --out runs/mine

\b
A file of one's own:
  stream: digits
  lr: {low: 3e-4, high: 3e-2}
  seeds: [0, 1, 2]
  train: {epochs: 5}
  methods:
    lora:
    lora-plus: {method: lora, options: {lr_ratio: 16}, lr: {low: 1e-4}}
    smora: {options: {r: 16, k: 4}}
"""


def command(
    spec: Annotated[
        str, typer.Argument(metavar="SPEC", help="A YAML file, or the name of a recipe.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the sweep; else runs/ and the file's name.")
    ] = None,
    dry: Annotated[
        bool, typer.Option("--dry", help="Check the file and print what there is to do.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write the tables of what is finished.")
    ] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="Short runs for the grid, full ones for the best.")
    ] = False,
) -> None:
    """Run what is left, write the tables, print them."""
    from polyrank.cli import recipes, sweep_steps

    path = recipes.file_of(spec, sweeps=True)
    folder = Path("runs") / path.stem if out is None else out
    failed: list[str] = []
    if dry:
        sweep_steps.outline(path, folder, probe=probe)
        return
    if not report_only:
        failed = sweep_steps.run(path, folder, probe=probe)
    sweep_steps.report(folder)
    if failed:
        raise ConfigError(failed)

"""`polyrank export`: an adapter for use without polyrank."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polyrank.cli.sources import adapter_in

HELP = """Write an adapter as an ordinary LoRA, which PEFT loads without polyrank.

FROM is the folder of a run or of an adapter, OUT a new folder, or an older export that gives way.
What computes the same as one matrix can be written; what weighs ranks for each token is refused. A
classifier that grew is saved whole: load the adapter onto a base with that many classes. --format
polyrank writes the adapter as it is.

\b
  polyrank export runs/digits-lora lora
  polyrank export runs/digits-lora lora --system sequential
  polyrank export my-adapter lora
"""


def command(
    source: Annotated[Path, typer.Argument(metavar="FROM", help="Folder of a run or an adapter.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    system: Annotated[
        str | None, typer.Option(help="Which system of a run; else its method.")
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="peft-lora, or polyrank: as it is.")
    ] = "peft-lora",
    method_file: Annotated[
        Path | None, typer.Option(help="The Python file, if the method is your own.")
    ] = None,
) -> None:
    """Read, convert, write, say what it has become."""
    folder = adapter_in(source, system)
    from polyrank import frame
    from polyrank.io.adapters import converted, loading_of, read_saved, write_saved

    if method_file is not None:
        frame.load_file(method_file)
    found = converted(read_saved(folder), format_)
    write_saved(found, out)
    for key, values in found.plan.items():
        if key == "ranks":
            total, kept = sum(values.values()), sum(r > 0 for r in values.values())
            typer.echo(f"{total} ranks at {kept} of {len(values)} layers")
        elif key == "labels":
            typer.echo(f"for a base with {len(values)} classes: {', '.join(values)}")
    typer.echo(str(out))
    for line in loading_of(found, out):
        typer.echo(line)

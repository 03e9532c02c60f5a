"""`polyrank streams`: the streams there are, what one consists of, and a copy of it to edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from polyrank.cli.stream_tables import built, catalogue, outline

HELP = """List all streams; show, copy or validate one.

\b
  polyrank streams
  polyrank streams standard-cl
  polyrank streams standard-cl --copy mine.yaml
  polyrank streams mine.yaml --validate --root /data

\b
A file of one's own:
  kind: sequence-classification
  scenario: class-incremental
  tasks:
    - {name: news, path: news.jsonl, train: 0.8, test: 0.2}
    - {name: mail, train: mail/train.csv, test: mail/test.csv, columns: {text: body}}
    - {name: wiki, hub: fancyzhx/dbpedia_14, columns: {text: content}}
"""


def command(
    name: Annotated[str | None, typer.Argument(help="A stream, or a YAML file.")] = None,
    copy: Annotated[
        Path | None, typer.Option(help="Write the definition to a new file, to edit.")
    ] = None,
    validate: Annotated[
        bool, typer.Option("--validate", help="Read all data, also from the hub, and check them.")
    ] = False,
    root: Annotated[
        Path | None, typer.Option(help="Folder with copies of the data sets; else the hub.")
    ] = None,
    order: Annotated[str | None, typer.Option(help="One of the orders of its tasks.")] = None,
) -> None:
    """Print the catalogue or one stream, or write a copy."""
    from polyrank.streams import ready, stream
    from polyrank.streams.file import Definition

    console = Console(highlight=False)
    if name is None:
        console.print(catalogue())
        console.print("polyrank streams NAME shows one of them; --copy FILE writes it, to edit.")
        return
    if copy is not None:
        ready.copy(name, copy)
        console.print(f"wrote {copy}\nread it: polyrank streams {copy}", soft_wrap=True)
        return
    options = {k: v for k, v in (("root", root), ("order", order)) if v is not None}
    if not validate and (name in ready.ready() or Path(name).suffix in (".yaml", ".yml")):
        definition = Definition.open(name, root).inner
        if definition.unread:
            outline(console, definition)
            return
    made = stream(name, **options)
    # The hash reads every row.
    verdict = f"valid; hash {made.hash}" if validate else ""
    built(console, made)
    if validate:
        console.print(verdict, soft_wrap=True)

"""`polyrank new-method`: a method of one's own, in one file that runs as it is."""

from __future__ import annotations

import keyword
from pathlib import Path
from typing import Annotated

import typer

from polyrank.cli.starter import TEMPLATE
from polyrank.errors import ConfigError

HELP = """Write a file with a working method to start from.

\b
  polyrank new-method scaled
  polyrank run --method-file scaled.py
"""


def command(
    name: Annotated[str, typer.Argument(help="Name of the method; the file is NAME.py.")],
    folder: Annotated[Path, typer.Option(help="Where to write it.")] = Path(),
) -> None:
    """Write the file and say what to do next."""
    from polyrank import frame

    stem = frame.slug(name).replace("-", "_")
    if not stem.isidentifier() or keyword.iskeyword(stem):
        raise ConfigError(
            f"name: got {name!r}, expected letters, digits and '-', beginning with a letter"
        )
    if frame.slug(name) in frame.names():
        raise ConfigError(f"name: {frame.slug(name)!r} is a shipped method; choose another name")
    path = folder / f"{stem}.py"
    if path.exists():
        raise ConfigError(f"file: {path} exists; choose another name, or remove it")
    if not folder.is_dir():
        raise ConfigError(f"folder: {folder} does not exist; make it first")
    words = stem.split("_")
    text = TEMPLATE.safe_substitute(
        title=" ".join(words).capitalize(), cls="".join(w.capitalize() for w in words)
    )
    aside = path.with_suffix(".py.part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
    typer.echo(
        f"wrote {path}\n"
        f"run it: polyrank run --method-file {path}\n"
        f"read it: polyrank methods --method-file {path}"
    )

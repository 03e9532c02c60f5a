"""`polyrank run`: one method through a stream of tasks, with references beside it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from polyrank.cli.values import pairs
from polyrank.errors import ConfigError

HELP = """Take a method through a stream of tasks and report.

Without options it trains a small vision transformer on handwritten digits 0-3, then SMoRA on three tasks of two new
digits each, and shows sequential LoRA, joint training and a frozen probe beside it.

  polyrank run --method lora --set r=8 alpha=16
  polyrank run --method smora --set r=32 k=4 --train epochs=5 lr=1e-3 --out runs/mine
  polyrank run --method-file my_method.py
"""
# What fits the embedded model of width 64 in well under a minute.
SMALL = {"smora": {"r": 16, "k": 4}}


def command(
    method: Annotated[
        str | None, typer.Option(help="Name of a method; `polyrank methods` lists them.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Options of the method: r=16 k=4.")
    ] = None,
    with_: Annotated[
        list[str] | None, typer.Option("--with", help="Strategies to combine with the method.")
    ] = None,
    stream: Annotated[str, typer.Option(help="The tasks: digits.")] = "digits",
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of an image classifier; else a small one is made."),
    ] = None,
    train: Annotated[
        list[str] | None,
        typer.Option(help="Training of each task: epochs=15 batch_size=32 lr=3e-3 …"),
    ] = None,
    references: Annotated[
        list[str] | None,
        typer.Option(help="What to show beside it: sequential joint probe, or none."),
    ] = None,
    method_file: Annotated[
        Path | None, typer.Option(help="A Python file with your own method.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Key of every random draw.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; else a free one below runs/.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Replace an interrupted run, or the same one, in --out.")
    ] = False,
    report: Annotated[
        bool, typer.Option(help="Write report.html, matrix.png and matrix.csv.")
    ] = True,
) -> None:
    """Run, print the tables, write the report."""
    from polyrank import engine, frame
    from polyrank.reports import terminal_table

    name = frame.load_file(method_file).name if method_file is not None else "smora"
    if method is not None and method_file is not None and frame.slug(method) != name:
        raise ConfigError(
            f"method: --method says {method!r}, --method-file brings {name!r}; give one of the two"
        )
    name = frame.slug(method or name)
    options = pairs(set_ or [], "--set")
    if model is None:
        options = {**SMALL.get(name, {}), **options}
    problems: list[str] = []
    made = _collect(problems, lambda: frame.method(name, **options))
    settings = _collect(problems, lambda: _settings(train))
    strategies = [_collect(problems, lambda word=word: frame.method(word)) for word in with_ or []]
    if made is not None and not isinstance(made, frame.Method):
        problems.append(f"method: {name!r} is a strategy; write --method lora --with {name}")
    problems += [
        f"with: {s.name!r} is a method and owns structure; give it with --method"
        for s in strategies
        if isinstance(s, frame.Method)
    ]
    if problems:
        raise ConfigError(problems)
    chosen = (
        engine.REFERENCES if references is None else tuple(w for w in references if w != "none")
    )
    result = engine.run(
        model, stream, made, strategies=strategies, references=chosen, train=settings, seed=seed, out=out,
        overwrite=overwrite, command=["polyrank", *sys.argv[1:]],
    )  # fmt: skip
    console = Console(highlight=False)
    console.print(terminal_table(result.results))
    if report:
        console.print(f"report: {result.report()}", soft_wrap=True)
    else:
        console.print(f"run: {result.path}", soft_wrap=True)


def _settings(words: list[str] | None) -> Any:
    from polyrank.engine.settings import Settings

    return Settings.build(pairs(words or [], "--train"))


def _collect(problems: list[str], make: Any) -> Any:
    try:
        return make()
    except ConfigError as error:
        problems += error.problems
        return None

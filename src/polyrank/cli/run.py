"""`polyrank run`: one method through a stream of tasks, with references beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polyrank.cli import recipes
from polyrank.cli.choices import STREAM, asked, borrowed, choose, repeated
from polyrank.cli.outcome import show
from polyrank.cli.values import TYPED

HELP = """Take a method through a stream of tasks and report.

Without options it trains a small vision transformer on handwritten digits 0-3, then SMoRA on
three tasks of two new digits each, and shows sequential LoRA, joint training and a frozen probe
beside it.

\b
  polyrank run --method lora --set r=8 alpha=16
  polyrank run --method smora --set r=32 k=4 --train epochs=5 lr=1e-3 --out runs/mine
  polyrank run --method lora --with replay:capacity=0.1,by=class --seed 0 1 2
  polyrank run --method lora --init lora-ga:gamma=64 --optim altlora
  polyrank run --method-file my_method.py
  polyrank run --recipe smora --train epochs=5

A recipe is a YAML file that holds what these options say; options beside it go before, --set and
--train one by one. Another --method takes none of the recipe's options. Recipes that come with
polyrank: RECIPES.

The same command again continues a run that was stopped.
"""
HELP = HELP.replace("RECIPES", ", ".join(recipes.names()))
Word = str | None
Words = list[str] | None
Place = Path | None


def command(
    method: Annotated[
        Word, typer.Option(help="Name of a method; `polyrank methods` lists them.")
    ] = None,
    set_: Annotated[Words, typer.Option("--set", help="Options of the method: r=16 k=4.")] = None,
    init: Annotated[
        Word, typer.Option(help="A method that lends its start: lora-ga:direction=ArBr,gamma=64.")
    ] = None,
    optim: Annotated[
        Word, typer.Option(help="A method that lends its optimiser and rules: altlora.")
    ] = None,
    with_: Annotated[
        Words, typer.Option("--with", help="Strategies to add: ewc, replay:capacity=0.1,by=class.")
    ] = None,
    stream: Annotated[
        Word, typer.Option(help="See `polyrank streams`; or a YAML file.", show_default=STREAM)
    ] = None,
    model: Annotated[
        Word,
        typer.Option(
            help="Folder or hub id of a model; else the small one the stream is meant for."
        ),
    ] = None,
    target: Annotated[
        Words, typer.Option(help="Modules to adapt, as in PEFT: q_proj v_proj, or all-linear.")
    ] = None,
    train: Annotated[
        Words, typer.Option(help="Training of each task: epochs=15 batch_size=32 lr=3e-3 …")
    ] = None,
    references: Annotated[
        Words, typer.Option(help="What to show beside it: sequential joint probe, or none.")
    ] = None,
    recipe: Annotated[
        Word, typer.Option(help="A YAML file with options of this command, or a recipe's name.")
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Run the recipe as short as it says, to try it.")
    ] = False,
    method_file: Annotated[Place, typer.Option(help="A Python file with your own method.")] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Key of every random draw; several make a run each.")
    ] = None,
    out: Annotated[Place, typer.Option(help="Folder of the run; else a free one in runs/.")] = None,
    validate: Annotated[bool, typer.Option(help="Score the validation rows too.")] = False,
    save_every: Annotated[
        int | None, typer.Option(help="Updates between two checkpoints; else twice a minute.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Replace an interrupted run, or the same one, in --out.")
    ] = False,
    report: Annotated[
        bool, typer.Option(help="Write report.html, matrix.png and matrix.csv.")
    ] = True,
) -> None:
    """Run, print the tables, write the report."""
    problems: list[str] = []
    words = asked(
        method=method,
        file=method_file,
        options=[*(set_ or []), *borrowed(init, optim)],
        strategies=with_ or [],
        stream=stream,
        model=model,
        target=target,
        train=train or [],
        references=references,
        seeds=seed,
        problems=problems,
    )
    wanted = recipes.wanted(recipe, smoke, words, problems)
    chosen = choose(wanted, method_file, problems)
    from polyrank import engine

    seeds = wanted.seeds or (0,)
    results = []
    for number in seeds:
        folder = out if len(seeds) == 1 or out is None else out / f"seed-{number}"
        results.append(
            engine.run(
                wanted.model,
                wanted.stream or STREAM,
                chosen.method,
                strategies=chosen.strategies,
                references=wanted.references,
                train=chosen.settings,
                target_modules=wanted.target,
                seed=number,
                validate=validate,
                out=folder,
                overwrite=overwrite,
                save_every=save_every,
                command=["polyrank", *repeated(TYPED, number)],
            )
        )
    show(results, report, out)

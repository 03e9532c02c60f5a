"""Puts the sub-commands together and turns errors into one line each and an exit code."""

from __future__ import annotations

import io
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence

# transformers looks at this when it is imported; nothing here tokenises in threads.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer

from polyrank.cli import (
    bench,
    compare,
    doctor,
    export,
    methods,
    new_method,
    report,
    resume,
    run,
    streams,
    sweep,
)
from polyrank.cli.values import TYPED, spread
from polyrank.errors import ConfigError, PolyrankError

NOISE = (
    "torch.utils._pytree",
    "torchao",
    "bitsandbytes.cextension",
    "bitsandbytes.backends.cpu.ops",
    "peft",
    "accelerate",
)

STOPPED = "stopped; of a run the same command goes on from its last checkpoint"
# By SIGINT, for which typer ends with this code, and by SIGTERM.
SIGNALLED = (130, 143)

app = typer.Typer(
    name="polyrank",
    help=(
        "Adapt pretrained models to many tasks without losing what they knew. "
        "Every rank is an expert."
    ),
    epilog=(
        "Start with `polyrank run`: real data, no network, about a minute. Then `polyrank methods`."
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
COMMANDS = (
    run, resume, sweep, methods, streams, report, compare, export, bench, new_method, doctor
)  # fmt: skip
for module in COMMANDS:
    word = module.__name__.rpartition(".")[2].replace("_", "-")
    app.command(word, help=module.HELP)(module.command)


def quiet() -> None:
    """Silence what libraries say about themselves; errors still come through."""
    for name in NOISE:
        logging.getLogger(name).addFilter(_errors_only)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\.")
    libraries = r"(torch|torchao|bitsandbytes)\."
    warnings.filterwarnings("ignore", category=UserWarning, module=libraries)


def _errors_only(record: logging.LogRecord) -> bool:
    # A level would not hold: torch sets the levels of its own loggers when it is imported.
    return record.levelno >= logging.ERROR


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Exit codes: 0 done, 1 a check of `doctor` failed, 2 something to correct, 130 and 143 stopped by
    SIGINT and SIGTERM, with a checkpoint.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    TYPED[:] = words
    quiet()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A pipe that cannot take Greek letters gets question marks, not a traceback.
            stream.reconfigure(errors="replace")
    try:
        app(spread(words), standalone_mode=True)
    except PolyrankError as error:
        for problem in error.problems if isinstance(error, ConfigError) else [error]:
            typer.echo(f"error: {problem}", err=True)
        sys.exit(2)
    except KeyboardInterrupt as end:
        typer.echo(_how_to_go_on(end, words[:1]), err=True)
        sys.exit(130)
    except SystemExit as end:
        # `resume` has called this with the command of its run, which has told it already.
        if end.code in SIGNALLED and words[:1] != ["resume"]:
            typer.echo(_how_to_go_on(end, words[:1]), err=True)
        raise


def _how_to_go_on(end: BaseException, command: list[str]) -> str:
    """Name the folder of a run that a signal stopped, wherever in the chain it is known."""
    cause: BaseException | None = end
    while cause is not None and not hasattr(cause, "run_folder"):
        cause = cause.__cause__ or cause.__context__
    # The folder of one run in a sweep is nothing to resume by itself.
    if cause is None or command != ["run"]:
        return STOPPED
    resume = shlex.join(["polyrank", "resume", str(cause.run_folder)])
    return (
        f"stopped: {cause.run_folder} is kept; `{resume}`, or the same command again, goes on from "
        "its last checkpoint"
    )

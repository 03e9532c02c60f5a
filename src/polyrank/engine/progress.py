"""A progress bar with system, task, step, loss and time left."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Takes the name and the fields of an event.
Watch = Callable[[str, dict[str, Any]], None]


class Bar:
    """Shows events of a run on standard error: a bar on a terminal, else one line per phase.

    Args:
        on: False is silent, True draws the bar wherever standard error goes.
    """

    def __init__(self, on: bool | None = None) -> None:
        self.on = sys.stderr.isatty() if on is None else on
        self.lines = Console(stderr=True, highlight=False) if on is None and not self.on else None
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not self.on,
            transient=True,
        )
        self.task: Any = None

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        """Take one event."""
        if event == "phase" and self.lines is not None:
            where = f"{fields['system']}: {_place(fields)} ({fields['total']} updates)"
            self.lines.print(where, markup=False, soft_wrap=True)
        if event == "phase" and self.on:
            if self.task is not None:
                self.progress.remove_task(self.task)
            where = f"{fields['system']}: {_place(fields)}"
            self.task = self.progress.add_task(where, total=fields["total"], loss="-")
        elif event == "step" and self.task is not None:
            self.progress.update(self.task, completed=fields["step"], loss=f"{fields['loss']:.3f}")


def _place(fields: dict[str, Any]) -> str:
    """Return the task, and which of its phases this is where it has several."""
    task, count = fields["task"], fields.get("of", 1)
    if count != 1:
        of = f" of {count}" if count else ""
        return f"{task}, stage {fields.get('number', 1)}{of}"
    return str(task)

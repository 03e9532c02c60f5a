"""What a system leaves besides its scores: figures for the report, adapters for use elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from polyrank.errors import ConfigError
from polyrank.frame import Boundary, Figure, Workshop
from polyrank.io.adapters import write_saved

FOLDER = "exports"
_FIGURE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_EXPORT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def figures_of(
    boundaries: Sequence[Boundary], workshop: Workshop, routing: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Return the figures of all boundaries, as results.json holds them.

    Raises:
        ConfigError: naming everything that is wrong with them.
    """
    found = [figure for b in boundaries for figure in b.figures(workshop, routing)]
    names = [figure.name for figure in found]
    if problems := [p for figure in found for p in _problems(figure, names)]:
        raise ConfigError(list(dict.fromkeys(problems)))
    return [asdict(figure) for figure in found]


def _problems(figure: Figure, names: list[str]) -> Iterator[str]:
    where = f"figure {figure.name!r}"
    if not _FIGURE.fullmatch(figure.name):
        yield f"{where}: got this name, expected lower-case words joined by '-'; rename it"
    if names.count(figure.name) > 1:
        yield f"{where}: is given twice; rename one of the two"
    rows, columns = len(figure.rows), len(figure.columns)
    shape = [len(row) for row in figure.values]
    if not rows or not columns or shape != [columns] * rows:
        yield (
            f"{where}: got rows of {shape} values, expected {rows} rows of {columns}, at least one "
            "each; fill what was not measured with NaN"
        )


def exported(
    boundaries: Sequence[Boundary], workshop: Workshop, folder: Path, system: str
) -> dict[str, str]:
    """Write the adapters that boundaries export; return their folders inside the run's, by name.

    Raises:
        ConfigError: for a name that is no folder, or is given twice.
    """
    written: dict[str, str] = {}
    for boundary in boundaries:
        for name, saved in boundary.exports(workshop).items():
            if not _EXPORT.fullmatch(name) or name in written:
                twice = " twice" if name in written else ""
                raise ConfigError(
                    f"exports: got the name {name!r}{twice}, expected letters, digits, '.', '_' "
                    "and '-', each name once; rename it"
                )
            path = Path(FOLDER) / system / name
            write_saved(saved, folder / path)
            written[name] = path.as_posix()
    return written

"""Tables, pictures and one HTML page from run folders; no torch."""

import os
from collections.abc import Iterable
from pathlib import Path

from polyrank.errors import RunError
from polyrank.io import RunFolder
from polyrank.io.files import write_bytes
from polyrank.io.runs import RUN
from polyrank.reports import (
    compare_picture,
    compare_table,
    compare_view,
    heat_picture,
    page,
    picture,
    sheet,
    view,
)
from polyrank.reports.path_drawing import path_picture
from polyrank.reports.table import terminal_table, terminal_text

__all__ = ["compare", "path_picture", "report", "terminal_table", "terminal_text"]


def report(path: str | os.PathLike[str]) -> dict[str, Path]:
    """Write report.html, matrix.png, matrix.csv and a PNG a figure, replacing older ones.

    Returns:
        File name to path.

    Raises:
        RunError: if the folder holds no run or no results yet; nothing is written then.
    """
    folder = RunFolder.open(path)
    shown = view.prepare(folder.run, folder.results())
    made = {
        "report.html": page.render(shown).encode(),
        "matrix.png": picture.draw(shown),
        "matrix.csv": sheet.render(shown).encode(),
    }
    where = f"{folder.run['stream']['name']}, seed {folder.run['seed']}"
    made |= {heat.file: heat_picture.draw(heat, where) for heat in shown.figures}
    return {name: write_bytes(folder.path / name, data) for name, data in made.items()}


def compare(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    baseline: str | None = None,
    out: str | os.PathLike[str] = "compare",
    *,
    restricted: bool = False,
) -> dict[str, Path]:
    """Write compare.md, compare.csv and compare.png over finished runs of one stream.

    What is the same system at several seeds becomes one line: mean ± sample deviation, and the
    difference to a baseline, paired by seed.

    Args:
        paths: Run folders, or folders that hold some at any depth; one or several.
        baseline: Label or name of the system that differences are taken to; the sequential
            reference if left out.
        out: Folder of the three files, older ones of which are replaced.
        restricted: Whether to show predictions among a task's own classes alone.

    Returns:
        File name to path.

    Raises:
        RunError: if there is no run, a run is not finished, streams differ, or `out` is a run.
        ConfigError: if the baseline is none of the systems, or no prediction is restricted.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    folder = Path(out)
    if (folder / RUN).exists():
        raise RunError(
            f"{folder}: is a run folder, expected one for the comparison; choose another"
        )
    found = compare_view.gather(given, baseline, restricted=restricted)
    made = {
        "compare.md": compare_table.markdown(found).encode(),
        "compare.csv": compare_table.sheet(found).encode(),
        "compare.png": compare_picture.draw(found),
    }
    return {name: write_bytes(folder / name, data) for name, data in made.items()}

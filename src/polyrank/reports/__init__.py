"""Tables, pictures and one HTML page from a run folder; no torch."""

import os
from pathlib import Path

from polyrank.io import RunFolder
from polyrank.io.files import write_bytes
from polyrank.reports import page, picture, sheet, view
from polyrank.reports.table import terminal_table, terminal_text

__all__ = ["report", "terminal_table", "terminal_text"]


def report(path: str | os.PathLike[str]) -> dict[str, Path]:
    """Write report.html, matrix.png and matrix.csv into a run folder, replacing older ones.

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
    return {name: write_bytes(folder.path / name, data) for name, data in made.items()}

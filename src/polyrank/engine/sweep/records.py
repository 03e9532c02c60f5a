"""runs.jsonl: a line for each finished run, only ever appended to.

A line's "state" is "ok", "diverged" (its scores are the worst value) or "error" (it is no result,
and the run is made again). A last line that a kill cut off is dropped; its run is made again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from polyrank.errors import RunError
from polyrank.io.files import plain

try:
    import fcntl
except ImportError:  # Windows: two sweeps in one folder are then not told apart.
    fcntl = None  # type: ignore[assignment]

RUNS, LOCK = "runs.jsonl", "spec.lock"
STATES = ("ok", "diverged", "error")
FINISHED = ("ok", "diverged")
_NEEDED = {
    "id": str,
    "group": str,
    "method": str,
    "index": int,
    "rate": float,
    "seed": int,
    "state": str,
}
Line = Mapping[str, Any]
# Number of the rate, seed.
Place = tuple[int, int]


class Records:
    """The lines of a sweep, open for appending by one process at a time.

    Attributes:
        path: the file.
        lines: what stands in it.

    Raises:
        RunError: if another process writes it, or a line is no run.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / RUNS
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _claimed(self.path)
        try:
            self.lines = read(folder)
        except RunError:
            self._file.close()
            raise

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, line: Line) -> None:
        """Add one line; it is on the disk when this returns.

        Raises:
            RunError: if it lacks a key.
        """
        made = plain(line)
        if faults := _faults(made):
            raise RunError(f"{RUNS}: a line cannot be written: {'; '.join(faults)}")
        text = json.dumps(made, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        self._file.write((text + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.lines.append(made)


def read(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the whole lines of a folder, none if it has no file.

    Raises:
        RunError: naming a line that is no run.
    """
    path = Path(folder) / RUNS
    if not path.exists():
        return []
    found = []
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            made = json.loads(line)
            faults = _faults(made)
        except ValueError as error:
            faults = [f"no JSON: {error}"]
        if faults:
            raise RunError(f"{path}: line {number}: {'; '.join(faults)}; delete the line")
        found.append(made)
    return found


def by_group(lines: Iterable[Line]) -> dict[str, dict[Place, Line]]:
    """Return one line for each group, rate and seed, whatever the order of the lines.

    A finished run goes before an error; of several alike the first by its text is taken.
    """
    groups: dict[str, dict[Place, list[Line]]] = {}
    for line in lines:
        place = (line["index"], line["seed"])
        groups.setdefault(line["group"], {}).setdefault(place, []).append(line)
    return {
        group: {
            place: found[0] if len(found) == 1 else _first(found) for place, found in own.items()
        }
        for group, own in groups.items()
    }


def _first(lines: list[Line]) -> Line:
    return min(lines, key=lambda line: (line["state"] not in FINISHED, _text(line)))


def _text(line: Line) -> str:
    return json.dumps(line, sort_keys=True)


def _faults(line: Any) -> list[str]:
    if not isinstance(line, dict):
        return [f"got {type(line).__name__}, expected an object"]
    found = [
        f"{key}: got {line.get(key)!r}, expected {kind.__name__}"
        for key, kind in _NEEDED.items()
        if not isinstance(line.get(key), kind) or isinstance(line.get(key), bool)
    ]
    if found:
        return found
    if line["state"] not in STATES:
        return [f"state: got {line['state']!r}, expected one of {', '.join(STATES)}"]
    scores = ("validation", "test") if line["state"] in FINISHED else ()
    return [
        f"{key}: got {line.get(key)!r}, expected a number"
        for key in scores
        if not isinstance(line.get(key), int | float) or isinstance(line.get(key), bool)
    ]


def _claimed(path: Path) -> IO[bytes]:
    """Open the file for appending, drop a line cut off by a kill, hold a lock on it."""
    file = open(path, "a+b")  # noqa: SIM115 (kept open for the life of the sweep)
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise RunError(
            f"{path.parent}: another process is running this sweep; wait for it, or choose another "
            "folder by --out"
        ) from error
    except OSError:
        # Some network file systems have no locks.
        pass
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    return file

"""The folder of one run: what was asked for, what happened, what came out.

    run.json       resolved configuration, seed, versions, commit, hardware, command, status
    events.jsonl   one JSON object a line, appended while the run goes on
    results.json   accuracy matrices, metrics and routing of every system
    report.html, matrix.png, matrix.csv     made from these by polyrank.reports
    SYSTEM-FIGURE.png                       the same, one for each figure of a method
    adapters/, exports/, base/, checkpoints/        written by the engine

Every JSON file is written aside and renamed. Not measured is null in a file and NaN in memory.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from polyrank.errors import RunError
from polyrank.io import environment, schema
from polyrank.io.files import plain, read_json, write_json

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are then told apart by their status alone.
    fcntl = None  # type: ignore[assignment]

RUN, EVENTS, RESULTS = "run.json", "events.jsonl", "results.json"
REPORTS = ("report.html", "matrix.png", "matrix.csv")
FOLDERS = ("adapters", "base", "checkpoints", "exports")
_OURS = frozenset({RUN, EVENTS, RESULTS, *REPORTS, *FOLDERS})
_IGNORED = frozenset({".DS_Store", ".gitignore", ".gitkeep"})


class RunFolder:
    """One run on disk; `create` starts a new one, `open` reads one that exists.

    With several processes only the first one may create and write it.

    Attributes:
        path: The folder.
        run: Content of run.json.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path = path
        self.run = run
        self._log: IO[bytes] | None = None
        self._begun = time.monotonic()

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        run: Mapping[str, Any],
        *,
        command: Sequence[str] | None = None,
        overwrite: bool = False,
    ) -> "RunFolder":
        """Start a run in a new or empty folder; versions, commit and hardware are collected here.

        Args:
            path: Folder, made with its parents.
            run: At least method, stream, model, seed, train; these say which run it is.
            command: How to repeat it; the arguments of this process if left out.
            overwrite: Also replace an interrupted run, or a finished one with the same `run`.

        Raises:
            RunError: before anything is written, if the folder holds another run or other files,
                or if `run` is incomplete.
        """
        path, identity = Path(path), plain(run)
        problems = [
            f"run: {key!r} is missing or no {kind.__name__}"
            for key, kind in schema.IDENTITY.items()
            if not isinstance(identity.get(key), kind)
        ]
        if problems:
            raise RunError("; ".join(problems) + "; pass method, stream, model, seed and train")
        _check_free(path, identity, overwrite)
        full = {
            "schema": schema.SCHEMA,
            **identity,
            "versions": environment.versions(),
            "commit": environment.commit(),
            "hardware": environment.hardware(),
            "command": list(sys.argv if command is None else command),
            "started": _now(),
            "seconds": None,
            "status": "running",
        }
        if problems := schema.run_problems(plain(full)):
            raise RunError("\n".join(problems))
        _clear(path)
        write_json(path / RUN, full)
        folder = cls(path, plain(full))
        folder._open_log()
        return folder

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "RunFolder":
        """Read a run that exists.

        Raises:
            RunError: if the folder is missing, holds no run, or its run.json has faults.
        """
        path = Path(path)
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise RunError(f"{path}: {what}, expected the folder of a run; check the path")
        if not (path / RUN).exists():
            raise RunError(f"{path}: holds no {RUN}, so it is no run folder; check the path")
        run = read_json(path / RUN)
        _refuse(path / RUN, schema.run_problems(run))
        return cls(path, run)

    def event(self, event: str, /, **fields: Any) -> None:
        """Append one line to events.jsonl: time (UTC), event, then the fields."""
        line = json.dumps(plain({"time": _now(), "event": event, **fields}), ensure_ascii=False)
        log = self._open_log()
        log.write((line + "\n").encode())
        log.flush()

    def events(self) -> Iterator[dict[str, Any]]:
        """The lines of events.jsonl; a last line cut off by a kill is left out."""
        path = self.path / EVENTS
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(keepends=True), 1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise RunError(
                    f"{path}: line {number} is no JSON ({error}); delete the line"
                ) from error

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Check and write results.json; NaN becomes null, "schema" is added.

        Raises:
            RunError: listing everything that does not fit, before the file is touched.
        """
        data = plain({**results, "schema": schema.SCHEMA})
        _refuse(self.path / RESULTS, schema.results_problems(data))
        write_json(self.path / RESULTS, data)

    def results(self) -> dict[str, Any]:
        """Content of results.json with NaN for every score that was not measured.

        Raises:
            RunError: if the run has no results yet, or the file has faults.
        """
        if not (self.path / RESULTS).exists():
            raise RunError(
                f"{self.path}: the run has no {RESULTS} yet (status {self.run['status']!r}); "
                "let it finish, or repeat it"
            )
        data = read_json(self.path / RESULTS)
        _refuse(self.path / RESULTS, schema.results_problems(data))
        return schema.map_scores(data, lambda x: float("nan") if x is None else x)

    def update(self, **fields: Any) -> None:
        """Change fields of run.json, for example `train=` once its defaults are resolved."""
        changed = {**self.run, **plain(fields)}
        _refuse(self.path / RUN, schema.run_problems(changed))
        write_json(self.path / RUN, changed)
        self.run = changed

    def resume(self) -> None:
        """Take up a run that was stopped: claim its log and mark it as running.

        Raises:
            RunError: if another process is writing it.
        """
        self._open_log()
        self._begun = time.monotonic() - (self.run["seconds"] or 0.0)
        for aside in self.path.glob(".*.tmp"):
            aside.unlink()
        self.update(status="running", seconds=None)

    def taken(self) -> bool:
        """Say whether another process is writing this run now."""
        try:
            self._open_log()
        except RunError:
            return True
        self.close()
        return False

    def finish(self, status: str = "done") -> None:
        """Write the status and the seconds since `create`, close the log.

        Args:
            status: "done", "failed" or "interrupted".
        """
        self.update(status=status, seconds=round(time.monotonic() - self._begun, 3))
        self.close()

    def close(self) -> None:
        """Close events.jsonl, which also gives up the claim on the folder."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def differences(self, run: Mapping[str, Any]) -> list[str]:
        """Where `run` (as given to `create`) differs from this run: `seed: 0 here, 1 asked for`."""
        return [
            f"{key}: {_short(old)} here, {_short(new)} asked for"
            for key, old, new in _differing(self._identity(), plain(run))
        ]

    def _identity(self) -> dict[str, Any]:
        return {key: value for key, value in self.run.items() if key not in schema.COLLECTED}

    def _open_log(self) -> IO[bytes]:
        if self._log is None:
            self._log = _claim(self.path / EVENTS)
        return self._log


def _claim(path: Path) -> IO[bytes]:
    """Open the event log for appending, drop a line cut off by a kill, hold a lock on it."""
    log = open(path, "a+b")  # noqa: SIM115 (kept open for the life of the run)
    try:
        if fcntl is not None:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        log.close()
        raise RunError(
            f"{path.parent}: another process is writing this run; wait for it, or choose another "
            "folder"
        ) from error
    except OSError:
        # Some network file systems have no locks; the status in run.json still tells.
        pass
    log.seek(0)
    whole = log.read().rfind(b"\n") + 1
    log.truncate(whole)
    return log


def _check_free(path: Path, identity: Mapping[str, Any], overwrite: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise RunError(f"{path}: is a file, expected a folder; choose another name")
    names = {p.name for p in path.iterdir() if not _ignored(p.name)}
    if foreign := sorted(names - _OURS - _figures(path)):
        shown = ", ".join(foreign[:3]) + (" …" if len(foreign) > 3 else "")
        raise RunError(
            f"{path}: holds files of something else ({shown}), expected a new or empty folder; "
            "choose another folder"
        )
    if not names:
        return
    if RUN not in names:
        shown = ", ".join(sorted(names))
        raise RunError(
            f"{path}: holds {shown} but no {RUN}, expected a new or empty folder; choose another "
            "folder, or empty this one"
        )
    old = RunFolder.open(path)
    name, status = old.run["method"]["name"], old.run["status"]
    changed = old.differences(identity)
    if not overwrite:
        same = "the same run" if not changed else "another run"
        raise RunError(
            f"{path}: holds {same} ({name}, seed {old.run['seed']}, {status}); choose another "
            "folder, or ask to overwrite it"
        )
    if status == "done" and changed:
        raise RunError(
            f"{path}: holds another finished run, which is never overwritten "
            f"({'; '.join(changed[:3])}); choose another folder, or delete this one"
        )
    # Raises if the other run is still going on.
    _claim(path / EVENTS).close()


def _clear(path: Path) -> None:
    # run.json goes last: as long as it stands, a killed replacement can be asked for again.
    if not path.exists():
        return
    for name in sorted((_OURS | _figures(path)) - {RUN}):
        target = path / name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
    for aside in path.glob(".*.tmp"):
        aside.unlink()


def figure_files(results: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """File name -> (system, figure) of every figure in the content of results.json."""
    return {
        f"{system['name']}-{figure['name']}.png": (system, figure)
        for system in results["systems"]
        for figure in system.get("figures") or ()
    }


def _figures(path: Path) -> set[str]:
    try:
        return set(figure_files(read_json(path / RESULTS)))
    except (RunError, LookupError, TypeError, AttributeError):
        # A folder without results, or whose results were changed by hand, has no figures of ours.
        return set()


def _ignored(name: str) -> bool:
    return name in _IGNORED or (name.startswith(".") and name.endswith(".tmp"))


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise RunError(
            f"{path}: does not fit schema {schema.SCHEMA}:\n{listed}\n"
            "  it was changed by hand or by another version; repeat the run"
        )


def _differing(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted({*old, *new}):
            inner = f"{key}.{name}" if key else name
            yield from _differing(old.get(name), new.get(name), inner)
    elif old != new:
        yield key, old, new


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")

"""What is made once on a machine and used again: one folder for each key, whole or absent."""

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from polyrank.errors import CheckpointError, RunError
from polyrank.io.files import read_json, sha256_file, sha256_json, write_json

_RECORD = "cached.json"


def cache_folder() -> Path:
    """Where polyrank keeps what it makes once.

    $POLYRANK_CACHE; else "polyrank" in $XDG_CACHE_HOME, or where the platform keeps caches:
    ~/Library/Caches on macOS, %LOCALAPPDATA% on Windows, ~/.cache elsewhere. It need not exist.
    """
    if own := os.environ.get("POLYRANK_CACHE"):
        return Path(own).expanduser()
    if place := os.environ.get("XDG_CACHE_HOME"):
        return Path(place) / "polyrank"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "polyrank"
    if sys.platform == "win32" and (place := os.environ.get("LOCALAPPDATA")):
        return Path(place) / "polyrank"
    return Path.home() / ".cache" / "polyrank"


def cached(
    kind: str,
    key: Mapping[str, Any],
    make: Callable[[Path], None],
    folder: str | os.PathLike[str] | None = None,
) -> Path:
    """The folder with what `make` writes for this key; made now unless it is there.

    It is made aside and renamed, so that it is there whole or not at all; of two processes that
    make the same one, the first to finish keeps its own.

    Args:
        kind: First part of the folder's name, for people.
        key: Everything that decides the content.
        make: Writes files into the empty folder that it is given.
        folder: Cache to use, `cache_folder()` if left out.

    Raises:
        CheckpointError: if what is there was changed since it was made.
        RunError: if the cache cannot be written.
    """
    place = cache_folder() if folder is None else Path(folder)
    found = place / f"{kind}-{sha256_json(key)[:16]}"
    if not found.exists():
        _make(found, key, make)
    _check(found, key)
    return found


def _make(found: Path, key: Mapping[str, Any], make: Callable[[Path], None]) -> None:
    try:
        found.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(mkdtemp(prefix=f".{found.name}.", dir=found.parent))
    except OSError as error:
        raise RunError(
            f"cache: {found.parent} cannot be written ({error.strerror}); set POLYRANK_CACHE to a "
            "folder that you may write to"
        ) from error
    try:
        make(aside)
        write_json(aside / _RECORD, {"key": key, "files": _sums(aside)})
        # Another process may have been faster; what it made is the same.
        with suppress(OSError):
            aside.rename(found)
        if not found.exists():
            raise RunError(
                f"cache: {found} could not be put in place; set POLYRANK_CACHE to a folder that "
                "you may write to"
            )
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check(found: Path, key: Mapping[str, Any]) -> None:
    try:
        record = read_json(found / _RECORD)
        whole = sha256_json(record["key"]) == sha256_json(key) and record["files"] == _sums(found)
    except (RunError, KeyError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(
            f"cache: {found} is not what was made there, expected the files of its {_RECORD}; "
            "remove the folder, and it is made anew"
        )


def _sums(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _RECORD)
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}

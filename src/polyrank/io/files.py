"""Files that are either the old or the new version, never half of one; JSON and checksums."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from polyrank.errors import RunError

_CHUNK = 1 << 20


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file aside, flush it to the disk and rename it over `path`.

    A process killed at any instant leaves the old file or the new one, and perhaps a hidden
    `.NAME.PID.tmp` beside it. The folder is created if needed.

    Raises:
        RunError: if the folder cannot be written.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise RunError(
            f"{path}: could not be written ({error.strerror or error}); free some space, or choose "
            "a folder that you may write to"
        ) from error
    return path


def write_json(path: str | os.PathLike[str], data: Any) -> Path:
    """Write `plain(data)` as UTF-8 JSON by `write_bytes`."""
    text = json.dumps(plain(data), indent=1, ensure_ascii=False, allow_nan=False)
    return write_bytes(path, (text + "\n").encode())


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read one JSON file; null comes back as None.

    Raises:
        RunError: if it is missing, unreadable or no JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(
            f"{path}: no such file; give the folder of a run, the one that holds run.json"
        ) from error
    except OSError as error:
        raise RunError(
            f"{path}: could not be read ({error.strerror}); check its permissions"
        ) from error
    except ValueError as error:
        raise RunError(
            f"{path}: got text that is no JSON ({error}); restore the file or repeat the run"
        ) from error


def plain(value: Any) -> Any:
    """`value` in the types of JSON: NaN becomes None, infinities the strings "inf" and "-inf".

    Takes numbers, strings, paths, mappings, sequences, sets (sorted), dataclasses, numpy arrays
    and torch tensors (recognised by `tolist`).

    Raises:
        RunError: on any other type, naming it.
    """
    if value is None or isinstance(value, bool | int | str):
        # A subclass (an enum, numpy's str) is written as its base type.
        return value if type(value) in (bool, int, str, type(None)) else _base(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: plain(getattr(value, field.name)) for field in fields}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise RunError(
        f"JSON: got {type(value).__name__} ({value!r:.60}), expected numbers, text, lists, "
        "mappings or arrays; convert it before it is written"
    )


def sha256_bytes(data: bytes) -> str:
    """Checksum as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_json(data: Any) -> str:
    """Checksum of `plain(data)`, independent of the order of keys."""
    text = json.dumps(plain(data), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256_bytes(text.encode())


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Checksum of a file, read in pieces.

    Raises:
        RunError: if it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(_CHUNK):
                digest.update(piece)
    except OSError as error:
        raise RunError(
            f"{path}: could not be read ({error.strerror}); give the path of an existing file"
        ) from error
    return digest.hexdigest()


def _base(value: Any) -> bool | int | str:
    return str.__str__(value) if isinstance(value, str) else int(value)


def _sync_folder(folder: Path) -> None:
    # The rename itself must reach the disk; not every system can open a folder.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

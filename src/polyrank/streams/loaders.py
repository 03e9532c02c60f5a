"""Tables of raw rows, from files and folders here or from a data set of the Hugging Face hub.

A table knows its columns, gives one column as a list and one row as a dict. Images stay as they are
stored, `{"bytes": …, "path": …}` or a path, and are decoded when a row is asked for.
"""

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyrank.errors import StreamError

SUFFIXES = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff")


class Table(ABC):
    """Raw rows.

    Attributes:
        where: What messages call it.
        columns: Names of its columns.
        names: Label names that the data set itself gives for a column of numbers.
        folder: What paths of images are relative to.
    """

    where: str
    columns: Sequence[str]
    names: Mapping[str, Sequence[str]]
    folder: Path | None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def column(self, name: str) -> list[Any]:
        """All values of a column."""

    @abstractmethod
    def row(self, index: int) -> Mapping[str, Any]:
        """All columns of a row."""


class Lists(Table):
    """A table of Python lists; a value that a row lacks is None."""

    def __init__(
        self, where: str, columns: Mapping[str, list[Any]], folder: Path | None = None
    ) -> None:
        self.where = where
        self.folder = folder
        self.columns = tuple(columns)
        self.names = {}
        self._lists = dict(columns)

    @classmethod
    def of(cls, file: Path, rows: Sequence[Mapping[str, Any]]) -> "Lists":
        """The table of a list of dicts, with every key that one of them has."""
        keys = dict.fromkeys(key for row in rows for key in row)
        lists = {str(key): [row.get(key) for row in rows] for key in keys}
        return cls(str(file), lists, file.parent)

    def __len__(self) -> int:
        return len(next(iter(self._lists.values()), ()))

    def column(self, name: str) -> list[Any]:
        return self._lists[name]

    def row(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self._lists.items()}


class Arrow(Table):
    """A table of Parquet files, kept as Arrow."""

    def __init__(self, file: Path, table: Any) -> None:
        self.where = str(file)
        self.folder = file.parent
        self.columns = tuple(table.column_names)
        self.names = _names(table.schema.metadata or {})
        self._table = table.combine_chunks()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def column(self, name: str) -> list[Any]:
        found: list[Any] = self._table.column(name).to_pylist()
        return found

    def row(self, index: int) -> dict[str, Any]:
        return {name: self._table.column(name)[index].as_py() for name in self.columns}


class Hub(Table):
    """A split of a data set that `datasets` loaded; image files are not decoded here."""

    def __init__(self, where: str, split: Any) -> None:
        import datasets

        self.where = where
        self.folder = None
        self.columns = tuple(split.column_names)
        features = split.features
        self.names = {n: f.names for n, f in features.items() if hasattr(f, "int2str")}
        for name, feature in features.items():
            if isinstance(feature, datasets.Image):
                split = split.cast_column(name, datasets.Image(decode=False))
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def column(self, name: str) -> list[Any]:
        return list(self._split[name])

    def row(self, index: int) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._split[int(index)]
        return found


class Joined(Table):
    """Several tables one after another; they have the same columns."""

    def __init__(self, where: str, tables: Sequence[Table]) -> None:
        self.where = where
        self.tables = list(tables)
        self.columns = tables[0].columns
        self.names = tables[0].names
        folders = {table.folder for table in tables}
        self.folder = folders.pop() if len(folders) == 1 else None
        for table in tables:
            if set(table.columns) != set(self.columns):
                raise StreamError(
                    f"{table.where}: got the columns {', '.join(table.columns)}, expected those of "
                    f"{tables[0].where}: {', '.join(self.columns)}; read them as two tasks"
                )

    def __len__(self) -> int:
        return sum(map(len, self.tables))

    def column(self, name: str) -> list[Any]:
        return [value for table in self.tables for value in table.column(name)]

    def row(self, index: int) -> Mapping[str, Any]:
        for table in self.tables:
            if index < len(table):
                return table.row(index)
            index -= len(table)
        raise IndexError(index)


def format_of(path: Path) -> str | None:
    """What a path is read as, by its ending; a folder holds images."""
    return "images" if path.is_dir() else SUFFIXES.get(path.suffix.lower())


def found_at(path: Path) -> list[Path]:
    """The files of a path: itself, or what its pattern (`*`, `?`, `[…]`) matches, in order."""
    if path.exists():
        return [path]
    root = Path(path.anchor)
    pattern = str(path.relative_to(root)) if path.is_absolute() else str(path)
    return sorted(root.glob(pattern)) if any(c in pattern for c in "*?[") else []


def local(
    path: Path,
    *,
    kind: str | None = None,
    header: Sequence[str] | None = None,
    unit: str = "line",
) -> Table:
    """Read a file, all files that a pattern matches, or a folder of images.

    Args:
        path: The file, pattern or folder.
        kind: One of `schema.FORMATS`; by the file's ending if left out.
        header: Names of the columns of a CSV file without a first line of names.
        unit: For text, what becomes a row: "line", "paragraph" or "document".

    Raises:
        StreamError: if nothing is there, or it cannot be read.
    """
    files = found_at(path)
    if not files:
        raise StreamError(f"{path}: no such file or folder; correct the path")
    tables = [_table(file, kind or format_of(file), header, unit) for file in files]
    return tables[0] if len(tables) == 1 else Joined(str(path), tables)


def hub(
    name: str, config: str | None, revision: str | None, root: Path | None, split: str | None
) -> dict[str, Table]:
    """Load splits of a data set: one, or all if `split` is None, by their names.

    Args:
        name: The data set's id, owner/name.
        config: Its configuration, if it has several.
        revision: Branch, tag or commit.
        root: A folder that holds a copy under the same id, which is then read instead.
        split: A split as `datasets` writes it, for example "train" or "train[:1000]".

    Raises:
        StreamError: if it cannot be loaded, whatever the reason.
    """
    source = name if root is None else str(root / name)
    if root is not None and not (root / name).is_dir():
        raise StreamError(
            f"no folder {source}; put a copy of the data set {name!r} there, "
            f"for example with `hf download --repo-type dataset {name} --local-dir {source}`"
        )
    import datasets
    from huggingface_hub.utils import logging

    shown, level = datasets.is_progress_bar_enabled(), logging.get_verbosity()
    datasets.disable_progress_bars()
    # Each of the client's tries to reach the hub would write a line of its own.
    logging.set_verbosity_error()
    try:
        revision = revision if root is None else None
        found = datasets.load_dataset(source, config, revision=revision, split=split)
    # The hub's client raises more classes than it documents; each becomes one line.
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        what = f"{name!r}" + (f", config {config!r}" if config else "")
        raise StreamError(
            f"cannot load {what}, split {split or 'all'!r}: {reason[0]}; check id, config and "
            "network, or put a copy into a folder and name that as `root`"
        ) from error
    finally:
        logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()
    parts = {split: found} if split is not None else dict(found)
    return {key: Hub(f"{name}, split {key}", part) for key, part in parts.items()}


def _table(file: Path, kind: str | None, header: Sequence[str] | None, unit: str) -> Table:
    if kind is None:
        raise StreamError(
            f"{file}: got the ending {file.suffix or 'none'!r}, expected one of "
            f"{', '.join(SUFFIXES)} or a folder of images; say what it is with `format`"
        )
    if kind == "images":
        return _images(file)
    if file.is_dir():
        raise StreamError(f"{file}: got a folder, expected a {kind} file; write {file.name}/*")
    try:
        if kind == "parquet":
            return _parquet(file)
        with file.open(encoding="utf-8-sig", newline="" if kind in ("csv", "tsv") else None) as f:
            if kind in ("csv", "tsv"):
                return _csv(file, f, "," if kind == "csv" else "\t", header)
            if kind == "text":
                return Lists(str(file), {"text": list(_units(f.read(), unit))})
            return _json(file, f) if kind == "json" else _jsonl(file, f)
    except (OSError, UnicodeDecodeError) as error:
        raise StreamError(f"{file}: cannot be read: {error}; it must be UTF-8 text") from error


def _units(text: str, unit: str) -> Iterator[str]:
    if unit == "document":
        pieces: Iterable[str] = [text]
    elif unit == "line":
        pieces = text.splitlines()
    else:
        blanked = "\n".join(line if line.strip() else "" for line in text.splitlines())
        pieces = blanked.split("\n\n")
    return (piece.strip("\n") for piece in pieces if piece.strip())


def _json(file: Path, lines: Iterable[str]) -> Lists:
    try:
        rows = json.loads("".join(lines))
    except json.JSONDecodeError as error:
        raise StreamError(
            f"{file}: no JSON at line {error.lineno}: {error.msg}; if every line is an object of "
            "its own, call the file .jsonl"
        ) from error
    if not isinstance(rows, list) or any(not isinstance(row, dict) for row in rows):
        raise StreamError(f"{file}: expected a list of objects, one for each row; write it so")
    return Lists.of(file, rows)


def _jsonl(file: Path, lines: Iterable[str]) -> Lists:
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise StreamError(
                f"{file}: no JSON in line {number}: {error.msg}; correct it"
            ) from error
        if not isinstance(row, dict):
            raise StreamError(f"{file}: got {line.strip()[:40]} in line {number}, expected {{…}}")
        rows.append(row)
    return Lists.of(file, rows)


def _csv(file: Path, lines: Iterable[str], mark: str, header: Sequence[str] | None) -> Lists:
    try:
        rows = list(csv.reader(lines, delimiter=mark))
    except csv.Error as error:
        raise StreamError(f"{file}: {error}; write it as JSON lines or Parquet instead") from error
    names = list(header) if header is not None else rows.pop(0) if rows else []
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise StreamError(f"{file}: two columns are called {double[0]!r}; rename one")
    rows = [row for row in rows if row]
    for number, row in enumerate(rows, 1):
        if len(row) != len(names):
            raise StreamError(
                f"{file}: row {number} has {len(row)} values for {len(names)} columns "
                f"({', '.join(names)}); put quotes around text with a delimiter in it"
            )
    lists = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    return Lists(str(file), lists, file.parent)


def _parquet(file: Path) -> Arrow:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise StreamError(f"{file}: Parquet needs pyarrow; pip install pyarrow") from error
    try:
        return Arrow(file, pyarrow.parquet.read_table(file))
    except pyarrow.ArrowInvalid as error:
        raise StreamError(f"{file}: no Parquet file: {error}; write it anew") from error


def _names(metadata: Mapping[bytes, bytes]) -> dict[str, Sequence[str]]:
    # What `datasets` writes beside the columns, label names among it.
    try:
        info = json.loads(metadata.get(b"huggingface", b"{}"))
    except json.JSONDecodeError:
        return {}
    features = info.get("info", {}).get("features", {})
    return {n: f["names"] for n, f in features.items() if isinstance(f, dict) and "names" in f}


def _images(folder: Path) -> Lists:
    if not folder.is_dir():
        raise StreamError(f"{folder}: got a file, expected a folder with one folder a class")
    inner = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [f for c in inner for f in sorted(c.rglob("*")) if f.suffix.lower() in IMAGES]
    if not files:
        raise StreamError(
            f"{folder}: no image below a folder of its class, such as {folder.name}/cat/1.png; "
            f"images end in {', '.join(IMAGES)}"
        )
    labels = [file.relative_to(folder).parts[0] for file in files]
    return Lists(str(folder), {"image": [str(file) for file in files], "label": labels})

"""Rows of data as a task holds them: map-style datasets of dicts, in numpy, in a fixed order."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from polyrank.errors import StreamError


class Dataset(Protocol):
    """What a role of a task needs: a length and rows by number, always in the same order.

    A row is a dict; for classification it has "label", the class as a number in the seen order.
    torch's map-style datasets and Hugging Face's `Dataset` fit as they are.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Rows:
    """Columns of equal length as a dataset of dicts; numbers come out as Python numbers.

    The columns are copied and kept read-only; a row holds its own writable copy of each array.

    Attributes:
        origin: For each row its number in the data it was taken from, or None.
    """

    def __init__(
        self, columns: Mapping[str, Any], *, origin: Sequence[int] | np.ndarray | None = None
    ) -> None:
        self._columns = {name: _fixed(values) for name, values in columns.items()}
        lengths = {name: len(values) for name, values in self._columns.items()}
        if len(set(lengths.values())) != 1:
            raise StreamError(
                f"rows: got columns of lengths {lengths}, expected at least one column and equal "
                "lengths; drop the rows that lack a value"
            )
        self.origin = None if origin is None else _fixed(origin)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        return {
            name: values[index].copy() if values.ndim > 1 else values[index].item()
            for name, values in self._columns.items()
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def batch(self, indices: Any) -> dict[str, np.ndarray]:
        """Rows by a list, array or slice of numbers as one array per column, copied."""
        return {name: np.array(values[indices]) for name, values in self._columns.items()}

    def take(self, indices: Any) -> "Rows":
        """The rows with these numbers, in this order."""
        origin = None if self.origin is None else self.origin[indices]
        return Rows(self.batch(indices), origin=origin)

    @property
    def labels(self) -> np.ndarray | None:
        """The column "label", without reading row by row."""
        return self._columns.get("label")

    @property
    def fingerprint(self) -> str:
        """Checksum of names, types, shapes and values; equal on every machine."""
        digest = hashlib.sha256()
        for name, values in sorted(self._columns.items()):
            little = values.astype(values.dtype.newbyteorder("<"), copy=False)
            digest.update(f"{name} {little.dtype.str} {little.shape}\n".encode())
            digest.update(np.ascontiguousarray(little).tobytes())
        return digest.hexdigest()


class OnePass:
    """A dataset of an online stream: every row can be read once.

    Each worker process of a loader counts for itself; its reads are those of one pass anyway.
    """

    def __init__(self, inner: Dataset, name: str) -> None:
        self.inner = inner
        self.name = name
        self._read = np.zeros(len(inner), dtype=bool)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int, /) -> Any:
        if self._read[index]:
            raise StreamError(
                f"{self.name}: row {index} was asked for twice, expected one pass over an online "
                "stream; keep what you need in a replay buffer, or begin again with stream.fresh()"
            )
        self._read[index] = True
        return self.inner[index]


def labels_of(dataset: Dataset) -> np.ndarray | None:
    """The labels of all rows, by the column if there is one; None if rows have no "label"."""
    if isinstance(dataset, OnePass):
        return labels_of(dataset.inner)
    if isinstance(dataset, Rows):
        return dataset.labels
    names = getattr(dataset, "column_names", None)
    if names is not None:
        column: Any = dataset
        return np.asarray(column["label"]) if "label" in names else None
    rows = [dataset[i] for i in range(len(dataset))]
    if any(not isinstance(row, Mapping) or "label" not in row for row in rows):
        return None
    return np.asarray([row["label"] for row in rows])


def fingerprint_of(dataset: Dataset) -> str:
    """Checksum of all rows; a dataset may provide its own as the attribute `fingerprint`."""
    if isinstance(dataset, OnePass):
        return fingerprint_of(dataset.inner)
    own = getattr(dataset, "fingerprint", None)
    if isinstance(own, str):
        return own
    digest = hashlib.sha256()
    for i in range(len(dataset)):
        digest.update(_canonical(dataset[i]).encode())
    return digest.hexdigest()


def _canonical(value: Any) -> str:
    if isinstance(value, Mapping):
        inside = ",".join(f"{key!s}:{_canonical(value[key])}" for key in sorted(value, key=str))
        return "{" + inside + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_canonical, value)) + "]"
    if value is None or isinstance(value, str | int | float | bool):
        return json.dumps(value)
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    # Arrays, tensors and images all turn into arrays.
    array = np.asarray(value)
    if array.dtype == object:
        raise StreamError(
            f"row: got a {type(value).__name__}, which has no checksum; expected numbers, text, "
            "arrays or images, or a dataset with its own `fingerprint`"
        )
    return f"{array.dtype.str}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"


def _fixed(values: Any) -> np.ndarray:
    array = np.array(values)
    if array.dtype == object:
        raise StreamError(
            "rows: got a column of mixed objects, expected numbers, text or equal-sized arrays; "
            "pass any other dataset of dicts with len() and rows by number instead"
        )
    array.setflags(write=False)
    return array

"""States kept by the content of their rows: in memory, or in a file that is checked and renamed."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyrank.engine.prefix_find import as_bytes
from polyrank.errors import CheckpointError
from polyrank.io.cache import cache_folder, cached
from polyrank.io.files import sha256_json

_log = logging.getLogger(__name__)

# Of the file and of what its key says; a file of another one is never read.
FORMAT = 1
KIND = "prefix"
_FILE = "states.safetensors"
# Of states that can be kept, by what safetensors calls them.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


@dataclass(frozen=True)
class Shape:
    """What the states of `count` rows look like.

    Attributes:
        count: rows.
        row: shape of one row's states, such as (tokens, d).
        dtype: of the states, a floating one.
    """

    count: int
    row: tuple[int, ...]
    dtype: torch.dtype

    @property
    def width(self) -> int:
        """Bytes of one row."""
        return prod(self.row) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return self.count * self.width


class States:
    """States of rows, found by the digests of the rows.

    Args:
        digests: of the rows, in order, all different.
        shape: of the states.
        held: bytes of all rows (rows, width), uint8.
        place: where they are: "memory", or the file's folder.
    """

    def __init__(
        self, digests: Sequence[bytes], shape: Shape, held: np.ndarray, place: str
    ) -> None:
        self.numbers = {digest: number for number, digest in enumerate(digests)}
        self.shape, self.held, self.place = shape, held, place

    def take(self, digests: Sequence[bytes]) -> Tensor | None:
        """Return new tensors of some rows, (n, *row); None if one of them is unknown."""
        try:
            numbers = [self.numbers[digest] for digest in digests]
        except KeyError:
            return None
        part = torch.from_numpy(np.ascontiguousarray(self.held[numbers]))
        return part.view(self.shape.dtype).reshape(len(numbers), *self.shape.row)


def row_digests(inputs: Mapping[str, Any]) -> list[bytes] | None:
    """Return 16 bytes for each row of a model's inputs; None if they are not one entry a row.

    Names, dtypes and shapes of the tensors count too, and the values of all other inputs.
    """
    tensors = {k: v.detach().cpu() for k, v in sorted(inputs.items()) if isinstance(v, Tensor)}
    if not tensors or any(not t.dim() for t in tensors.values()):
        return None
    counts = {len(tensor) for tensor in tensors.values()}
    if len(counts) > 1 or 0 in counts:
        return None
    count = counts.pop()
    head = [(name, str(t.dtype), tuple(t.shape[1:])) for name, t in tensors.items()]
    rest = [(k, repr(v)) for k, v in sorted(inputs.items()) if not isinstance(v, Tensor)]
    start = hashlib.blake2b(repr((head, rest)).encode(), digest_size=16)
    flat = [as_bytes(t).numpy().reshape(count, -1) for t in tensors.values()]
    rows = np.ascontiguousarray(np.concatenate(flat, axis=1))
    found = []
    for row in rows:
        digest = start.copy()
        digest.update(row.data)
        found.append(digest.digest())
    return found


def row_shapes(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return names and shapes of one row's inputs."""
    return tuple((k, v.shape[1:]) for k, v in sorted(inputs.items()) if isinstance(v, Tensor))


def in_memory(digests: Sequence[bytes], shape: Shape, parts: Iterable[Tensor]) -> States:
    """Keep what comes in parts, each (n, *row), in order."""
    held = np.empty((shape.count, shape.width), dtype=np.uint8)
    start = 0
    for part in parts:
        held[start : start + len(part)] = _lines(part)
        start += len(part)
    assert start == shape.count
    return States(digests, shape, held, "memory")


def on_disk(
    digests: Sequence[bytes],
    shape: Shape,
    parts: Callable[[], Iterable[Tensor]],
    key: Mapping[str, Any],
    folder: Path | None,
    limit: int,
) -> States:
    """Read what is kept under a key, or keep what comes in parts; the file is mapped.

    A file that was damaged is made anew, with a warning. What was used longest ago goes if all
    files together would take more than `limit` bytes.

    Raises:
        RunError: if the folder cannot be written.
        OSError: if the disk is full.
    """
    place = cache_folder() if folder is None else folder
    key = {
        **key,
        "format": FORMAT,
        "row": list(shape.row),
        "dtype": str(shape.dtype),
        "rows": hashlib.blake2b(b"".join(digests), digest_size=32).hexdigest(),
    }

    def make(aside: Path) -> None:
        _make_room(place, shape.bytes, limit)
        _write(aside / _FILE, shape, parts())

    try:
        found = cached(KIND, key, make, place)
        held = _mapped(found / _FILE, shape)
    except CheckpointError as error:
        _log.warning("prefix: %s; it is made anew now", error)
        shutil.rmtree(place / f"{KIND}-{sha256_json(key)[:16]}", ignore_errors=True)
        found = cached(KIND, key, make, place)
        held = _mapped(found / _FILE, shape)
    # The time of last use, by which the oldest is chosen.
    (found / _FILE).touch()
    return States(digests, shape, held, str(found))


def _lines(part: Tensor) -> np.ndarray:
    return as_bytes(part.detach().cpu()).numpy().reshape(len(part), -1)


def _head(shape: Shape) -> bytes:
    tensor = {
        "dtype": DTYPES[shape.dtype],
        "shape": [shape.count, *shape.row],
        "data_offsets": [0, shape.bytes],
    }
    text = json.dumps({"__metadata__": {"polyrank": f"prefix {FORMAT}"}, "states": tensor}).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def _write(path: Path, shape: Shape, parts: Iterable[Tensor]) -> None:
    """Write a safetensors file part by part, for states that memory does not hold."""
    with path.open("wb") as file:
        file.write(_head(shape))
        for part in parts:
            file.write(_lines(part).data)


def _mapped(path: Path, shape: Shape) -> np.ndarray:
    head = _head(shape)
    with path.open("rb") as file:
        whole = file.read(len(head)) == head
    if not whole or path.stat().st_size != len(head) + shape.bytes:
        raise CheckpointError(
            f"cache: {path.parent} holds other states than its key says, expected "
            f"{shape.count} rows of {shape.row}; remove the folder"
        )
    return np.memmap(path, np.uint8, "r", len(head), (shape.count, shape.width))


def _kept(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"{KIND}-*") if (path / _FILE).is_file()]


def _make_room(folder: Path, size: int, limit: int) -> None:
    """Remove the files that were used longest ago, until `size` more bytes fit into the limit."""
    found = [(path, (path / _FILE).stat()) for path in _kept(folder)]
    total = sum(stat.st_size for _, stat in found)
    for path, stat in sorted(found, key=lambda entry: entry[1].st_mtime):
        if total + size <= limit:
            break
        shutil.rmtree(path, ignore_errors=True)
        total -= stat.st_size

"""Rows of a table as a task holds them: made when they are asked for, checked by one checksum."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from polyrank.errors import StreamError
from polyrank.streams import templates
from polyrank.streams.kinds import KINDS
from polyrank.streams.loaders import Table

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How rows of one task are made; plain data, so that it travels between processes.

    Args:
        kind: One of `kinds.KINDS`.
        task: Number of the task.
        columns: For each field a column or a template.
        prompt: Template of the prompt, for kinds that have one.
        options: The label names, for {options} in the prompt.
        channels: 1 for grey, 2 with transparency, 3 for colours, 4 with transparency.
    """

    kind: str
    task: int
    columns: Mapping[str, str]
    prompt: str | None = None
    options: tuple[str, ...] = ()
    channels: int = 3

    def missing(self, available: Sequence[str]) -> list[tuple[str, str]]:
        """What is asked for and a table with these columns does not have: (key, name)."""
        known = (*self.columns, "options")
        asked = [("prompt", name) for name in templates.names(self.prompt or "")]
        asked = [(key, name) for key, name in asked if name not in known]
        for field, column in self.columns.items():
            names = templates.names(column) if "{" in column else [column]
            asked += [(f"columns.{field}", name) for name in names]
        return [(key, name) for key, name in asked if templates.column(name, available) is None]


class FileRows:
    """Some rows of a table, in a fixed order; a row is a dict as `kinds` says.

    Attributes:
        origin: For each row its number in the table.
    """

    def __init__(
        self,
        table: Table,
        origin: np.ndarray,
        recipe: Recipe,
        labels: np.ndarray | None = None,
        answers: Mapping[int, str] | None = None,
    ) -> None:
        self.table, self.recipe = table, recipe
        self.origin = np.array(origin)
        self._labels = None if labels is None else np.array(labels)
        self._answers = dict(answers or {})

    def __len__(self) -> int:
        return len(self.origin)

    def __getitem__(self, index: int | str, /) -> Any:
        """A row by its number, or the column "label" by its name."""
        if isinstance(index, str):
            if index != "label" or self._labels is None:
                raise KeyError(index)
            return self._labels.copy()
        row = self._row(range(len(self))[index])
        if "image" in row:
            row["image"] = self._decoded(row["image"], index)
        return row

    @property
    def column_names(self) -> list[str]:
        """The columns that can be had without reading row by row."""
        return [] if self._labels is None else ["label"]

    @cached_property
    def fingerprint(self) -> str:
        """Checksum of all rows in their order, of images as they are stored."""
        digest = hashlib.sha256(self.recipe.kind.encode())
        for index in range(len(self)):
            row = self._row(index)
            if "image" in row:
                content = self._stored(row["image"], index)
                row["image"] = [self.recipe.channels, hashlib.sha256(content).hexdigest()]
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
        return digest.hexdigest()

    def _row(self, index: int) -> dict[str, Any]:
        raw, recipe = self.table.row(int(self.origin[index])), self.recipe
        row: dict[str, Any] = {}
        label = None if self._labels is None else int(self._labels[index])
        if KINDS[recipe.kind].prompted:
            row["prompt"] = self._prompt(raw, index)
            row["answer"] = (
                self._text("answer", raw, index) if label is None else self._answers[label]
            )
        else:
            for field in ("text", "text_pair"):
                if field in recipe.columns:
                    row[field] = self._text(field, raw, index)
        if "image" in recipe.columns:
            row["image"] = raw[recipe.columns["image"]]
        if "target" in recipe.columns:
            row["target"] = self._number(raw, index)
        if label is not None:
            row["label"] = label
        return {**row, "task": recipe.task}

    def _text(self, field: str, raw: Mapping[str, Any], index: int) -> str:
        column = self.recipe.columns[field]
        try:
            value = (
                templates.render(column, raw) if "{" in column else templates.lookup(column, raw)
            )
        except KeyError as error:
            raise self._empty(str(error.args[0]), index) from None
        if value is None:
            raise self._empty(column, index)
        return str(value)

    def _prompt(self, raw: Mapping[str, Any], index: int) -> str:
        recipe = self.recipe
        template = recipe.prompt
        if template is None:
            return self._text("prompt" if "prompt" in recipe.columns else "text", raw, index)
        asked = [name for name in templates.names(template) if name in recipe.columns]
        own = {name: self._text(name, raw, index) for name in asked}
        try:
            return templates.render(template, own, {"options": ", ".join(recipe.options)}, raw)
        except KeyError as error:
            raise self._empty(str(error.args[0]), index) from None

    def _number(self, raw: Mapping[str, Any], index: int) -> float:
        column = self.recipe.columns["target"]
        try:
            value = float(templates.lookup(column, raw))
        except (TypeError, ValueError, KeyError):
            value = math.nan
        if not math.isfinite(value):
            raise StreamError(
                f"{self._place(index)}: column {column!r}: got {raw.get(column)!r}, expected a "
                "number; correct the row or leave it out with `where`"
            )
        return value

    def _stored(self, value: Any, index: int) -> bytes:
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if isinstance(value, str):
            path = Path(value)
            if self.table.folder is not None:
                path = self.table.folder / path
            try:
                return path.read_bytes()
            except OSError as error:
                raise StreamError(f"{self._place(index)}: {error}; correct the path") from error
        raise StreamError(
            f"{self._place(index)}: got {type(value).__name__} as image, expected a path or the "
            "content of an image file; name the right column with columns.image"
        )

    def _decoded(self, value: Any, index: int) -> np.ndarray:
        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError as error:
            raise StreamError("images: reading them needs Pillow; pip install pillow") from error
        try:
            with Image.open(BytesIO(self._stored(value, index))) as image:
                pixels = np.array(image.convert(_MODES[self.recipe.channels]), dtype=np.uint8)
        except (UnidentifiedImageError, OSError) as error:
            raise StreamError(f"{self._place(index)}: no readable image: {error}") from error
        return pixels if pixels.ndim == 3 else pixels[:, :, None]

    def _empty(self, name: str, index: int) -> StreamError:
        return StreamError(
            f"{self._place(index)}: {name!r} is empty, expected a value; correct the row or leave "
            "it out with `where`"
        )

    def _place(self, index: int) -> str:
        return f"{self.table.where}, row {int(self.origin[index])}"

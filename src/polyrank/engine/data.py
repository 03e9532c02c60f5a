"""From rows to batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import data

from polyrank.frame import seed_of
from polyrank.streams import Dataset


class TaskRows(data.Dataset[dict[str, Any]]):
    """Rows of one or several tasks, one after another, as a torch dataset."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        part = int(np.searchsorted(self.ends, index, side="right"))
        row: dict[str, Any] = self.parts[part][index - (self.ends[part - 1] if part else 0)]
        return row


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack rows; the class goes under "labels", the name that Trainer counts."""
    batch = {}
    for key in rows[0]:
        name = "labels" if key == "label" else key
        batch[name] = torch.from_numpy(np.stack([np.asarray(row[key]) for row in rows]))
    return batch


def batches(rows: Dataset, size: int, *, seed: int | None = None) -> Iterator[dict[str, Tensor]]:
    """Yield batches in order, or in the order that the seed draws."""
    count = len(rows)
    order = np.arange(count)
    if seed is not None:
        order = np.random.default_rng(seed_of("order", seed)).permutation(count)
    for start in range(0, count, size):
        yield collate([rows[int(i)] for i in order[start : start + size]])

"""From rows to batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import data

from polyrank.frame import seed_of
from polyrank.streams import Dataset, Task


class TaskRows(data.Dataset[dict[str, Any]]):
    """Rows of one or several tasks, one after another, as a torch dataset.

    Each row gets "row", its number in its own part.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        part = int(np.searchsorted(self.ends, index, side="right"))
        number = index - int(self.ends[part - 1] if part else 0)
        return {**self.parts[part][number], "row": number}


def batches(
    rows: Dataset,
    size: int,
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]],
    *,
    seed: int | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yield batches in order, or in the order that the seed draws."""
    count = len(rows)
    order = np.arange(count)
    if seed is not None:
        order = np.random.default_rng(seed_of("order", seed)).permutation(count)
    for start in range(0, count, size):
        yield collate([rows[int(i)] for i in order[start : start + size]])


def train_rows(task: Task) -> Dataset:
    """Return the rows that a task is trained on: its texts, if it has no examples."""
    return task.data["train"] if "train" in task.data else task.data["text"]

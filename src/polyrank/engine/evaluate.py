"""One pass over the test rows gives both matrices: among a task's classes, and among all seen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from polyrank.engine.data import batches
from polyrank.streams import Stream


@torch.no_grad()
def scores(
    logits_of: Callable[[dict[str, Tensor]], Tensor], stream: Stream, seen: int, size: int
) -> tuple[list[float], list[float]]:
    """Return (restricted, unrestricted) accuracies on every task; NaN where no class was seen.

    Args:
        logits_of: maps a batch to logits (batch, seen classes).
        stream: the tasks.
        seen: number of tasks trained so far.
        size: rows per forward.
    """
    restricted, unrestricted = [], []
    for index, task in enumerate(stream):
        if index >= seen:
            restricted.append(float("nan"))
            unrestricted.append(float("nan"))
            continue
        own = torch.tensor(task.classes)
        right_own = right_all = 0
        for batch in batches(task.data["test"], size):
            logits = logits_of(batch).float().cpu()
            right_own += int((own[logits[:, own].argmax(-1)] == batch["labels"]).sum())
            right_all += int((logits.argmax(-1) == batch["labels"]).sum())
        restricted.append(right_own / task.size("test"))
        unrestricted.append(right_all / task.size("test"))
    return restricted, unrestricted

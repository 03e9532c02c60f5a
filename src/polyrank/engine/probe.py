"""The frozen probe: what a linear classifier reads from the untouched base."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from polyrank.engine.data import batches, train_rows
from polyrank.engine.reading import Reader
from polyrank.errors import ConfigError
from polyrank.layers import HeadHost
from polyrank.streams import Stream


@torch.no_grad()
def features(
    model: nn.Module, reader: Reader, head: str | None, rows: Any, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (inputs of the classifier (n, d), labels (n,)).

    Args:
        model: a base model, or an adapted one whose classifier a head replaces.
        reader: makes batches and runs the model.
        head: path of the base's classifier.
        rows: what is read; of rows that may be read once, what lies behind.
        size: rows per forward.
    """
    hosts = [m for m in model.modules() if isinstance(m, HeadHost)]
    place = hosts[0] if hosts else model.get_submodule(head or "")
    seen: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    handle = place.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].float().cpu().numpy())
    )
    device = next(model.parameters()).device
    try:
        for batch in batches(getattr(rows, "inner", rows), size, reader.collate):
            moved = {key: value.to(device) for key, value in batch.items()}
            reader.forward(model.eval(), moved, frozenset({"logits"}))
            labels.append(batch["labels"].numpy())
    finally:
        handle.remove()
    if seen[0].ndim != 2:
        raise ConfigError(
            f"probe: the classifier of {type(model).__name__} reads every token, expected one "
            "vector a row; leave the probe out of references"
        )
    return np.concatenate(seen), np.concatenate(labels)


def frozen_probe(
    model: nn.Module, reader: Reader, head: str, stream: Stream, size: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Fit a logistic regression on frozen features of all tasks so far, after every task.

    It keeps the features of old tasks and so cannot forget: it says what the base alone is worth.

    Returns:
        (restricted, unrestricted, number of fitted weights).
    """
    train = [features(model, reader, head, train_rows(task), size) for task in stream]
    test = [features(model, reader, head, task.data["test"], size) for task in stream]
    count = len(stream)
    restricted = np.full((count, count), np.nan)
    unrestricted = np.full((count, count), np.nan)
    fitted = 0
    for row in range(count):
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        probe.fit(
            np.concatenate([x for x, _ in train[: row + 1]]),
            np.concatenate([y for _, y in train[: row + 1]]),
        )
        classes = probe.classes_
        fitted = probe[-1].coef_.size + probe[-1].intercept_.size
        for column in range(row + 1):
            x, y = test[column]
            odds = probe.predict_log_proba(x)
            own = np.isin(classes, stream[column].classes)
            unrestricted[row, column] = float((classes[odds.argmax(1)] == y).mean())
            restricted[row, column] = float(
                (classes[np.where(own, odds, -np.inf).argmax(1)] == y).mean()
            )
    return restricted, unrestricted, fitted

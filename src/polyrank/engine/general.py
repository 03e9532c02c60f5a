"""General ability: what the adapted model can still do that no task of the stream asks for."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from polyrank.engine.probe import features
from polyrank.engine.reading import Reader
from polyrank.streams import Task


class General:
    """Scores a model on a held-out task that is never trained on.

    With classes: a linear readout is fitted once on the untouched base's features of the task's
    training rows, and says how many test rows it still gets right on the adapted model's features.
    Text: the task's own score, as it stands.

    Args:
        base: the model before it is adapted.
        reader: reads the rows.
        head: path of the base's classifier; None for language models.
        task: the held-out task.
        size: rows per forward.
    """

    def __init__(
        self, base: nn.Module, reader: Reader, head: str | None, task: Task, size: int
    ) -> None:
        self.reader, self.head, self.task, self.size = reader, head, task, size
        self.readout = None
        if head is not None and task.classes:
            x, y = features(base, reader, head, task.data["train"], size)
            self.readout = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
            self.readout.fit(x, y)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> float:
        """Return the score; the model's mode is left in evaluation."""
        model.eval()
        rows = self.task.data["test"]
        if self.readout is None:
            return self.reader.score(model, self.task, rows, self.size).unrestricted
        x, y = features(model, self.reader, self.head, rows, self.size)
        return float(np.mean(self.readout.predict(x) == y))

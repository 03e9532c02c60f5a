"""The contract of a reader: what the engine needs to know about rows and their model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyrank.frame import Loss, Out
from polyrank.layers import HeadHost
from polyrank.streams import Stream, Task

# Columns that say where a row comes from; they never reach the model.
ORIGIN = ("task", "row", "role")


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one task's rows scored; NaN where a view has no meaning.

    Attributes:
        restricted: among the task's own classes.
        unrestricted: among all classes seen, or of the text as it stands.
        count: rows scored.
    """

    restricted: float
    unrestricted: float
    count: int


class CrossEntropy(Loss):
    """−log softmax(z)_y over all classes seen so far, summed over the rows."""

    needs = frozenset({"logits"})

    def __call__(self, out: Out, batch: dict[str, Tensor]) -> Tensor:
        """Return the sum over rows; labels are class numbers."""
        assert out.logits is not None
        return F.cross_entropy(out.logits.float(), batch["labels"], reduction="sum")


class Reader:
    """How rows of a stream become batches, what the model makes of them, how that is scored.

    One reader serves all tasks of a run, and it is made before anything is trained.

    Class facts:
        kinds: the kinds of tasks it reads.
        growing: whether the model has a classifier that grows with the classes.
    """

    kinds: ClassVar[frozenset[str]] = frozenset()
    growing: ClassVar[bool] = True

    def problems(self, model: nn.Module, stream: Stream) -> list[str]:
        """Return what says that this model cannot read these rows: what, got, expected, remedy."""
        return []

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return one batch: "labels", the model's inputs, and the columns of `ORIGIN` as int64."""
        raise NotImplementedError(f"{type(self).__name__} must define collate(rows)")

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what `model(**inputs)` takes."""
        raise NotImplementedError(f"{type(self).__name__} must define inputs(batch)")

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor], wants: frozenset[str]) -> Out:
        """Run the model once; `wants` is a part of {"logits", "hidden", "embedding"}."""
        inputs = self.inputs(batch)
        if "hidden" in wants:
            inputs["output_hidden_states"] = cast("Any", True)
        embedding: list[Tensor] = []
        handle = None
        if "embedding" in wants:
            host = next(m for m in model.modules() if isinstance(m, HeadHost))
            handle = host.register_forward_pre_hook(lambda m, args: embedding.append(args[0]))
        try:
            found = model(**inputs)
        finally:
            if handle is not None:
                handle.remove()
        return Out(
            logits=found.logits,
            hidden=list(found.hidden_states) if "hidden" in wants else [],
            embedding=embedding[0] if embedding else None,
            mask=self.mask(batch),
        )

    def mask(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Return (n, seq) bool of real tokens, or None if all are."""
        found = batch.get("attention_mask")
        return None if found is None else found.bool()

    def loss(self) -> Loss:
        """Return the loss of the tasks."""
        return CrossEntropy()

    @torch.no_grad()
    def score(self, model: nn.Module, task: Task, rows: Any, size: int) -> Score:
        """Score a model in evaluation mode on one task's rows, `size` rows a forward."""
        own = torch.tensor(task.classes)
        device = next(model.parameters()).device
        right_own = right_all = 0
        for start in range(0, len(rows), size):
            batch = self.collate([rows[i] for i in range(start, min(start + size, len(rows)))])
            moved = {k: v.to(device) for k, v in batch.items()}
            out = self.forward(model, moved, frozenset({"logits"}))
            logits = cast("Tensor", out.logits).float().cpu()
            right_own += int((own[logits[:, own].argmax(-1)] == batch["labels"]).sum())
            right_all += int((logits.argmax(-1) == batch["labels"]).sum())
        count = len(rows)
        return Score(restricted=right_own / count, unrestricted=right_all / count, count=count)


def stacked(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Tensor]:
    """Return columns of numbers or equal arrays as tensors; those that no row has are left out."""
    return {
        name: torch.from_numpy(np.stack([np.asarray(row[name]) for row in rows]))
        for name in names
        if name in rows[0]
    }

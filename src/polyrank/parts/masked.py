"""The choice among the classes of the current task alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from polyrank.frame import Adapter, Loss, Out, Workshop
from polyrank.layers.views import wide
from polyrank.parts.distil import classes_of, refuse_strangers


class MaskedCrossEntropy(Loss):
    """−Σ_rows log softmax(z_N)_y.

    Args:
        entry: whose loss it is, for what it refuses.
    """

    needs = frozenset({"logits"})

    def __init__(self, entry: str = "masked") -> None:
        self.entry = entry

    def bind(self, adapter: Adapter, workshop: Workshop | None) -> None:
        """Learn the classes of the task.

        Raises:
            ConfigError: if it has none.
        """
        self.classes = torch.tensor(sorted(classes_of(workshop)))

    def __call__(self, out: Out, batch: dict[str, Tensor]) -> Tensor:
        """Return the sum over rows.

        Raises:
            ConfigError: if a label lies outside the task.
        """
        assert out.logits is not None
        classes, labels = self.classes.to(out.logits.device), batch["labels"]
        place = torch.searchsorted(classes, labels).clamp_max(len(classes) - 1)
        refuse_strangers(classes[place] == labels, self.entry)
        return F.cross_entropy(wide(out.logits)[:, classes], place, reduction="sum")

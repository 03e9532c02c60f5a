"""Masked: the task loss chooses among the classes of the current task alone.

Idea: a new class need not push the old ones down to be told from its own kind.
Maths: L = −mean over rows of log softmax(z_N)_y, N = classes of the current task; the gradient of
    all other rows of the head is exactly 0.
Source: arXiv:2203.17269 (the local softmax); 2104.05025 for current rows beside replayed ones.
Differs from the released code: a label outside the task raises; theirs is a loss of infinity.
Limits: nothing brings the classes of different tasks to one scale. Cost: none.
Status: loss and gradient tested; published figures not verified.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polyrank.frame import Adapter, Loss, Method, Out, Strategy, Workshop, register
from polyrank.layers.views import wide
from polyrank.parts.distil import classes_of, refuse_strangers


class MaskedCrossEntropy(Loss):
    """−Σ_rows log softmax(z_N)_y."""

    needs = frozenset({"logits"})

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
        refuse_strangers(classes[place] == labels, "masked")
        return F.cross_entropy(wide(out.logits)[:, classes], place, reduction="sum")


@register
@dataclass(frozen=True, kw_only=True)
class Masked(Strategy):
    """Softmax over the current task's classes."""

    needs = frozenset({"boundary", "classes"})

    def task_loss(self) -> Loss:
        """Return the masked cross-entropy."""
        return MaskedCrossEntropy()

    def unfit(self, method: Method, others: Sequence[Strategy]) -> Iterator[str]:
        """Refuse what brings rows of other tasks into the task loss."""
        for other in others:
            stored = other.replay()
            if stored is not None and stored.shared and stored.ratio:
                yield (
                    f"the task loss knows the current task's classes alone, and {other.name} mixes "
                    "rows of earlier tasks into it; use der, whose stored rows have their own loss"
                )
            if other.pools:
                yield f"{other.name} has one task of all classes, so nothing is masked; drop one"

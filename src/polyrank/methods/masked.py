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

from polyrank.frame import Loss, Method, Strategy, register
from polyrank.parts.masked import MaskedCrossEntropy


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

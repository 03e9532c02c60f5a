"""Absorb: at the end of every task its update moves into the base weights, and a fresh one begins.

Idea: one adapter's room and cost, whatever the number of tasks.
Maths: W ← W + s B δ A, then A, B and the core as at the start (B = 0): the model's answers stay.
Source: merge-and-reset as in arXiv:2203.17269's LoRA form; ReLoRA arXiv:2307.05695 within a task.
Differs from the released code: in fp32 or not at all: below it a part of every update is lost.
Limits: the base model changes, so a saved adapter fits the original one only by an archive; needs
    a core that merges exactly and a base that is not quantised. Cost: none while training.
Status: equality of answers tested.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from polyrank.frame import Boundary, Method, Strategy, Workshop, register
from polyrank.parts.boundaries import Aside


class Absorption(Aside):
    """Adds the update to the base at the end of a task.

    Args:
        archive: keep the absorbed ranks with the adapter.
    """

    def __init__(self, archive: bool) -> None:
        self.archive = archive

    def finish(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> None:
        """Absorb, and draw fresh factors."""
        workshop.absorb(archive=self.archive)


@register
@dataclass(frozen=True, kw_only=True)
class Absorb(Strategy):
    """Merge and reset.

    Args:
        archive: whether the saved adapter keeps the absorbed ranks, r (d_in + d_out) weights a task
            and layer, and so fits the original base; without them it fits the changed one alone.
    """

    archive: bool = False

    structural: ClassVar[bool] = True

    def boundary(self) -> Boundary:
        """Absorb between tasks."""
        return Absorption(self.archive)

    def unfit(self, method: Method, others: Sequence[Strategy]) -> Iterator[str]:
        """Refuse what is no dense update, and methods that rebuild themselves between tasks."""
        if method.merges != "exact":
            yield (
                f"adds the update to the base weights, and that of {method.name} is no matrix; "
                "use a method that merges exactly, such as lora"
            )
        if not method.boundary().persistent:
            yield (
                f"ends every task with fresh ranks, and so does {method.name} in its own way; "
                "drop one of the two"
            )
        if method.boundary().replicates:
            yield (
                f"ends the replicas that {method.name} shows after a task, with the base that they "
                "stand on; drop one of the two"
            )

"""Replay: stored samples of earlier tasks train along with the current ones (ER).

Idea: what is still practised is not forgotten.
Maths: L = mean over B current and ratio · B stored rows of −log softmax(z)_y, as one batch. The
    store holds M rows by reservoir: offer n (from 0) is kept while n < M, later with probability
    M / (n + 1) in a random slot.
Source: ER as in arXiv:1902.10486; reservoir sampling: Vitter, ACM TOMS 11(1), 1985.
Differs from the released code: replayed rows are never offered again, which would keep old rows for
    longer than their share; one forward over both kinds of rows.
Limits: needs room for samples, and the right to keep them. Cost: 1 + ratio times the training.
Status: draws and losses tested; no published figures verified.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from polyrank.frame import Replay, Strategy, register
from polyrank.parts.memory import BY, Storing


@register
@dataclass(frozen=True, kw_only=True)
class ExperienceReplay(Storing):
    """Experience replay.

    Args:
        by: "stream", one reservoir over all rows; "class" or "task", equal parts of the store.
        ratio: stored rows for every current row of a batch, > 0.
    """

    by: str = "stream"
    ratio: float = 1.0

    choices: ClassVar = {"by": BY}

    def problems(self) -> Iterator[str]:
        """Check the store and the ratio."""
        yield from super().problems()
        if not self.ratio > 0:
            yield f"ratio: got {self.ratio}, expected > 0; 1 draws as many rows as are current"

    def replay(self) -> Replay:
        """Mix stored rows into the task loss."""
        return Replay(capacity=self.capacity, by=self.by, bytes=self.bytes, ratio=self.ratio)

    @classmethod
    def samples(cls) -> list[Strategy]:
        """A share of the stream, a number of rows of each class."""
        return [cls(), cls(capacity=200, by="class", ratio=0.5)]

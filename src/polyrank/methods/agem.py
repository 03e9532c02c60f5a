"""A-GEM: an update may not raise the mean loss on the stored samples of all earlier tasks.

Idea: one constraint in place of GEM's one for each task.
Maths: g_ref = gradient of the mean loss on `size` stored rows, equally many of each past task; if
    ⟨g, g_ref⟩ < 0: g ← g − ⟨g, g_ref⟩ / ⟨g_ref, g_ref⟩ · g_ref, over all parameters at once.
Source: arXiv:1812.00420, section 4.
Differs from the released code: nothing is drawn of the current task.
Limits: one extra backward of `size` rows an update. It holds on average, not for every task.
Status: equals GEM with one constraint; no published figures verified.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from polyrank.frame import Boundary, Replay, Rule, Strategy, register
from polyrank.parts.memory import BY, Constrain, Past, Storing


def coefficient(G: Tensor) -> Tensor | None:
    """Return v (1,) from the products (2, 2) of (g, g_ref); None if they agree."""
    if float(G[0, 1]) >= 0:
        return None
    return -G[0, 1:] / G[1, 1]


@register
@dataclass(frozen=True, kw_only=True)
class AGEM(Storing):
    """Averaged gradient episodic memory.

    Args:
        by: "task" or "class", equal parts of the store; "stream", one reservoir over all rows.
        size: stored rows that the gradient is taken of at every update, >= 1.
    """

    by: str = "task"
    size: int = 64

    needs = frozenset({"boundary"})
    choices = {"by": BY}  # noqa: RUF012 - annotated in the base
    least = {**Storing.least, "size": 1}  # noqa: RUF012 - merged from the base's

    def replay(self) -> Replay:
        """Keep rows, and put none into batches."""
        return Replay(capacity=self.capacity, by=self.by, bytes=self.bytes, ratio=0.0)

    def rules(self) -> list[Rule]:
        """Constrain every update."""
        return [Constrain("agem", self.size, False, coefficient)]

    def boundary(self) -> Boundary:
        """Note the past tasks."""
        return Past("agem")

    @classmethod
    def samples(cls) -> list[Strategy]:
        """Equal parts; a reservoir."""
        return [cls(), cls(capacity=100, by="stream", size=8)]

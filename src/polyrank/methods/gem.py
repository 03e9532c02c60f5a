"""GEM: an update may not raise the loss on the stored samples of any earlier task.

Idea: leave the direction as it is, unless the memory of a task objects; then take the nearest one
    to which none objects.
Maths: g_k = gradient of the mean loss on stored rows of task k; z = argmin ½‖z − g‖² subject to
    ⟨z, g_k⟩ >= margin for all past k. With G the rows g_k: z = g + Gᵀ v,
    v = argmin_{v >= 0} ½ vᵀ G Gᵀ v + (G g − margin)ᵀ v, solved from the products alone.
Source: arXiv:1706.08840, section 3.
Differs from the released code: the margin bounds the products, theirs the dual v >= margin; the
    rows of a task are drawn anew for every update instead of all of them being used.
Limits: one extra backward of `size` rows for each past task and update, so its cost grows with the
    tasks. Gradients of the method's penalties are constrained along.
Status: projection tested against its optimality conditions; no published figures verified.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from scipy.optimize import nnls
from torch import Tensor

from polyrank.errors import RunError
from polyrank.frame import Boundary, Replay, Rule, Strategy, register
from polyrank.parts.memory import Constrain, Past, Storing


def dual(G: Tensor, margin: float) -> Tensor | None:
    """Return v (K,) from the products (1 + K, 1 + K) of (g, g_1 … g_K); None if none objects.

    ½ vᵀ K v + (a − m)ᵀ v over v >= 0 is ‖S v − b‖² with SᵀS = K and Sᵀb = m − a, which Lawson and
    Hanson solve. Every g_k is brought to length one first, so that small gradients count as well.

    Raises:
        RunError: if no direction meets the margin, as when two memories oppose each other.
    """
    norms = G.diagonal()[1:].clamp_min(0).sqrt()
    live = norms > 0
    if bool((G[0, 1:] >= margin).all()):
        return None
    unit = torch.where(live, 1 / norms.where(live, torch.ones_like(norms)), 0.0)
    K = unit[:, None] * G[1:, 1:] * unit
    goal = unit * (margin - G[0, 1:])
    values, vectors = torch.linalg.eigh(K)
    kept = values > values.max().clamp_min(1e-300) * 1e-12
    roots, basis = values[kept].sqrt(), vectors[:, kept].T
    v = torch.from_numpy(nnls((roots[:, None] * basis).numpy(), (basis @ goal / roots).numpy())[0])
    if bool(((K @ v - goal)[live] < -1e-6 * goal.abs().max()).any()) or (
        margin > 0 and not bool(live.all())
    ):
        raise RunError(
            f"gem: no direction agrees with the memories of all {len(v)} tasks by margin "
            f"{margin:g}; use a smaller margin, 0 always has one"
        )
    return v * unit


@register
@dataclass(frozen=True, kw_only=True)
class GEM(Storing):
    """Gradient episodic memory.

    Args:
        size: stored rows that a task's gradient is taken of at every update, >= 1.
        margin: least product with every memory gradient, >= 0; > 0 asks for more than no harm.
    """

    size: int = 32
    margin: float = 0.0

    needs = frozenset({"boundary"})
    least = {**Storing.least, "size": 1, "margin": 0}  # noqa: RUF012 - merged from the base's

    def problems(self) -> Iterator[str]:
        """Check the store."""
        yield from super().problems()

    def replay(self) -> Replay:
        """Keep equally many rows of each task, and put none into batches."""
        return Replay(capacity=self.capacity, by="task", bytes=self.bytes, ratio=0.0)

    def rules(self) -> list[Rule]:
        """Constrain every update."""
        return [Constrain("gem", self.size, True, lambda G: dual(G, self.margin))]

    def boundary(self) -> Boundary:
        """Note the past tasks."""
        return Past("gem")

    @classmethod
    def samples(cls) -> list[Strategy]:
        """No harm; a little more."""
        return [cls(), cls(capacity=100, size=8, margin=1e-4)]

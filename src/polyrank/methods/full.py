"""Full fine-tuning of the linear layers: their whole weights train, task after task.

Idea: what every method that trains less has to be compared with.
Maths: y = (W + D) x + b;  D (d_out, d_in) trains from 0, so that gradients and the steps of any
    optimiser that adapts to gradients are those of W itself.
Source: none; the baseline called SeqFT in arXiv:2504.07097.
Differs from the released code: a run's weight decay pulls to the base weight, not to 0.
Limits: biases, norms and embeddings stay, as under every adapter here; D is kept beside W, and an
    identity (d_out, d_out) is saved with it; r, alpha and dropout mean nothing. Cost: d_out d_in
    weights with optimiser state, and one more product with the size of W.
Status: equal to training W itself, update for update. 3 seeds (bench/results/streams-digits.md),
    rate 1e-3: it forgets .40 among a task's own classes, LoRA of rank 8 .32, `osf` .05; the base's
    own classes lose .62, .33 and .05.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from polyrank.frame import Adapter, Core, Init, Method, Site, register
from polyrank.parts.retention import unread_problems
from polyrank.parts.subspaces import Split, Whole, WholeStart, moved


@register
@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Full fine-tuning of linear layers; `r` and `alpha` mean nothing here."""

    scaling: str | float = 1.0

    trains = frozenset({"A", "side", "head"})
    sized: ClassVar[bool] = False

    def problems(self) -> Iterator[str]:
        """Check what would make it another method."""
        yield from unread_problems(self, scaling=1.0)

    def ranks(self, site: Site) -> int:
        """All of them."""
        return min(site.d_in, site.d_out)

    def core(self, site: Site) -> Core:
        """Return what reads D."""
        return Whole(Split(site.d_out, site.d_in, 0, min(site.d_in, site.d_out)))

    def init(self) -> Init:
        """D = 0."""
        return WholeStart()

    def parameters_per_site(self, site: Site) -> int:
        """All weights."""
        return site.d_in * site.d_out

    def vital_sign(self, adapter: Adapter) -> dict[str, float]:
        """Return the mean norm of D."""
        return {"moved": moved(adapter)}

    @classmethod
    def samples(cls) -> list[Method]:
        """The default."""
        return [cls()]

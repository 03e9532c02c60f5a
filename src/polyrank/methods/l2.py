"""L2: an update may not move far from where the last task ended.

Idea: with a pretrained model, staying near is most of not forgetting.
Maths: λ ‖s B A − s B' A'‖²_F summed over layers, B', A' = end of the last task, 0 in the first: the
    distance of dense weights, from Gram matrices alone: ‖L R‖² = Σ_ij (LᵀL)_ij (R Rᵀ)_ij with
    L = [B − B', B'], R = [A; A − A']; a core that merges exactly enters through its matrix δ, as
    B δ. "factors": λ Σ_j (θ_j − θ'_j)² over A, B, the core, θ' = their values at task start.
Source: arXiv:2203.17269 (EWC with F = 1; no ½).
Differs from the released code: theirs holds every weight, the head's included; here the head's rows
    of old classes are an option, and rows of new classes are free.
Limits: protects weights, not what a head makes of them. Cost: r² (d_in + d_out) a layer and update;
    one copy of the factors.
Status: Gram form and gradients tested; published figures not verified.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from polyrank.errors import ConfigError
from polyrank.frame import Adapter, Boundary, Method, Penalty, Step, Strategy, Workshop, register
from polyrank.parts import consolidate
from polyrank.parts.boundaries import Aside


class Anchor(Aside):
    """Keeps what the last task ended with, in the memory of "l2"."""

    def __init__(self, space: str, head: bool) -> None:
        self.space, self.head = space, head

    @torch.no_grad()
    def start(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> None:
        """Copy what is held; of a head the rows of earlier classes."""
        memory, known = workshop.memory("l2"), workshop.known
        held = consolidate.held_parameters(workshop.adapter, self.space, self.head)
        heads = {id(p) for p in workshop.adapter.roles().get("head", [])}
        rows = {name: p[:known] if id(p) in heads else p for name, p in held.items()}
        memory["named"] = {name: p.detach().clone() for name, p in rows.items() if len(p)}
        memory["products"] = {}
        for layer in workshop.adapter.layers if self.space == "weights" else ():
            P, A = consolidate.product_of(layer)
            # The first task is held to the base, and so is every task after absorb.
            if not workshop.first and bool(P.any()):
                memory["products"][layer.site.path] = [P.detach().clone(), A.detach().clone()]


class Drift(Penalty):
    """Σ ‖s B A − s B' A'‖² over layers, and Σ (θ − θ')² over what is held as it is."""

    def __init__(self, weight: float, space: str, head: bool) -> None:
        self.weight, self.space, self.head = weight, space, head

    def bind(self, adapter: Adapter, workshop: Workshop | None) -> None:
        """Read the anchors; without an engine there are none."""
        if workshop is None:
            raise ConfigError("l2: anchors are kept between tasks; train through polyrank.run")
        memory = workshop.memory("l2")
        self.named = [(n, torch.ones_like(m), m) for n, m in memory["named"].items()]
        kept = memory["products"]
        self.then = [kept.get(v.site.path) or consolidate.shadow_of(v) for v in adapter.layers]

    def __call__(self, adapter: Adapter, step: Step) -> Tensor:
        """Return the penalty."""
        total = torch.zeros((), device=adapter.layers[0].A.device)
        if self.space == "weights":
            now = map(consolidate.product_of, adapter.layers)
            pairs = map(consolidate.difference, now, self.then)
            total = total + consolidate.squared_norms(list(pairs))
        if self.named:
            held = consolidate.held_parameters(adapter, self.space, self.head)
            total = total + consolidate.weighted_squares(held, self.named)
        return total


@register
@dataclass(frozen=True, kw_only=True)
class L2(Strategy):
    """Distance to the end of the last task.

    Args:
        weight: λ >= 0.
        space: "weights", the dense update, or "factors", for cores that weigh each token.
        include_head: whether the head's rows of earlier classes are held too.
    """

    weight: float = 0.1
    space: str = "weights"
    include_head: bool = False

    needs = frozenset({"boundary"})
    choices: ClassVar = {"space": consolidate.SPACES}
    least: ClassVar = {"weight": 0}

    def __post_init__(self) -> None:
        object.__setattr__(self, "persistent", self.space == "factors")

    def penalties(self) -> list[Penalty]:
        """Hold to the anchors."""
        return [Drift(self.weight, self.space, self.include_head)]

    def boundary(self) -> Boundary:
        """Keep the anchors."""
        return Anchor(self.space, self.include_head)

    def unfit(self, method: Method, others: Sequence[Strategy]) -> Iterator[str]:
        """Refuse what has no dense update, if one is needed."""
        yield from consolidate.unmergeable(method, self.space)

    @classmethod
    def samples(cls) -> list[Strategy]:
        """Both spaces."""
        return [cls(), cls(space="factors", include_head=True)]

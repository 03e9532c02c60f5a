"""EWC: a weight is held to its old value the more, the more the old answers mind it.

Idea: of all solutions of the new task, take one near the old one in the directions that count.
Maths: ½ λ Σ_k Σ_j F_k,j (θ_j − θ*_k,j)², with gradient λ Σ_k F_k (θ − θ*_k); θ*_k = end of task k,
    F_k,j = (1/n) Σ_i (∂ log p(y_i | x_i) / ∂θ_j)² on its rows. "online": one F ← gamma F + F_k and
    the newest θ*. "separate" needs no more room: Σ_k F_k (θ − θ*_k)² = F (θ − m)² + constant.
    Estimators, by y: "true" drawn from p(· | x); "predicted" argmax p; "empirical" the row's label;
    "batch", Σ_b |b| (∂ mean of batch b)² / batches, which is no diagonal Fisher information.
Source: arXiv:1612.00796, eq. 3; online arXiv:1805.06370; see also 2203.17269.
Differs from the released code: ½ as in the first paper, so λ = 2 with F = 1 equals `l2` with 1;
    F is taken of single samples in evaluation mode after the task, never of the penalty itself;
    gamma = 1 with "online" gives 2203.17269's. F_k is brought to mean 1 unless `normalised` is
    false: that of a sure model is near 0, and λ = 10⁷ would be needed where 0.1 is now.
Limits: nothing is held in the first task, nor classes that come later. Cost: one backward a batch
    after each task, or a sample if ranks are gated; in "weights" two dense copies of W as well.
Status: estimators and penalty tested; published figures not verified.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from polyrank.errors import ConfigError
from polyrank.frame import Adapter, Boundary, Method, Penalty, Step, Strategy, Workshop, register
from polyrank.parts.boundaries import Later
from polyrank.parts.consolidate import SPACES, Quadratic, unmergeable, weighted_squares
from polyrank.parts.fisher import ESTIMATORS, Estimate, FisherStep, places_of


class Importance(Penalty):
    """½ Σ F (θ − m)² over what the memory of past tasks holds."""

    def __init__(self, weight: float, space: str, head: bool) -> None:
        self.weight, self.space, self.head = weight, space, head

    def bind(self, adapter: Adapter, workshop: Workshop | None) -> None:
        """Read the memory, empty in a first task; without an engine there is none."""
        if workshop is None:
            raise ConfigError("ewc: F is estimated between tasks; train through polyrank.run")
        memory = Quadratic(workshop.memory("ewc"))
        self.terms = memory.bound(places_of(adapter, self.space, self.head))

    def __call__(self, adapter: Adapter, step: Step) -> Tensor:
        """Return the penalty, a constant 0 while nothing is held."""
        if not self.terms:
            return torch.zeros(())
        return 0.5 * weighted_squares(places_of(adapter, self.space, self.head), self.terms)


@register
@dataclass(frozen=True, kw_only=True)
class EWC(Later):
    """Elastic weight consolidation.

    Args:
        weight: λ >= 0.
        form: "separate", a term for every task; "online", one running term.
        gamma: decay of the running F, in [0, 1]; read by "online".
        estimator: "true", "predicted", "empirical" or "batch".
        rows: rows that F is estimated from, drawn by key; 0 for all.
        normalised: whether every F_k is brought to mean 1; false is the formula as written.
        space: "factors" (A, B, the core), or "weights", their dense update.
        include_head: whether rows of the head are held too, those of classes known then.
    """

    weight: float = 0.1
    form: str = "separate"
    gamma: float = 0.9
    estimator: str = "true"
    rows: int = 0
    normalised: bool = True
    space: str = "factors"
    include_head: bool = False

    choices: ClassVar = {
        "form": ("separate", "online"), "estimator": ESTIMATORS, "space": SPACES,
    }  # fmt: skip
    least: ClassVar = {"weight": 0, "gamma": 0, "rows": 0}

    def __post_init__(self) -> None:
        asks = {"classes"} if self.estimator in ("true", "predicted") else set()
        object.__setattr__(self, "needs", frozenset({"boundary", "passes", *asks}))
        object.__setattr__(self, "persistent", self.space == "factors")

    def problems(self) -> Iterator[str]:
        """Check the decay."""
        if self.gamma > 1:
            yield f"gamma: got {self.gamma}, expected 0..1; 1 forgets no task"

    def penalties(self) -> list[Penalty]:
        """Hold what counts."""
        return [Importance(self.weight, self.space, self.include_head)]

    def boundary(self) -> Boundary:
        """Estimate F after each task."""
        step = FisherStep(self.estimator, self.rows, self.space, self.include_head)
        decay = self.gamma if self.form == "online" else None
        return Estimate(step, "ewc", decay, normalised=self.normalised)

    def unfit(self, method: Method, others: Sequence[Strategy]) -> Iterator[str]:
        """Refuse what has no dense update if one is needed, and training on all tasks at once."""
        yield from unmergeable(method, self.space)
        yield from super().unfit(method, others)

    @classmethod
    def samples(cls) -> list[Strategy]:
        """All estimators, both forms, both spaces."""
        return [
            cls(),
            cls(form="online", estimator="empirical", include_head=True, rows=100),
            cls(estimator="predicted", space="weights"),
            cls(estimator="batch", form="online", gamma=1.0),
        ]

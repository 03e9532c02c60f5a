"""O-LoRA: one LoRA a task, all of them active, the new one orthogonal to the old.

Idea: what a new task reads of the input shall not be what the old ones read.
Maths: y = W x + b + s Σ_{j <= t} B_j A_j x; A_t, B_t train, the old ones are a frozen bank. Added
    once per update: λ1 Σ_layers Σ_{j < t} Σ |A_j A_tᵀ|^power + λ2 Σ (‖A_t‖_F + ‖B_t‖_F), the norms
    with subgradient 0 at 0. λ1 = λ2 = 0 is IncLoRA.
Source: arXiv:2310.14152, and the released code, which has power 1 and norms that are not squared.
Differs from the released code: λ counts once per update, not once per micro-batch; equal shapes
    are one product, not a loop over names.
Limits: ranks grow with the tasks, and beyond r t = d_in no orthogonal ones are left. Cost:
    r (d_in + d_out) a task and layer, one product of all ranks in the forward.
Status: penalty, bank and merge tested; published figures not verified.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from polyrank.frame import Adapter, Boundary, Method, Penalty, Step, Workshop, register
from polyrank.layers.views import wide
from polyrank.parts.boundaries import Append


class Overlap(Penalty):
    """λ1 Σ |A_old Aᵀ|^power + λ2 Σ (‖A‖ + ‖B‖)."""

    def __init__(self, lambda_1: float, lambda_2: float, power: int) -> None:
        self.lambda_1, self.lambda_2, self.power = lambda_1, lambda_2, power

    def bind(self, adapter: Adapter, workshop: Workshop | None) -> None:
        """Stack the banks of equal shape; they do not change within a phase."""
        groups: dict[tuple[torch.Size, ...], list[Any]] = {}
        for layer in adapter.layers:
            if layer.bank is not None and self.lambda_1:
                groups.setdefault((layer.bank[0].shape, layer.A.shape), []).append(layer)
        self.groups = [(torch.stack([v.bank[0] for v in g]), g) for g in groups.values()]

    def __call__(self, adapter: Adapter, step: Step) -> Tensor:
        """Return the penalty, a constant 0 for a first task without λ2."""
        total = torch.zeros(())
        for old, layers in self.groups:
            A = torch.stack([wide(layer.A) for layer in layers])
            product = wide(old) @ A.mT
            term = product.abs() if self.power == 1 else product.square()
            total = total.to(A.device) + self.lambda_1 * term.sum()
        if self.lambda_2:
            factors = [wide(p) for layer in adapter.layers for p in (layer.A, layer.B)]
            norms = torch.stack([torch.linalg.vector_norm(p) for p in factors])
            total = total.to(norms.device) + self.lambda_2 * norms.sum()
        return total


@register
@dataclass(frozen=True, kw_only=True)
class OLoRA(Method):
    """Orthogonal LoRA subspaces.

    Args:
        lambda_1: weight of the overlap with old ranks, >= 0; 0.1 to 5 are common.
        lambda_2: weight of the norms of the new factors, >= 0; up to 0.3 is common.
        power: 1, absolute values as released; 2, squares as written.
        strict: whether more ranks than inputs are an error, or a warning.
    """

    lambda_1: float = 0.5
    lambda_2: float = 0.0
    power: int = 1
    strict: bool = False

    needs = frozenset({"boundary"})
    least: ClassVar = {"lambda_1": 0, "lambda_2": 0}

    def problems(self) -> Iterator[str]:
        """Check the power."""
        if self.power not in (1, 2):
            yield f"power: got {self.power}, expected 1 (absolute values) or 2 (squares)"

    def penalties(self) -> list[Penalty]:
        """Keep new ranks off the old ones."""
        on = self.lambda_1 or self.lambda_2
        return [Overlap(self.lambda_1, self.lambda_2, self.power)] if on else []

    def boundary(self) -> Boundary:
        """Freeze and append."""
        return Append("olora", strict=self.strict)

    @classmethod
    def samples(cls) -> list[Method]:
        """Overlap and norms."""
        return [cls(r=4, lambda_2=0.1)]

"""LoRA: a frozen weight plus a trained product of two thin factors; rsLoRA and LoRA+ as options.

Idea: the update that a task needs has low rank, so train only B A.
Maths: y = W x + b + s · B A x;  A (r, d_in) ~ U(±1/√d_in), B (d_out, r) = 0;  s = alpha / r, or
    alpha / √r (rsLoRA). LoRA+ trains B at `lr_ratio` times the rate of A.
Source: arXiv:2106.09685, section 4.1; rsLoRA arXiv:2312.03732; LoRA+ arXiv:2402.12354.
Differs from the released code: factors are fp32 and cast inside the operator; the input is never
    cast up.
Limits: linear layers only. Cost: r (d_in + d_out) weights, 2 r (d_in + d_out) operations a token.
Status: formula, merge and rates tested; the reference of every comparison. All tasks at once, each
    at its best rate, 3 seeds (`polyrank sweep sweep-starts`, and -text): digits .90, texts .64;
    rsLoRA .89 and .65, LoRA+ .89 and .62, both tied with LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from polyrank.frame import Adapter, Group, Method, register


@register
@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Plain LoRA.

    Args:
        lr_ratio: learning rate of B over that of A, > 0; 1 is LoRA, 16 is LoRA+'s suggestion.
    """

    lr_ratio: float = 1.0

    def problems(self) -> Iterator[str]:
        """Check the ratio."""
        if not self.lr_ratio > 0:
            yield f"lr_ratio: got {self.lr_ratio}, expected > 0; 1 trains A and B at the same rate"

    def steered(self) -> bool:
        """LoRA+ needs its own groups."""
        return self.lr_ratio != 1 or super().steered()

    def decides(self, what: str) -> bool:
        """Only LoRA+ has groups of its own."""
        return self.lr_ratio != 1 if what == "optim" else super().decides(what)

    def groups(self, adapter: Adapter, args: Any = None) -> list[Group]:
        """Give B its own rate."""
        if self.lr_ratio == 1:
            return super().groups(adapter, args)
        roles = {
            role: [p for p in params if p.requires_grad] for role, params in adapter.roles().items()
        }
        others = [p for role, params in roles.items() if role != "B" for p in params]
        found = [Group(params=others), Group(params=roles.get("B", []), lr=self.lr_ratio)]
        return [group for group in found if group.params]

    @classmethod
    def samples(cls) -> list[Method]:
        """Plain, rsLoRA, LoRA+, dropout."""
        return [
            cls(r=4),
            cls(r=4, scaling="alpha/sqrt(r)"),
            cls(r=4, lr_ratio=16.0),
            cls(r=4, dropout=0.1),
        ]

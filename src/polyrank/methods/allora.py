"""ALLoRA: the gradient of an output row is larger while its row of B A is small; s = 1, no dropout.

Idea: B = 0 makes a slow start, and α / r a factor that grows through the layers; enlarge instead
    what small rows learn, and taper as they grow.
Maths: y = W x + b + B A x. a_i = 1 / √(‖(B A)_i‖ + 1/η²), (d_out,), a constant of one update;
    ∂A = (diag(a) B)ᵀ G, ∂B = diag(a) G Aᵀ with G = Σ δ xᵀ, and ∂x as without a. ‖(B A)_i‖² =
    b_i (A Aᵀ) b_iᵀ. Ablations of the paper: form "output", a_ni = 1 / √(|f_ni| + 1/η²) of every
    token, f = B A x, in place of a_i; form "forward" (ASF), f / √(|f| + 1/η²) in the answer.
Source: arXiv:2410.09692, section 4.2 and the listing of its appendix F.
Differs from the released code: only a listing is known; it forms B A and sums gradients later; a is
    found once per update and stays through its micro-batches.
Limits: under Adam a frozen a would leave B's path as it is, as each entry's scale cancels: what
    acts is the change of a and the mix of rows in ∂A. `apply_to="update"` is ours: a multiplies the
    optimiser's step of B. Needs polyrank's trainer or attach. Cost: two Gram products a layer and
    update; r d_out multiplications a token in backward. Form "forward" cannot be merged.
Status: gradients and ablations tested; published figures not verified, and their gains are small.
    All tasks at once, each at its best rate, 3 seeds (`polyrank sweep sweep-starts`, and -text), it
    ties with LoRA of s = 2: digits .90 and .90, texts .64 and .64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from polyrank.errors import ConfigError
from polyrank.frame import Adapter, Core, Identity, Method, Rule, Site, register
from polyrank.parts.row_scale import ByOutput, ScaledGradient, ScaledStep, row_scales


@register
@dataclass(frozen=True, kw_only=True)
class ALLoRA(Method):
    """Adaptive learning rates by output row.

    Args:
        eta2: η² > 0, the square of the largest factor; 1, 2 and 4 were published.
        apply_to: "gradient", or "update", an extension: a multiplies what the optimiser did to B.
        form: "rows"; or an ablation, "output" or "forward".
        allow_dropout: whether dropout may be above 0 (ALLoRA+D).
        scaling: must give s = 1.
    """

    scaling: str | float = 1.0
    eta2: float = 4.0
    apply_to: str = "gradient"
    form: str = "rows"
    allow_dropout: bool = False

    lendable: ClassVar[frozenset[str]] = frozenset({"optim"})
    choices: ClassVar = {
        "apply_to": ("gradient", "update"),
        "form": ("rows", "output", "forward"),
    }
    presets: ClassVar = {
        "commonsense": {"r": 32, "eta2": 4.0},
        "commonsense-dropout": {"r": 32, "eta2": 4.0, "dropout": 0.05, "allow_dropout": True},
    }

    def __post_init__(self) -> None:
        if self.form == "forward":
            object.__setattr__(self, "merges", "never")

    def problems(self) -> Iterator[str]:
        """Check η, the scaling, dropout and the ablations."""
        if not self.eta2 > 0:
            yield f"eta2: got {self.eta2}, expected > 0; 4 is common"
        if self.dropout and not self.allow_dropout:
            yield (
                f"dropout: got {self.dropout}, expected 0, as ALLoRA has none; allow_dropout=True "
                "gives ALLoRA+D"
            )
        if self.form != "rows" and self.apply_to != "gradient":
            yield f'apply_to: form "{self.form}" acts where it is computed; leave it at "gradient"'
        site = Site(path="", d_in=1, d_out=1, r=self.r, alpha=self.alpha)
        if self.scaling != "alpha/k" and (s := self.scale(site)) != 1:
            yield f"scaling: got s = {s:g}, expected 1; leave scaling at 1.0, or set alpha to r"

    def core(self, site: Site) -> Core:
        """Return the identity; the ablations act behind B.

        Raises:
            ConfigError: if s is not 1 here.
        """
        if (s := self.scale(site)) != 1:
            raise ConfigError(
                f"scaling at {site.path}: got s = {s:g}, expected 1; leave scaling at 1.0"
            )
        if self.form == "rows":
            return Identity(site.r)
        return ByOutput(site.r, self.eta2, forward=self.form == "forward")

    def rules(self) -> list[Rule]:
        """Set a before every update."""
        if self.form != "rows":
            return []
        update = self.apply_to == "update"
        return [ScaledStep(self.eta2) if update else ScaledGradient(self.eta2)]

    def lends(self, what: str, to: Method) -> Iterator[str]:
        """Say that an ablation is a core, which cannot be lent."""
        yield from super().lends(what, to)
        if what == "optim" and self.form != "rows":
            yield f'form "{self.form}" acts behind B and not at an update; lend form "rows"'

    def vital_sign(self, adapter: Adapter) -> dict[str, float]:
        """Return how far a has come down from η on average, as a share, beside the size of B."""
        scales: list[Any] = row_scales(adapter.layers, self.eta2)
        tapered = torch.stack([1 - a.mean().cpu() / self.eta2**0.5 for a in scales]).mean()
        return {**super().vital_sign(adapter), "tapered": float(tapered)}

    @classmethod
    def samples(cls) -> list[Method]:
        """As published; the ablation whose gradients are scaled by token."""
        return [cls(r=4), cls(r=4, form="output", dropout=0.1, allow_dropout=True)]

"""AltLoRA: one factor moves per step, by the gradient of W projected on what the other one reaches.

Idea: what LoRA sees of the gradient G of W is distorted by its own factors. With one factor fixed
    the best correction is unique and cheap: a least-squares projection, of the momentum as well.
Maths: W = W0 + s B A, g_A = s Bᵀ G. Step of A: h = (BᵀB + λ)⁻¹ g_A / s²; M ← β1 (BᵀB + λ)⁻¹ Bᵀ
    B_old M + (1 − β1) h; A ← A − η (M + γ A). The next step is that of B, with g_B = s G Aᵀ at the
    new A, and so on in turn. `plus` (AltLoRA+): V ← β2 V + (1 − β2) h², M / (√V + ε) in place of M.
Source: arXiv:2505.12455, theorems 1 and 2, and the released optimiser.
Differs from the released code: there both factors move in every step (`joint=True`), without 1/s²,
    at a rate that no scheduler changes, with lr / (1 − β1ᵗ), decay after the step, and in AltLoRA+
    a momentum that is kept untransported (`released=True`, presets "released", "released-plus");
    a failed inverse becomes the identity there and an error here; pairs are explicit; heads and
    all else train by AdamW. B moves first, as in the paper's better ablation.
Limits: identity or constant diagonal cores; a loss scaler skips a step for either factor. The step
    of W does not depend on how B A is factored; λ, AltLoRA+ and clipping by the norm of gradients
    break that, `clip` does not. Cost: one momentum (two with `plus`), one r × r Cholesky a layer.
Status: laws, invariance, released form tested; published figures not verified. No gain over LoRA by
    AdamW (`polyrank sweep sweep-starts`, -text): digits .80, AltLoRA+ .86, .90; texts .61 .62 .64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from polyrank.frame import Adapter, Group, Identity, Method, Rule, Site, register
from polyrank.parts import alternating  # noqa: F401 - it serves the update
from polyrank.parts.pairs import OPTIONS, Balanced, Idle, option_problems, pair_group, pairable


@register
@dataclass(frozen=True, kw_only=True)
class AltLoRA(Method):
    """Alternating projections, on plain LoRA.

    Args:
        factor_lr: rate of the factors over that of all else that trains, such as a head, > 0.
        plus: whether steps are divided by √V, as AltLoRA+ does.
        beta1: β1 in [0, 1), of the momentum.
        beta2: β2 in [0, 1), of V.
        eps: ε > 0, in the denominator of AltLoRA+.
        damping: λ >= 0.
        relative: whether λ counts in mean eigenvalues of the Gram matrix.
        first: "B" or "A", which factor moves first; A cannot while B is zero.
        switch_every: steps after which the factors change places, >= 1.
        joint: whether both factors move in every step, A first.
        released: whether `joint` is what the released code does, in all points above.
        bias_correction: whether the rate is divided by 1 − β1ᵗ.
        clip: largest norm of s B h over all layers, which no refactoring changes; 0 for none.
        balance_every: steps between rescalings of A and B to like norms, by powers of two, which
            leave B A as it is, and go with no rule or penalty on factors; 0 for none.
    """

    factor_lr: float = 1.0
    plus: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    damping: float = 1e-6
    relative: bool = False
    first: str = "B"
    switch_every: int = 1
    joint: bool = False
    released: bool = False
    bias_correction: bool = False
    clip: float = 0.0
    balance_every: int = 0

    lendable: ClassVar[frozenset[str]] = frozenset({"optim"})
    presets: ClassVar = {
        "paper": {"first": "A"},
        "paper-plus": {"plus": True, "first": "A"},
        "released": {"joint": True, "released": True, "damping": 1e-5},
        "released-plus": {
            "plus": True, "joint": True, "released": True, "damping": 1e-5, "eps": 1e-4,
        },
    }  # fmt: skip

    def problems(self) -> Iterator[str]:
        """Check the optimiser's options."""
        if not self.factor_lr > 0:
            yield f"factor_lr: got {self.factor_lr}, expected > 0; 1 is the rate of all else"
        yield from option_problems(self.options())

    def lends(self, what: str, to: Method) -> Iterator[str]:
        """Say why a method's factors are not moved so: both must train, and no token weigh them."""
        if what != "optim":
            return (yield from super().lends(what, to))
        core = to.core(Site(path="", d_in=to.r, d_out=to.r, r=to.r, alpha=to.alpha))
        if not pairable(core):
            yield (
                "a gradient is projected through factors with the identity or a constant diagonal "
                f"between them, and {to.name} has {type(core).__name__}"
            )
        elif not {"A", "B"} <= to.trains:
            yield f"both factors have to train, and {to.name} trains {', '.join(sorted(to.trains))}"
        elif type(core) is Identity and to.decides("optim"):
            yield f"{to.name} has its own optimiser"

    def groups(self, adapter: Adapter, args: Any = None) -> list[Group]:
        """Put all factors into one group of pairs; the rest is as the adapter's method has it."""
        options = {name: getattr(self, name) for name in OPTIONS}
        pairs = replace(pair_group(adapter, options), lr=self.factor_lr)
        held = {id(p) for p in pairs.params}
        own: Any = getattr(adapter, "method", self)
        others = (Method if isinstance(own, AltLoRA) else type(own)).groups(own, adapter, args)
        for group in others:
            group.params[:] = [p for p in group.params if id(p) not in held]
        return [group for group in (pairs, *others) if group.params]

    def rules(self) -> list[Rule]:
        """Drop the gradient of the factor that stands still; tell what the optimiser rescales."""
        return [Idle(), *([Balanced()] if self.balance_every else [])]

    @classmethod
    def samples(cls) -> list[Method]:
        """AltLoRA; AltLoRA+ with all that a step may do besides."""
        plus = cls(r=4, plus=True, clip=1.0, switch_every=2, balance_every=3, bias_correction=True)
        return [cls(r=4), plus]

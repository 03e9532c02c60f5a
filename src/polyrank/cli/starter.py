"""The file that `polyrank new-method` writes: a method that works as it stands."""

from string import Template

TEMPLATE = Template('''"""$title: one trained weight per rank.

Idea: a rank that does not help should fade by itself.
Maths: y = W x + b + s · B (c ∘ A x);  A (r, d_in), c (r,), B (d_out, r);  s = alpha / r.
Source: your paper, your equation.
Differs from the released code: nothing is released.
Limits: linear layers only. Cost: r weights and r multiplications per token more than LoRA.
"""

from dataclasses import dataclass

import torch
from polyrank.frame import Core, Method, register


class Weights(Core):
    """φ(h) = c ∘ h."""

    axes = {"weight": ("rank",)}
    gates = frozenset({"weight"})

    def __init__(self, r, start):
        super().__init__()
        self.widths = (r, r)
        self.start = start
        self.weight = torch.nn.Parameter(torch.empty(r))

    def fill(self, rng):
        self.weight.fill_(self.start)

    def forward(self, h, z, flow):
        return h * self.weight.to(h.dtype)

    def delta(self, condition=None):
        return torch.diag(self.weight.float())


@register
@dataclass(frozen=True, kw_only=True)
class $cls(Method):
    """One trained weight per rank.

    Args:
        start: first value of every weight, > 0.
    """

    start: float = 1.0

    def problems(self):
        if self.start <= 0:
            yield f"start: got {self.start}, expected > 0; 1.0 begins as plain LoRA"

    def core(self, site):
        return Weights(site.r, self.start)

    def parameters_per_site(self, site):
        return super().parameters_per_site(site) + site.r

    @classmethod
    def samples(cls):
        return [cls(r=4), cls(r=4, start=0.5)]
''')

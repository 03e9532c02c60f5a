"""A toy with one trained weight per rank, a rule, a penalty and gradients scaled by row."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from polyrank.frame import ORDER, Core, Group, Method, Penalty, Rule, register
from polyrank.ops.rank_gate import Epilogue


class Weighted(Core):
    axes: ClassVar = {"weight": ("rank",)}
    gates = frozenset({"weight"})
    epilogue = "static"

    def __init__(self, r):
        super().__init__()
        self.widths = (r, r)
        self.weight = nn.Parameter(torch.ones(r))

    def fill(self, rng):
        self.weight.fill_(1.0)

    def fused(self):
        return Epilogue(kind="static", gate=self.weight)

    def forward(self, h, z, flow):
        return h * self.weight.to(h.dtype)

    def delta(self, condition=None):
        return torch.diag(self.weight)


class Rows(Rule):
    """Scales the gradients of A and B by a number per output row, not that of the input."""

    order = ORDER["project"]

    def bind(self, adapter, optimizer, workshop):
        self.layers = adapter.layers

    def begin(self, step):
        for layer in self.layers:
            layer.row_scale = torch.full((layer.site.d_out,), float(step.index + 1))


class Square(Penalty):
    """weight · Σ c²."""

    weight = 0.25

    def __call__(self, adapter, step):
        return sum(layer.core.weight.square().sum() for layer in adapter.layers)


@register
@dataclass(frozen=True, kw_only=True)
class Scaled(Method):
    r: int = 4
    rows: bool = False
    pull: bool = False

    def core(self, site):
        return Weighted(site.r)

    def rules(self):
        return [Rows()] if self.rows else []

    def penalties(self):
        return [Square()] if self.pull else []

    def groups(self, adapter, args=None):
        roles = adapter.roles()
        return [
            Group(params=[*roles["A"], *roles["B"]]),
            Group(params=roles["core"], lr=10.0, weight_decay=0.0),
        ]

    def parameters_per_site(self, site):
        return super().parameters_per_site(site) + site.r

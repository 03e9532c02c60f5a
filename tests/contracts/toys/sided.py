"""A toy with a side branch: reads what enters the second norm, adds to what the MLP gives."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from polyrank.frame import Block, Method, register

PLACES = {"llama": ("post_attention_layernorm", "mlp"), "gpt2": ("ln_2", "mlp")}


class Side(Block):
    """base(x) + U relu(D tapped), with a frozen statistic and a part of another role."""

    roles: ClassVar = {"probe": "descriptor"}
    frozen = frozenset({"mean"})

    def __init__(self, tap, add, d, width):
        super().__init__()
        self.tap, self.add = tap, add
        self.down = nn.Linear(d, width)
        self.up = nn.Linear(width, d, bias=False)
        nn.init.zeros_(self.up.weight)
        self.probe = nn.Linear(d, 1)
        self.mean = nn.Parameter(torch.full((d,), 0.5), requires_grad=False)

    def forward(self, base, x, tapped, flow):
        y, t = base(x), tapped.to(self.mean.dtype)
        told = self.probe(t - self.mean).sigmoid()
        return y + (told * self.up(self.down(t).relu())).to(y.dtype)


@register
@dataclass(frozen=True, kw_only=True)
class Sided(Method):
    family: str = "llama"
    width: int = 5
    d: int = 24
    first: int = 0

    merges = "never"
    trains = frozenset({"A", "B", "core", "side", "descriptor", "head"})

    def sub_block(self, site):
        tap, add = PLACES[self.family]
        return Side(tap, add, self.d, self.width) if site.depth >= self.first else None

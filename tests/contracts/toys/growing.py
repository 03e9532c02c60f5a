"""A toy whose blocks grow: parts come one after the other, and only the last of them trains."""

from dataclasses import dataclass

import torch
from torch import nn

from polyrank.frame import Block, Method, register


class Parts(Block):
    """base(x) + Σ_i U_i relu(D_i x), with a count of each part's age that stays in fp32."""

    exact = frozenset({"age"})
    tap = add = "mlp"

    def __init__(self, d, width):
        super().__init__()
        self.d, self.width, self.widths = d, width, []
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.age = nn.Parameter(torch.ones(1), requires_grad=False)
        self.grow(width)

    @property
    def frozen(self):
        names = {name for name, _ in self.named_parameters()}
        last = str(len(self.widths) - 1)
        return frozenset(n for n in names if n == "age" or n.split(".")[1] != last)

    def grow(self, width):
        self.down.append(nn.Linear(self.d, width))
        self.up.append(nn.Linear(width, self.d, bias=False))
        nn.init.zeros_(self.up[-1].weight)
        self.widths.append(width)

    def settings(self):
        return {"widths": self.widths[1:]} if len(self.widths) > 1 else {}

    def configure(self, settings):
        for width in settings.get("widths", []):
            self.grow(width)

    def forward(self, base, x, tapped, flow):
        y = base(x)
        for down, up in zip(self.down, self.up, strict=True):
            y = y + up(down(x.to(down.weight.dtype)).relu()).to(y.dtype)
        return y


class Pair(Block):
    """One of two blocks in a transformer block: multiplies what the attention gives."""

    tap = add = "self_attn"

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, base, x, tapped, flow):
        y, *rest = base(x)
        return (self.gain.to(y.dtype) * y, *rest)


@register
@dataclass(frozen=True, kw_only=True)
class Growing(Method):
    width: int = 3
    pair: bool = False

    merges = "never"

    def sub_block(self, site):
        return [Parts(site.d_in, self.width), *([Pair()] if self.pair else [])]

"""The plain growing classifier."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyrank.errors import ConfigError
from polyrank.frame import Head
from polyrank.layers.views import wide


class LinearHead(Head):
    """logits = x Wᵀ + b over the classes seen so far; new rows are U(±1/√d), new biases zero.

    Args:
        d: width of the embedding.
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        self.d = d
        self.names = []
        self.weight = nn.Parameter(torch.empty(0, d))
        self.bias = nn.Parameter(torch.empty(0))

    def grow(self, names: Sequence[str], rng: torch.Generator) -> None:
        """Append classes; the rows of the old ones stay bit-identical.

        Raises:
            ConfigError: if a class is already there.
        """
        seen = [*self.names, *names]
        if again := sorted({name for name in names if seen.count(name) > 1}):
            raise ConfigError(
                f"head: classes {again} are already there; give each class its own name"
            )
        bound = 1 / math.sqrt(self.d)
        rows = torch.empty(len(names), self.d).uniform_(-bound, bound, generator=rng)
        with torch.no_grad():
            trained = self.weight.requires_grad
            rows = rows.to(self.weight.device, self.weight.dtype)
            self.weight = nn.Parameter(torch.cat([self.weight, rows]), requires_grad=trained)
            self.bias = nn.Parameter(
                torch.cat([self.bias, self.bias.new_zeros(len(names))]), requires_grad=trained
            )
        self.names.extend(names)

    def forward(
        self, embedding: Tensor, encode: Callable[[Sequence[str]], Tensor] | None = None
    ) -> Tensor:
        """Return logits (batch, seen classes) in fp32, in fp64 if the weights are."""
        weight, bias = wide(self.weight), wide(self.bias)
        return F.linear(embedding.to(weight.dtype), weight, bias)

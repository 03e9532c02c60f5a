"""Starting values with more than one user, or with a law of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from polyrank.frame import Init, Layer


class Gaussian(Init):
    """A ~ N(0, std²), B = 0: the adapted model starts as the base.

    Args:
        std: standard deviation of the entries of A, > 0.
    """

    def __init__(self, std: float) -> None:
        self.std = std

    def fill(self, layer: Layer, stat: dict[str, Tensor] | None, rng: torch.Generator) -> None:
        layer.A.copy_(torch.empty(layer.A.shape).normal_(0, self.std, generator=rng))
        layer.B.zero_()
        layer.core.fill(rng)

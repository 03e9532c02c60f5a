"""What a method is that fills no slot: plain LoRA."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyrank.frame.core import Core
from polyrank.frame.flow import Flow
from polyrank.frame.slots import Init, Layer
from polyrank.ops.rank_gate import Epilogue

# Made once: to make it takes as long as a small kernel's start.
_FORM = Epilogue(kind="none")


class Identity(Core):
    """φ(h) = h; the same for every token, so it merges exactly."""

    epilogue = "none"

    def __init__(self, r: int) -> None:
        super().__init__()
        self.widths = (r, r)
        self.bank = 0

    def banked(self, ranks: int) -> None:
        """Frozen ranks pass through like the live ones."""
        self.bank = ranks

    def fused(self) -> Epilogue:
        """Return the operator's form."""
        return _FORM

    def forward(self, h: Tensor, z: Tensor | None, flow: Flow) -> Tensor:
        """Return h."""
        return h

    def delta(self, condition: Tensor | None = None) -> Tensor:
        """Return the identity matrix, the bank's ranks included."""
        return torch.eye(self.bank + self.widths[0])


class KaimingZero(Init):
    """A ~ U(±1/√d_in) (Kaiming uniform, a = √5), B = 0: the adapted model starts as the base."""

    def fill(self, layer: Layer, stat: dict[str, Tensor] | None, rng: torch.Generator) -> None:
        """Write A and B; the core draws its own parameters."""
        bound = 1 / math.sqrt(layer.A.shape[1])
        layer.A.copy_(torch.empty(layer.A.shape).uniform_(-bound, bound, generator=rng))
        layer.B.zero_()
        layer.core.fill(rng)

"""The gate of ranks that choose themselves, by how strongly their keys answer."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from polyrank.frame import Core, Flow
from polyrank.ops.rank_gate import Epilogue, gate

logger = logging.getLogger(__name__)


@functools.cache
def _say_clipped(k: int, r: int) -> None:
    logger.info("self gate: k=%d exceeds r=%d; until a bank has grown every rank is kept", k, r)


class SelfGate(Core):
    """φ(z) = w(z) ⊙ z: every rank weighs itself among all of them, those of the bank included.

    Args:
        r: live ranks.
        k: ranks that a token keeps; what exceeds the ranks there are is cut.
        tau: temperature, > 0.
        delta: least s of a kept rank in evaluation, in [0, 1].
        eps: lower bound of ‖z‖, > 0.
        fades: whether values of ranks that are frozen lose the scale of their layer.
    """

    merges = "never"
    epilogue = "self"
    competing = True

    def __init__(
        self, r: int, *, k: int, tau: float, delta: float, eps: float, fades: bool = False
    ) -> None:
        super().__init__()
        self.widths, self.fades = (r, r), fades
        if k > r:
            _say_clipped(k, r)
        self.learning = Epilogue(kind="self", k=max(k, 2), tau=tau, eps=eps)
        self.serving = Epilogue(kind="self", k=max(k, 2), tau=tau, delta=delta, eps=eps)

    def banked(self, ranks: int) -> None:
        """Frozen ranks compete like the live ones; nothing has to be counted."""

    def settle(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors as they are: the gate goes on."""
        return A, B

    def faded(self, scale: float) -> float:
        """Return 1 / scale, if ranks fade."""
        return 1 / scale if self.fades else 1.0

    def fused(self) -> Epilogue:
        """Return the operator's form; the threshold belongs to evaluation."""
        return self.learning if self.training else self.serving

    def gates_of(self, h: Tensor, z: Tensor | None) -> Tensor:
        """Return w (*, R) in fp32 for h = A x."""
        return gate(h if h.dtype == torch.float64 else h.float(), None, self.fused())

    def forward(self, h: Tensor, z: Tensor | None, flow: Flow) -> Tensor:
        """Return w ⊙ h."""
        return (self.gates_of(h, z) * h).to(h.dtype)

    def unreachable(self, A: Tensor) -> Tensor:
        """Return which ranks, (R,) bool, no x lifts to s >= delta.

        z lies in the column space of A, and over it max s_i = ‖P e_i‖ = √h_i with the projector
        P = A (AᵀA)⁺ Aᵀ and h_i = P_ii, the leverage of key i: rank i is out of reach if
        h_i < delta². The margin covers arithmetic in fp32, not keys rounded to bf16.
        """
        U, S, _ = torch.linalg.svd(A.double(), full_matrices=False)
        # Directions that rounding alone made are counted: they raise the leverage, never lower it.
        nothing = S.max() * max(A.shape) * torch.finfo(torch.float64).eps
        leverage = U[:, S.gt(nothing)].square().sum(1)
        return leverage.sqrt() < self.serving.delta * (1 - 1e-3) - 1e-5

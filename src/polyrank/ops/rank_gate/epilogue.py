"""What stands between h = A x and q = φ(h): the gate of each rank, as plain data."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from polyrank.errors import ConfigError, nearest

KINDS = ("none", "static", "linear", "self")
SCORES = ("sigmoid", "softmax")


@dataclass(frozen=True, eq=False)
class Epilogue:
    """The gate g of q = g ⊙ h, h = A x; which fields count depends on `kind`.

    "none": g = 1.
    "static": g = gate, the same for every token; its gradient is computed.
    "linear": z = x rowsᵀ, one logit per block of `block` ranks. The k / block best blocks of a
        token are on, by the score σ(z) + b ("sigmoid") or z + b ("softmax"); of equal scores the
        lower index. g is total · v / Σ v over the ranks that are on and 0 elsewhere, with v = σ(z)
        or e^z; with `bias_in_weight` v = σ(z) + b or e^(z + b).
    "self": s = h / max(‖h‖, eps); g = softmax(s / tau) over the k largest s, 0 elsewhere and where
        s < delta.

    Attributes:
        kind: "none", "static", "linear" or "self".
        gate: static: (r,) weights.
        k: linear, self: ranks that are on per token, >= 1; linear: a multiple of `block`; self:
            more than r means r.
        block: linear: ranks per logit, >= 1; divides r and k.
        score: linear: "sigmoid" or "softmax".
        bias: linear: (r,) balance bias b, constant within a block, fp32; never differentiated.
        bias_in_weight: linear: whether b also enters the weights, not only the selection.
        total: linear: sum of the gates over the ranks, > 0: k (the default), 1, or `block` for
            mixtures whose expert weights sum to one. The sum is smaller where Σ v (sigmoid) is
            below 1e-6 with `bias_in_weight`, below 1e-30 without.
        tau: self: temperature, > 0.
        delta: self: threshold on s in [0, 1]; 0 turns it off; belongs to inference.
        eps: self: lower bound of the norm, > 0.

    Raises:
        ConfigError: Fields outside these ranges; lists all of them.
    """

    kind: str = "none"
    gate: Tensor | None = None
    k: int = 1
    block: int = 1
    score: str = "sigmoid"
    bias: Tensor | None = None
    bias_in_weight: bool = False
    total: float | None = None
    tau: float = 1.0
    delta: float = 0.0
    eps: float = 1e-12

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise ConfigError(problems)

    def _problems(self) -> list[str]:
        found = []
        if self.kind not in KINDS:
            guess = nearest(self.kind, KINDS) or " choose one"
            found.append(f"epilogue kind: got {self.kind!r}, expected one of {KINDS};{guess}")
        if (self.kind == "static") != (self.gate is not None and self.gate.dim() == 1):
            got = "none" if self.gate is None else f"shape {tuple(self.gate.shape)}"
            found.append(
                f"gate: got {got} for kind {self.kind!r}, expected a tensor (r,) for 'static' "
                "and none for the others"
            )
        if self.kind in ("linear", "self") and self.k < 1:
            found.append(f"k: got {self.k}, expected >= 1 active ranks; k = r turns all of them on")
        if self.kind == "linear":
            if self.block < 1 or self.k % max(self.block, 1):
                found.append(
                    f"block: got {self.block} with k = {self.k}, expected a divisor of k, >= 1; "
                    "count k in ranks: block times active blocks"
                )
            if self.score not in SCORES:
                guess = nearest(self.score, SCORES) or " choose one"
                found.append(f"score: got {self.score!r}, expected one of {SCORES};{guess}")
            if self.total is not None and not self.total > 0:
                found.append(f"total: got {self.total}, expected > 0; leave it out for k")
        if self.kind == "self":
            if not self.tau > 0:
                found.append(f"tau: got {self.tau}, expected > 0; a large one weighs ranks alike")
            if not 0 <= self.delta <= 1:
                found.append(f"delta: got {self.delta}, expected 0 <= delta <= 1; 0 turns it off")
            if not self.eps > 0:
                found.append(f"eps: got {self.eps}, expected > 0; use 1e-12")
        return found

    @property
    def sum(self) -> float:
        """Sum of the gates of one token over its ranks (linear)."""
        return float(self.k if self.total is None else self.total)

    @property
    def floor(self) -> float:
        """Lower bound of the divisor Σ v (sigmoid), over ranks."""
        # With b in the weights the sum can reach zero or below; without, only underflow can.
        return 1e-6 if self.bias_in_weight else 1e-30

    @cached_property
    def constants(self) -> tuple[Any, ...]:
        """All but the tensors: of two that agree in it one product can make the gates."""
        numbers = (self.k, self.block, self.score, self.bias_in_weight, self.total)
        return (self.kind, *numbers, self.bias is None, self.tau, self.delta, self.eps)

    def bias_of_blocks(self, dtype: torch.dtype) -> Tensor | None:
        """Return b of each block, (…, r / block), detached."""
        return None if self.bias is None else self.bias.detach()[..., :: self.block].to(dtype)

    def weight_bias(self, dtype: torch.dtype) -> Tensor | float:
        """The part of b that enters the weights."""
        b = self.bias_of_blocks(dtype) if self.bias_in_weight else None
        return 0.0 if b is None else b

    def detached(self) -> "Epilogue":
        """The same without a gradient to `gate`."""
        return self if self.gate is None else replace(self, gate=self.gate.detach())

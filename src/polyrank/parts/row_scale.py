"""Factors by output row that fall as the row of B A grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polyrank.frame import ORDER, Adapter, Core, Identity, Layer, Rule, Step, Workshop
from polyrank.layers.views import wide

if TYPE_CHECKING:
    from torch.optim import Optimizer

    Product = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def row_scales(layers: Sequence[Layer], eta2: float) -> list[Tensor]:
    """Return a_i = (‖(B A)_i‖ + 1/η²)^(−1/2), (d_out,), of every layer, in fp32 at least.

    ‖(B A)_i‖² = b_i (A Aᵀ) b_iᵀ: B A is never formed, and layers of equal shape are one product.
    """
    found: dict[int, Tensor] = {}
    groups: dict[Any, list[int]] = {}
    for place, layer in enumerate(layers):
        key = (layer.A.shape, layer.B.shape, layer.A.dtype, layer.A.device)
        groups.setdefault(key, []).append(place)
    for places in groups.values():
        A = torch.stack([wide(layers[n].A) for n in places])
        B = torch.stack([wide(layers[n].B) for n in places])
        # Rounding may leave a zero row below zero.
        squares = ((B @ (A @ A.mT)) * B).sum(-1).clamp_min(0)
        found.update(zip(places, (squares.sqrt() + 1 / eta2).rsqrt().unbind(), strict=True))
    return [found[n] for n in range(len(layers))]


class ScaledGradient(Rule):
    """Before every update writes a into each layer, whose gradients of A and B it then scales.

    Args:
        eta2: η² > 0; a <= η.
    """

    order = ORDER["penalty"]
    touches = frozenset({"true_grad"})

    def __init__(self, eta2: float) -> None:
        self.eta2 = eta2

    def bind(self, adapter: Adapter, optimizer: Optimizer, workshop: Workshop | None) -> None:
        """Remember the layers."""
        self.layers = adapter.layers

    def begin(self, step: Step) -> None:
        """Compute a from the factors of this update; micro-batches share it."""
        for layer, a in zip(self.layers, row_scales(self.layers, self.eta2), strict=True):
            if layer.row_scale is None:
                layer.row_scale = a.clone()
            else:
                # In place, so that compiled code meets the tensor that it knows.
                layer.row_scale.copy_(a)

    def release(self) -> None:
        """Give gradients their true size back."""
        for layer in self.layers:
            layer.row_scale = None


class ScaledStep(Rule):
    """Multiplies what the optimiser did to row i of B by a_i, of the factors before the step.

    Args:
        eta2: η² > 0; a <= η.
    """

    order = ORDER["prox"]
    touches = frozenset({"param"})

    def __init__(self, eta2: float) -> None:
        self.eta2 = eta2

    def bind(self, adapter: Adapter, optimizer: Optimizer, workshop: Workshop | None) -> None:
        """Remember the layers."""
        self.layers = adapter.layers

    @torch.no_grad()
    def grads(self, step: Step) -> None:
        """Keep B as it is before the step."""
        self.scales = row_scales(self.layers, self.eta2)
        self.before = [layer.B.detach().clone() for layer in self.layers]

    @torch.no_grad()
    def after(self, step: Step) -> None:
        """B ← B_old + diag(a) (B − B_old)."""
        for layer, old, a in zip(self.layers, self.before, self.scales, strict=True):
            layer.B.copy_(old + a[:, None].to(old) * (layer.B - old))
        del self.before


class ByOutput(Identity):
    """a_ni = (|f_ni| + 1/η²)^(−1/2), f = B A x: on the gradients of A and B, or on the answer.

    Args:
        r: live ranks.
        eta2: η² > 0.
        forward: whether the answer is a ∘ f, differentiated as it stands; no matrix equals it.
    """

    epilogue = "python"

    def __init__(self, r: int, eta2: float, *, forward: bool) -> None:
        super().__init__(r)
        self.eta2, self.answers = eta2, forward
        self.merges = "never" if forward else "exact"

    def outcome(self, product: Product, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Return f, with scaled gradients, or f / √(|f| + 1/η²)."""
        if self.answers:
            f = product(x, A, B)
            return f * (f.abs() + 1 / self.eta2).rsqrt()
        f = product(x.detach(), A, B)
        f = f * (f.detach().abs() + 1 / self.eta2).rsqrt()
        return product(x, A.detach(), B.detach()) + (f - f.detach())

    def delta(self, condition: Tensor | None = None) -> Tensor:
        """Return the identity, unless the answer is no linear map."""
        return Core.delta(self) if self.answers else super().delta(condition)

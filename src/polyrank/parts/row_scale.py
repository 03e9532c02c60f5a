"""Factors by output row that fall as the row of B A grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polyrank.frame import ORDER, Adapter, Core, Identity, Layer, Rule, Step, Workshop
from polyrank.layers.precision import exact
from polyrank.layers.views import wide

if TYPE_CHECKING:
    from torch.optim import Optimizer

    Product = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def row_scales(layers: Sequence[Layer], eta2: float) -> list[Tensor]:
    """Return a_i = (‖(B A − B0 A0)_i‖ + 1/η²)^(−1/2), (d_out,), of every layer, in fp32 at least.

    ‖(B A)_i‖² = b_i (A Aᵀ) b_iᵀ: B A is never formed, and layers of equal shape are one product.
    B0 A0 is a start that is subtracted; mostly there is none.
    """
    found: dict[int, Tensor] = {}
    groups: dict[Any, list[int]] = {}
    pairs = [_factors(layer) for layer in layers]
    for place, (A, B) in enumerate(pairs):
        groups.setdefault((A.shape, B.shape, A.dtype, A.device), []).append(place)
    for (_, _, _, device), places in groups.items():
        with exact(device.type):
            A = torch.stack([pairs[n][0] for n in places])
            B = torch.stack([pairs[n][1] for n in places])
            # Rounding may leave a zero row below zero.
            squares = ((B @ (A @ A.mT)) * B).sum(-1).clamp_min(0)
            found.update(zip(places, (squares.sqrt() + 1 / eta2).rsqrt().unbind(), strict=True))
    return [found[n] for n in range(len(layers))]


def _factors(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return wide (A, B) whose product is the layer's update over s."""
    A, B = wide(layer.A), wide(layer.B)
    if layer.shadow is None:
        return A, B
    A0, B0, delta = layer.shadow
    A0, B0 = wide(A0), wide(B0)
    if delta is not None:
        A0 = wide(delta) @ A0 if delta.dim() == 2 else wide(delta).reshape(-1, 1) * A0
    if A0.shape != A.shape:
        return torch.cat([A, A0]), torch.cat([B, -B0], dim=1)
    # B A − B0 A0 = (B − B0) A + B0 (A − A0): near the start the squares then do not cancel.
    return torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)


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
            return (f * self._root(f)).to(f.dtype)
        f = product(x.detach(), A, B)
        f = (f * self._root(f.detach())).to(f.dtype)
        return product(x, A.detach(), B.detach()) + (f - f.detach())

    def _root(self, f: Tensor) -> Tensor:
        """Return 1 / √(|f| + 1/η²) in fp32 at least, also for answers in half precision."""
        return (wide(f).abs() + 1 / self.eta2).rsqrt()

    def delta(self, condition: Tensor | None = None) -> Tensor:
        """Return the identity, unless the answer is no linear map."""
        return Core.delta(self) if self.answers else super().delta(condition)

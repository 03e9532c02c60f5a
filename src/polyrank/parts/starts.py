"""Starts from data: singular vectors of a gradient, of an update, or of the weight itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from polyrank.errors import ConfigError
from polyrank.frame import Init, Layer, Site
from polyrank.parts.decompose import leading
from polyrank.parts.square import Square

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
MAGNITUDES = ("stable", "unit", "gd", "weightS")
STEPS = ("sign", "sgd")


def split(direction: str, r: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return which of the leading 2r singular vectors A and B take, (r,) int64 each."""
    order = torch.arange(2 * r)
    if direction == "ArBr":
        return order[1::2], order[::2]
    if direction == "random":
        order = torch.randperm(2 * r, generator=rng)
    first, second = order[:r], order[r:]
    return (second, first) if direction == "A2rBr" else (first, second)


def _narrow(site: Site, times: int) -> Iterator[str]:
    if times * site.r > (least := min(site.d_in, site.d_out)):
        ranks = "r" if times == 1 else f"{times} r"
        yield (
            f"r at {site.path}: got {site.r}, expected {ranks} <= {least}, its smaller width; use "
            "a smaller r, rank_pattern, or leave the layer out with exclude_modules"
        )


class GradientStart(Init):
    """A0 = f V_Iᵀ and B0 = f U_J of the mean gradient, and the same as the subtracted shadow.

    Args:
        direction: how the leading 2r vectors are split, one of `DIRECTIONS`.
        magnitude: f, one of `MAGNITUDES`.
        gamma: γ of "stable", > 0.
        norm_clip: shrink A0 and B0 alike until max|s B0 A0| <= max|W|.
        batches: how many batches to look at, at most.
        training: whether they are seen in training mode.
    """

    def __init__(
        self,
        *,
        direction: str,
        magnitude: str,
        gamma: float,
        norm_clip: bool,
        batches: int,
        training: bool,
    ) -> None:
        self.direction, self.magnitude, self.gamma = direction, magnitude, gamma
        self.norm_clip, self.batches, self.training = norm_clip, batches, training
        weight = {"weight"} if norm_clip or magnitude == "weightS" else set()
        self.wants = frozenset({"weight_grad", *weight})

    def unfit(self, site: Site) -> Iterator[str]:
        """Refuse layers with fewer than 2r directions."""
        yield from _narrow(site, 2)

    def fill(self, layer: Layer, stat: dict[str, Tensor] | None, rng: torch.Generator) -> None:
        """Write A, B and the shadow."""
        assert stat is not None
        r = layer.site.r
        G = stat["weight_grad"].to(layer.A.device)
        U, _, Vt = leading(G, 2 * r, rng, width=2 * r + max(8, 2 * r))
        rows, columns = (index.to(G.device) for index in split(self.direction, r, rng))
        f = self._factor(layer, stat, rng)
        A, B = f * Vt[rows], f * U[:, columns]
        if self.norm_clip:
            if not bool(stat["weight"].any()):
                raise ConfigError(
                    f"norm_clip at {layer.site.path}: the base weight is all zero, and a start of "
                    "no size could never move; use norm_clip=False, or leave the layer out with "
                    "exclude_modules"
                )
            most = layer.scale * (B @ A).abs().max()
            shrink = (stat["weight"].abs().max().to(A) / most).clamp(max=1.0).sqrt()
            A, B = shrink * A, shrink * B
        layer.A.copy_(A)
        layer.B.copy_(B)
        layer.core.fill(rng)
        # What was written, so that a rounded factor is subtracted as it was rounded.
        layer.shadow = (layer.A, layer.B, None)

    def _factor(self, layer: Layer, stat: dict[str, Tensor], rng: torch.Generator) -> float:
        if self.magnitude == "stable":
            return float(layer.site.d_out**0.25 / math.sqrt(self.gamma))
        if self.magnitude == "weightS":
            r = layer.site.r
            _, values, _ = leading(stat["weight"], r, rng, width=4 * r)
            return float((values / layer.scale).sqrt().mean())
        return 1.0 if self.magnitude == "unit" else 1 / layer.scale


class UpdateStart(Init):
    """B R A = the best approximation of the first update D of the whole weight, over s.

    D = −η sign(Σ) or, for "sgd", −η Σ / n, Σ the sum of the gradients of n terms of the loss, in
    fp32 (rows, or the tokens of texts); D ≈ U diag(S) Vᵀ, B = U, A = Vᵀ, R = diag(S) / s.

    Args:
        step: "sign" or "sgd".
        eta: η > 0, or None for the learning rate of the first update.
        samples: rows to look at, exactly; 0 for all.
        training: whether they are seen in training mode.
        released: decompose without oversampling and round U, S and V to bf16, as released.
    """

    reduction = "sum"
    neutral = False

    def __init__(
        self, *, step: str, eta: float | None, samples: int, training: bool, released: bool
    ) -> None:
        self.step, self.eta, self.released = step, eta, released
        self.samples, self.training = samples, training
        self.wants = frozenset({"weight_grad", *(() if eta is not None else ("rate",))})

    def unfit(self, site: Site) -> Iterator[str]:
        """Refuse layers with fewer than r directions."""
        yield from _narrow(site, 1)

    def update(self, stat: dict[str, Tensor]) -> Tensor:
        """Return D (d_out, d_in)."""
        eta = float(stat["rate"]) if self.eta is None else self.eta
        total = stat["weight_grad"]
        return -eta * (total.sign() if self.step == "sign" else total / float(stat["count"]))

    def fill(self, layer: Layer, stat: dict[str, Tensor] | None, rng: torch.Generator) -> None:
        """Write A, B and the square core."""
        assert stat is not None
        r, D = layer.site.r, self.update(stat).to(layer.A.device)
        if self.released:
            found = leading(D, r, rng, width=r, passes=10, exact=0)
            U, S, Vt = (part.bfloat16().to(D) for part in found)
        else:
            # Signs have a flat spectrum, which a narrow sketch captures badly.
            U, S, Vt = leading(D, r, rng, width=2 * r, passes=10)
        layer.A.copy_(Vt)
        layer.B.copy_(U)
        cast("Square", layer.core).begin(S / layer.scale)


class WeightStart(Init):
    """B = U diag(σ), A = Vᵀ of the leading singular triplets of W; the core draws itself."""

    wants = frozenset({"weight"})

    def unfit(self, site: Site) -> Iterator[str]:
        """Refuse layers with fewer than r directions."""
        yield from _narrow(site, 1)

    def fill(self, layer: Layer, stat: dict[str, Tensor] | None, rng: torch.Generator) -> None:
        """Write A, B and the core."""
        assert stat is not None
        r = layer.site.r
        U, S, Vt = leading(stat["weight"], r, rng, width=2 * r, passes=10)
        layer.A.copy_(Vt)
        layer.B.copy_(U * S)
        layer.core.fill(rng)

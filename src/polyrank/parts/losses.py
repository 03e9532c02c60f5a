"""Losses of routed layers, on their logits; injected where the logits are, never collected."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Charge(NamedTuple):
    """What a routed layer adds to the objective, by coefficient (0: nothing).

    Attributes:
        balance: of `balance`.
        first: whether `balance` counts a token's first choice alone (the switch form), or all.
        z: of `z_square`.
        localized: of `localized`.
        gap: δ of `localized`.
    """

    balance: float = 0.0
    first: bool = False
    z: float = 0.0
    localized: float = 0.0
    gap: float = 0.0

    def due(self) -> bool:
        """Say whether anything is to be added."""
        return bool(self.balance or self.z or self.localized)


NOTHING = Charge()


def _mean(value: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of (*, n) over real tokens, (n,); zeros without any."""
    flat = value.reshape(-1, value.shape[-1])
    if mask is None:
        return flat.sum(0) / max(len(flat), 1)
    real = mask.reshape(-1, 1).to(flat.dtype)
    return (flat * real).sum(0) / real.sum().clamp_min(1)


def balance(z: Tensor, kept: Tensor, mask: Tensor | None) -> Tensor:
    """E · Σ_e f_e P_e: f_e the share of real tokens sent to expert e, P_e its mean softmax(z).

    z (*, E) logits, kept (*, E) bool. With k choices a token, even load gives k and a collapse onto
    the same k experts gives E; k = 1 is the switch loss. The gradient flows through P alone.
    """
    return z.shape[-1] * (_mean(kept.to(z.dtype), mask) * _mean(z.softmax(-1), mask)).sum()


def z_square(z: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over real tokens of logsumexp(z)²: keeps logits (*, E) from growing."""
    return _mean(z.logsumexp(-1, keepdim=True).square(), mask).sum()


def localized(weights: Tensor, types: Tensor, mask: Tensor | None, gap: float) -> Tensor:
    """Var(I ⊙ Q) / (mean(I ⊙ Q)² + 1e-10), Q_{n,e} = Σ_t ω_{n,t,e} over the real tokens.

    I = 1 + gap where an expert belongs to the sample's type, else 1 − gap; the first half of the
    experts belongs to type 1, the second to type 0. The variance is unbiased over all entries, and
    0 if there is only one.

    Args:
        weights: (batch, tokens, E).
        types: (batch,) of 0 and 1.
        mask: (batch, tokens) of real tokens, or None.
        gap: δ >= 0.
    """
    experts = weights.shape[-1]
    load = (weights if mask is None else weights * mask[..., None]).sum(1)
    first = torch.arange(experts, device=weights.device) < experts // 2
    own = ((types[:, None] == 1) == first).to(load.dtype)
    share = load * (1 - gap + 2 * gap * own)
    if share.numel() < 2:
        return share.sum() * 0
    return share.var() / (share.mean().square() + 1e-10)

"""The gates of the rank gate and their derivatives in closed form, on (T, r) tensors in fp32 or fp64.

With u = s · dy B and γ = h ⊙ u = dL/dg (summed over a block: Γ), total = Σ g, on the ranks that are on:
  sigmoid   g = c v, c = total / Σ v, v = p (+ b):   dz = c (Γ − m) p (1 − p),   m = Σ Γ v / Σ v
  softmax   g = total · softmax(z):                  dz = g (Γ − m),             m = Σ Γ g / total
  self      w = softmax(s / tau), s = h / n:         dh = u w + (ds − s Σ ds s) / n,   ds = w (γ − Σ γ w) / tau
and dh = u ⊙ g for all but "self". No gradient passes through the selection.
"""

import torch
from torch import Tensor

from polyrank.ops.rank_gate.epilogue import Epilogue
from polyrank.ops.rank_gate.selection import check_finite, largest_fast

Kept = tuple[Tensor | None, ...]


def _times(h: Tensor, g: Tensor, block: int) -> Tensor:
    """Multiply h (T, r) by g (T, r / block), each gate serving the ranks of its block."""
    return h * g if block == 1 else (h.view(*g.shape, block) * g[..., None]).view(h.shape)


def _per_block(t: Tensor, block: int) -> Tensor:
    return t if block == 1 else t.view(t.shape[0], -1, block).sum(-1)


def route(z: Tensor, e: Epilogue) -> tuple[Kept, Tensor]:
    """What `weigh` and `back` need of a linear router's logits z (T, E), and the selection as 1 and 0 (T, E).

    Raises:
        NonFiniteError: logits that are not finite.
    """
    check_finite(z)
    b = e.bias_of_blocks(z.dtype)
    p = z.sigmoid() if e.score == "sigmoid" else z
    on = largest_fast(p if b is None else p + b, e.k // e.block)
    if e.score == "softmax":
        v = z + e.weight_bias(z.dtype) + on.log()
        return (v.softmax(-1).mul_(e.sum / e.block), None, None, None), on
    p = p * on
    if b is None or not e.bias_in_weight:
        return (p, (p.sum(-1, keepdim=True) * e.block).clamp_min_(e.floor).reciprocal_().mul_(e.sum), None, None), on
    v = torch.addcmul(p, on, b)
    S = v.sum(-1, keepdim=True) * e.block
    # Where the guard holds the divisor, c is a constant and brings no mean.
    free = (S >= e.floor).to(z.dtype)
    return (v, S.clamp_min(e.floor).reciprocal_().mul_(e.sum), p, free), on


def attend(h: Tensor, e: Epilogue) -> Kept:
    """What `weigh` and `back` need of the self-activated gate on h (T, r).

    Raises:
        NonFiniteError: activations that are not finite.
    """
    check_finite(h)
    s = h / h.norm(dim=-1, keepdim=True).clamp_min_(e.eps)
    w = (s / e.tau).add_(largest_fast(s, e.k).log_()).softmax(-1)
    return (w, s)


def gates(kept: Kept, e: Epilogue) -> Tensor | None:
    """Gates of one token's blocks: (T, r / block), (r,) for "static", None for 1."""
    first, *rest = kept or (None,)
    if e.kind == "self":
        return torch.where(rest[0] >= e.delta, first, 0.0) if e.delta else first
    return first if e.kind != "linear" or rest[0] is None else first * rest[0]


def weigh(h: Tensor, g: Tensor | None, e: Epilogue) -> Tensor:
    """q = g ⊙ h."""
    return h if g is None else _times(h, g, e.block if e.kind == "linear" else 1)


def back(u: Tensor, h: Tensor, g: Tensor | None, kept: Kept, e: Epilogue) -> tuple[Tensor, Tensor | None]:
    """(dh (T, r), dz (T, r / block) or None) of u = s · dy B, the gradient of q."""
    dh = weigh(u, g, e)
    if e.kind not in ("linear", "self"):
        return dh, None
    gamma = u * h
    if e.kind == "self":
        w, s = kept
        n = h.norm(dim=-1, keepdim=True)
        if e.delta:
            gamma = gamma * (s >= e.delta)
        ds = gamma.sub_((gamma * w).sum(-1, keepdim=True)).mul_(w).mul_(1 / e.tau)
        along = (ds * s).sum(-1, keepdim=True).mul_(n > e.eps)
        return dh.add_(torch.addcmul(ds, s, along, value=-1).div_(n.clamp_min_(e.eps))), None
    v, c, p, free = kept
    gamma = _per_block(gamma, e.block)
    m = (gamma * g).sum(-1, keepdim=True).mul_(e.block / e.sum)
    if c is None:
        return dh, (gamma - m).mul_(g)
    if p is None:
        return dh, (gamma - m).mul_(g).mul_(1 - v)
    return dh, gamma.sub_(m.mul_(free)).mul_(c).mul_(p).mul_(1 - p)

"""The gates and their derivatives in closed form, on (T, r) tensors in fp32 or fp64.

With u = s · dy B, q = g ⊙ h, γ = u ⊙ h = dL/dg (summed over a block: Γ) and total = Σ g, on the
ranks that are on:
  sigmoid   g = c v,  c = total / Σ v,  v = p (+ b):   dz = c (Γ − m) p (1 − p),  m = Σ Γ v / Σ v
  softmax   g = total · softmax(z):                    dz = g (Γ − m),            m = Σ Γ g / total
  self      w = softmax(s / tau),  s = h / n:          dh = u w + (ds − s Σ ds s) / n,
                                                       ds = w (γ − Σ γ w) / tau
and dh = u ⊙ g for all but "self". No gradient passes through the selection.
"""

from typing import Any, cast

import torch
from torch import Tensor

from polyrank.ops.rank_gate.epilogue import Epilogue
from polyrank.ops.rank_gate.selection import largest_fast

# Tensors, or None where a variant needs none.
Kept = tuple[Any, ...]


def _per_block(t: Tensor, block: int) -> Tensor:
    return t if block == 1 else t.unflatten(-1, (t.shape[-1] // block, block)).sum(-1)


def route(z: Tensor, e: Epilogue) -> tuple[Kept, Tensor]:
    """A linear router: what `gates` and `back` need, and the selection as 1 and 0, both (T, E).

    Args:
        z: (T, E) logits, finite; overwritten.
        e: An epilogue of kind "linear".
    """
    b, share = e.bias_of_blocks(z.dtype), e.sum / e.block
    p = z.sigmoid_() if e.score == "sigmoid" else z
    on = largest_fast(p if b is None else p + b, e.k // e.block, scratch=b is not None)
    if e.score == "softmax":
        # log turns the selection into 0 and −inf.
        v = (z + e.weight_bias(z.dtype)).add_(on.log()).softmax(-1)
        return (z.copy_(v).mul_(share), None, None, None), on
    p = p.mul_(on)
    if b is None or not e.bias_in_weight:
        # Per block: total / (block Σ v), the bound of the divisor moved to the sum over blocks.
        S = p.sum(-1, keepdim=True).clamp_min_(e.floor / e.block)
        return (p, S.reciprocal_().mul_(share), None, None), on
    v = torch.addcmul(p, on, b)
    S = v.sum(-1, keepdim=True)
    # Where the bound holds the divisor, c is a constant and brings no mean.
    free = S.ge(e.floor / e.block).to(z.dtype)
    return (v, S.clamp_min_(e.floor / e.block).reciprocal_().mul_(share), p, free), on


def attend(h: Tensor, e: Epilogue) -> Kept:
    """The self-activated gate: what `gates` and `back` need of h (T, r), finite."""
    s = h / h.norm(dim=-1, keepdim=True).clamp_min_(e.eps)
    w = (s / e.tau).add_(largest_fast(s, e.k).log_()).softmax(-1)
    return (w, s)


def gates(kept: Kept, e: Epilogue) -> Tensor | None:
    """g: (T, r / block) for "linear", (T, r) for "self", (r,) for "static", None for ones."""
    first = kept[0]
    if e.kind == "self" and e.delta:
        return torch.where(kept[1] >= e.delta, first, 0.0)
    return first * kept[1] if e.kind == "linear" and kept[1] is not None else first


def weigh(h: Tensor, g: Tensor | None, e: Epilogue, out: Tensor | None = None) -> Tensor:
    """G ⊙ h, each gate serving the ranks of its block; into `out` if that is given."""
    if g is None:
        return h
    if e.block == 1 or e.kind != "linear":
        return torch.mul(h, g, out=out)
    q = (h.reshape(*g.shape, e.block) * g[..., None]).view(h.shape)
    return q if out is None else out.copy_(q)


def back(
    u: Tensor,
    h: Tensor,
    g: Tensor | None,
    q: Tensor,
    kept: Kept,
    e: Epilogue,
    out: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor | None]:
    """Gradients dh (T, r) and dz (T, r / block) or None; written into `out` where it is given."""
    if e.kind == "self":
        return _back_self(u, h, cast("Tensor", g), kept, e), None
    dh = weigh(u, g, e, out[0])
    if g is None or e.kind != "linear":
        return dh, None
    v, c, p, free = kept
    t = _per_block(u * q, e.block)
    m = t.sum(-1, keepdim=True).mul_(e.block / e.sum)
    if p is not None:
        gamma = _per_block(u * h, e.block)
        return dh, torch.mul(gamma.sub_(m.mul_(free)).mul_(c).mul_(p), 1 - p, out=out[1])
    if c is None:
        return dh, torch.addcmul(t, g, m, value=-1, out=out[1])
    t.addcmul_(g, m, value=-1)
    return dh, torch.addcmul(t, t, v, value=-1, out=out[1])


def _back_self(u: Tensor, h: Tensor, g: Tensor, kept: Kept, e: Epilogue) -> Tensor:
    w, s = kept
    n = h.norm(dim=-1, keepdim=True)
    gamma = u * h
    if e.delta:
        gamma = gamma * (s >= e.delta)
    ds = gamma.sub_((gamma * w).sum(-1, keepdim=True)).mul_(w).mul_(1 / e.tau)
    # Where eps bounds the norm it is a constant.
    along = (ds * s).sum(-1, keepdim=True).mul_(n > e.eps)
    return (u * g).add_(ds.addcmul_(s, along, value=-1).div_(n.clamp_min_(e.eps)))

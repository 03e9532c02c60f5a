"""The rank gate in plain differentiable torch: what every faster path must equal.

y + scale · (B (g ⊙ A x̂) − B0 δ0 A0 x) with x̂ = dropout(x) and g by the epilogue; x (…, d_in),
y (…, d_out), A (r, d_in), B (d_out, r), rows (r / block, d_in). Arithmetic in fp32, fp64 if x is.
Columns that B lacks on the left are zeros.
"""

import torch

from polyrank.ops.philox import dropout as drop
from polyrank.ops.rank_gate.selection import chosen, largest


def gate(h, z, e):
    """Gates g (…, r) of the epilogue e, differentiable except through the selection.

    h = A x (…, r); z = x rowsᵀ (…, r / block), unused but for "linear"; both fp32 or fp64.
    """
    if e.kind in ("none", "static"):
        return torch.ones_like(h) if e.gate is None else e.gate.to(h.dtype).expand_as(h)
    if e.kind == "self":
        s = h / h.norm(dim=-1, keepdim=True).clamp_min(e.eps)
        w = (s / e.tau).masked_fill(~largest(s, e.k), -torch.inf).softmax(-1)
        return torch.where(s >= e.delta, w, 0.0) if e.delta else w
    v = (z.sigmoid() if e.score == "sigmoid" else z) + e.weight_bias(z.dtype)
    if e.score == "softmax":
        w = v.masked_fill(~chosen(z, e), -torch.inf).softmax(-1) / e.block
    else:
        v = torch.where(chosen(z, e), v, 0.0)
        w = v / (e.block * v.sum(-1, keepdim=True)).clamp_min(e.floor)
    return (e.sum * w).repeat_interleave(e.block, dim=-1)


def rank_gate(y, x, A, rows, B, epilogue, scale, live_from=0, shadow=None, row_scale=None,
              dropout=0.0, seed=0, mask=None, *, count=False):  # fmt: skip
    """Return (y + update, counts (r,) int64 or None); see `polyrank.ops.rank_gate.rank_gate`."""
    e, wide = epilogue, torch.promote_types(x.dtype, torch.float32)
    x, A, B, rows = (t.to(wide) for t in (x, A, B, A[:0] if rows is None else rows))
    B = torch.nn.functional.pad(B, (len(A) - B.shape[1], 0))
    A = torch.cat([A[:live_from].detach(), A[live_from:]])
    B = torch.cat([B[:, :live_from].detach(), B[:, live_from:]], dim=1)
    x_hat = drop(x, dropout, seed) if dropout else x

    def update(x, A, rows, B, e):
        return (gate(h := x @ A.T, x @ rows.T, e) * h) @ B.T

    out, counts = update(x_hat, A, rows, B, e), None
    if row_scale is not None:
        theta = row_scale.to(wide) * update(x_hat.detach(), A, rows, B, e)
        out = update(x_hat, A.detach(), rows.detach(), B.detach(), e.detached())
        out = out + (theta - theta.detach())
    if shadow is not None:
        A0, B0, delta = (t if t is None else t.to(wide) for t in shadow)
        A0 = A0 if delta is None else delta @ A0 if delta.dim() == 2 else delta[..., None] * A0
        out = out - x @ A0.T @ B0.T
    if count and e.kind == "linear":
        on = chosen(x_hat @ rows.T, e).repeat_interleave(e.block, dim=-1)
        counts = on[... if mask is None else mask].reshape(-1, on.shape[-1]).sum(0)
    return (y.to(wide) + scale * out).to(y.dtype), counts

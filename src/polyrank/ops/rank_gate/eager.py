"""The rank gate without kernels, on any device: few passes over x and y, backward in closed form.

One product for [A; rows], the gate on (T, r) tensors, one product onto y; backward likewise. Saved for backward:
x, h and the router's weights of the ranks that are on, never a copy of x, the gate or the dropout mask.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from polyrank.ops.philox import Word, keep_mask
from polyrank.ops.rank_gate import closed
from polyrank.ops.rank_gate.epilogue import Epilogue

# torch.mm(bf16, bf16, out_dtype=fp32), on CUDA only, came with torch 2.8.
_MM_WIDE = hasattr(torch.ops.aten.mm, "dtype")


class _Plan(NamedTuple):
    """The constants of one call."""

    epilogue: Epilogue
    scale: float
    live_from: int
    dropout: float
    seed: Word
    count: bool


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """A b in `dtype`, accumulated in it where the device can."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    if a.is_cuda and _MM_WIDE:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def _logits(x: Tensor, W: Tensor, wide: torch.dtype) -> Tensor:
    """X Wᵀ in `wide`: logits rounded to bf16 would tie and change the selection of some tokens."""
    if x.dtype == wide or (x.is_cuda and _MM_WIDE):
        return _mm(x, W.to(x.dtype).t(), wide)
    return torch.mm(x.to(wide), W.to(wide).t())


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _kept(x: Tensor, plan: _Plan) -> Tensor:
    """The dropout mask over its keep probability, in the dtype of x."""
    return keep_mask(x.shape, plan.dropout, plan.seed, x.device).to(x.dtype).mul_(1 / (1 - plan.dropout))


def _shadowed(x: Tensor, A0: Tensor, delta: Tensor | None) -> Tensor:
    """δ0 A0 x, (T, w) in the dtype of x."""
    h0 = torch.mm(x, A0.to(x.dtype).t())
    if delta is None:
        return h0
    return torch.mm(h0, delta.to(x.dtype).t()) if delta.dim() == 2 else (h0 * delta).to(x.dtype)


class _RankGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, rows: Tensor | None, B: Tensor, gate: Tensor | None,
                row_scale: Tensor | None, A0: Tensor | None, B0: Tensor | None, delta: Tensor | None,
                mask: Tensor | None, plan: _Plan) -> Any:  # fmt: skip
        e, dtype, wide, r = plan.epilogue, x.dtype, _wide(x.dtype), A.shape[0]
        flat = x.reshape(-1, x.shape[-1])
        x_hat = flat * _kept(flat, plan) if plan.dropout else flat
        on = None
        if e.kind == "linear":
            hz = _logits(x_hat, torch.cat([A, rows]), wide)
            kept, on = closed.route(hz[:, r:], e)
            h = hz[:, :r].to(dtype, copy=True)
        elif e.kind == "self":
            h = _logits(x_hat, A, wide)
            kept = closed.attend(h, e)
        else:
            h = torch.mm(x_hat, A.to(dtype).t())
            kept = (gate,)
        q = closed.weigh(h, closed.gates(kept, e), e).to(dtype)
        Bt = B.to(dtype).t()
        base = y.reshape(-1, y.shape[-1])
        if A0 is None and y.dtype == dtype:
            out = torch.addmm(base, q, Bt, alpha=plan.scale)
        else:
            update = torch.mm(q, Bt)
            if A0 is not None:
                # The difference first: equal factors then cancel to exact zeros.
                update -= torch.mm(_shadowed(flat, A0, delta), B0.to(dtype).t())
            out = base + update.mul_(plan.scale).to(y.dtype)
        ctx.plan = plan
        ctx.save_for_backward(x, A, rows, B, row_scale, A0, B0, delta, h, *kept)
        out = out.view(y.shape)
        if not plan.count or on is None:
            return out, None
        counts = (on if mask is None else on * mask.reshape(-1, 1)).sum(0).long().repeat_interleave(e.block)
        ctx.mark_non_differentiable(counts)
        return out, counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Any) -> Any:
        x, A, rows, B, row_scale, A0, B0, delta, h, *kept = ctx.saved_tensors
        plan, (_, to_x, to_A, to_rows, to_B, to_gate, *_) = ctx.plan, ctx.needs_input_grad
        e, dtype, r, live = plan.epilogue, x.dtype, A.shape[0], plan.live_from
        wide = _wide(dtype)
        flat, dy2 = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]).to(dtype)
        kept_share = _kept(flat, plan) if plan.dropout and (to_x or to_A or to_rows) else None
        g = closed.gates(kept, e)
        dx = dA = drows = dB = dgate = None

        def inner(B: Tensor) -> tuple[Tensor, Tensor | None]:
            """Gradients of [h, z], and of a static gate, for the output factor B."""
            u = _mm(dy2, B.to(dtype), wide).mul_(plan.scale)
            dgate = (u * h).sum(0).to(gate_dtype) if to_gate else None
            dh, dz = closed.back(u, h, g, kept, e)
            return (dh if dz is None else torch.cat([dh, dz], dim=1)).to(dtype), dgate

        gate_dtype = kept[0].dtype if to_gate else None
        if to_B:
            q = closed.weigh(h, g, e).to(dtype)
            dB = _mm(q[:, live:].t(), dy2, wide).t() * plan.scale
            dB = _padded(dB if row_scale is None else dB * row_scale[:, None], live, 1).to(B.dtype)
        d = None
        if to_A or to_rows or to_gate:
            d, dgate = inner(B if row_scale is None else B * row_scale[:, None])
            if to_A or to_rows:
                d_used = d[:, live if to_A else r : None if to_rows else r]
                x_hat = flat if kept_share is None else flat * kept_share
                dW = _mm(d_used.t(), x_hat, wide)
                dA = _padded(dW[: r - live], live, 0).to(A.dtype) if to_A else None
                drows = dW[-rows.shape[0] :].to(rows.dtype) if to_rows else None
        if to_x:
            if d is None or row_scale is not None:
                d, _ = inner(B)
            dx = torch.mm(d, (A if rows is None else torch.cat([A, rows])).to(dtype))
            if kept_share is not None:
                dx *= kept_share
            if A0 is not None:
                u0 = torch.mm(dy2, B0.to(dtype))
                if delta is not None:
                    u0 = torch.mm(u0, delta.to(dtype)) if delta.dim() == 2 else (u0 * delta).to(dtype)
                dx = dx.addmm_(u0, A0.to(dtype), alpha=-plan.scale)
            dx = dx.view(x.shape)
        return dy, dx, dA, drows, dB, dgate, None, None, None, None, None, None


def _padded(grad: Tensor, live: int, dim: int) -> Tensor:
    """Prepend `live` zeros along `dim`: the gradient of the frozen ranks."""
    if not live:
        return grad
    shape = list(grad.shape)
    shape[dim] = live
    return torch.cat([grad.new_zeros(shape), grad], dim)


def rank_gate(y, x, A, rows, B, epilogue, scale, live_from=0, shadow=None, row_scale=None,
              dropout=0.0, seed=0, mask=None, *, count=False):  # fmt: skip
    """Return (y + update, counts (r,) int64 or None); see `polyrank.ops.rank_gate.rank_gate`."""
    device = x.device.type
    A0, B0, delta = (None, None, None) if shadow is None else shadow
    plan = _Plan(epilogue.detached(), float(scale), live_from, float(dropout), seed, count)
    autocast = torch.is_autocast_enabled(device)
    if autocast and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        return _RankGate.apply(
            y, x, A, rows, B, epilogue.gate, row_scale, A0, B0, delta, mask, plan
        )

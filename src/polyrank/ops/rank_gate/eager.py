"""The rank gate without kernels, on any device: few passes over x and y, backward in closed form.

One product with [A; rows], the gate on (T, r) tensors, one product onto y; backward likewise. Saved
for backward: x, h and the router's weights of the ranks that are on; no copy of x, no gates.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from polyrank.ops.philox import Word, keep_mask
from polyrank.ops.rank_gate import closed
from polyrank.ops.rank_gate.epilogue import Epilogue
from polyrank.ops.rank_gate.selection import check_finite, watch_finite

# torch.mm(bf16, bf16, out_dtype=fp32), on CUDA only, came with torch 2.8.
_MM_WIDE = hasattr(torch.ops.aten.mm, "dtype")


class _Plan(NamedTuple):
    """The constants of one call."""

    epilogue: Epilogue
    scale: float
    live_from: int
    dropout: float
    seed: Word
    counts: bool
    inplace: bool
    backward: bool


def _keep(x: Tensor, plan: _Plan) -> tuple[Tensor | None, float]:
    """The mask of dropout, a bool like x (T, d_in), and what its products are multiplied with."""
    if not plan.dropout:
        return None, 1.0
    return keep_mask(x.shape, plan.dropout, plan.seed, x.device), 1 / (1 - plan.dropout)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype, alpha: float = 1.0) -> Tensor:
    """The product alpha · a b in `dtype`, accumulated in it where the device can."""
    if a.dtype == dtype:
        # beta = 0: the scale costs no pass of its own.
        return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=alpha)
    if a.is_cuda and _MM_WIDE:
        return torch.mm(a, b, out_dtype=dtype).mul_(alpha)
    return torch.mm(a, b).to(dtype).mul_(alpha)


def _logits(x: Tensor, W: Tensor, alpha: float) -> Tensor:
    """Alpha · x Wᵀ in fp32 or fp64: logits rounded to bf16 would tie, and route otherwise."""
    wide = _wide(x.dtype)
    if x.dtype == wide or (x.is_cuda and _MM_WIDE):
        return _mm(x, W.to(x.dtype).t(), wide, alpha)
    return _mm(x.to(wide), W.to(wide).t(), wide, alpha)


def _delta(h: Tensor, delta: Tensor | None, *, transposed: bool) -> Tensor:
    """H δ0 or h δ0ᵀ for δ0 given as None, 0-d, (w,) or (w, w)."""
    if delta is None or delta.dim() < 2:
        return h if delta is None else (h * delta).to(h.dtype)
    return torch.mm(h, (delta.t() if transposed else delta).to(h.dtype))


def _padded(grad: Tensor, zeros: int, dim: int) -> Tensor:
    """Put zeros before `grad` along `dim`: what frozen ranks get, and what silent ones give."""
    if not zeros:
        return grad
    shape = list(grad.shape)
    shape[dim] = zeros
    return torch.cat([grad.new_zeros(shape), grad], dim)


def _update(y: Tensor, q: Tensor, flat: Tensor, B: Tensor, shadow: tuple, plan: _Plan) -> Tensor:
    """The sum y + scale · (q Bᵀ − q0 B0ᵀ) for y (T, d_out); y itself with `inplace`."""
    (A0, B0, delta), dtype = shadow, q.dtype
    Bt = B.to(dtype).t()
    if A0 is None and y.dtype == dtype:
        add = y.addmm_ if plan.inplace else y.addmm
        return add(q, Bt, alpha=plan.scale)
    update = torch.mm(q, Bt)
    if A0 is not None:
        # The difference first: equal factors cancel to exact zeros.
        q0 = _delta(torch.mm(flat, A0.to(dtype).t()), delta, transposed=True)
        update -= torch.mm(q0, B0.to(dtype).t())
    return (y.add_ if plan.inplace else y.add)(update.mul_(plan.scale).to(y.dtype))


class _RankGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        A: Tensor,
        rows: Tensor | None,
        B: Tensor,
        gate: Tensor | None,
        row_scale: Tensor | None,
        A0: Tensor | None,
        B0: Tensor | None,
        delta: Tensor | None,
        mask: Tensor | None,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor | None]:
        e, dtype, r = plan.epilogue, x.dtype, A.shape[0]
        flat = x.reshape(-1, x.shape[-1])
        keep, gain = _keep(flat, plan)
        x_hat = flat if keep is None else flat * keep
        on = ctx.finite = None
        if e.kind == "linear":
            hz = _logits(x_hat, torch.cat([A, cast("Tensor", rows)]), gain)
            h, z = hz[:, :r], hz[:, r:]
            if hz.dtype != dtype:
                h, z = h.to(dtype), z.contiguous()
            ctx.finite = (watch_finite if plan.backward else check_finite)(z)
            kept, on = closed.route(z, e)
        elif e.kind == "self":
            h = _logits(x_hat, A, gain)
            ctx.finite = (watch_finite if plan.backward else check_finite)(h)
            kept = closed.attend(h, e)
        else:
            h, kept = _mm(x_hat, A.to(dtype).t(), dtype, gain), (gate,)
        q = closed.weigh(h, closed.gates(kept, e), e)[:, r - B.shape[1] :].to(dtype)
        out = _update(y.reshape(-1, B.shape[0]), q, flat, B, (A0, B0, delta), plan)
        if plan.inplace:
            ctx.mark_dirty(y)
            out = y
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        # A CPU draws the mask in the time of a large product and has the memory to hold it.
        held = keep if x.is_cpu else None
        ctx.save_for_backward(x, A, rows, B, row_scale, A0, B0, delta, held, h, *kept)
        counts = None
        if plan.counts and on is not None:
            counts = (on if mask is None else on * mask.reshape(-1, 1)).sum(0).long()
            counts = counts if e.block == 1 else counts.repeat_interleave(e.block)
            ctx.mark_non_differentiable(counts)
        return out.view(y.shape) if out is not y else y, counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 12
        if ctx.finite is not None:
            ctx.finite()
        x, A, rows, B, row_scale, A0, B0, delta, keep, h, *kept = ctx.saved_tensors
        plan, (_, to_x, to_A, to_rows, to_B, to_gate, *_) = ctx.plan, ctx.needs_input_grad
        e, dtype, r, live = plan.epilogue, x.dtype, A.shape[0], plan.live_from
        wide, silent = _wide(dtype), r - B.shape[1]
        flat, dy2 = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]).to(dtype)
        keep, gain = (keep, 1 / (1 - plan.dropout)) if keep is not None else _keep(flat, plan)
        g = closed.gates(kept, e)
        q = closed.weigh(h, g, e)
        dx = dA = drows = dB = dgate = d = None

        def inner(B: Tensor) -> tuple[Tensor, Tensor]:
            """Returns u = scale · dy B and the gradient of [h, z]."""
            u = _padded(_mm(dy2, B.to(dtype), wide, plan.scale), silent, 1)
            if rows is None:
                return u, closed.back(u, h, g, q, kept, e)[0].to(dtype)
            if dtype != wide or torch.compiler.is_compiling():
                dh, dz = closed.back(u, h, g, q, kept, e)
                return u, torch.cat([dh, cast("Tensor", dz)], dim=1).to(dtype)
            d = u.new_empty(u.shape[0], r + rows.shape[0])
            closed.back(u, h, g, q, kept, e, out=(d[:, :r], d[:, r:]))
            return u, d

        if to_B:
            # (qᵀ dy)ᵀ beats dyᵀ q by more than the copy that a transposed gradient costs.
            dB = _mm(q[:, live:].to(dtype).t(), dy2, wide, plan.scale).t()
            dB = dB if row_scale is None else dB * row_scale[:, None]
            dB = _padded(dB, live - silent, 1).to(B.dtype)
        if to_A or to_rows or to_gate:
            u, d = inner(B if row_scale is None else B * row_scale[:, None])
            if to_gate:
                dgate = (u * h).sum(0).to(kept[0].dtype)
            if to_A or to_rows:
                used = d[:, live if to_A else r : None if to_rows else r]
                dW = _mm(used.t(), flat if keep is None else flat * keep, wide, gain)
                if to_A:
                    dA = _padded(dW[: r - live], live, 0).to(A.dtype)
                if to_rows:
                    drows = dW[-rows.shape[0] :].to(rows.dtype)
        if to_x:
            if d is None or row_scale is not None:
                d = inner(B)[1]
            dx = _mm(d, (A if rows is None else torch.cat([A, rows])).to(dtype), dtype, gain)
            dx = dx if keep is None else dx.mul_(keep)
            if A0 is not None:
                u0 = _delta(torch.mm(dy2, B0.to(dtype)), delta, transposed=False)
                dx = dx.addmm_(u0, A0.to(dtype), alpha=-plan.scale)
            dx = dx.view(x.shape)
        return dy, dx, dA, drows, dB, dgate, None, None, None, None, None, None


def writable(y: Tensor, inplace: bool) -> Tensor | None:
    """The tensor of y's elements to overwrite; None where autograd forbids it or it costs more."""
    if not inplace or torch.compiler.is_compiling() or not y.is_contiguous():
        return None
    if not torch.is_grad_enabled():
        return y
    if y.requires_grad and y.is_leaf:
        return None
    if not y._is_view():
        return y
    # nn.Linear gives a view of a (T, d_out) product; overwriting the view copies gradients thrice,
    # and autograd forbids it to a function with two outputs, whether y requires a gradient or not.
    base = cast("Tensor", y._base)
    whole = base.numel() == y.numel() and base.is_contiguous()
    whole = whole and not (base.requires_grad and base.is_leaf)
    return base if whole and base.shape[-1] == y.shape[-1] else None


def rank_gate(y, x, A, rows, B, epilogue, scale, live_from=0, shadow=None, row_scale=None,
              dropout=0.0, seed=0, mask=None, *, count=False, inplace=False):  # fmt: skip
    """Return (y + update, counts (r,) int64 or None); see `polyrank.ops.rank_gate.rank_gate`."""
    device, shape = x.device.type, y.shape
    A0, B0, delta = (None, None, None) if shadow is None else shadow
    autocast = torch.is_autocast_enabled(device)
    if autocast and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    target = writable(y, inplace)
    inplace, y = target is not None, y if target is None else target
    tensors = (y, x, A, rows, B, epilogue.gate)
    backward = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    constants = (float(scale), live_from, dropout, seed, count, inplace, backward)
    plan = _Plan(epilogue.detached(), *constants)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        out, counts = _RankGate.apply(
            y, x, A, rows, B, epilogue.gate, row_scale, A0, B0, delta, mask, plan
        )
    return out.view(shape), counts

"""The rank gate on kernels: the autograd side of `fused.py`, and what it cannot serve.

Saved for backward: x, h, a router's logits and the factors in the dtype of x; no gates, no copy of
x. Logits that are not finite make the gates of their token NaN. Backward raises for them as soon as
the host can see it: nothing waits for the device, so that it may be the backward of the next step.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from polyrank.ops.capture import capturing
from polyrank.ops.philox import Word
from polyrank.ops.rank_gate import eager, few, fused, launch
from polyrank.ops.rank_gate.epilogue import Epilogue
from polyrank.ops.rank_gate.plan import WIDTH, Call
from polyrank.ops.rank_gate.projection import INTERPRETED, MOST_RANKS, Memo, Projection
from polyrank.ops.rank_gate.selection import MESSAGE, NonFiniteError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problems(x: Tensor, r: int, shadow: Any) -> list[str]:
    """Say why the kernels cannot serve a call; empty if they can."""
    found = []
    if not x.is_cuda and not INTERPRETED:
        found.append(f"x on {x.device.type}: kernels need a CUDA device")
    if x.dtype not in DTYPES:
        found.append(f"{x.dtype}: kernels compute in float32, bfloat16 or float16")
    if r > MOST_RANKS:
        found.append(f"r = {r}: one tile holds up to {MOST_RANKS} ranks")
    if shadow is not None:
        found.append("shadow: kernels subtract no second pair of factors")
    return found


def _member(e: Epilogue, r: int, scale: float, live_from: int, count: bool) -> launch.Member:
    kind = e.score if e.kind == "linear" else e.kind
    sums = (e.sum, e.floor) if e.kind == "linear" else (1.0, 1.0)
    return launch.Member(
        kind, min(e.k, r), e.block if e.kind == "linear" else 1, e.bias_in_weight, *sums,
        float(e.tau), float(e.delta) if e.kind == "self" else 0.0, float(e.eps), float(scale),
        live_from, count and e.kind == "linear",
    )  # fmt: skip


def _on(x: Tensor) -> Any:
    """Makes the device of x the current one."""
    if not x.is_cuda or x.device.index == torch._C._cuda_getDevice():
        return nullcontext()
    return torch.cuda.device(x.device)


def _check(x: Tensor) -> None:
    """Raise if a kernel met logits that are not finite, as far as the host knows by now.

    Raises:
        NonFiniteError: Once; what is not finite was met by this call or an earlier one.
    """
    if torch.compiler.is_compiling() or not launch.raised(x.device)[0]:
        return
    if not capturing(x.device):
        launch.raised(x.device)[0] = 0
        raise NonFiniteError(MESSAGE.format("some tokens"))


class _Fused(torch.autograd.Function):
    """Inputs: constants, x, mask, then eight of each member; outputs: sums, then counts."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, seed: Word, x: Tensor, mask: Tensor | None,
        *given: Tensor | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        n = len(call.members)
        if torch.compiler.is_compiling():
            key, number = (seed, 0) if isinstance(seed, Tensor) else (None, seed)
            found = torch.ops.polyrank.rank_gate(x, list(given), mask, key, number, call.numbers())
            outs, counts, saved = found[:n], fused.found(found[n : 2 * n]), found[2 * n :]
        else:
            with _on(x):
                outs, counts, saved, plan = fused.forward(x, list(given), mask, seed, call)
                ctx.plan = plan
        if not x.is_cuda:
            _check(x)
        if call.inplace:
            ctx.mark_dirty(given[0])
        if call.keep:
            ctx.call = call
            ctx.seed = None if isinstance(seed, Tensor) else seed
            # Of what was given, backward in eager mode reads W, gate, balance bias and row_scale.
            held = list(given)
            if not torch.compiler.is_compiling():
                held = [t if i % 8 > 4 or not i % 8 else None for i, t in enumerate(given)]
            if not call.owned:
                held[0] = None
            key = seed if isinstance(seed, Tensor) else None
            ctx.save_for_backward(x, key, *held, *saved)
            ctx.held = len(held)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(c for c in counts if c is not None))
        return (*outs, *counts)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        # What refuses a second derivative takes as long as a kernel; mostly none can follow.
        return _gradients_once(ctx, *dys) if torch.is_grad_enabled() else _gradients(ctx, *dys)


# Without what looks through the inputs for wrappers of functorch.
_plainly = super(torch.autograd.Function, _Fused).apply


def _applied(*inputs: Any) -> tuple[Any, ...]:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _Fused.apply(*inputs)
    return _plainly(*inputs)


def _gradients(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
    call = ctx.call
    n, width = len(call.members), WIDTH
    outs = dys[:n]
    if all(dy is None for dy in outs):
        return (None,) * (4 + n * width)
    x, key, *rest = ctx.saved_tensors
    if any(m.gated for m in call.members):
        _check(x)
    given, saved = list(rest[: ctx.held]), list(rest[ctx.held :])
    asked = ctx.needs_input_grad
    needs = fused.Needs(
        asked[2],
        tuple(tuple(asked[4 + i * width + j] for j in (2, 3, 4, 5)) for i in range(n)),
    )
    seed = ctx.seed if key is None else key
    if torch.compiler.is_compiling():
        flags = [needs.x, *(flag for group in needs.members for flag in group)]
        found = fused.found(
            torch.ops.polyrank.rank_gate_backward(
                list(outs), x, given, saved, key,
                0 if ctx.seed is None else ctx.seed, call.numbers(), flags,
            )
        )  # fmt: skip
        dx, grads = found[0], [found[1 + 4 * i : 5 + 4 * i] for i in range(n)]
    else:
        dx, grads = fused.backward(list(outs), x, given, saved, seed, ctx.plan, needs)
    result: list[Any] = [None, None, dx, None]
    for i, (dA, drows, dB, dgate) in enumerate(grads):
        dy = None if call.owned or not asked[4 + i * width] else outs[i]
        result += [dy, None, dA, drows, dB, dgate, None, None]
    return tuple(result)


_gradients_once = once_differentiable(_gradients)


def rank_gate(y, x, A, rows, B, epilogue, scale, live_from=0, row_scale=None, dropout=0.0, seed=0,
              mask=None, *, count=False, inplace=False):  # fmt: skip
    """Return (y + update, counts (r,) int64 or None); see `polyrank.ops.rank_gate.rank_gate`."""
    device, shape = x.device.type, y.shape
    autocast = torch.is_autocast_enabled(device)
    if autocast:
        x = x.to(torch.get_autocast_dtype(device))
    target = eager.writable(y, inplace)
    inplace, y = target is not None, y if target is None else target
    member = _member(epilogue, A.shape[0], scale, live_from, count)
    given = [y, None, A, rows, B, epilogue.gate, _detached(epilogue.bias), row_scale]
    call = _call_of([member], x, given, dropout, owned=False)
    call = call._replace(inplace=inplace)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        out, counts = _applied(call, _seed(seed), x, mask, *given)
    return out.view(shape), counts


def linears(
    x: Tensor, projections: Sequence[Projection], dropout: float = 0.0, seed: Word = 0,
    mask: Tensor | None = None, memo: Memo | None = None,
) -> tuple[list[Tensor], list[Tensor | None]]:  # fmt: skip
    """Return x Wᵀ + b + update for frozen linear layers that share x, and their counts.

    The base product adds onto the update, and the gradient of x is gathered in one buffer; large
    ones are a single sum (`product.py`). Neither passes through memory for its own sake.

    Args:
        x: (…, d_in), in the dtype of every W.
        projections: the layers; their W and b get no gradient.
        dropout: as in `rank_gate`, one mask for all.
        seed: as in `rank_gate`.
        mask: as in `rank_gate`.
        memo: what calls of these layers leave for the next one.
    """
    alone = not (dropout or torch.is_grad_enabled() or torch.compiler.is_compiling())
    if alone and memo is not None and memo.few is not None:
        again = memo.few(x, projections)
        if again is not None:
            return again, [None] * len(again)
    given, members = [], []
    for p in projections:
        members.append(_member(p.epilogue, p.A.shape[0], p.scale, p.live_from, p.counts))
        given += [p.W, p.b, p.A, p.rows, p.B, p.epilogue.gate, _detached(p.epilogue.bias)]
        given.append(p.row_scale)
    if alone and few.serves(x, projections):
        with _on(x):
            outs, again = few.forward(x, projections, members)
        if memo is not None:
            memo.few = again
        return outs, [None] * len(outs)
    call = _call_of(members, x, given, dropout, owned=True)
    if not (call.keep or torch.compiler.is_compiling()):
        with _on(x):
            return fused.forward(x, given, mask, _seed(seed), call)[:2]
    found = _applied(call, _seed(seed), x, mask, *given)
    n = len(members)
    return list(found[:n]), list(found[n:])


def _call_of(
    members: list[launch.Member], x: Tensor, given: list, dropout: float, *, owned: bool
) -> Call:
    needed = (x, *given)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in needed)
    counted = any(m.counts for m in members)
    # Few tokens read the factors once: a cast of its own would read them twice.
    packs = keep or counted or x.numel() // x.shape[-1] >= 1024
    return Call(tuple(members), float(dropout), owned, keep, packs)


def _seed(seed: Word) -> Word:
    return seed if isinstance(seed, Tensor) else (int(seed) + 2**63) % 2**64 - 2**63


def _detached(t: Tensor | None) -> Tensor | None:
    return t if t is None or not t.requires_grad else t.detach()

"""The rank gate by kernels: forward and backward of one or several projections of the same x.

`forward` and `backward` work on tensors alone. They stand in torch.library as functional operators
for compiled graphs, and behind one autograd.Function; `triton.py` chooses what they are given.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from polyrank.ops.rank_gate import launch
from polyrank.ops.rank_gate.launch import At
from polyrank.ops.rank_gate.plan import WIDTH, Call, Given, Part, Plan, call_of, plan_of, unit
from polyrank.ops.rank_gate.product import readable

# torch.mm(bf16, bf16, out_dtype=fp32), on CUDA only, came with torch 2.8.
MM_WIDE = hasattr(torch.ops.aten.mm, "dtype")


def flat(x: Tensor) -> Tensor:
    """x as (T, d), rows in one piece."""
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return unit(x)


def forward(
    x: Tensor, given: Given, mask: Tensor | None, seed: int | Tensor, call: Call
) -> tuple[list[Tensor], Given, Given, Plan]:
    """Outputs and counts of every member, and what backward needs: [A; rows] and a buffer."""
    flat_x = flat(x)
    plan = plan_of(call, flat_x, given, mask is not None, isinstance(seed, Tensor))
    AW = x.new_empty(plan.ranks, x.shape[-1]) if call.packs else None
    buffer = x.new_empty(plan.bytes, dtype=torch.uint8)
    outs, counts, origin, flag = [], [], buffer.data_ptr(), launch.flag(x.device)
    for part in plan.parts:
        found = given[part.first : part.first + WIDTH]
        _, _, A, rows, B, gate, bias, _ = found
        rows, number = A if rows is None else rows, None
        if not part.straight:
            A, rows, B = unit(A), unit(rows), unit(B)
        if AW is not None:
            own, router = part.keyed(AW)
            if part.m.counts:
                number = x.new_empty(part.r, dtype=torch.int64)
            packed = part.at("B", buffer, origin)
            part.pack(A, rows, B, own, packed, own if number is None else number)
            A, rows, B = own, router, packed
        q = part.at("q", buffer, origin)
        part.read(
            flat_x, A, rows, x if gate is None else gate, x if bias is None else bias,
            x if mask is None else mask, q, part.at("h", buffer, origin),
            part.at("kept", buffer, origin), x if number is None else number,
            flag, *part.read.split(flat_x), seed=seed if call.dropout else None,
        )  # fmt: skip
        outs.append(_output(x, flat_x, q.after(part.silent), B, found, part, call))
        counts.append(number)
    return outs, counts, [AW, buffer] if call.keep else [], plan


def _output(
    x: Tensor, flat_x: Tensor, q: At, B: Tensor | At, found: Given, part: Part, call: Call
) -> Tensor:
    base, bias = found[:2]
    if part.folds:
        out = x.new_empty(flat_x.shape[0], part.n)
        part.sum(base, bias is not None).run(out, ((flat_x, base), (q, B)), bias)
    elif call.owned:
        # The product that adds reads the update while it computes; a pass of its own costs more.
        out = x.new_empty(flat_x.shape[0], part.n)
        part.write(out, out, q, B, out if bias is None else bias)
        accumulate(out, flat_x, base.t())
    else:
        y = flat(base)
        out = y if call.inplace else torch.empty_like(y, memory_format=torch.contiguous_format)
        part.write(out, y, q, B, out)
        return base if call.inplace else out.view(base.shape)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], part.n)


def accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the product a b to `out`, in its memory."""
    out.addmm_(a, b)


class Needs(NamedTuple):
    """Which gradients are asked for: of x; of a member's A, rows, B, gate."""

    x: bool
    members: tuple[tuple[bool, bool, bool, bool], ...]


def backward(
    dys: Given, x: Tensor, given: Given, saved: Given, seed: int | Tensor, plan: Plan, needs: Needs
) -> tuple[Tensor | None, list[Given]]:
    """Gradients of x (beside those that pass through a given y), and A, rows, B, gate of each.

    Of `given` only W, gate, balance bias and row_scale are read.
    """
    flat_x, (AW, buffer) = flat(x), saved
    d = x.new_empty(plan.T, plan.ranks)
    dys = [dy if dy is None else flat(dy) for dy in dys]
    dys = [dy if dy is None or dy.dtype == x.dtype else dy.to(x.dtype) for dy in dys]
    grads, scaled = [], []
    for part, dy, need in zip(plan.parts, dys, needs.members, strict=True):
        found = given[part.first : part.first + WIDTH]
        grad, own = _member_gradients(dy, found, buffer, d, part, need)
        grads.append(grad)
        scaled.append(own)
    dx: Tensor | None = None
    if needs.x:
        dx = _input_gradient(flat_x, dys, given, d, AW, seed, plan)
        dx = dx if x.dim() == 2 else dx.view(x.shape)
    _key_gradients(grads, flat_x, d, scaled, seed, plan, needs)
    return dx, grads


def _input_gradient(
    x: Tensor, dys: Given, given: Given, d: Tensor, AW: Tensor, seed: int | Tensor, plan: Plan
) -> Tensor:
    call, dx = plan.call, x.new_empty(x.shape)
    pairs = []
    if call.owned:
        present = zip(plan.parts, dys, strict=True)
        pairs = [(dy, given[part.first]) for part, dy in present if dy is not None]
    if plan.folds:
        # A hook on what is saved may have put W elsewhere.
        pairs = [(readable(dy), readable(W)) for dy, W in pairs]
        plan.sum(d, pairs).run(dx, [*pairs, (d, AW)])
        return dx
    if plan.vendor:
        torch.mm(d, AW, out=dx)
    else:
        plan.spread(d.stride(0))(dx, dx, d, AW, dx, seed=seed if call.dropout else None)
    for dy, W in pairs:
        accumulate(dx, dy, W)
    return dx


def _member_gradients(
    dy: Tensor | None, found: Given, buffer: Tensor, d: Tensor, part: Part,
    need: tuple[bool, bool, bool, bool],
) -> tuple[Given, Tensor | None]:  # fmt: skip
    """Fills columns of d with [dh, dz]; [None, None, dB, dgate], and them as parameters see them.

    None where parameters see those of d.
    """
    (_, _, to_B, to_gate), m, origin = need, part.m, buffer.data_ptr()
    q, h, kept, B = (part.at(name, buffer, origin) for name in ("q", "h", "kept", "B"))
    gate, bias, row_scale = found[5:]
    grad: Given = [None] * 4
    if dy is None:
        _own(d, part).zero_()
        if to_B:
            grad[2] = d.new_zeros(part.n, part.r_B, dtype=part.B_dtype)
        if to_gate:
            grad[3] = torch.zeros_like(gate)
        return grad, None
    sums = d.new_empty(part.tiles, part.r, dtype=torch.float32) if m.kind == "static" else d

    # The gradient of x sees dy as it came, those of the parameters see it scaled.
    scaled = row_scale is not None and any(need)
    own = d.new_empty(d.shape[0], part.width) if scaled else None
    work = part.inner(dy.stride(0), d.stride(0), scaled)
    seen = part.ranked(d, part.start)
    work(
        dy, B, d if gate is None else gate, d if bias is None else bias, h, kept, *seen, sums,
        row_scale if scaled else d, *(seen if own is None else part.ranked(own, 0)),
        *work.split(d),
    )  # fmt: skip
    if to_gate:
        grad[3] = sums.sum(0).to(gate.dtype)
    if to_B:
        frozen = m.live_from - part.silent
        dB = (d.new_zeros if frozen else d.new_empty)(part.n, part.r_B, dtype=part.B_dtype)
        if frozen < part.r_B:
            work = part.values(dy.stride(0), row_scale is not None)
            out = dB[:, frozen:] if frozen else dB
            scale = dy if row_scale is None else row_scale
            work(dy, q.after(m.live_from), out, scale, *work.split(d))
        grad[2] = dB
    return grad, own


def _own(d: Tensor, part: Part) -> Tensor:
    """The columns of a part."""
    return d if part.whole else d[:, part.start : part.start + part.width]


def _key_gradients(
    grads: list[Given], x: Tensor, d: Tensor, scaled: list[Tensor | None], seed: int | Tensor,
    plan: Plan, needs: Needs,
) -> None:  # fmt: skip
    """Fills in the gradients of A and rows, of all members by one product where that suffices."""
    keyed = seed if plan.call.dropout else None
    both = None
    whole = plan.alike and all(need[0] or need[1] for need in needs.members)
    if whole and all(own is None for own in scaled):
        both = _outer(x, d, plan, keyed)
    for part, own, grad, (to_A, to_rows, *_) in zip(
        plan.parts, scaled, grads, needs.members, strict=True
    ):
        live = part.m.live_from
        if not (to_A or to_rows):
            continue
        if both is None:
            W = x.new_zeros(part.width, plan.d, dtype=part.A_dtype)
            if live < part.width:
                seen = _own(d, part) if own is None else own
                W[live:] = _outer(x, seen[:, live:], plan, keyed)
        else:
            W = both if part.whole else both[part.start : part.start + part.width]
        if to_A:
            grad[0] = W[: part.r] if part.m.linear else W
        if to_rows:
            rows = W[part.r :]
            if part.m.block > 1:
                rows = rows.view(-1, part.m.block, plan.d).sum(1)
            grad[1] = rows if rows.dtype == part.rows_dtype else rows.to(part.rows_dtype)


def _outer(x: Tensor, d: Tensor, plan: Plan, seed: int | Tensor | None) -> Tensor:
    """Gain · dᵀ x (K, d_in) in the dtype of A, by torch where that is faster."""
    dtype = plan.parts[0].A_dtype
    if plan.vendor:
        if dtype == torch.float32 and MM_WIDE:
            return torch.mm(d.t(), x, out_dtype=torch.float32)
        return torch.mm(d.t(), x).to(dtype)
    out = x.new_empty(d.shape[1], x.shape[1], dtype=dtype)
    work = plan.keys(d.shape[1], d.stride(0))
    work(x, d, out.t(), x, *work.split(x), seed=seed)
    return out


# --- operators for compiled graphs ------------------------------------------------------------


def _present(tensors: list[Tensor | None], like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if t is None else t for t in tensors]


def found(tensors: list[Tensor]) -> Given:
    """Tensors of an operator, with None for empty ones."""
    return [None if t.dim() == 1 and t.shape[0] == 0 else t for t in tensors]


# Defined by hand: what `custom_op` puts around a call takes longer than many a kernel of it.
_LIBRARY = torch.library.Library("polyrank", "FRAGMENT")
_LIBRARY.define(
    "rank_gate(Tensor x, Tensor?[] given, Tensor? mask, Tensor? key, SymInt seed, float[] numbers)"
    " -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "rank_gate_backward(Tensor?[] dys, Tensor x, Tensor?[] given, Tensor?[] saved, Tensor? key, "
    "SymInt seed, float[] numbers, bool[] needed) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _rank_gate(
    x: Tensor, given: list[Tensor | None], mask: Tensor | None, key: Tensor | None, seed: int,
    numbers: list[float],
) -> list[Tensor]:  # fmt: skip
    """Outputs, counts and what is kept of `forward`, as one list; empty tensors for None."""
    call = call_of(tuple(numbers))
    outs, counts, saved, _ = forward(x, given, mask, seed if key is None else key, call)
    return [*outs, *_present(counts, x), *_present(saved, x)]


@torch.library.register_fake("polyrank::rank_gate", lib=_LIBRARY)
def _(x, given, mask, key, seed, numbers):
    call = call_of(tuple(numbers))
    # Not among the plans of real tensors: its sizes may be symbols.
    plan = Plan(call, flat(x), given, mask is not None, key is not None)
    outs, counts = [], []
    for part in plan.parts:
        base = given[part.first]
        outs.append(base.new_empty((*x.shape[:-1], part.n) if call.owned else base.shape))
        number = x.new_empty(part.r, dtype=torch.int64) if part.m.counts and call.packs else None
        counts.append(number)
    saved: Given = []
    if call.keep:
        AW = x.new_empty(plan.ranks, plan.d) if call.packs else None
        saved = [AW, x.new_empty(plan.bytes, dtype=torch.uint8)]
    return [*outs, *_present(counts, x), *_present(saved, x)]


def _rank_gate_backward(
    dys: list[Tensor | None], x: Tensor, given: list[Tensor | None], saved: list[Tensor | None],
    key: Tensor | None, seed: int, numbers: list[float], needed: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of `backward` as one list; empty tensors for None."""
    call, needs = call_of(tuple(numbers)), _needs(needed)
    plan = plan_of(call, flat(x), given, False, key is not None)
    dx, grads = backward(dys, x, given, saved, seed if key is None else key, plan, needs)
    results, memory = [dx], set()
    for grad in (g for group in grads for g in group):
        # An operator's results share no memory.
        place = None if grad is None else grad.untyped_storage().data_ptr()
        results.append(grad.clone() if grad is not None and place in memory else grad)
        memory.add(place)
    return _present(results, x)


@torch.library.register_fake("polyrank::rank_gate_backward", lib=_LIBRARY)
def _(dys, x, given, saved, key, seed, numbers, needed):
    needs = _needs(needed)
    found: list = [x.new_empty(x.shape) if needs.x else None]
    for i, need in enumerate(needs.members):
        for value, wanted in zip(given[i * WIDTH + 2 : i * WIDTH + 6], need, strict=True):
            found.append(value.new_empty(value.shape) if wanted else None)
    return _present(found, x)


def _needs(flags: list[bool]) -> Needs:
    groups = zip(*(flags[1 + i :: 4] for i in range(4)), strict=True)
    return Needs(flags[0], tuple(groups))


_LIBRARY.impl("rank_gate", _rank_gate, "CompositeExplicitAutograd")
_LIBRARY.impl("rank_gate_backward", _rank_gate_backward, "CompositeExplicitAutograd")

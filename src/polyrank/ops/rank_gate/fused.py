"""The rank gate by kernels: forward and backward of one or several projections of the same x.

`forward` and `backward` work on tensors alone. They stand in torch.library as functional operators
for compiled graphs, and behind one autograd.Function; `triton.py` chooses what they are given.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyrank.ops.rank_gate import launch
from polyrank.ops.rank_gate.kernel_gates import KINDS
from polyrank.ops.rank_gate.launch import Member, Read, Tensors

# Of one member: y or W, the bias of W, A, rows, B, gate, balance bias, row_scale.
WIDTH = 8
# Tensors, or None where a member has none.
Given = list[Any]


class Call(NamedTuple):
    """The constants of one call."""

    members: tuple[Member, ...]
    dropout: float
    # Whether the base product is made here, from W, and not given as y.
    owned: bool
    keep: bool
    packs: bool
    inplace: bool = False

    def numbers(self) -> list[float]:
        """The same as numbers, which an operator of torch.library can take."""
        flat = [self.dropout, self.owned, self.keep, self.packs]
        for m in self.members:
            flat += [KINDS.index(m.kind), *m[1:]]
        return [float(v) for v in flat]


@lru_cache(maxsize=4096)
def _call(numbers: tuple[float, ...]) -> Call:
    dropout, *flags = numbers[:4]
    size, members = len(Member._fields), []
    for start in range(4, len(numbers), size):
        kind, k, block, in_weight, *rates, live, counts = numbers[start : start + size]
        first: list[Any] = [KINDS[int(kind)], int(k), int(block), bool(in_weight), *rates]
        members.append(Member(*(*first, int(live), bool(counts))))
    owned, keep, packs = (bool(f) for f in flags)
    return Call(tuple(members), dropout, owned, keep, packs)


def _split(call: Call, given: Given) -> list[tuple[Any, Any, Tensors, Any]]:
    found = []
    for i in range(len(call.members)):
        base, bias, A, rows, B, gate, balance, row_scale = given[i * WIDTH : (i + 1) * WIDTH]
        found.append((base, bias, Tensors(A, rows, B, gate, balance), row_scale))
    return found


def flat(x: Tensor) -> Tensor:
    """x as (T, d), rows in one piece."""
    return launch._unit(x.reshape(-1, x.shape[-1]))


def forward(
    x: Tensor, given: Given, mask: Tensor | None, seed: int | Tensor, call: Call
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """Outputs and counts of every member, and what backward needs: [[A; rows], (B, h, kept) …]."""
    flat_x, parts = flat(x), _split(call, given)
    ranks = [m.ranks(t.r) for m, (_, _, t, _) in zip(call.members, parts, strict=True)]
    AW = x.new_empty(sum(ranks), x.shape[-1]) if call.packs else None
    outs, counts, start = [], [], 0
    saved: Given = [AW]
    for m, (base, bias, t, _), width in zip(call.members, parts, ranks, strict=True):
        packed = None if AW is None else launch.pack(m, t, AW[start : start + width])
        start += width
        flat_mask = None if mask is None else mask.reshape(-1)
        found = launch.read(
            m, t, flat_x, packed, keep=call.keep, mask=flat_mask, dropout=call.dropout, seed=seed
        )
        B = (t.B if packed is None else packed.B).t()
        # Silent ranks have no column of B.
        q = found.q[:, t.r - B.shape[0] :]
        outs.append(_output(x, flat_x, q, B, base, bias, m, call))
        counts.append(None if packed is None else packed.counts)
        saved += [None if packed is None else packed.B, found.h, found.kept]
    return outs, counts, saved if call.keep else []


def _output(
    x: Tensor, flat_x: Tensor, q: Tensor, B: Tensor, base: Tensor, bias: Tensor | None,
    m: Member, call: Call,
) -> Tensor:  # fmt: skip
    if call.owned:
        # The product that adds reads the update while it computes; a pass of its own costs more.
        out = x.new_empty(flat_x.shape[0], base.shape[0])
        launch.write(out, q, B, m.scale, bias=bias)
        return out.addmm_(flat_x, base.t()).view(*x.shape[:-1], base.shape[0])
    y = flat(base)
    out = y if call.inplace else torch.empty_like(y, memory_format=torch.contiguous_format)
    launch.write(out, q, B, m.scale, base=y)
    return base if call.inplace else out.view(base.shape)


class Needs(NamedTuple):
    """Which gradients are asked for: of x; of a member's A, rows, B, gate."""

    x: bool
    members: tuple[tuple[bool, bool, bool, bool], ...]


def backward(
    dys: Given, x: Tensor, given: Given, saved: Given, seed: int | Tensor, call: Call,
    needs: Needs,
) -> tuple[Tensor | None, list[tuple[Tensor | None, ...]]]:  # fmt: skip
    """Gradients of x (beside those that pass through a given y), and A, rows, B, gate of each."""
    flat_x, parts, AW = flat(x), _split(call, given), saved[0]
    gain = 1 / (1 - call.dropout)
    d = x.new_empty(flat_x.shape[0], AW.shape[0])
    grads: list[tuple[Any, ...]] = []
    start, scaled = 0, []
    for i, (m, (_, _, t, row_scale)) in enumerate(zip(call.members, parts, strict=True)):
        B, h, kept = saved[1 + 3 * i : 4 + 3 * i]
        width = m.ranks(t.r)
        part = d[:, start : start + width]
        start += width
        if dys[i] is None:
            part.zero_()
            gate = None if t.gate is None else torch.zeros_like(t.gate)
            grads.append((None, None, torch.zeros_like(t.B), gate))
            scaled.append(part)
            continue
        dy = flat(dys[i]).to(x.dtype)
        q = h if m.kind == "none" else torch.empty_like(h, dtype=x.dtype)
        found = Read(q, h, kept)
        dgate = launch.inner(m, t, dy, B, found, part, q)
        if row_scale is not None and any(needs.members[i]):
            # The gradient of x sees dy as it came, those of the parameters see it scaled.
            part = torch.empty_like(part, memory_format=torch.contiguous_format)
            dgate = launch.inner(m, t, dy, (B * row_scale[:, None]).to(B.dtype), found, part, q)
        scaled.append(part)
        dB = _value_gradient(m, t, dy, q, row_scale) if needs.members[i][2] else None
        if dgate is not None and t.gate is not None:
            dgate = dgate.to(t.gate.dtype)
        grads.append((None, None, dB, dgate))
    dx: Tensor | None = None
    if needs.x:
        dx = torch.empty_like(flat_x, memory_format=torch.contiguous_format)
        if call.dropout or not launch.vendor(d):
            launch.write(dx, d, AW, gain, dropout=call.dropout, seed=seed)
        else:
            torch.mm(d, AW, out=dx)
        if call.owned:
            for dy, (W, *_) in zip(dys, parts, strict=True):
                if dy is not None:
                    dx.addmm_(flat(dy).to(x.dtype), W)
        dx = dx.view(x.shape)
    keys = _key_gradients(flat_x, d, scaled, parts, seed, call, needs)
    return dx, [(*key, *value[2:]) for key, value in zip(keys, grads, strict=True)]


def _value_gradient(
    m: Member, t: Tensors, dy: Tensor, q: Tensor, row_scale: Tensor | None
) -> Tensor:
    (n, r_B), frozen = t.B.shape, m.live_from - (t.r - t.B.shape[1])
    make = t.B.new_zeros if frozen else t.B.new_empty
    dB = make(n, r_B)
    if frozen < r_B:
        launch.outer(dy, q[:, m.live_from :], dB[:, frozen:], m.scale, row_scale=row_scale)
    return dB


def _key_gradients(
    x: Tensor, d: Tensor, scaled: list[Tensor], parts: list, seed: int | Tensor, call: Call,
    needs: Needs,
) -> list[tuple[Tensor | None, Tensor | None]]:  # fmt: skip
    """Gradients of A and rows, of all members by one product where that suffices."""
    options: Any = {"dropout": call.dropout, "seed": seed}
    gain, n = 1 / (1 - call.dropout), x.shape[1]
    dtypes = {t.A.dtype for _, _, t, _ in parts}
    whole = len(dtypes) == 1 and all(
        m.live_from == 0 and row_scale is None and any(need[:2])
        for m, (*_, row_scale), need in zip(call.members, parts, needs.members, strict=True)
    )
    both = x.new_empty(d.shape[1], n, dtype=dtypes.pop()) if whole else None
    if both is not None and not call.dropout and launch.vendor(d):
        both = launch.wide_mm(d.t(), x, both)
    elif both is not None:
        launch.outer(x, d, both.t(), gain, **options)
    found, start = [], 0
    for i, (m, (_, _, t, _), part) in enumerate(zip(call.members, parts, scaled, strict=True)):
        (to_A, to_rows, *_), live = needs.members[i], m.live_from
        own = None
        if both is not None:
            own = both[start : start + part.shape[1]]
        elif to_A or to_rows:
            own = t.A.new_zeros(part.shape[1], n) if live else t.A.new_empty(part.shape[1], n)
            if live < part.shape[1]:
                launch.outer(x, part[:, live:], own.t()[:, live:], gain, **options)
        start += part.shape[1]
        dA = own[: t.r] if own is not None and to_A else None
        drows = own[t.r :] if own is not None and to_rows else None
        if drows is not None:
            if m.block > 1:
                drows = drows.view(-1, m.block, n).sum(1)
            drows = drows.to(t.rows.dtype)
        found.append((dA, drows))
    return found


# --- operators for compiled graphs ------------------------------------------------------------


def _present(tensors: list[Tensor | None], like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if t is None else t for t in tensors]


def found(tensors: list[Tensor]) -> Given:
    """Tensors of an operator, with None for empty ones."""
    return [None if t.dim() == 1 and t.shape[0] == 0 else t for t in tensors]


@torch.library.custom_op("polyrank::rank_gate", mutates_args=())
def rank_gate_op(
    x: Tensor, given: list[Tensor | None], mask: Tensor | None, key: Tensor | None, seed: int,
    numbers: list[float],
) -> list[Tensor]:  # fmt: skip
    """Outputs, counts and what is kept of `forward`, as one list; empty tensors for None."""
    call = _call(tuple(numbers))
    outs, counts, saved = forward(x, given, mask, seed if key is None else key, call)
    return [*outs, *_present(counts, x), *_present(saved, x)]


@rank_gate_op.register_fake
def _(x, given, mask, key, seed, numbers):
    call = _call(tuple(numbers))
    parts, T = _split(call, given), x.numel() // max(x.shape[-1], 1)
    outs, counts, ranks = [], [], 0
    saved = []
    for m, (base, _, t, _) in zip(call.members, parts, strict=True):
        shape = (*x.shape[:-1], base.shape[0]) if call.owned else base.shape
        outs.append(base.new_empty(shape))
        counts.append(x.new_empty(t.r, dtype=torch.int64) if m.counts and call.packs else None)
        wide = torch.float32 if m.kind == "self" else x.dtype
        kept = x.new_empty(T, t.r, dtype=torch.float32) if m.gated else None
        packed = x.new_empty(t.B.shape) if call.packs else None
        saved += [packed, x.new_empty(T, t.r, dtype=wide), kept]
        ranks += m.ranks(t.r)
    saved = [x.new_empty(ranks, x.shape[-1]) if call.packs else None, *saved]
    return [*outs, *_present(counts, x), *_present(saved if call.keep else [], x)]


@torch.library.custom_op("polyrank::rank_gate_backward", mutates_args=())
def rank_gate_backward_op(
    dys: list[Tensor | None], x: Tensor, given: list[Tensor | None], saved: list[Tensor | None],
    key: Tensor | None, seed: int, numbers: list[float], needed: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of `backward` as one list; empty tensors for None."""
    call, needs = _call(tuple(numbers)), _needs(needed)
    keyed = seed if key is None else key
    dx, grads = backward(dys, x, given, saved, keyed, call, needs)
    results, memory = [dx], set()
    for grad in (g for group in grads for g in group):
        # An operator's results share no memory.
        place = None if grad is None else grad.untyped_storage().data_ptr()
        results.append(grad.clone() if grad is not None and place in memory else grad)
        memory.add(place)
    return _present(results, x)


@rank_gate_backward_op.register_fake
def _(dys, x, given, saved, key, seed, numbers, needed):
    call, needs = _call(tuple(numbers)), _needs(needed)
    found: list = [torch.empty_like(x) if needs.x else None]
    for (_, _, t, _), need in zip(_split(call, given), needs.members, strict=True):
        for value, wanted in zip((t.A, t.rows, t.B, t.gate), need, strict=True):
            found.append(value.new_empty(value.shape) if wanted else None)
    return _present(found, x)


def _needs(flags: list[bool]) -> Needs:
    groups = zip(*(flags[1 + i :: 4] for i in range(4)), strict=True)
    return Needs(flags[0], tuple(groups))

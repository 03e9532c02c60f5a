"""The rank gate on a few tokens without gradients: two launches for all projections of the same x.

As `fused.forward`, but weights are cast where they are read, since they are read once, and the
update is added to a base product of torch's own: it is small, and that takes the fewest calls.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from polyrank.ops.rank_gate import kernels_few, launch, tiles
from polyrank.ops.rank_gate.fused import flat
from polyrank.ops.rank_gate.launch import Launch, Member, parts_of
from polyrank.ops.rank_gate.projection import Projection

# Tokens up to which this is the way, and projections of one launch.
TOKENS, TOGETHER = 64, 3
_PLANS: dict[Any, "Pair"] = {}
_MOST = 4096


class Pair:
    """The two launches of a group; see `kernels_few`.

    Args:
        members: their constants; alike but for the scale.
        x: (T, d).
        given: the projections.
    """

    def __init__(self, members: Sequence[Member], x: Tensor, given: Sequence[Projection]) -> None:
        (T, d), m, first = x.shape, members[0], given[0]
        r, size, dtype = first.A.shape[0], x.element_size(), x.dtype
        R = tiles.padded(r)
        columns = R * (2 if m.linear else 1)
        tile = tiles.read(T, d, columns, size)
        programs = parts_of(T, tile.rows) * len(given)
        rows = first.A if first.rows is None else first.rows
        numbers = (T, d, r, x.stride(0), first.A.stride(0), rows.stride(0), m.total, m.floor,
                   m.tau, m.delta, m.eps)  # fmt: skip
        constants = (
            R, R if m.k >= r else m.k, m.kind, first.epilogue.bias is not None,
            m.in_weight and first.epilogue.bias is not None, m.delta > 0, m.block, m.linear,
            d % tile.depth == 0, launch.precision(dtype), tile.rows, tile.depth, tile.split,
        )  # fmt: skip
        room = programs * tile.split * tile.rows * columns if tile.split > 1 else 0
        self.read = Launch(kernels_few.read, (programs * tile.split, 1, 1), numbers, constants,
                           tile.warps, tile.stages, room)  # fmt: skip
        bm, bn = (16, 64) if size < 4 else (16, 32)
        ends: list[int] = []
        scales, widths = [m.scale for m in members], [p.B.shape[0] for p in given]
        for width in widths:
            ends.append((ends[-1] if ends else 0) + parts_of(width, bn))
        ends += [ends[-1]] * (TOGETHER - len(ends))
        scales += [1.0] * (TOGETHER - len(scales))
        widths += [1] * (TOGETHER - len(widths))
        self.write = Launch(
            kernels_few.write, (parts_of(T, bm) * ends[-1], 1, 1),
            (T, r, *widths, ends[0], ends[1], ends[-1], *scales),
            (launch.precision(dtype), bm, bn, R), 4, 2,
        )  # fmt: skip
        self.size = (len(given), T, r)
        self.forms = [_form(p) for p in given]

    def __call__(self, x: Tensor, given: Sequence[Projection], outs: Sequence[Tensor]) -> None:
        """Add the updates to outputs, (T, d_out) each, rows one after the other."""
        q = x.new_empty(self.size)
        A, B, y = [p.A for p in given], [p.B for p in given], list(outs)
        W = [p.A if p.rows is None else p.rows for p in given]
        v = [p.A if t is None else t for p in given for t in _held(p)[2:3]]
        if short := TOGETHER - len(A):
            for each in (A, W, v, B, y):
                each += each[:1] * short
        self.read(x, *A, *W, *v, q, launch.flag(x.device), *self.read.split(x))
        self.write(*y, q, *B)


def _held(p: Projection) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """What kernels read of a projection: A, rows, a static gate or the balance bias, B."""
    e = p.epilogue
    return p.A, p.rows, e.bias if e.gate is None else e.gate, p.B


class Again:
    """The launches of a group, started by addresses: for a call like the one that made them.

    Nothing of a tensor is kept but what the launches were made for, so that nothing can be old.

    Args:
        x: (…, d), rows one after the other.
        given: the projections.
        pair: their launches.
    """

    __slots__ = ("device", "dtype", "epilogues", "held", "index", "pair", "precision", "shape")

    def __init__(self, x: Tensor, given: Sequence[Projection], pair: Pair) -> None:
        self.shape, self.dtype, self.device, self.index = x.shape, x.dtype, x.device, x.get_device()
        self.precision, self.pair = launch.precision(x.dtype), pair
        self.epilogues = [p.epilogue for p in given]
        # A stream and what its kernels share, as one: threads have streams of their own.
        self.held: tuple[int, tuple[int, ...]] | None = None

    def __call__(self, x: Tensor, given: Sequence[Projection]) -> list[Tensor] | None:
        """x Wᵀ + b + update of every projection, (…, d_out), or None if something is not alike."""
        index, pair, place = self.index, self.pair, x.data_ptr()
        if (
            x.shape != self.shape
            or x.dtype is not self.dtype
            or x.get_device() != index
            or torch._C._cuda_getDevice() != index
            or not x.is_contiguous()
            or len(given) != len(self.epilogues)
            or launch.precision(self.dtype) != self.precision
            or (found := self._places(given, place)) is None
        ):
            return None
        keys, values = found
        outs = [linear(x, p.W, p.b) for p in given]
        stream = torch._C._cuda_getCurrentRawStream(index)
        held, memory, captured = self.held, None, launch.capturing(self.device)
        if held is None or held[0] != stream or captured:
            # What a stream's kernels share stays where it is: larger memory comes beside it.
            memory = (launch.flag(self.device), *pair.read.split(x))
            held = (stream, tuple(t.data_ptr() for t in memory))
            if not captured:
                self.held = held
        q = x.new_empty(pair.size)
        inside, y = q.data_ptr(), [out.data_ptr() for out in outs]
        y += y[:1] * (TOGETHER - len(y))
        for work, places in (
            (pair.read, (place, *keys, inside, *held[1])),
            (pair.write, (*y, inside, *values)),
        ):
            run, function, more = work.ready[index]
            run(*work.grid, stream, function, *more, None, None, None, *places, *work.tail)
        return outs

    def _places(self, given: Sequence[Projection], x: int) -> tuple[list[int], list[int]] | None:
        """Addresses of keys and gates, and of values, if the launches are for such tensors."""
        keys: list[int] = []
        logits: list[int] = []
        gates: list[int] = []
        values: list[int] = []
        odd = x
        for p, epilogue, form in zip(given, self.epilogues, self.pair.forms, strict=True):
            W, _, A, rows, B, e, scale, _, _, counts = p
            if e is not epilogue or counts or (scale, W.shape, A.dtype, A.shape) != form[:4]:
                return None
            v = e.bias if e.gate is None else e.gate
            if (B.dtype, B.shape) != form[4:6] or not (A.is_contiguous() and B.is_contiguous()):
                return None
            if _form_of(rows) != form[6] or _form_of(v) != form[7]:
                return None
            key, value = A.data_ptr(), B.data_ptr()
            logit = key if rows is None else rows.data_ptr()
            gate = key if v is None else v.data_ptr()
            odd |= key | value | logit | gate
            keys.append(key)
            logits.append(logit)
            gates.append(gate)
            values.append(value)
        # Kernels were compiled for addresses that are multiples of 16.
        if odd & 15:
            return None
        if short := TOGETHER - len(keys):
            for each in (keys, logits, gates, values):
                each += each[:1] * short
        return keys + logits + gates, values


def _form(p: Projection) -> tuple[Any, ...]:
    """What the launches of a projection were made for: its scale, sizes and dtypes."""
    A, rows, v, B = _held(p)
    return (p.scale, p.W.shape, A.dtype, A.shape, B.dtype, B.shape, _form_of(rows), _form_of(v))


def _form_of(t: Tensor | None) -> tuple[torch.dtype, torch.Size, bool] | None:
    return None if t is None else (t.dtype, t.shape, t.is_contiguous())


def serves(x: Tensor, given: Sequence[Projection]) -> bool:
    """Whether a call without gradients, dropout and counts can go this way."""
    return x.numel() // x.shape[-1] <= TOKENS and all(_plain(p) for p in given)


def _plain(p: Projection) -> bool:
    return (
        p.A.is_contiguous()
        and p.B.is_contiguous()
        and p.B.shape == (p.W.shape[0], p.A.shape[0])
        and (p.rows is None or p.rows.is_contiguous())
        and not p.counts
    )


def _kind(p: Projection, m: Member) -> tuple[Any, ...]:
    """What members of one launch have in common."""
    dtypes = [None if t is None else t.dtype for t in _held(p)]
    return (p.A.shape, *dtypes, p.epilogue.bias is None, m[:9])


def forward(
    x: Tensor, given: Sequence[Projection], members: Sequence[Member]
) -> tuple[list[Tensor], Again | None]:
    """x Wᵀ + b + update of every projection, and what makes the next call like this one short."""
    kinds = [_kind(p, m) for p, m in zip(given, members, strict=True)]
    rows = flat(x)
    outs, pairs, start = [linear(rows, p.W, p.b) for p in given], [], 0
    while start < len(given):
        end = start + 1
        while end < len(given) and end - start < TOGETHER and kinds[end] == kinds[start]:
            end += 1
        pairs.append(_pair(rows, given[start:end], members[start:end], kinds[start]))
        pairs[-1](rows, given[start:end], outs[start:end])
        start = end
    index, pair = x.get_device(), pairs[0]
    # Launches for rows that are apart would read others at the same distance.
    started = (
        len(pairs) == 1
        and x.is_contiguous()
        and index in pair.read.ready
        and index in pair.write.ready
    )
    again = Again(x, given, pair) if started else None
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outs], again


def _pair(
    x: Tensor, given: Sequence[Projection], members: Sequence[Member], kind: tuple[Any, ...]
) -> Pair:
    """The launches for projections that are alike, made at their first time."""
    scales = tuple(m.scale for m in members)
    sizes = tuple(p.B.shape[0] for p in given)
    precision = launch.precision(x.dtype)
    key = (x.shape, x.stride(0), x.dtype, kind, scales, sizes, precision)
    pair = _PLANS.get(key)
    if pair is None:
        if len(_PLANS) >= _MOST:
            _PLANS.clear()
        pair = _PLANS[key] = Pair(members, x, given)
    return pair

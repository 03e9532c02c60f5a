"""The rank gate on a few tokens without gradients: two launches for all projections of the same x.

As `fused.forward`, but weights are cast where they are read: they are read once.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from polyrank.ops.rank_gate import kernels_few, launch, tiles
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
        self.widths = [p.B.shape[0] for p in given]
        bm, bn = (16, 64) if size < 4 else (16, 32)
        ends: list[int] = []
        scales = [m.scale for m in members]
        for width in self.widths:
            ends.append((ends[-1] if ends else 0) + parts_of(width, bn))
        ends += [ends[-1]] * (TOGETHER - len(ends))
        scales += [1.0] * (TOGETHER - len(scales))
        widths = self.widths + [1] * (TOGETHER - len(self.widths))
        self.write = Launch(
            kernels_few.write, (parts_of(T, bm) * ends[-1], 1, 1),
            (T, r, *widths, ends[0], ends[1], ends[-1], *scales),
            (first.b is not None, launch.precision(dtype), bm, bn, R), 4, 2,
        )  # fmt: skip

    def __call__(self, x: Tensor, given: Sequence[Projection]) -> list[Tensor]:
        """The updates plus bias, (T, d_out) each."""
        q = x.new_empty(len(given), x.shape[0], given[0].A.shape[0])
        A, W, v, B, b, y = [], [], [], [], [], []
        for p, width in zip(given, self.widths, strict=True):
            A.append(p.A)
            W.append(p.A if p.rows is None else p.rows)
            bias = p.epilogue.bias if p.epilogue.gate is None else p.epilogue.gate
            v.append(p.A if bias is None else bias)
            B.append(p.B)
            y.append(x.new_empty(x.shape[0], width))
            b.append(y[-1] if p.b is None else p.b)
        if short := TOGETHER - len(A):
            for each in (A, W, v, B, b, y):
                each += each[:1] * short
        self.read(x, *A, *W, *v, q, launch.flag(x.device), *self.read.split(x))
        self.write(*y, q, *B, *b)
        return y[: len(given)]


def serves(x: Tensor, given: Sequence[Projection]) -> bool:
    """Whether a call without gradients, dropout and counts can go this way."""
    return x.numel() // x.shape[-1] <= TOKENS and all(_plain(p) for p in given)


def _plain(p: Projection) -> bool:
    return (
        p.A.is_contiguous()
        and p.B.is_contiguous()
        and p.B.shape[1] == p.A.shape[0]
        and (p.rows is None or p.rows.is_contiguous())
        and not p.counts
    )


def _kind(p: Projection, m: Member) -> tuple[Any, ...]:
    """What members of one launch have in common."""
    e = p.epilogue
    held = (p.b is None, e.bias is None, p.B.dtype, None if p.rows is None else p.rows.dtype)
    kinds = None if e.gate is None else e.gate.dtype
    return (p.A.shape, p.A.dtype, *held, kinds, m[:9], None if p.b is None else p.b.dtype)


def forward(x: Tensor, given: Sequence[Projection], members: Sequence[Member]) -> list[Tensor]:
    """x Wᵀ + b + update of every projection, for x (T, d) with rows in one piece."""
    kinds = [_kind(p, m) for p, m in zip(given, members, strict=True)]
    found, start = [], 0
    while start < len(given):
        end = start + 1
        while end < len(given) and end - start < TOGETHER and kinds[end] == kinds[start]:
            end += 1
        mine = given[start:end]
        scales = tuple(m.scale for m in members[start:end])
        sizes = tuple(p.B.shape[0] for p in mine)
        key = (
            x.shape,
            x.stride(0),
            x.dtype,
            kinds[start],
            scales,
            sizes,
            launch.precision(x.dtype),
        )
        pair = _PLANS.get(key)
        if pair is None:
            if len(_PLANS) >= _MOST:
                _PLANS.clear()
            pair = _PLANS[key] = Pair(members[start:end], x, mine)
        for y, p in zip(pair(x, mine), mine, strict=True):
            found.append(y.addmm_(x, p.W.t()))
        start = end
    return found

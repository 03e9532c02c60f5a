"""The passes of a few tokens through up to three projections of the same x, one launch for all.

Where tokens are few, starts of kernels and the bytes of weights are what takes time; letters are
those of `kernels.py`. Members are alike but for their weights, outputs and scale.
"""

import triton
import triton.language as tl

from polyrank.ops.rank_gate.kernels import _gated, _last, _rows, _summed


@triton.jit
def _one_of(n, a, b, c):
    """Which of three pointers a program works with."""
    if n == 1:
        a = b
    if n == 2:
        a = c
    return a


@triton.jit
def read(
    x, A0, A1, A2, W0, W1, W2, v0, v1, v2, q, flag, scratch, locks,
    T, d, r, sx, sa, sr, total, floor, tau, delta, eps,
    R: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr,
    IN_WEIGHT: tl.constexpr, CUT: tl.constexpr, BLOCK: tl.constexpr, LINEAR: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """One read of x (T, d) by every member: h = x Aᵀ, z = x Wᵀ, gates, q = g ⊙ h (members, T, r).

    v is the gate or the balance bias (r,) of a member, whichever its kind has.
    """
    tiles = tl.cdiv(T, BM)
    place, part = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
    member, tile = place // tiles, place % tiles
    A, W, v = _one_of(member, A0, A1, A2), _one_of(member, W0, W1, W2), _one_of(member, v0, v1, v2)
    t, cols = _rows(tile, BM, T), tl.arange(0, R)
    live = cols < r
    rank = tl.where(live, cols, 0)
    h_acc = tl.zeros((BM, R), tl.float32)
    z_acc = tl.zeros((BM, R), tl.float32)
    share = tl.cdiv(tl.cdiv(d, BK), SPLIT)
    for step in range(part * share, tl.minimum((part + 1) * share, tl.cdiv(d, BK))):
        n = step * BK + tl.arange(0, BK)
        ok = (n < d) if not EVEN else (n >= 0)
        tile_x = tl.load(x + t[:, None] * sx + n[None, :], mask=ok[None, :], other=0.0)
        tile_A = tl.load(A + rank[None, :] * sa + n[:, None], mask=ok[:, None], other=0.0)
        h_acc = tl.dot(tile_x, tile_A.to(tile_x.dtype), h_acc, input_precision=PRECISION)
        if LINEAR:
            at = W + (rank // BLOCK)[None, :] * sr + n[:, None]
            tile_W = tl.load(at, mask=ok[:, None], other=0.0)
            z_acc = tl.dot(tile_x, tile_W.to(tile_x.dtype), z_acc, input_precision=PRECISION)
    ends = True
    if SPLIT > 1:
        wide: tl.constexpr = BM * R * (2 if LINEAR else 1)
        here = scratch + place * SPLIT * wide
        inside = tl.arange(0, BM)[:, None] * R + cols[None, :]
        tl.store(here + part * wide + inside, h_acc)
        if LINEAR:
            tl.store(here + part * wide + BM * R + inside, z_acc)
        ends = _last(locks, place, SPLIT)
        if ends:
            h_acc = _summed(here, inside, wide, h_acc, SPLIT)
            if LINEAR:
                z_acc = _summed(here + BM * R, inside, wide, z_acc, SPLIT)
    if ends:
        h_acc = tl.where(live[None, :], h_acc, 0.0)
        z_acc = tl.where(live[None, :], z_acc, 0.0)
        own = tile * BM + tl.arange(0, BM)
        q += member.to(tl.int64) * T * r
        _gated(
            h_acc, z_acc, own, cols, v, v, flag, q, q, q, flag, flag,
            T, r, r, total, floor, tau, delta, eps,
            R, K, KIND, BIAS, IN_WEIGHT, CUT, False, False, False, LINEAR,
        )  # fmt: skip


@triton.jit
def write(
    y0, y1, y2, q, B0, B1, B2, T, r, N0, N1, N2, end0, end1, strips, s0, s1, s2,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """y (T, N) += scale · q (T, r) Bᵀ of every member, y and B (N, r) in one piece.

    Members have `strips` strips of BN columns in all, the second from `end0` on, the third from
    `end1` on.
    """
    tile, strip = tl.program_id(0) // strips, tl.program_id(0) % strips
    member = (strip >= end0).to(tl.int32) + (strip >= end1).to(tl.int32)
    y, B = _one_of(member, y0, y1, y2), _one_of(member, B0, B1, B2)
    N = tl.where(member == 0, N0, tl.where(member == 1, N1, N2))
    scale = tl.where(member == 0, s0, tl.where(member == 1, s1, s2))
    first = tl.where(member == 0, 0, tl.where(member == 1, end0, end1))
    t, n, k = _rows(tile, BM, T), (strip - first) * BN + tl.arange(0, BN), tl.arange(0, R)
    inside = n < N
    q += member.to(tl.int64) * T * r
    a = tl.load(q + t[:, None] * r + k[None, :], mask=(k < r)[None, :], other=0.0)
    at = B + n.to(tl.int64)[None, :] * r + k[:, None]
    w = tl.load(at, mask=(k < r)[:, None] & inside[None, :], other=0.0)
    acc = tl.dot(a, w.to(a.dtype), input_precision=PRECISION) * scale
    own = (tile * BM + tl.arange(0, BM) < T)[:, None] & inside[None, :]
    place = y + t[:, None] * N + n[None, :]
    acc += tl.load(place, mask=own, other=0.0).to(tl.float32)
    tl.store(place, acc.to(y.dtype.element_ty), mask=own)

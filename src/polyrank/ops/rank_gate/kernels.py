"""The rank gate's passes as Triton kernels; `launch.py` starts them, `naive.py` defines them.

Letters: t tokens, n columns of a wide matrix, r ranks, padded to a power of two R. Products are
accumulated in fp32. Where a sum is split over programs, the one that ends last adds the parts in
their order, so that results do not depend on timing.
"""

import triton
import triton.language as tl

from polyrank.ops.rank_gate import kernel_gates as gates


@triton.jit
def _seed(seed, TENSOR: tl.constexpr):
    return tl.load(seed) if TENSOR else seed.to(tl.int64)


@triton.jit
def _dropped(tile, seed, t, n, width, p):
    """The tile with dropout's zeros; element (t, n) of a matrix has number t · width + n."""
    number = (t[:, None] * width + n[None, :]).to(tl.int32)
    return tl.where(tl.rand(seed, number) >= p, tile, 0.0).to(tile.dtype)


@triton.jit
def _rows(tile, BM: tl.constexpr, T):
    """Numbers of a tile's tokens, int64; those beyond the last one repeat it."""
    return tl.minimum(tile * BM + tl.arange(0, BM), T - 1).to(tl.int64)


@triton.jit
def _last(locks, tile, SPLIT: tl.constexpr):
    """Whether this program is the last of SPLIT that come here for a tile; leaves the lock at 0."""
    tl.debug_barrier()
    last = tl.atomic_add(locks + tile, 1, sem="acq_rel") == SPLIT - 1
    if last:
        tl.store(locks + tile, 0)
    return last


@triton.jit
def _summed(scratch, place, step, like, SPLIT: tl.constexpr):
    total = tl.zeros(like.shape, tl.float32)
    for part in range(SPLIT):
        total += tl.load(scratch + part * step + place, cache_modifier=".cg")
    return total


@triton.jit
def _per_rank(values, cols, r, FOUND: tl.constexpr):
    """A vector over ranks as fp32 (R,), zeros where there is none."""
    if FOUND:
        v = tl.load(values + cols, mask=cols < r, other=0.0).to(tl.float32)
    else:
        v = tl.zeros(cols.shape, tl.float32)
    return v


@triton.jit
def pack(A, rows, B, to, to_B, zeroed, r, e, d, n_out, r_B, sa, sr, sb, n_zeroed, scale,
         BLOCK: tl.constexpr, LINEAR: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Casts [A; rows], each row of `rows` once per rank of its block, to (2r, d), scale · B (n, r).

    Also writes zeros to `zeroed`, which later kernels count in.
    """
    row = tl.program_id(0)
    n = tl.program_id(1) * BD + tl.arange(0, BD)
    if row == 0:
        tl.store(zeroed + n, tl.zeros((BD,), tl.int64), mask=n < n_zeroed)
    if row < r:
        v = tl.load(A + row * sa + n, mask=n < d)
        tl.store(to + row.to(tl.int64) * d + n, v.to(to.dtype.element_ty), mask=n < d)
    if LINEAR:
        if (row >= r) & (row < 2 * r):
            v = tl.load(rows + ((row - r) // BLOCK) * sr + n, mask=n < d)
            tl.store(to + row.to(tl.int64) * d + n, v.to(to.dtype.element_ty), mask=n < d)
        row -= r
    # What is left are strips of B, BD numbers wide, d-strips after one another.
    strip = (row - r) * tl.num_programs(1) + tl.program_id(1)
    if row >= r:
        at = strip.to(tl.int64) * BD + tl.arange(0, BD)
        found = at < n_out * r_B
        v = tl.load(B + (at // r_B) * sb + at % r_B, mask=found).to(tl.float32) * scale
        tl.store(to_B + at, v.to(to_B.dtype.element_ty), mask=found)


@triton.jit(do_not_specialize=["seed"])
def read(
    x, A, rows, gate, bias, mask, q, h, kept, counts, flag, scratch, locks,
    T, d, r, sx, sa, sr, sq, total, floor, tau, delta, eps, p, gain, seed,
    R: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr,
    IN_WEIGHT: tl.constexpr, CUT: tl.constexpr, BLOCK: tl.constexpr, KEEP: tl.constexpr,
    LINEAR: tl.constexpr, COUNT: tl.constexpr, MASK: tl.constexpr, DROP: tl.constexpr,
    SEED: tl.constexpr, JOIN: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One read of x (T, d): h = x Aᵀ, z = x rowsᵀ, gates, q = g ⊙ h, counts."""
    tile, part = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
    t, cols = _rows(tile, BM, T), tl.arange(0, R)
    live = cols < r
    rank = tl.where(live, cols, 0)
    h_acc = tl.zeros((BM, R), tl.float32)
    z_acc = tl.zeros((BM, R), tl.float32)
    both = tl.zeros((BM, 2 * R if JOIN else R), tl.float32)
    wide_rank = tl.arange(0, 2 * R if JOIN else R)
    key = _seed(seed, SEED) if DROP else 0
    share = tl.cdiv(tl.cdiv(d, BK), SPLIT)
    for step in range(part * share, tl.minimum((part + 1) * share, tl.cdiv(d, BK))):
        n = step * BK + tl.arange(0, BK)
        ok = (n < d) if not EVEN else (n >= 0)
        tile_x = tl.load(x + t[:, None] * sx + n[None, :], mask=ok[None, :], other=0.0)
        if DROP:
            tile_x = _dropped(tile_x, key, t, n, d, p)
        if JOIN:
            tile_AW = tl.load(A + wide_rank[None, :] * sa + n[:, None], mask=ok[:, None], other=0.0)
            both = tl.dot(tile_x, tile_AW.to(tile_x.dtype), both, input_precision=PRECISION)
        else:
            tile_A = tl.load(A + rank[None, :] * sa + n[:, None], mask=ok[:, None], other=0.0)
            h_acc = tl.dot(tile_x, tile_A.to(tile_x.dtype), h_acc, input_precision=PRECISION)
        if LINEAR and not JOIN:
            at = rows + (rank // BLOCK)[None, :] * sr + n[:, None]
            tile_W = tl.load(at, mask=ok[:, None], other=0.0)
            z_acc = tl.dot(tile_x, tile_W.to(tile_x.dtype), z_acc, input_precision=PRECISION)
    if JOIN:
        h_acc, z_acc = tl.split(tl.permute(tl.reshape(both, (BM, 2, R)), (0, 2, 1)))
    ends = True
    if SPLIT > 1:
        wide: tl.constexpr = BM * R * (2 if LINEAR else 1)
        here = scratch + tile * SPLIT * wide
        place = tl.arange(0, BM)[:, None] * R + cols[None, :]
        tl.store(here + part * wide + place, h_acc)
        if LINEAR:
            tl.store(here + part * wide + BM * R + place, z_acc)
        ends = _last(locks, tile, SPLIT)
        if ends:
            h_acc = _summed(here, place, wide, h_acc, SPLIT)
            if LINEAR:
                z_acc = _summed(here + BM * R, place, wide, z_acc, SPLIT)
    if ends:
        h_acc = tl.where(live[None, :], h_acc * gain, 0.0)
        z_acc = tl.where(live[None, :], z_acc * gain, 0.0)
        own = tile * BM + tl.arange(0, BM)
        _gated(
            h_acc, z_acc, own, cols, gate, bias, mask, q, h, kept, counts, flag,
            T, r, sq, total, floor, tau, delta, eps,
            R, K, KIND, BIAS, IN_WEIGHT, CUT, KEEP, COUNT, MASK, LINEAR,
        )  # fmt: skip


@triton.jit
def _gated(
    h_acc, z_acc, t, cols, gate, bias, mask, q, h, kept, counts, flag,
    T, r, sq, total, floor, tau, delta, eps,
    R: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr,
    IN_WEIGHT: tl.constexpr, CUT: tl.constexpr, KEEP: tl.constexpr, COUNT: tl.constexpr,
    MASK: tl.constexpr, LINEAR: tl.constexpr,
):  # fmt: skip
    """Epilogue of `read` on fp32 tiles (BM, R)."""
    own = (t < T)[:, None] & (cols < r)[None, :]
    to = t.to(tl.int64)[:, None]
    value = _per_rank(gate, cols, r, KIND == "static")
    b = _per_rank(bias, cols, r, BIAS)
    if KIND != "self":
        # What backward will multiply with is what forward multiplied.
        h_acc = h_acc.to(q.dtype.element_ty).to(tl.float32)
    g, keep = gates.forward(
        h_acc, z_acc, value, b, cols, r, total, floor, tau, delta, eps,
        KIND, IN_WEIGHT, CUT, K, R,
    )  # fmt: skip
    if LINEAR or KIND == "self":
        logit = h_acc if KIND == "self" else z_acc
        bad = tl.max((tl.abs(logit) < float("inf")).to(tl.int32) * -1 + 1, axis=1) > 0
        g = tl.where(bad[:, None], float("nan"), g)
        tl.store(flag, 1, mask=tl.max((bad & (t < T)).to(tl.int32), axis=0) > 0)
        if KEEP:
            tl.store(kept + to * r + cols[None, :], keep, mask=own)
    if KEEP:
        tl.store(h + to * r + cols[None, :], h_acc.to(h.dtype.element_ty), mask=own)
    tl.store(q + to * sq + cols[None, :], (g * h_acc).to(q.dtype.element_ty), mask=own)
    if COUNT and LINEAR:
        on = (keep > float("-inf")) & own
        if MASK:
            on = on & (tl.load(mask + t, mask=t < T, other=0) != 0)[:, None]
        number = tl.sum(on.to(tl.int32), axis=0).to(tl.int64)
        tl.atomic_add(counts + cols, number, mask=cols < r, sem="relaxed")


@triton.jit(do_not_specialize=["seed"])
def write(
    out, base, left, weight, bias, T, N, K, so, sb, sl, swk, swn, scale, p, seed,
    ADD: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr, SEED: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """The thin product out (T, N) = [base +] scale · left (T, K) weight (K, N) [+ bias]."""
    tiles = tl.cdiv(N, BN)
    tile, strip = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    t, n = _rows(tile, BM, T), strip * BN + tl.arange(0, BN)
    inside = n < N
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        ok = (k < K) if not EVEN else (k >= 0)
        a = tl.load(left + t[:, None] * sl + k[None, :], mask=ok[None, :], other=0.0)
        at = weight + k.to(tl.int64)[:, None] * swk + n.to(tl.int64)[None, :] * swn
        w = tl.load(at, mask=ok[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(a, w.to(a.dtype), acc, input_precision=PRECISION)
    acc *= scale
    if DROP:
        acc = _dropped(acc, _seed(seed, SEED), t, n, N, p)
    if BIAS:
        acc += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    to = out + t[:, None] * so + n[None, :]
    own = (tile * BM + tl.arange(0, BM) < T)[:, None] & inside[None, :]
    if ADD:
        at = base + t[:, None] * sb + n[None, :]
        acc += tl.load(at, mask=own, other=0.0).to(tl.float32)
    tl.store(to, acc.to(out.dtype.element_ty), mask=own)


@triton.jit
def inner(
    dy, B, gate, bias, h, kept, dh, dz, dgate, row_scale, dh_own, dz_own, scratch, locks,
    T, N, r, sy, sbn, sbr, sd, sd_own, silent, scale, total, floor, tau, delta, eps,
    R: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr, IN_WEIGHT: tl.constexpr,
    CUT: tl.constexpr, OFF: tl.constexpr, SCALED: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One read of dy (T, N): u = scale · dy B, and through the gates dh, dz, parts of dgate.

    With SCALED also dh_own and dz_own, of row_scale ⊙ dy, and dgate is of that.
    """
    tile, part = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
    t, cols = _rows(tile, BM, T), tl.arange(0, R)
    heard = (cols >= silent) & (cols < r)
    u, own_u = tl.zeros((BM, R), tl.float32), tl.zeros((BM, R), tl.float32)
    share = tl.cdiv(tl.cdiv(N, BK), SPLIT)
    for step in range(part * share, tl.minimum((part + 1) * share, tl.cdiv(N, BK))):
        n = step * BK + tl.arange(0, BK)
        ok = (n < N) if not EVEN else (n >= 0)
        tile_y = tl.load(dy + t[:, None] * sy + n[None, :], mask=ok[None, :], other=0.0)
        at = B + n[:, None] * sbn + (cols - silent)[None, :] * sbr
        tile_B = tl.load(at, mask=ok[:, None] & heard[None, :], other=0.0)
        u = tl.dot(tile_y, tile_B.to(tile_y.dtype), u, input_precision=PRECISION)
        if SCALED:
            factor = tl.load(row_scale + n, mask=ok, other=0.0).to(tl.float32)
            tile_B = (tile_B.to(tl.float32) * factor[:, None]).to(tile_y.dtype)
            own_u = tl.dot(tile_y, tile_B, own_u, input_precision=PRECISION)
    ends = True
    if SPLIT > 1:
        wide: tl.constexpr = BM * R * (2 if SCALED else 1)
        here = scratch + tile * SPLIT * wide
        place = tl.arange(0, BM)[:, None] * R + cols[None, :]
        tl.store(here + part * wide + place, u)
        if SCALED:
            tl.store(here + part * wide + BM * R + place, own_u)
        ends = _last(locks, tile, SPLIT)
        if ends:
            u = _summed(here, place, wide, u, SPLIT)
            if SCALED:
                own_u = _summed(here + BM * R, place, wide, own_u, SPLIT)
    if ends:
        u = tl.where(heard[None, :], u * scale, 0.0)
        _passed(u, tile, t, cols, gate, bias, h, kept, dh, dz, dgate, T, r, sd, total, floor, tau,
                delta, eps, R, KIND, BIAS, IN_WEIGHT, CUT, OFF, BM)  # fmt: skip
        if SCALED:
            u = tl.where(heard[None, :], own_u * scale, 0.0)
            _passed(u, tile, t, cols, gate, bias, h, kept, dh_own, dz_own, dgate, T, r, sd_own,
                    total, floor, tau, delta, eps, R, KIND, BIAS, IN_WEIGHT, CUT, OFF,
                    BM)  # fmt: skip


@triton.jit
def _passed(
    u, tile, t, cols, gate, bias, h, kept, dh, dz, dgate,
    T, r, sd, total, floor, tau, delta, eps,
    R: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr, IN_WEIGHT: tl.constexpr,
    CUT: tl.constexpr, OFF: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Epilogue of `inner` on an fp32 tile u (BM, R)."""
    own_t = tile * BM + tl.arange(0, BM)
    own = (own_t < T)[:, None] & (cols < r)[None, :]
    to = own_t.to(tl.int64)[:, None]
    live = (own_t >= 0)[:, None] & (cols < r)[None, :]
    h_own = tl.load(h + t[:, None] * r + cols[None, :], mask=live, other=0.0).to(tl.float32)
    keep = u
    if KIND != "none" and KIND != "static":
        keep = tl.load(kept + t[:, None] * r + cols[None, :], mask=live, other=OFF)
    value = _per_rank(gate, cols, r, KIND == "static")
    b = _per_rank(bias, cols, r, BIAS)
    _, d_h, d_z = gates.backward(
        u, h_own, keep, value, b, total, floor, tau, delta, eps, KIND, IN_WEIGHT, CUT
    )
    tl.store(dh + to * sd + cols[None, :], d_h.to(dh.dtype.element_ty), mask=own)
    if KIND == "sigmoid" or KIND == "softmax":
        tl.store(dz + to * sd + cols[None, :], d_z.to(dz.dtype.element_ty), mask=own)
    if KIND == "static":
        share_g = tl.sum(tl.where(own, u * h_own, 0.0), axis=0)
        tl.store(dgate + tile * r + cols, share_g, mask=cols < r)


@triton.jit(do_not_specialize=["seed"])
def outer(
    left, right, out, row_scale, scratch, locks, T, N, K, sl, sr, son, sok, scale, p, seed,
    SCALED: tl.constexpr, DROP: tl.constexpr, SEED: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Gradient of a factor: out (N, K) = scale · row_scale ⊙ left (T, N)ᵀ right (T, K)."""
    strips = tl.cdiv(K, BK)
    tile, part = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
    n, k = (tile // strips) * BN + tl.arange(0, BN), (tile % strips) * BK + tl.arange(0, BK)
    acc = tl.zeros((BN, BK), tl.float32)
    key = _seed(seed, SEED) if DROP else 0
    share = tl.cdiv(tl.cdiv(T, BT), SPLIT)
    for step in range(part * share, tl.minimum((part + 1) * share, tl.cdiv(T, BT))):
        t = step * BT + tl.arange(0, BT)
        row, found = t.to(tl.int64), t < T
        a = tl.load(
            left + row[:, None] * sl + n[None, :], mask=found[:, None] & (n < N)[None, :], other=0.0
        )
        if DROP:
            a = _dropped(a, key, row, n, N, p)
        b = tl.load(
            right + row[:, None] * sr + k[None, :],
            mask=found[:, None] & (k < K)[None, :],
            other=0.0,
        )
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    ends = True
    if SPLIT > 1:
        here = scratch + tile * SPLIT * BN * BK
        place = tl.arange(0, BN)[:, None] * BK + tl.arange(0, BK)[None, :]
        tl.store(here + part * BN * BK + place, acc)
        ends = _last(locks, tile, SPLIT)
        if ends:
            acc = _summed(here, place, BN * BK, acc, SPLIT)
    if ends:
        acc *= scale
        if SCALED:
            acc *= tl.load(row_scale + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        to = out + n.to(tl.int64)[:, None] * son + k.to(tl.int64)[None, :] * sok
        own = (n < N)[:, None] & (k < K)[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=own)

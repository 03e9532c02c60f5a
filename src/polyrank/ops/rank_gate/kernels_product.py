"""A product of Hopper's tensor cores that sums over several pairs of matrices; see `product.py`.

A layer's update is a second pair beside x and W, and the gradient of x has a pair for each layer
that reads x: as one sum none of them passes through memory. One warp copies tiles into shared
memory, whatever pair they are of; two groups of warps multiply what is there.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Later versions of Triton have other names.
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def _place(tile, T, N, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr):
    """First token and column of a tile; GROUP rows of tiles share the strips of w in the L2."""
    rows, strips = gl.cdiv(T, BM), gl.cdiv(N, BN)
    first = tile // (GROUP * strips) * GROUP
    size = min(rows - first, GROUP)
    inside = tile % (GROUP * strips)
    return (first + inside % size) * BM, (inside // size) * BN


@gluon.jit
def _feed_pair(
    step, m, n, K, a, w, a_tiles, w_tiles, full, free,
    TURNED: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for k in range(0, K, BK):
        slot = step % STAGES
        mbarrier.wait(free.index(slot), (step // STAGES) & 1 ^ 1)
        arrived = full.index(slot)
        mbarrier.expect(arrived, a.block_type.nbytes + w.block_type.nbytes)
        _load(a, [m, k], arrived, a_tiles.index(slot))
        if TURNED:
            _load(w, [n, k], arrived, w_tiles.index(slot))
        else:
            _load(w, [k, n], arrived, w_tiles.index(slot))
        step += 1
    return step


@gluon.jit
def _feed(
    matrices, depths, a_tiles, w_tiles, full, free, T, N,
    PAIRS: gl.constexpr, TURNED: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """What the copying warp does: the tiles of all pairs, one after the other."""
    step = 0
    tiles = gl.cdiv(T, BM) * gl.cdiv(N, BN)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, n = _place(tile, T, N, BM, BN, GROUP)
        for i in gl.static_range(PAIRS):
            step = _feed_pair(step, m, n, depths[i], matrices[2 * i], matrices[2 * i + 1], a_tiles,
                              w_tiles, full, free, TURNED, BK, STAGES)  # fmt: skip


@gluon.jit
def _multiply(
    out, bias, out_tile, a_tiles, w_tiles, full, free, steps, T, N,
    BIAS: gl.constexpr, TURNED: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """What the other warps do: multiply tiles as they arrive, and write sums."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    tiles = gl.cdiv(T, BM) * gl.cdiv(N, BN)
    step = 0
    acc = gl.zeros((BM, BN), gl.float32, layout)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, n = _place(tile, T, N, BM, BN, GROUP)
        for i in range(steps):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), (step // STAGES) & 1)
            w = w_tiles.index(slot)
            if TURNED:
                w = w.permute((1, 0))
            acc = warpgroup_mma(a_tiles.index(slot), w, acc, use_acc=i > 0, is_async=True)
            # The one before is done; this one runs while the next is begun.
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=i > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
        if BIAS:
            cols = n + gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
            acc += gl.load(bias + cols, mask=cols < N, other=0.0).to(gl.float32)[None, :]
        tma.store_wait(0)
        out_tile.store(acc.to(out.dtype))
        fence_async_shared()
        _store(out, [m, n], out_tile)
    tma.store_wait(0)


@gluon.jit
def product(
    out, bias, a0, a1, a2, a3, w0, w1, w2, w3, T, N, so, K0, K1, K2, K3, sa0, sa1, sa2, sa3,
    sw0, sw1, sw2, sw3, steps,
    PAIRS: gl.constexpr, BIAS: gl.constexpr, TURNED: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """out (T, N) = Σ aᵢ (T, Kᵢ) wᵢ (Kᵢ, N) [+ bias], or with wᵢ (N, Kᵢ) turned; `steps` in BK."""
    dtype: gl.constexpr = out.dtype.element_ty
    WM: gl.constexpr = BN if TURNED else BK
    WN: gl.constexpr = BK if TURNED else BN
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], dtype)
    w_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([WM, WN], dtype)
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BN], dtype)
    a, w = (a0, a1, a2, a3), (w0, w1, w2, w3)
    sa, sw = (sa0, sa1, sa2, sa3), (sw0, sw1, sw2, sw3)
    depths = (K0, K1, K2, K3)
    matrices = ()
    for i in gl.static_range(PAIRS):
        K = depths[i]
        left = tma.make_tensor_descriptor(a[i], [T, K], [sa[i], 1], [BM, BK], a_layout)
        if TURNED:
            right = tma.make_tensor_descriptor(w[i], [N, K], [sw[i], 1], [WM, WN], w_layout)
        else:
            right = tma.make_tensor_descriptor(w[i], [K, N], [sw[i], 1], [WM, WN], w_layout)
        # Triton unpacks no tuples.
        matrices = matrices + (left, right)  # type: ignore[assignment]  # noqa: RUF005
    to = tma.make_tensor_descriptor(out, [T, N], [so, 1], [BM, BN], out_layout)
    a_tiles = gl.allocate_shared_memory(dtype, [STAGES, BM, BK], a_layout)
    w_tiles = gl.allocate_shared_memory(dtype, [STAGES, WM, WN], w_layout)
    out_tile = gl.allocate_shared_memory(dtype, [BM, BN], out_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (to, bias, out_tile, a_tiles, w_tiles, full, free, steps, T, N, BIAS,
                         TURNED, BM, BN, STAGES, GROUP, WARPS)),
            (_feed, (matrices, depths, a_tiles, w_tiles, full, free, T, N, PAIRS, TURNED, BM, BN,
                     BK, STAGES, GROUP)),
        ],
        [1],
        [24],
    )  # fmt: skip

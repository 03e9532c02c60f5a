"""Starts the kernels of `kernels.py`: tensors in, tensors out, no autograd.

A call adapts one or several projections of the same x: a `Member` each. Everything here is written
for a list of them, so that projections which share x share its gradient's buffer.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from polyrank.ops.rank_gate import kernels, tiles

# The lock words of a device's stream; kernels leave them at zero.
_LOCKS: dict[tuple[int, int], Tensor] = {}
# Set by a kernel that met logits that are not finite; in memory that the host reads.
_FLAGS: dict[int, Tensor] = {}
_LOCK_WORDS = 1 << 16


class Member(NamedTuple):
    """The constants of one adapted projection; see `Epilogue` for those of the gate."""

    kind: str
    k: int
    block: int
    in_weight: bool
    total: float
    floor: float
    tau: float
    delta: float
    eps: float
    scale: float
    live_from: int
    counts: bool

    @property
    def linear(self) -> bool:
        """Whether a router's rows are read beside A."""
        return self.kind in ("sigmoid", "softmax")

    @property
    def gated(self) -> bool:
        """Whether tokens choose their ranks."""
        return self.kind in ("sigmoid", "softmax", "self")

    def ranks(self, r: int) -> int:
        """Columns that the first pass makes: h, and a router's logits."""
        return 2 * r if self.linear else r


class Tensors(NamedTuple):
    """The tensors of one adapted projection; see `rank_gate`."""

    A: Tensor
    rows: Tensor | None
    B: Tensor
    gate: Tensor | None
    bias: Tensor | None

    @property
    def r(self) -> int:
        """Number of ranks."""
        return self.A.shape[0]


class Packed(NamedTuple):
    """Factors in the dtype of x: [A; rows] with a row of `rows` per rank, and B."""

    AW: Tensor
    B: Tensor
    counts: Tensor | None


class Read(NamedTuple):
    """What the first pass gives: q (T, r), and for backward h (T, r) and the gate's logits."""

    q: Tensor
    h: Tensor | None
    kept: Tensor | None


def locks(device: torch.device) -> Tensor:
    """Zeros, one word for every tile whose sum is split."""
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    key = (device.index or 0, stream)
    if key not in _LOCKS:
        _LOCKS[key] = torch.zeros(_LOCK_WORDS, dtype=torch.int32, device=device)
    return _LOCKS[key]


def flag(device: torch.device) -> Tensor:
    """One int32 in pinned memory that a kernel sets when it meets what is not finite."""
    key = device.index or 0
    if key not in _FLAGS:
        _FLAGS[key] = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
    return _FLAGS[key]


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _unit(t: Tensor) -> Tensor:
    """A matrix whose rows lie in one piece each."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def pack(m: Member, t: Tensors, AW: Tensor) -> Packed:
    """Cast the factors to the dtype of AW (ranks, d), in one kernel, and make room for counts."""
    (r, d), (n, r_B), ranks = t.A.shape, t.B.shape, AW.shape[0]
    B = t.A.new_empty(n, r_B, dtype=AW.dtype)
    counts = t.A.new_empty(r, dtype=torch.int64) if m.counts else None
    A, rows, given = _unit(t.A), t.A if t.rows is None else _unit(t.rows), _unit(t.B)
    BD = 1024
    across = triton.cdiv(d, BD)
    strips = triton.cdiv(n * r_B, BD * across)
    kernels.pack[(ranks + strips, across)](
        A, rows, given, AW, B, AW if counts is None else counts, r, rows.shape[0], d, n, r_B,
        A.stride(0), rows.stride(0), given.stride(0), 0 if counts is None else r,
        BLOCK=m.block, LINEAR=m.linear, BD=BD,
    )  # fmt: skip
    return Packed(AW, B, counts)


def read(
    m: Member, t: Tensors, x: Tensor, factors: Packed | None, *, keep: bool,
    mask: Tensor | None, dropout: float, seed: int | Tensor,
) -> Read:  # fmt: skip
    """First pass over x (T, d): q and what backward needs."""
    (T, d), r = x.shape, t.r
    R = tiles.padded(r)
    tile = tiles.read(T, d, R * (2 if m.linear else 1), x.element_size())
    wide = torch.float32 if m.kind == "self" else x.dtype
    q = x.new_empty(T, r)
    h = x.new_empty(T, r, dtype=wide) if keep else None
    kept = x.new_empty(T, r, dtype=torch.float32) if keep and m.gated else None
    if factors is None:
        A, rows, block = _unit(t.A), t.A if t.rows is None else _unit(t.rows), m.block
    else:
        A, rows, block = factors.AW, factors.AW[r:] if m.linear else factors.AW, 1
    parts = triton.cdiv(T, tile.rows)
    room = parts * tile.split * tile.rows * R * (2 if m.linear else 1) if tile.split > 1 else 1
    counts = q if factors is None or factors.counts is None else factors.counts
    kernels.read[(parts * tile.split,)](
        x, A, rows, _or(t.gate, x), _or(t.bias, x), _or(mask, x), q, _or(h, q), _or(kept, q),
        counts, flag(x.device), x.new_empty(room, dtype=torch.float32), locks(x.device), seed,
        T, d, r, x.stride(0), A.stride(0), rows.stride(0), q.stride(0), m.total, m.floor, m.tau,
        m.delta, m.eps, dropout, 1 / (1 - dropout),
        R=R, K=R if m.k >= r else m.k, KIND=m.kind, BIAS=t.bias is not None,
        IN_WEIGHT=m.in_weight and t.bias is not None, CUT=m.delta > 0, BLOCK=block, KEEP=keep,
        LINEAR=m.linear, COUNT=counts is not q, MASK=mask is not None, DROP=dropout > 0,
        SEED=isinstance(seed, Tensor), EVEN=d % tile.depth == 0,
        JOIN=tiles.JOIN and factors is not None and m.linear and r == R,
        PRECISION=_precision(x.dtype),
        BM=tile.rows, BK=tile.depth, SPLIT=tile.split, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    return Read(q, h, kept)


def write(
    out: Tensor, left: Tensor, weight: Tensor, scale: float, *, base: Tensor | None = None,
    bias: Tensor | None = None, dropout: float = 0.0, seed: int | Tensor = 0,
) -> Tensor:  # fmt: skip
    """Write out (T, N) = [base +] scale · left weight [+ bias]; weight (K, N) of any strides."""
    (T, N), K = out.shape, left.shape[1]
    bm, bn, bk, warps, stages = tiles.write(T, N, K, left.element_size())
    kernels.write[(triton.cdiv(T, bm) * triton.cdiv(N, bn),)](
        out, _or(base, out), left, weight, _or(bias, out), seed, T, N, K, out.stride(0),
        _or(base, out).stride(0), left.stride(0), weight.stride(0), weight.stride(1), scale,
        dropout,
        ADD=base is not None, BIAS=bias is not None, DROP=dropout > 0,
        SEED=isinstance(seed, Tensor), EVEN=K % bk == 0, PRECISION=_precision(left.dtype),
        BM=bm, BN=bn, BK=bk, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def inner(
    m: Member, t: Tensors, dy: Tensor, B: Tensor, found: Read, d: Tensor, q: Tensor
) -> Tensor | None:
    """One read of dy: fills d with [dh, dz] and q; returns the gradient of a static gate."""
    (T, N), r = dy.shape, t.r
    R = tiles.padded(r)
    tile = tiles.read(T, N, R, dy.element_size())
    parts = triton.cdiv(T, tile.rows)
    room = parts * tile.split * tile.rows * R if tile.split > 1 else 1
    static = m.kind == "static"
    dgate = dy.new_empty(parts, r, dtype=torch.float32) if static else None
    h = found.h
    kernels.inner[(parts * tile.split,)](
        dy, B, _or(t.gate, dy), _or(t.bias, dy), h, _or(found.kept, dy), q, d,
        d[:, r:] if m.linear else d, _or(dgate, dy), dy.new_empty(room, dtype=torch.float32),
        locks(dy.device), T, N, r, dy.stride(0), B.stride(0), B.stride(1), d.stride(0),
        r - B.shape[1], m.scale, m.total, m.floor, m.tau, m.delta, m.eps,
        R=R, KIND=m.kind, BIAS=t.bias is not None,
        IN_WEIGHT=m.in_weight and t.bias is not None, CUT=m.delta > 0,
        OFF=0.0 if m.kind == "self" else float("-inf"), EVEN=N % tile.depth == 0,
        PRECISION=_precision(dy.dtype), BM=tile.rows, BK=tile.depth, SPLIT=tile.split,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return None if dgate is None else dgate.sum(0)


def outer(
    left: Tensor, right: Tensor, out: Tensor, scale: float, *, row_scale: Tensor | None = None,
    dropout: float = 0.0, seed: int | Tensor = 0,
) -> Tensor:  # fmt: skip
    """Write out (N, K) = scale · row_scale ⊙ left (T, N)ᵀ right (T, K); out of any strides."""
    (T, N), K = left.shape, right.shape[1]
    bn, bk, bt, split, warps, stages = tiles.outer(T, N, K, left.element_size())
    parts = triton.cdiv(N, bn) * triton.cdiv(K, bk)
    room = parts * split * bn * bk if split > 1 else 1
    kernels.outer[(parts * split,)](
        left, right, out, _or(row_scale, left), left.new_empty(room, dtype=torch.float32),
        locks(left.device), seed, T, N, K, left.stride(0), right.stride(0), out.stride(0),
        out.stride(1), scale, dropout,
        SCALED=row_scale is not None, DROP=dropout > 0, SEED=isinstance(seed, Tensor),
        PRECISION=_precision(left.dtype), BN=bn, BK=bk, BT=bt, SPLIT=split, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return out


def _or(t: Tensor | None, other: Tensor) -> Tensor:
    """What a kernel gets where it will read nothing."""
    return other if t is None else t


def vendor(left: Tensor) -> bool:
    """Whether torch's own product of skinny matrices is the faster one."""
    return left.is_cuda and left.element_size() == 2 and left.shape[0] >= 1024


def wide_mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """The product a b in the dtype of `out`, fp32 where torch can, written into it or anew."""
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if out.dtype == torch.float32 and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).to(out.dtype)

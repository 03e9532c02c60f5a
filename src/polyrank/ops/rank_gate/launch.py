"""Starts the kernels of `kernels.py`: tensors in, tensors out, no autograd.

A call adapts one or several projections of the same x: a `Member` each. Everything here is written
for a list of them, so that projections which share x share its gradient's buffer.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyrank.ops.rank_gate import kernels, tiles

# The lock words of a device's stream; kernels leave them at zero.
_LOCKS: dict[tuple[int, int], Tensor] = {}
# fp32 memory for parts of sums, likewise of a stream; the last is the largest.
_SCRATCH: dict[tuple[int, int], list[Tensor]] = {}
# Set by a kernel that met logits that are not finite; in memory that the host reads.
_FLAGS: dict[int, tuple[Tensor, Any]] = {}
_LOCK_WORDS = 1 << 16
# Compiled kernels by what decides them: shapes, dtypes, constants.
_COMPILED: dict[tuple[Any, ...], Any] = {}
_MOST_COMPILED = 8192
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


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
    h: Any
    kept: Tensor | None


class Start(NamedTuple):
    """What a kernel starts with beside its tensors."""

    grid: tuple[int, int, int]
    numbers: tuple[int | float, ...]
    constants: tuple[Any, ...]
    warps: int
    stages: int


def _place(device: torch.device) -> tuple[int, int]:
    """A device's current stream, whose kernels run one after the other."""
    if device.type != "cuda":
        return (-1, 0)
    return (device.index, torch._C._cuda_getCurrentRawStream(device.index))


def locks(device: torch.device) -> Tensor:
    """Zeros, one word for every tile whose sum is split."""
    key = _place(device)
    if key not in _LOCKS:
        _LOCKS[key] = torch.zeros(_LOCK_WORDS, dtype=torch.int32, device=device)
    return _LOCKS[key]


def flag(device: torch.device) -> Tensor:
    """One int32 in pinned memory that a kernel sets when it meets what is not finite."""
    key = device.index or 0
    if key not in _FLAGS:
        held = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        _FLAGS[key] = (held, held.numpy())
    return _FLAGS[key][0]


def raised(device: torch.device) -> Any:
    """The same memory as an array, which reads faster."""
    flag(device)
    return _FLAGS[device.index or 0][1]


def scratch(like: Tensor, room: int, split: int) -> Tensor:
    """Memory for the parts of a split sum, of this stream and the next call; any if unsplit."""
    if split == 1:
        return like
    key = _place(like.device)
    held = _SCRATCH.setdefault(key, [])
    if not held or held[-1].numel() < room:
        # A captured graph may still write into what was too small.
        held.append(torch.empty(max(room, 1 << 20), dtype=torch.float32, device=like.device))
    return held[-1]


def start(
    kernel: Any, key: tuple[Any, ...], tensors: tuple[Tensor, ...], make: Callable[[], Start],
    seed: int | Tensor | None = None,
) -> None:  # fmt: skip
    """Start a kernel on tensors, then numbers, a seed if it takes one, and constants.

    Triton looks at every argument to find the compiled kernel, which takes longer than many a
    kernel runs. Here `key`, which decides dtypes, numbers and constants, finds it.
    """
    if INTERPRETED:
        grid, numbers, constants, warps, stages = make()
        extra = () if seed is None else (seed,)
        kernel[grid](*tensors, *numbers, *extra, *constants, num_warps=warps, num_stages=stages)
        return
    places, odd = [t.data_ptr() for t in tensors], 0
    for place in places:
        odd |= place
    if seed is not None:
        key = (key, isinstance(seed, Tensor) or -(2**31) <= seed < 2**31)
    device = torch._C._cuda_getDevice()
    known = (id(kernel), key, odd & 15 and tuple(place & 15 for place in places), device)
    found = _COMPILED.get(known)
    extra = () if seed is None else (seed,)
    if found is None:
        grid, numbers, constants, warps, stages = make()
        made = kernel[grid](
            *tensors, *numbers, *extra, *constants, num_warps=warps, num_stages=stages
        )
        if len(_COMPILED) >= _MOST_COMPILED:
            _COMPILED.clear()
        _COMPILED[known] = (made.run, grid, made.function, made.packed_metadata, numbers, constants)
        return
    run, grid, function, packed, numbers, constants = found
    if isinstance(seed, Tensor):
        extra = (seed.data_ptr(),)
    stream = torch._C._cuda_getCurrentRawStream(device)
    run(*grid, stream, function, packed, None, None, None, *places, *numbers, *extra, *constants)


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
    strides, BD = (A.stride(0), rows.stride(0), given.stride(0)), 1024

    def make() -> Start:
        across = _parts(d, BD)
        grid = (ranks + _parts(n * r_B, BD * across), across, 1)
        numbers = (r, rows.shape[0], d, n, r_B, *strides, r * m.counts)
        return Start(grid, numbers, (m.block, m.linear, BD), 4, 2)

    start(
        kernels.pack,
        (m.block, m.linear, m.counts, r, d, n, r_B, strides, A.dtype, rows.dtype, B.dtype),
        (A, rows, given, AW, B, AW if counts is None else counts),
        make,
    )
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
    counts = q if factors is None or factors.counts is None else factors.counts
    masked, keyed = mask is not None, isinstance(seed, Tensor)
    strides = (x.stride(0), A.stride(0), rows.stride(0), q.stride(0))

    def make() -> Start:
        joined = tiles.JOIN and factors is not None and m.linear and r == R
        rates = (m.total, m.floor, m.tau, m.delta, m.eps, dropout, 1 / (1 - dropout))
        constants = (
            R, R if m.k >= r else m.k, m.kind, t.bias is not None,
            m.in_weight and t.bias is not None, m.delta > 0, block, keep, m.linear,
            counts is not q, masked, dropout > 0, keyed, joined, d % tile.depth == 0,
            _precision(x.dtype), tile.rows, tile.depth, tile.split,
        )  # fmt: skip
        grid = (_parts(T, tile.rows) * tile.split, 1, 1)
        return Start(grid, (T, d, r, *strides, *rates), constants, tile.warps, tile.stages)

    room = _parts(T, tile.rows) * tile.split * tile.rows * R * (2 if m.linear else 1)
    start(
        kernels.read,
        (m, T, d, r, strides, x.dtype, A.dtype, rows.dtype, block, keep, counts is q, masked,
         keyed, dropout, factors is None, _dtype(t.gate), _dtype(t.bias), _precision(x.dtype)),
        (x, A, rows, _or(t.gate, x), _or(t.bias, x), _or(mask, x), q, _or(h, q), _or(kept, q),
         counts, flag(x.device), scratch(x, room, tile.split), locks(x.device)),
        make, seed,
    )  # fmt: skip
    return Read(q, h, kept)


def write(
    out: Tensor, left: Tensor, weight: Tensor, scale: float, *, base: Tensor | None = None,
    bias: Tensor | None = None, dropout: float = 0.0, seed: int | Tensor = 0,
) -> Tensor:  # fmt: skip
    """Write out (T, N) = [base +] scale · left weight [+ bias]; weight (K, N) of any strides."""
    (T, N), K = out.shape, left.shape[1]
    base_of = _or(base, out)
    strides = (out.stride(0), base_of.stride(0), left.stride(0), *weight.stride())
    added, biased, keyed = base is not None, bias is not None, isinstance(seed, Tensor)

    def make() -> Start:
        bm, bn, bk, warps, stages = tiles.write(T, N, K, left.element_size())
        constants = (
            added, biased, dropout > 0, keyed, K % bk == 0, _precision(left.dtype), bm, bn, bk,
        )  # fmt: skip
        grid = (_parts(T, bm) * _parts(N, bn), 1, 1)
        return Start(grid, (T, N, K, *strides, scale, dropout), constants, warps, stages)

    start(
        kernels.write,
        (T, N, K, strides, scale, dropout, added, biased, keyed, out.dtype, left.dtype,
         weight.dtype, base_of.dtype, _dtype(bias), _precision(left.dtype)),
        (out, base_of, left, weight, _or(bias, out)),
        make, seed,
    )  # fmt: skip
    return out


def inner(
    m: Member, t: Tensors, dy: Tensor, B: Tensor, found: Read, d: Tensor, q: Tensor
) -> Tensor | None:
    """One read of dy: fills d with [dh, dz] and q; returns the gradient of a static gate."""
    (T, N), r = dy.shape, t.r
    R = tiles.padded(r)
    tile = tiles.read(T, N, R, dy.element_size())
    parts = _parts(T, tile.rows)
    dgate = dy.new_empty(parts, r, dtype=torch.float32) if m.kind == "static" else None
    strides, silent = (dy.stride(0), *B.stride(), d.stride(0)), r - B.shape[1]

    def make() -> Start:
        numbers = (T, N, r, *strides, silent)
        rates = (m.scale, m.total, m.floor, m.tau, m.delta, m.eps)
        constants = (
            R, m.kind, t.bias is not None, m.in_weight and t.bias is not None, m.delta > 0,
            0.0 if m.kind == "self" else float("-inf"), N % tile.depth == 0,
            _precision(dy.dtype), tile.rows, tile.depth, tile.split,
        )  # fmt: skip
        grid = (parts * tile.split, 1, 1)
        return Start(grid, (*numbers, *rates), constants, tile.warps, tile.stages)

    start(
        kernels.inner,
        (m, T, N, r, strides, silent, dy.dtype, B.dtype, _dtype(t.gate), _dtype(t.bias),
         _precision(dy.dtype)),
        (dy, B, _or(t.gate, dy), _or(t.bias, dy), found.h, _or(found.kept, dy), q, d,
         d[:, r:] if m.linear else d, _or(dgate, dy),
         scratch(dy, parts * tile.split * tile.rows * R, tile.split), locks(dy.device)),
        make,
    )  # fmt: skip
    return None if dgate is None else dgate.sum(0)


def outer(
    left: Tensor, right: Tensor, out: Tensor, scale: float, *, row_scale: Tensor | None = None,
    dropout: float = 0.0, seed: int | Tensor = 0,
) -> Tensor:  # fmt: skip
    """Write out (N, K) = scale · row_scale ⊙ left (T, N)ᵀ right (T, K); out of any strides."""
    (T, N), K = left.shape, right.shape[1]
    bn, bk, bt, split, warps, stages = tiles.outer(T, N, K, left.element_size())
    parts = _parts(N, bn) * _parts(K, bk)
    strides = (left.stride(0), right.stride(0), *out.stride())
    scaled, keyed = row_scale is not None, isinstance(seed, Tensor)

    def make() -> Start:
        constants = (scaled, dropout > 0, keyed, _precision(left.dtype), bn, bk, bt, split)
        numbers = (T, N, K, *strides, scale, dropout)
        return Start((parts * split, 1, 1), numbers, constants, warps, stages)

    start(
        kernels.outer,
        (T, N, K, strides, scale, dropout, scaled, keyed, left.dtype, right.dtype, out.dtype,
         _dtype(row_scale), _precision(left.dtype)),
        (left, right, out, _or(row_scale, left), scratch(left, parts * split * bn * bk, split),
         locks(left.device)),
        make, seed,
    )  # fmt: skip
    return out


def _parts(n: int, size: int) -> int:
    return -(-n // size)


def _dtype(t: Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


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

"""Starts of the kernels in `kernels.py`: made once for a shape, then given tensors alone.

A call adapts one or several projections of the same x: a `Member` each. Triton looks at every
argument to find a compiled kernel, in the time that many a kernel runs; a `Launch` knows its own.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from polyrank.ops.capture import capturing
from polyrank.ops.rank_gate import kernels, tiles
from polyrank.ops.rank_gate.projection import INTERPRETED

# Zeros that kernels count arrivals in and leave at zero, of a device's stream; kernels of one
# stream run one after the other.
_LOCKS: dict[tuple[int, int], Tensor] = {}
_LOCK_WORDS = 1 << 16
# Zeros of a device for graphs, and how many are given away: words of a graph stay its own.
_SPARE: dict[int, tuple[Tensor, list[int]]] = {}
_SPARE_WORDS = 1 << 18
# fp32 memory for parts of sums, likewise of a stream; the last is the largest.
_SCRATCH: dict[tuple[int, int], list[Tensor]] = {}
# Of Triton; what stands inside of its launchers differs between them.
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
# Whether a launcher can be started without its Python.
DIRECT = VERSION == (3, 6)
# Set by a kernel that met logits that are not finite; in memory that the host reads.
_FLAGS: dict[int, tuple[Tensor, Any]] = {}


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


class At:
    """A matrix within a buffer, as kernels see it: a tensor for each would take longer.

    Args:
        buffer: a tensor in one piece.
        origin: its address.
        start: where in it the matrix begins, in bytes.
        rows: the size of the matrix.
        columns: its distance of rows.
        dtype: of its numbers.
    """

    __slots__ = ("buffer", "columns", "dtype", "place", "rows", "start")

    def __init__(
        self, buffer: Tensor, origin: int, start: int, rows: int, columns: int, dtype: torch.dtype
    ) -> None:
        self.buffer, self.start, self.rows, self.columns = buffer, start, rows, columns
        self.dtype, self.place = dtype, origin + start

    def data_ptr(self) -> int:
        """Its address."""
        return self.place

    def after(self, columns: int) -> "At":
        """The same rows without their first columns, of the old distance."""
        if not columns:
            return self
        start = self.start + columns * self.dtype.itemsize
        origin = self.place - self.start
        return At(self.buffer, origin, start, self.rows, self.columns, self.dtype)

    def tensor(self) -> Tensor:
        """What lies there and beyond, rows in one piece where they are whole."""
        size = self.rows * self.columns * self.dtype.itemsize
        flat = self.buffer.reshape(-1).view(torch.uint8)[self.start :][:size].view(self.dtype)
        whole = flat.numel() == self.rows * self.columns
        return flat.view(self.rows, self.columns) if whole else flat


class Launch:
    """A kernel with everything but its tensors: they come first, then numbers, then constants.

    Args:
        kernel: the kernel.
        grid: programs.
        numbers: scalars; a seed comes after them, given here (0) or with a call.
        constants: values at compile time.
        warps: warps of a program.
        stages: depth of its loads.
        room: fp32 words for parts of a sum; 0 if nothing is split.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, int, int], numbers: tuple[Any, ...],
        constants: tuple[Any, ...], warps: int, stages: int, room: int = 0,
    ) -> None:  # fmt: skip
        self.kernel, self.grid, self.numbers, self.constants = kernel, grid, numbers, constants
        self.warps, self.stages, self.room = warps, stages, room
        self.tail = (*numbers, *constants)
        self.ready: dict[Any, tuple[Any, Any, Any]] = {}

    def __call__(self, *tensors: Tensor | At, seed: int | Tensor | None = None) -> None:
        """Start it on the current stream."""
        if INTERPRETED:
            self._ordinary(tensors, seed)
            return
        places, odd = [t.data_ptr() for t in tensors], 0
        for place in places:
            odd |= place
        device = torch._C._cuda_getDevice()
        key: Any = (device, tuple(p & 15 for p in places)) if odd & 15 else device
        tail = self.tail
        if seed is not None:
            tensor = isinstance(seed, Tensor)
            key = (key, tensor or -(2**31) <= seed < 2**31)
            number = seed.data_ptr() if isinstance(seed, Tensor) else seed
            tail = (*self.numbers, number, *self.constants)
        found = self.ready.get(key)
        if found is None:
            self.ready[key] = _starter(self._ordinary(tensors, seed))
            return
        run, function, more = found
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(*self.grid, stream, function, *more, None, None, None, *places, *tail)

    def _ordinary(self, given: tuple[Tensor | At, ...], seed: int | Tensor | None) -> Any:
        tensors = [t.tensor() if isinstance(t, At) else t for t in given]
        extra = () if seed is None else (seed,)
        return self.kernel[self.grid](
            *tensors, *self.numbers, *extra, *self.constants, num_warps=self.warps,
            num_stages=self.stages,
        )  # fmt: skip

    def split(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for parts of the sum, and locks; any tensor where nothing is split."""
        if not self.room:
            return like, like
        device = like.device
        # Graphs that were captured on one stream may run side by side: each needs memory that is
        # its own, and zeros that were zeros before its first replay.
        if capturing(device):
            room = torch.empty(self.room, dtype=torch.float32, device=device)
            return room, _locks_of_graph(device, self.grid[0])
        return scratch(device, self.room), locks(device)


def _starter(made: Any) -> tuple[Any, Any, tuple[Any, ...]]:
    """What starts a compiled kernel: a function, the kernel, and what stands before hooks."""
    run = made.run
    known = getattr(run, "launch_pdl", None) is not None and hasattr(run, "launch")
    if known and DIRECT and not (run.global_scratch_size or run.profile_scratch_size):
        # The launcher itself, without Python that looks for memory which this kernel does not need.
        cooperative, pdl = run.launch_cooperative_grid, run.launch_pdl
        return run.launch, made.function, (cooperative, pdl, None, None, made.packed_metadata)
    return run, made.function, (made.packed_metadata,)


def _place(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return (-1, 0)
    return (device.index, torch._C._cuda_getCurrentRawStream(device.index))


def locks(device: torch.device) -> Tensor:
    """Zeros, one word for every tile whose sum is split."""
    key = _place(device)
    if key not in _LOCKS:
        _LOCKS[key] = torch.zeros(_LOCK_WORDS, dtype=torch.int32, device=device)
        if key[0] not in _SPARE:
            words = torch.zeros(_SPARE_WORDS, dtype=torch.int32, device=device)
            _SPARE[key[0]] = (words, [0])
    return _LOCKS[key]


def _locks_of_graph(device: torch.device, words: int) -> Tensor:
    pool, given = _SPARE.get(_place(device)[0], (None, [0]))
    start, end = given[0], given[0] + -(-words // 4) * 4
    if pool is None or end > _SPARE_WORDS:
        # The graph writes them itself, at every replay.
        return torch.zeros(words, dtype=torch.int32, device=device)
    given[0] = end
    return pool[start:end]


def scratch(device: torch.device, room: int) -> Tensor:
    """At least `room` fp32 words, which the next call on this stream takes again."""
    held = _SCRATCH.setdefault(_place(device), [])
    if not held or held[-1].numel() < room:
        # A captured graph may still write into what was too small.
        held.append(torch.empty(max(room, 1 << 20), dtype=torch.float32, device=device))
    return held[-1]


def workspace(device: int, words: int) -> Tensor:
    """The same by a device's number; memory of its own for what is captured into a graph."""
    where = torch.device("cuda", device)
    if capturing(where):
        return torch.empty(words, dtype=torch.float32, device=where)
    return scratch(where, words)


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


def precision(dtype: torch.dtype) -> str:
    """How products of fp32 numbers are made; of others it says nothing."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def parts_of(n: int, size: int) -> int:
    """How many pieces of a size cover n."""
    return -(-n // size)


def _seed(dropout: float) -> tuple[int, ...]:
    return () if dropout else (0,)


def pack(
    m: Member, d: int, n: int, r: int, r_B: int, strides: tuple[int, int, int], scale: float
) -> Launch:
    """Casts [A; rows] and scale · B; strides of A, rows, B. Takes A, rows, B, AW, B', counts."""
    BD = 1024
    across = parts_of(d, BD)
    grid = (m.ranks(r) + parts_of(n * r_B, BD * across), across, 1)
    numbers = (r, r // m.block, d, n, r_B, *strides, r if m.counts else 0, scale)
    return Launch(kernels.pack, grid, numbers, (m.block, m.linear, BD), 4, 2)


def read(
    m: Member, T: int, d: int, r: int, strides: tuple[int, int, int, int], dtype: torch.dtype, *,
    keep: bool, counts: bool, bias: bool, mask: bool, dropout: float, seeded: bool, packed: bool,
) -> Launch:  # fmt: skip
    """First pass over x (T, d); strides of x, A, rows, q.

    Takes x, A, rows, gate, bias, mask, q, h, kept, counts, flag, scratch, locks.
    """
    R = tiles.padded(r)
    columns = R * (2 if m.linear else 1)
    tile = tiles.read(T, d, columns, dtype.itemsize)
    parts = parts_of(T, tile.rows)
    numbers = (T, d, r, *strides, m.total, m.floor, m.tau, m.delta, m.eps, dropout,
               1 / (1 - dropout), *_seed(dropout))  # fmt: skip
    constants = (
        R, R if m.k >= r else m.k, m.kind, bias, m.in_weight and bias, m.delta > 0,
        1 if packed else m.block, keep, m.linear, counts, mask, dropout > 0, seeded,
        packed and m.linear and r == R, d % tile.depth == 0, precision(dtype), tile.rows,
        tile.depth, tile.split,
    )  # fmt: skip
    room = parts * tile.split * tile.rows * columns if tile.split > 1 else 0
    grid = (parts * tile.split, 1, 1)
    return Launch(kernels.read, grid, numbers, constants, tile.warps, tile.stages, room)


def write(
    T: int, N: int, K: int, strides: tuple[int, ...], scale: float, dtype: torch.dtype, *,
    add: bool = False, bias: bool = False, dropout: float = 0.0, seeded: bool = False,
) -> Launch:  # fmt: skip
    """out (T, N) = [base +] scale · left weight (K, N) [+ bias].

    Strides of out, base, left, weight (two). Takes out, base, left, weight, bias.
    """
    bm, bn, bk, warps, stages = tiles.write(T, N, K, dtype.itemsize)
    constants = (add, bias, dropout > 0, seeded, K % bk == 0, precision(dtype), bm, bn, bk)
    numbers = (T, N, K, *strides, scale, dropout, *_seed(dropout))
    grid = (parts_of(T, bm) * parts_of(N, bn), 1, 1)
    return Launch(kernels.write, grid, numbers, constants, warps, stages)


def inner(
    m: Member, T: int, N: int, r: int, strides: tuple[int, ...], silent: int, dtype: torch.dtype,
    *, scale: float, bias: bool, scaled: bool,
) -> Launch:  # fmt: skip
    """One read of dy (T, N); strides of dy, B (two), d and, if scaled, a d of its own.

    Takes dy, B, gate, bias, h, kept, dh, dz, dgate, row_scale, dh and dz of their own, scratch,
    locks; dgate has a row for each of `token_tiles`.
    """
    R = tiles.padded(r)
    tile = tiles.read(T, N, R, dtype.itemsize)
    parts = parts_of(T, tile.rows)
    numbers = (T, N, r, *strides, silent, scale, m.total, m.floor, m.tau, m.delta, m.eps)
    constants = (
        R, m.kind, bias, m.in_weight and bias, m.delta > 0,
        0.0 if m.kind == "self" else float("-inf"), scaled, N % tile.depth == 0, precision(dtype),
        tile.rows, tile.depth, tile.split,
    )  # fmt: skip
    room = parts * tile.split * tile.rows * R * (1 + scaled) if tile.split > 1 else 0
    grid = (parts * tile.split, 1, 1)
    return Launch(kernels.inner, grid, numbers, constants, tile.warps, tile.stages, room)


def token_tiles(T: int, N: int, r: int, itemsize: int) -> int:
    """Tiles of tokens that `inner` works on."""
    return parts_of(T, tiles.read(T, N, tiles.padded(r), itemsize).rows)


def outer(
    T: int, N: int, K: int, strides: tuple[int, ...], scale: float, dtype: torch.dtype, *,
    scaled: bool = False, dropout: float = 0.0, seeded: bool = False,
) -> Launch:  # fmt: skip
    """out (N, K) = scale · row_scale ⊙ left (T, N)ᵀ right (T, K).

    Strides of left, right, out (two). Takes left, right, out, row_scale, scratch, locks.
    """
    bn, bk, bt, split, warps, stages = tiles.outer(T, N, K, dtype.itemsize)
    parts = parts_of(N, bn) * parts_of(K, bk)
    constants = (scaled, dropout > 0, seeded, precision(dtype), bn, bk, bt, split)
    numbers = (T, N, K, *strides, scale, dropout, *_seed(dropout))
    room = parts * split * bn * bk if split > 1 else 0
    return Launch(kernels.outer, (parts * split, 1, 1), numbers, constants, warps, stages, room)

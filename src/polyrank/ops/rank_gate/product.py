"""One kernel for a base product and the update: Σ aᵢ wᵢ [+ bias], on Hopper's tensor cores.

An update of its own passes through memory twice, once written and once read by the product that
adds; here it is a few more steps of that product. By `bench/results/product.csv`.
"""

import contextvars
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import triton
from torch import Tensor

from polyrank.ops.rank_gate.launch import DIRECT, VERSION, At, Launch, workspace
from polyrank.ops.rank_gate.projection import INTERPRETED, SIXTEEN

# Pairs of one kernel, and sizes from which the table has gains (one row of 33 loses 0.6 %); of
# fewer tokens, and of smaller results, some gain and some lose to the start of its copies.
MOST_PAIRS, LEAST_TOKENS, LEAST_NUMBERS = 4, 2048, 2048 * 4096
# The share of all processors' time that whole tiles must fill: below it the table has losses.
LEAST_FILL = 0.9
# Of Triton: timed with the first; compiled by the others it was right. Its language may change.
_VERSIONS = ((3, 6), (3, 7), (3, 8), (3, 9))
_TILE = (128, 256, 64)
Sum = Sequence[tuple[Any, Any]]


@cache
def _processors(device: int) -> int:
    """Streaming multiprocessors of a Hopper GPU; 0 of others."""
    if torch.version.hip:
        return 0
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count if (found.major, found.minor) == (9, 0) else 0


@cache
def _spoken() -> bool:
    """Whether Triton has the language that the kernel is written in."""
    try:
        return find_spec("triton.experimental.gluon") is not None
    except ModuleNotFoundError:
        return False


def runs(x: Tensor) -> bool:
    """Whether the kernel can serve a product with x (T, d) on the left."""
    if not x.is_cuda or x.dtype not in SIXTEEN or INTERPRETED or VERSION not in _VERSIONS:
        return False
    return _spoken() and _processors(x.get_device()) > 0


def pays(T: int, N: int, device: int) -> bool:
    """Whether it is the faster way to a result (T, N) on a device where it runs."""
    if T < LEAST_TOKENS or T * N < LEAST_NUMBERS:
        return False
    tiles, processors = -(-T // _TILE[0]) * -(-N // _TILE[1]), _processors(device)
    return tiles >= LEAST_FILL * processors * -(-tiles // processors)


def reads(matrix: Tensor) -> bool:
    """Whether its copies can read a 16-bit matrix whose rows lie in one piece each.

    Its rows are apart by a multiple of 16 bytes, and it begins at one.
    """
    odd = matrix.data_ptr() | matrix.stride(0) * 2 | (matrix.stride(0) < matrix.shape[1])
    return not odd & 15


def readable(matrix: Tensor) -> Tensor:
    """The matrix, or a copy that can be read."""
    return matrix if reads(matrix) else matrix.clone(memory_format=torch.contiguous_format)


class Product(Launch):
    """out (T, N) = Σ aᵢ wᵢ [+ bias] for pairs of given depths; starts with the tensors alone.

    Args:
        shape: T and N.
        depths: Kᵢ of each pair, up to `MOST_PAIRS`.
        strides: of the rows of out, of every a, of every w.
        turned: whether wᵢ is (N, Kᵢ) and not (Kᵢ, N).
        bias: whether there is one.
        device: where it runs.
    """

    def __init__(
        self, shape: tuple[int, int], depths: Sequence[int],
        strides: tuple[int, Sequence[int], Sequence[int]], *, turned: bool, bias: bool,
        device: torch.device,
    ) -> None:  # fmt: skip
        from polyrank.ops.rank_gate import kernels_product

        (T, N), pairs, (bm, bn, bk), stages, warps = shape, len(depths), _TILE, 3, 8
        programs = min(_processors(device.index), -(-T // bm) * -(-N // bn))
        short = MOST_PAIRS - pairs
        so, sa, sw = strides
        four = [value for each in (depths, sa, sw) for value in (*each, *[each[0]] * short)]
        numbers = (T, N, so, *four, sum(-(-K // bk) for K in depths))
        constants = (pairs, bias, turned, bm, bn, bk, stages, 8, warps)
        super().__init__(kernels_product.product, (programs, 1, 1), numbers, constants, warps, 1)
        self.short, self.words = short, 0

    def run(self, out: Tensor, pairs: Sum, bias: Tensor | None = None) -> None:
        """Fill `out`."""
        left, right = [a for a, _ in pairs], [w for _, w in pairs]
        if self.short:
            left += left[:1] * self.short
            right += right[:1] * self.short
        self(out, out if bias is None else bias, *left, *right)

    def __call__(self, *tensors: Tensor | At, seed: int | Tensor | None = None) -> None:
        """Start it on the current stream."""
        places, device = [t.data_ptr() for t in tensors], torch._C._cuda_getDevice()
        # Of the tensors the bias alone may lie anywhere.
        found = self.ready.get(key := (device, places[1] & 15))
        if found is None:
            made = contextvars.copy_context().run(self._ordinary, tensors, seed)
            self.words = -(-made.run.global_scratch_size * self.grid[0] // 4)
            self.ready[key] = (made.run, made.function, (made.packed_metadata,))
            return
        run, function, (packed,) = found
        stream = torch._C._cuda_getCurrentRawStream(device)
        if DIRECT:
            # The maps of its copies.
            memory = workspace(device, self.words)
            more = (run.launch_cooperative_grid, run.launch_pdl, memory.data_ptr(), None, packed)
            run.launch(*self.grid, stream, function, *more, None, None, None, *places, *self.tail)
            return

        def start() -> None:
            triton.set_allocator(_allocated)
            run(*self.grid, stream, function, packed, None, None, None, *places, *self.tail)

        # Whoever set an allocator has it afterwards.
        contextvars.copy_context().run(start)

    def _ordinary(self, given: tuple[Tensor | At, ...], seed: int | Tensor | None) -> Any:
        triton.set_allocator(_allocated)
        tensors = [t.tensor() if isinstance(t, At) else t for t in given]
        # The 128 registers of a thread that so many threads would have are too few for its sums.
        return self.kernel[self.grid](
            *tensors, *self.numbers, *self.constants, num_warps=self.warps, maxnreg=168
        )


def _allocated(size: int, alignment: int, stream: int | None) -> Tensor:
    # What torch gives begins at a multiple of 512 bytes.
    return workspace(torch._C._cuda_getDevice(), -(-size // 4))

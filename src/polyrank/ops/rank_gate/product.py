"""One kernel for a base product and the update: Σ aᵢ wᵢ [+ bias], on Hopper's tensor cores.

An update of its own passes through memory twice, once written and once read by the product that
adds; here it is a few more steps of that product. By `bench/results/product.csv`.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import triton
from torch import Tensor

from polyrank.ops.rank_gate.launch import DIRECT, INTERPRETED, VERSION, At, Launch, scratch

# Pairs of one kernel, and sizes from which every row of the table has a gain: of fewer tokens, and
# of a smaller result, the start of its copies costs more than what is spared.
MOST_PAIRS, LEAST_TOKENS, LEAST_NUMBERS = 4, 2048, 2048 * 4096
# Of Triton: where the kernel compiles; its language is not yet a settled one.
_VERSIONS = ((3, 6), (3, 7), (3, 8), (3, 9))
_SIXTEEN = (torch.bfloat16, torch.float16)
Pair = tuple[Any, Any]


@cache
def _processors(device: int) -> int:
    """Streaming multiprocessors of a Hopper GPU; 0 of others."""
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count if (found.major, found.minor) == (9, 0) else 0


def runs(x: Tensor) -> bool:
    """Whether the kernel can serve a product with x (T, d) on the left."""
    if not x.is_cuda or x.dtype not in _SIXTEEN or INTERPRETED or VERSION not in _VERSIONS:
        return False
    return find_spec("triton.experimental.gluon") is not None and _processors(x.get_device()) > 0


def gains(T: int, N: int) -> bool:
    """Whether it is the faster way to a result (T, N)."""
    return T >= LEAST_TOKENS and T * N >= LEAST_NUMBERS


def reads(*matrices: Tensor) -> bool:
    """Whether its copies can read matrices: rows 16 bytes apart or a multiple, from such a place.

    To be asked of 16-bit matrices with rows in one piece.
    """
    odd = 0
    for t in matrices:
        odd |= t.data_ptr() | t.stride(0) * 2 | (t.stride(0) < t.shape[1])
    return not odd & 15


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

        (T, N), pairs, processors = shape, len(depths), _processors(device.index)
        bm, bn, bk, stages, warps = 128, 256, 64, 3, 8
        if -(-T // bm) * -(-N // bn) < processors:
            # Too few wide tiles for all processors.
            bn, stages = 128, 5
        programs = min(processors, -(-T // bm) * -(-N // bn))
        short = MOST_PAIRS - pairs

        so, sa, sw = strides
        four = [value for each in (depths, sa, sw) for value in (*each, *[each[0]] * short)]
        numbers = (T, N, so, *four, sum(-(-K // bk) for K in depths))
        constants = (pairs, bias, turned, bm, bn, bk, stages, 8, warps)
        super().__init__(kernels_product.product, (programs, 1, 1), numbers, constants, warps, 1)
        self.short, self.words = short, 0

    def run(self, out: Tensor, pairs: Sequence[Pair], bias: Tensor | None = None) -> None:
        """Fill `out`."""
        left, right = [a for a, _ in pairs], [w for _, w in pairs]
        if self.short:
            left += left[:1] * self.short
            right += right[:1] * self.short
        self(out, out if bias is None else bias, *left, *right)

    def __call__(self, *tensors: Tensor | At, seed: int | Tensor | None = None) -> None:
        """Start it; 128 registers a thread are too few for its sums, and its copies have maps."""
        places, device = [t.data_ptr() for t in tensors], torch._C._cuda_getDevice()
        # Of the tensors the bias alone may lie anywhere.
        found = self.ready.get(key := (device, places[1] & 15))
        if found is None:
            made = self._ordinary(tensors, seed)
            size = made.run.global_scratch_size * self.grid[0]
            self.words = -(-size // 4)
            self.ready[key] = (made.run, made.function, (made.packed_metadata,))
            return
        run, function, (packed,) = found
        stream = torch._C._cuda_getCurrentRawStream(device)
        if DIRECT:
            maps = scratch(tensors[0].device, self.words).data_ptr()  # type: ignore[union-attr]
            more = (run.launch_cooperative_grid, run.launch_pdl, maps, None, packed)
            run.launch(*self.grid, stream, function, *more, None, None, None, *places, *self.tail)
        else:
            triton.set_allocator(_workspace)
            run(*self.grid, stream, function, packed, None, None, None, *places, *self.tail)

    def _ordinary(self, given: tuple[Tensor | At, ...], seed: int | Tensor | None) -> Any:
        triton.set_allocator(_workspace)
        tensors = [t.tensor() if isinstance(t, At) else t for t in given]
        return self.kernel[self.grid](
            *tensors, *self.numbers, *self.constants, num_warps=self.warps, maxnreg=168
        )


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the maps of a kernel's copies; torch's own begins at multiples of 512 bytes."""
    return scratch(torch.device("cuda", torch.cuda.current_device()), -(-size // 4))

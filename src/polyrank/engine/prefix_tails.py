"""Where a row's bits depend on its place in a batch: the ends of vector loops.

torch's loops over fp32 values on a CPU take several vectors at a time and the rest one by one; each
thread has such a rest. Of sigmoid, silu, mish, softplus, elu and the tanh form of gelu the two ways
differ in the last bit of up to a tenth of all values. If every thread's part is a whole number of
vectors, there is no rest, and a row has the same bits at every place. On a GPU there is one way.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Elements that two AVX-512 vectors of bf16 hold; every loop takes a divisor of them at a time.
VECTOR = 64
# Values below which torch does not share a loop out over threads.
GRAIN = 32768
# Correctly rounded, or found to have the same bits one by one and in vectors.
_EXACT = frozenset(
    """abs add addcmul ceil clamp clamp_max clamp_min clone copy cos div erf exp expm1 fill floor
    hardswish hardtanh leaky_relu lerp log1p masked_fill maximum minimum mul neg pow reciprocal relu
    round rsqrt rsub sign sin sqrt square sub tanh threshold to trunc where""".split()  # noqa: SIM905
)
# Loops that torch does not call pointwise, as they read two halves or keep a second result.
_MORE = frozenset({"glu", "log_sigmoid_forward"})


class Loop(NamedTuple):
    """One function over all values of a tensor.

    Attributes:
        row: values of one row.
        line: values that follow one another, 0 if all do.
    """

    row: int
    line: int


class Tails(TorchDispatchMode):
    """Notes loops whose rest has other bits, while `open`.

    Args:
        rows: of the batch that is run.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.open = rows, True
        self.loops: set[Loop] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        loop = torch.Tag.pointwise in func.tags or name in _MORE
        if self.open and loop and name not in _EXACT:
            values = [t for t in tree_leaves((args, kwargs, found)) if isinstance(t, Tensor)]
            for tensor in tree_leaves(found):
                # What is not made of the batch, such as sines of positions, is alike in all.
                if _shared_out(tensor) and len(tensor) % self.rows == 0:
                    line = 0 if all(t.is_contiguous() for t in values) else tensor.shape[-1]
                    self.loops.add(Loop(tensor.numel() // self.rows, line))
        return found


def _shared_out(tensor: Any) -> bool:
    plain = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dim() > 0
    return plain and tensor.device.type == "cpu"


def even(loops: Iterable[Loop], rows: int, threads: int) -> bool:
    """Say whether no loop over `rows` rows leaves a rest, in any thread."""
    for loop in loops:
        total = loop.row * rows
        used = {1, threads, min(threads, -(-total // GRAIN))}
        parts = {-(-total // count) for count in used}
        if total % VECTOR or loop.line % VECTOR or any(part % VECTOR for part in parts):
            return False
    return True

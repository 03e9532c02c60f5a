"""A frozen linear layer with what adapts it, as the operator sees it; where kernels gain."""

import os
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyrank.ops.rank_gate.epilogue import KINDS, Epilogue

SIXTEEN = (torch.bfloat16, torch.float16)
# What one tile holds, and what was timed.
MOST_RANKS, TIMED_RANKS = 256, 64
TIMED_KINDS = ("none", "static", "linear", "self")
INSTALLED = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_CAPABLE: dict[int, bool] = {}


class Projection(NamedTuple):
    """W (d_out, d_in), its bias, and the factors, gate and constants of `rank_gate`.

    Attributes:
        counts: whether to count the tokens that select each rank (linear router only).
    """

    W: Tensor
    b: Tensor | None
    A: Tensor
    rows: Tensor | None
    B: Tensor
    epilogue: Epilogue
    scale: float
    live_from: int = 0
    row_scale: Tensor | None = None
    counts: bool = False


class Memo:
    """What a call leaves for the next one of the same layers, which looks whether it still holds.

    Attributes:
        few: of calls with few tokens and without gradients.
    """

    __slots__ = ("few",)

    def __init__(self) -> None:
        self.few: Any = None


def _capable(device: int) -> bool:
    if device not in _CAPABLE:
        if torch.compiler.is_compiling():
            return True
        _CAPABLE[device] = torch.cuda.get_device_capability(device) >= (8, 0)
    return _CAPABLE[device]


def gains(x: Tensor, r: int, kind: str) -> bool:
    """Whether kernels are the faster path, by `bench/results/gates.csv`.

    The table has r = 64 and every gate, in bf16 and fp16, from one token to 8192: kernels beat the
    eager path in each of its rows, where the device is slow and where the host is.
    """
    return r <= TIMED_RANKS and kind in TIMED_KINDS and _timed(x)


def _timed(x: Tensor) -> bool:
    """Whether inputs like this one stand in the table."""
    if not x.is_cuda or x.dtype not in SIXTEEN or not INSTALLED or torch.version.hip:
        return False
    return x.shape[-1] >= 256 and _capable(x.device.index)


def asked() -> str:
    """What `POLYRANK_OPS` says; an empty one says nothing."""
    return os.environ.get("POLYRANK_OPS") or "auto"


def reach(x: Tensor) -> tuple[int, tuple[str, ...]]:
    """Up to how many ranks, and for which gates, `linears` is to be asked for x."""
    path = asked()
    if x.numel() and path == "auto" and _timed(x):
        return TIMED_RANKS, TIMED_KINDS
    # Where kernels are forced and cannot run, the ordinary way says so.
    runs = INSTALLED and (x.is_cuda or INTERPRETED) and x.dtype != torch.float64
    if x.numel() and path == "triton" and runs:
        return MOST_RANKS, KINDS
    return 0, ()

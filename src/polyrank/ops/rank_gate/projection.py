"""A frozen linear layer with what adapts it, as the operator sees it; where kernels gain."""

import os
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from polyrank.ops.rank_gate.epilogue import Epilogue

SIXTEEN = (torch.bfloat16, torch.float16)
# What one tile holds, and what was timed.
MOST_RANKS, TIMED_RANKS = 256, 64
TIMED_KINDS = ("none", "static", "linear", "self")
INSTALLED = find_spec("triton") is not None
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
    if not x.is_cuda or x.dtype not in SIXTEEN or not INSTALLED or torch.version.hip:
        return False
    if r > TIMED_RANKS or kind not in TIMED_KINDS or x.shape[-1] < 256:
        return False
    return _capable(x.device.index)


def owned(x: Tensor, r: int, kind: str) -> bool:
    """Whether `linears` is to be asked for, given what `POLYRANK_OPS` says."""
    path = os.environ.get("POLYRANK_OPS", "auto")
    if not x.numel() or r > MOST_RANKS:
        return False
    return gains(x, r, kind) if path == "auto" else path == "triton" and x.dtype != torch.float64

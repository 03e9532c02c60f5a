"""A frozen linear layer with what adapts it, as the operator sees it; where kernels gain."""

import os
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from polyrank.ops.rank_gate.epilogue import Epilogue

SIXTEEN = (torch.bfloat16, torch.float16)
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


def gains(x: Tensor, r: int) -> bool:
    """Whether kernels are the faster path, by `bench/results/rank_gate.csv`."""
    if not x.is_cuda or x.dtype not in SIXTEEN or not INSTALLED or torch.version.hip:
        return False
    return r <= 256 and x.shape[-1] >= 256 and _capable(x.device.index)


def owned(x: Tensor, r: int) -> bool:
    """Whether `linears` is to be asked for, given what `POLYRANK_OPS` says."""
    path = os.environ.get("POLYRANK_OPS", "auto")
    if not x.numel() or r > 256:
        return False
    return gains(x, r) if path == "auto" else path == "triton" and x.dtype != torch.float64

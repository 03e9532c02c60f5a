"""Which ranks of a token are on: the k best scores, equal scores by the lower index.

`torch.topk` promises no order among equals, so it alone would route differently from device to device.
"""

import numpy as np
import torch
from torch import Tensor

from polyrank.errors import PolyrankError
from polyrank.ops.rank_gate.epilogue import Epilogue

# One core: numpy's partition takes 0.13 µs for a row of 64, torch.topk 0.8 µs but on every core.
_NUMPY_THREADS = 6


class NonFiniteError(PolyrankError, ValueError):
    """Router logits that hold an infinity or a NaN: no rank can be selected by them."""


def check_finite(z: Tensor) -> None:
    """Refuse infinities and NaNs at the price of one sum.

    A graph that is compiled or captured cannot raise; there a NaN makes all gates of its token NaN.

    Raises:
        NonFiniteError: says how many tokens are hit.
    """
    if torch.compiler.is_compiling() or (z.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    # A sum is finite only if every term is, and takes a tenth of isfinite's time; it may also overflow by itself.
    if bool(z.detach().sum().isfinite()):
        return
    bad = ~z.isfinite().all(dim=-1)
    if hit := int(bad.sum()):
        raise NonFiniteError(
            f"rank gate: logits of {hit} of {bad.numel()} tokens are not finite, expected finite numbers; "
            "look for a diverged run (learning rate, fp16 overflow) or non-finite inputs to the layer"
        )


def largest(score: Tensor, k: int) -> Tensor:
    """Bool like `score`: the k largest of the last axis (all if k exceeds it). The reference: a stable sort."""
    order = score.detach().argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, order[..., :k], True)


def chosen(z: Tensor, e: Epilogue) -> Tensor:
    """Bool (…, r / block): the blocks of ranks that the linear router with logits z turns on."""
    score, b = (z.sigmoid() if e.score == "sigmoid" else z), e.bias_of_blocks(z.dtype)
    return largest(score if b is None else score + b, e.k // e.block)


def largest_fast(score: Tensor, k: int) -> Tensor:
    """The same as 1 and 0 in the dtype of `score` (T, n), without a sort where there are no ties."""
    n = score.shape[-1]
    if k >= n:
        return torch.ones_like(score)
    if torch.compiler.is_compiling() or not score.is_cpu:
        return largest(score, k).to(score.dtype)
    if torch.get_num_threads() <= _NUMPY_THREADS:
        parts = torch.from_numpy(np.partition(score.numpy(), n - k - 1, axis=-1))[:, n - k - 1 :]
        below, lowest = parts[:, :1], parts[:, 1:].amin(-1, keepdim=True)
    else:
        top = score.topk(k + 1, dim=-1).values
        below, lowest = top[:, k:], top[:, k - 1 : k]
    if bool((below == lowest).any()):
        return largest(score, k).to(score.dtype)
    # Floats at once: elementwise arithmetic on bools takes four times as long.
    return torch.gt(score, below, out=torch.empty_like(score))

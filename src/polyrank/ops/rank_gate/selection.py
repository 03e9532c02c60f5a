"""Which ranks of a token are on: the k best scores, equal scores by the lower index.

`torch.topk` promises no order among equals; alone it would route differently from device to device.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from polyrank.errors import PolyrankError
from polyrank.ops.capture import capturing
from polyrank.ops.rank_gate.epilogue import Epilogue

# One core: numpy's partition takes 0.13 µs for a row of 64, torch.topk 0.8 µs but on every core.
_NUMPY_THREADS = 6


MESSAGE = (
    "rank gate: logits of {} are not finite, expected finite numbers; look for a diverged run "
    "(learning rate, fp16 overflow) or non-finite inputs"
)


class NonFiniteError(PolyrankError, ValueError):
    """Router logits that hold an infinity or a NaN: no rank can be selected by them."""


def check_finite(z: Tensor) -> None:
    """Refuse infinities and NaNs at the price of one sum.

    A graph that is compiled or captured cannot raise; there a NaN makes all gates of its token NaN.

    Raises:
        NonFiniteError: Says how many tokens are hit.
    """
    if _silent(z):
        return
    # A sum is finite only if every term is, and takes a tenth of isfinite's time; it may overflow.
    if math.isfinite(z.detach().sum().item()):
        return
    bad = ~z.isfinite().all(dim=-1)
    if hit := int(bad.sum()):
        raise NonFiniteError(MESSAGE.format(f"{hit} of {bad.numel()} tokens"))


def watch_finite(z: Tensor) -> Callable[[], None] | None:
    """The same check in two steps, so that a GPU is not waited for: call the result later.

    Waiting in forward would cost a fifth of the time of a stack of layers (8192 tokens, H200).

    Raises:
        NonFiniteError: On a CPU at once, on a GPU from the call.
    """
    if not z.is_cuda or _silent(z):
        check_finite(z)
        return None
    finite = z.isfinite().all().to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream(z.device).record_event()

    def finish() -> None:
        copied.synchronize()
        if not finite:
            raise NonFiniteError(MESSAGE.format("some tokens"))

    return finish


def _silent(z: Tensor) -> bool:
    return torch.compiler.is_compiling() or capturing(z.device)


def largest(score: Tensor, k: int) -> Tensor:
    """Bool like `score`: the k largest of the last axis, all if k exceeds it; by a stable sort.

    Raises:
        NonFiniteError: Scores that are not finite.
    """
    check_finite(score)
    return _first(score, k)


def _first(score: Tensor, k: int) -> Tensor:
    order = score.detach().argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, order[..., :k], True)


def chosen(z: Tensor, e: Epilogue) -> Tensor:
    """Bool (…, r / block): the blocks of ranks that the linear router with logits z turns on.

    Raises:
        NonFiniteError: Logits that are not finite.
    """
    check_finite(z)
    score, b = (z.sigmoid() if e.score == "sigmoid" else z), e.bias_of_blocks(z.dtype)
    return _first(score if b is None else score + b, e.k // e.block)


def largest_fast(score: Tensor, k: int, *, scratch: bool = False) -> Tensor:
    """The same as `largest`, as 1 and 0 in the dtype of `score` (T, n).

    Args:
        score: (T, n), finite.
        k: How many are on.
        scratch: Whether `score` may be overwritten.
    """
    n = score.shape[-1]
    if k >= n:
        return torch.ones_like(score)
    if torch.compiler.is_compiling() or not score.is_cpu:
        return _first(score, k).to(score.dtype)
    if torch.get_num_threads() <= _NUMPY_THREADS:
        best = torch.from_numpy(np.partition(score.numpy(), n - k - 1, axis=-1))[:, n - k - 1 :]
        below, lowest = best[:, :1], best[:, 1:].amin(-1, keepdim=True)
    else:
        best = score.topk(k + 1, dim=-1).values
        below, lowest = best[:, k:], best[:, k - 1 : k]
    if bool((below == lowest).any()):
        return _first(score, k).to(score.dtype)
    # Written as floats at once: arithmetic on bools takes four times as long on a CPU.
    return torch.gt(score, below, out=score if scratch else torch.empty_like(score))

"""The rank gate: y + s · B (g ⊙ A x), the one formula behind every adapted layer.

`naive.py` is the definition, `eager.py` the path without kernels. `POLYRANK_OPS` in the environment
picks one: auto (default), naive, eager or triton; a forced path that cannot run raises.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polyrank.errors import ConfigError, nearest
from polyrank.ops.philox import Word
from polyrank.ops.rank_gate import eager, naive
from polyrank.ops.rank_gate.epilogue import Epilogue
from polyrank.ops.rank_gate.naive import gate
from polyrank.ops.rank_gate.projection import INSTALLED, Memo, Projection, asked, gains, reach
from polyrank.ops.rank_gate.selection import NonFiniteError

__all__ = [
    "Epilogue",
    "Memo",
    "NonFiniteError",
    "Projection",
    "gate",
    "linears",
    "rank_gate",
    "reach",
]

_PATHS = ("auto", "naive", "eager", "triton")
# `linears` of the kernels, once it was needed: a statement that imports takes as long as a kernel.
_LINEARS: list[Any] = []


def rank_gate(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    rows: Tensor | None,
    B: Tensor,
    epilogue: Epilogue,
    scale: float,
    live_from: int = 0,
    shadow: tuple[Tensor, Tensor, Tensor | None] | None = None,
    row_scale: Tensor | None = None,
    dropout: float = 0.0,
    seed: Word = 0,
    mask: Tensor | None = None,
    *,
    count: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y + scale · (B (g ⊙ A x̂) − B0 δ0 A0 x) with x̂ = dropout(x) and gates g = g(A x̂, rows x̂).

    Arithmetic in the dtype of x (the autocast dtype if that is on), accumulated and gated in fp32,
    fp64 if x is; weights are cast to it, x is not. Differentiable once, by y, x, A, rows, B and a
    static gate; no gradient passes through the selection of ranks.

    Args:
        y: (…, d_out), the base layer's output; its dtype is the result's.
        x: (…, d_in), floating; any leading shape, no tokens at all included.
        A: (r, d_in).
        rows: (r / block, d_in) of a linear router, else None.
        B: (d_out, r), or fewer columns: then the first ranks are silent, with a key but no value.
        epilogue: How the gates g come about.
        scale: Factor of the update.
        live_from: The first `live_from` ranks are a frozen bank: no gradient to their rows of A and
            columns of B, but x gets what passes through them; silent ranks lie among them.
        shadow: (A0 (w, d_in), B0 (d_out, w), δ0), subtracted and never trained; δ0 is None for the
            identity, 0-d, (w,) or (w, w). It sees x without dropout, as a part of the base would.
        row_scale: (d_out,) multiplies dL/dy on its way to A, B, rows and a static gate, not to x.
        dropout: Probability in [0, 1) of zeroing an element of x, the same for A and rows.
        seed: 64-bit key of the mask; a 0-d int64 tensor spares recompilations.
        mask: (…,) bool, real tokens; restricts what is counted, nothing else.
        count: Whether to count (linear router only).
        inplace: Whether y may be overwritten, as nobody else and no backward reads it (so it is
            with torch.nn.Linear), where that saves a copy.

    Returns:
        The sum, and how many tokens selected each rank, (r,) int64, or None if nothing was counted.

    Raises:
        ConfigError: Shapes, dtypes, ranges that do not fit; a `POLYRANK_OPS` that cannot be served.
        NonFiniteError: Router logits that are not finite; on a GPU a backward raises it, by
            kernels also that of a later step; a compiled graph gives NaN instead.
    """
    if found := _problems(y, x, A, rows, B, epilogue, live_from, shadow, row_scale, dropout, mask):
        raise ConfigError(found)
    inputs = (y, x, A, rows, B, epilogue, scale, live_from, shadow, row_scale, dropout, seed, mask)
    return _by(_path(x, A.shape[0], epilogue.kind, shadow), inputs, count, inplace)


def _by(
    path: str, inputs: tuple[Any, ...], count: bool, inplace: bool
) -> tuple[Tensor, Tensor | None]:
    if path == "triton":
        from polyrank.ops.rank_gate import triton

        without_shadow = (*inputs[:8], *inputs[9:])
        return triton.rank_gate(*without_shadow, count=count, inplace=inplace)
    if path == "eager":
        return eager.rank_gate(*inputs, count=count, inplace=inplace)
    with torch.autocast(inputs[1].device.type, enabled=False):
        return naive.rank_gate(*inputs, count=count)


def linears(
    x: Tensor,
    projections: Sequence[Projection],
    dropout: float = 0.0,
    seed: Word = 0,
    mask: Tensor | None = None,
    memo: Memo | None = None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """x Wᵀ + b + update of frozen linear layers that share x, by kernels; see `rank_gate`.

    The base product adds onto the update, and the gradient of x is gathered in one buffer; large
    ones are a single sum on Hopper. Neither passes through memory for its own sake. W and b get no
    gradient; x has the dtype of W. To be called where `reach` says so. A memo, kept between calls
    for layers that are called again and again, spares looking for what is as it was; it is compared
    with what is given, and may be one of other layers.

    Returns:
        The outputs and the counts, one of each a layer.
    """
    if torch.compiler.is_compiling() or not _LINEARS:
        from polyrank.ops.rank_gate import triton

        if torch.compiler.is_compiling():
            return triton.linears(x, projections, dropout, seed, mask)
        _LINEARS.append(triton.linears)
    return _LINEARS[0](x, projections, dropout, seed, mask, memo)


def _path(x: Tensor, r: int, kind: str, shadow: Any) -> str:
    """The path that `POLYRANK_OPS` asks for; with auto kernels where they gain."""
    path = asked()
    if path not in _PATHS:
        guess = nearest(path, _PATHS) or " unset it"
        raise ConfigError(f"POLYRANK_OPS: got {path!r}, expected one of {_PATHS};{guess}")
    if path == "auto":
        path = "triton" if shadow is None and x.numel() and gains(x, r, kind) else "eager"
    if path != "triton":
        return path
    if not INSTALLED:
        raise ConfigError(
            "POLYRANK_OPS: got 'triton', but Triton is not installed; unset it, or install a torch "
            "that brings Triton"
        )
    from polyrank.ops.rank_gate import triton

    if found := triton.problems(x, r, shadow):
        raise ConfigError([f"POLYRANK_OPS: got 'triton', but {f}; unset it" for f in found])
    # No token needs no kernel.
    return "triton" if x.numel() else "eager"


def _problems(y, x, A, rows, B, e, live_from, shadow, row_scale, dropout, mask) -> list[str]:
    (r, d_in), d_out, lead, found = A.shape, B.shape[0], x.shape[:-1], []

    def expect(name: str, tensor: Tensor, *shape: int) -> None:
        if tensor.shape != shape:
            found.append(f"{name}: got shape {tuple(tensor.shape)}, expected {shape}; check sizes")

    if not x.is_floating_point():
        found.append(f"x: got {x.dtype}, expected a floating dtype; embed or cast it before")
    expect("x", x, *lead, d_in)
    expect("y", y, *lead, d_out)
    silent = r - B.shape[-1]
    if B.dim() != 2 or not 0 <= silent <= max(live_from, 0):
        found.append(
            f"B: got shape {tuple(B.shape)}, expected {(d_out, r)}, or up to live_from = "
            f"{live_from} columns fewer, for frozen ranks without a value; check sizes"
        )
    if e.kind == "linear":
        if e.k > r or r % e.block:
            found.append(
                f"k, block: got {e.k}, {e.block}, expected k <= r = {r} and block a divisor of r; "
                "lower k or raise r"
            )
        elif rows is None:
            found.append(f"rows: got None, expected ({r // e.block}, {d_in}); pass the router")
        else:
            expect("rows", rows, r // e.block, d_in)
        if e.bias is not None:
            expect("bias", e.bias, r)
    elif rows is not None:
        found.append(f"rows: got {tuple(rows.shape)} for kind {e.kind!r}, expected None; omit them")
    if e.kind == "static":
        expect("gate", e.gate, r)
    if not 0 <= live_from <= r:
        found.append(f"live_from: got {live_from}, expected 0..{r}; it counts the frozen ranks")
    if not 0 <= dropout < 1:
        found.append(f"dropout: got {dropout}, expected 0 <= dropout < 1; 0 turns it off")
    if row_scale is not None:
        expect("row_scale", row_scale, d_out)
    if mask is not None:
        expect("mask", mask, *lead)
        if mask.dtype != torch.bool:
            found.append(f"mask: got {mask.dtype}, expected bool, True for real tokens")
    if shadow is not None:
        A0, B0, delta = shadow
        w = A0.shape[0]
        expect("shadow A0", A0, w, d_in)
        expect("shadow B0", B0, d_out, w)
        if delta is not None and delta.dim():
            expect("shadow δ0", delta, *((w,) if delta.dim() == 1 else (w, w)))
    return found

"""One table of tolerances and the one comparison that uses it.

A tolerance is relative to the largest magnitude of what is expected, so it means the same for
weights of size 1e-3 and for logits of size 30. The table is the same everywhere, the CI included.
"""

from typing import Any

import torch

# Relative to max|expected|. fp32 and fp64: rounding of sums of a few thousand terms; bf16 and fp16:
# two units in the last place, as inputs and outputs are both rounded.
TOL = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 8e-3,
    torch.float16: 2e-3,
}
_REAL = {torch.complex128: torch.float64, torch.complex64: torch.float32}


def tolerance(*dtypes: torch.dtype) -> float:
    """The tolerance of the coarsest of the given dtypes; 0 if none of them is floating.

    Raises:
        ValueError: A floating dtype without a row in `TOL`.
    """
    floats = [_REAL.get(d, d) for d in dtypes if d.is_floating_point or d.is_complex]
    for dtype in floats:
        if dtype not in TOL:
            rows = ", ".join(map(str, TOL))
            raise ValueError(
                f"tolerance of {dtype}: the table has none, expected one of {rows}; "
                "cast to one of them, or give tol= and reason="
            )
    return max((TOL[dtype] for dtype in floats), default=0.0)


def assert_close(
    actual: Any,
    expected: Any,
    *,
    dtype: torch.dtype | None = None,
    tol: float | None = None,
    reason: str | None = None,
) -> None:
    """Asserts max|actual − expected| ≤ tol · max|expected|, elementwise shapes equal.

    Infinities must stand at the same places with the same sign; a NaN is never close to anything.
    If everything expected is zero, or the values are integers or booleans, only equality passes.

    Args:
        actual: What the code gave: a tensor, an array, a number or nested lists of numbers.
        expected: What it should be.
        dtype: The precision of the arithmetic, if coarser than the two dtypes tell.
        tol: Overrides the table, relative like it; asks for `reason`.
        reason: Why the table's value does not fit, in words.

    Raises:
        AssertionError: Shapes or values differ; names the worst place.
        ValueError: `tol` without `reason`, `reason` without `tol`, or a dtype without tolerance.
    """
    if (tol is None) != (reason is None or not reason.strip()):
        raise ValueError(
            f"tol={tol!r}, reason={reason!r}: expected both or neither; say why the table's "
            "tolerance does not fit, or leave both out"
        )
    got, want = _tensor(actual), _tensor(expected)
    if got.shape != want.shape:
        raise AssertionError(f"shape: got {tuple(got.shape)}, expected {tuple(want.shape)}")
    if tol is None:
        tol = tolerance(got.dtype, want.dtype, *([dtype] if dtype else []))
    if not got.numel():
        return
    got, want = _wide(got), _wide(want)
    error = torch.where(got == want, 0.0, (got - want).abs())
    # What is left as NaN had a NaN or an infinity on one side only: nothing is small enough.
    error = error.nan_to_num(nan=torch.inf, posinf=torch.inf)
    finite = want[want.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    bound = tol * scale
    worst = int(error.argmax())
    if float(error.flatten()[worst]) > bound:
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), want.shape))
        wrong = int((error > bound).sum())
        relative = float(error.flatten()[worst]) / scale if scale else float("inf")
        raise AssertionError(
            f"{wrong} of {want.numel()} values differ; worst at {place}: "
            f"got {got.flatten()[worst].item()!r}, expected {want.flatten()[worst].item()!r}; "
            f"relative error {relative:.2e}, allowed {tol:.0e} of max|expected| = {scale:.6g}"
        )


def _tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return (value.to_dense() if value.is_sparse else value).cpu()
    tensor = torch.as_tensor(value)
    # A Python number is a double; torch reads it as its default dtype and would lose digits.
    if tensor.dtype == torch.get_default_dtype() and not hasattr(value, "dtype"):
        tensor = torch.as_tensor(value, dtype=torch.float64)
    return tensor


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)

"""Leading singular vectors of a matrix, the same in every process that draws from the same key."""

from __future__ import annotations

import torch
from torch import Tensor

# Up to this many rows or columns all singular vectors are found, without a draw.
EXACT = 1024


def leading(
    matrix: Tensor,
    ranks: int,
    rng: torch.Generator,
    *,
    width: int | None = None,
    passes: int = 4,
    exact: int = EXACT,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (U (m, k), S (k,), Vᵀ (k, n)) of the k = `ranks` largest singular values, in fp32.

    Above `exact` rows and columns by a randomised range finder (Halko, Martinsson, Tropp 2011,
    algorithms 4.4 and 5.1): Q spans (M Mᵀ)^passes M Ω, and Qᵀ M is decomposed.

    Args:
        matrix: (m, n), finite.
        ranks: 1 <= k <= min(m, n).
        rng: draws Ω, on the CPU.
        width: columns of Ω, k if left out; more find the last of the k better.
        passes: power iterations; a flat spectrum wants more.
        exact: smaller dimension up to which nothing is drawn.
    """
    M = matrix if matrix.dtype == torch.float64 else matrix.float()
    least = min(M.shape)
    if least <= exact:
        U, S, Vt = torch.linalg.svd(M, full_matrices=False)
        return U[:, :ranks], S[:ranks], Vt[:ranks]
    width = min(least, max(ranks, width or ranks))
    sketch = torch.randn(M.shape[1], width, generator=rng).to(M)
    Q, _ = torch.linalg.qr(M @ sketch)
    for _ in range(passes):
        # Orthonormal after each product, or the small directions drown in rounding.
        P, _ = torch.linalg.qr(M.mT @ Q)
        Q, _ = torch.linalg.qr(M @ P)
    U, S, Vt = torch.linalg.svd(Q.mT @ M, full_matrices=False)
    return (Q @ U)[:, :ranks], S[:ranks], Vt[:ranks]

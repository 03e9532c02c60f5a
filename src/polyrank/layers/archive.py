"""What was absorbed into base weights, so that a saved adapter knows which base it belongs to.

The live model has an absorbed update in W. A fresh process has the original W, or the changed one;
a few entries of the weight, kept in the adapter's config, tell which. On the original one the
archive, which keeps the absorbed ranks, acts as a bank: the answers are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyrank.errors import CheckpointError
from polyrank.frame import Core, Identity
from polyrank.layers.views import View, wide

# Entries that tell one weight from the other; those that moved most.
WITNESSES = 16


def witness(original: Tensor, absorbed: Tensor, old: dict[str, Any] | None) -> dict[str, Any]:
    """Return the entries that tell a base weight before its first absorption from now.

    Args:
        original: the weight before this absorption, in its own layout.
        absorbed: the weight after it.
        old: what an earlier absorption gave; its places are kept, as the first weight is gone.
    """
    after = absorbed.detach().reshape(-1)
    if old is None:
        before = original.detach().reshape(-1)
        moved = (wide(after) - wide(before)).abs()
        places = moved.topk(min(WITNESSES, moved.numel())).indices.sort().values
        index, first = places.tolist(), wide(before[places]).tolist()
    else:
        index, first = old["index"], old["original"]
    now = wide(after[torch.tensor(index, device=after.device)]).tolist()
    return {"index": index, "original": first, "absorbed": now}


def holds(weight: Tensor, kept: dict[str, Any], path: str) -> bool:
    """Say whether a base weight holds the absorbed updates; False if it is the original one.

    Raises:
        CheckpointError: if it is neither, beyond the rounding of its dtype.
    """
    values = wide(weight.detach().reshape(-1)).double().cpu()[torch.tensor(kept["index"])]
    first, now = (torch.tensor(kept[key], dtype=torch.float64) for key in ("original", "absorbed"))
    gap = float((first - now).abs().sum())
    near = [float((values - part).abs().sum()) for part in (now, first)]
    rounding = torch.finfo(weight.dtype).eps * float(values.abs().sum())
    if min(near) > gap / 4 + rounding:
        raise CheckpointError(
            f"base weight at {path}: is neither the one that the adapter was made on nor the one "
            "that holds its absorbed updates; load the adapter onto the base model of its training"
        )
    return near[0] <= near[1]


def settled(view: View) -> tuple[Tensor, Tensor]:
    """Return the live factors (A, B) of a layer with the core folded in: B A, without the core."""
    A, B, core = view.A.detach(), view.B.detach(), view.core
    if type(core).settle is not Core.settle:
        with torch.no_grad():
            return core.settle(A, B)
    if isinstance(core, Identity):
        return A, B
    out, inner = core.widths[1], core.widths[0]
    return A, B @ core.delta().detach().to(B)[-out:, -inner:]


def negated(view: View) -> list[tuple[Tensor, Tensor]]:
    """Return what is subtracted as factors that are added: [(A0, −B0 δ0)], or [] without any."""
    if view.shadow is None:
        return []
    A0, B0, delta = view.shadow
    if delta is not None:
        B0 = wide(B0) @ wide(delta) if delta.dim() == 2 else wide(B0) * wide(delta)
    return [(A0, -B0)]


def archived(view: View) -> tuple[Tensor, Tensor]:
    """Return (A, B) of all that a layer's base weight holds once its update is absorbed too.

    s B A is the sum of everything absorbed so far and of what acts now.
    """
    parts = [part for part in (view.dormant, view.bank, settled(view)) if part is not None]
    parts += negated(view)
    A = torch.cat([wide(A.detach()) for A, _ in parts])
    B = torch.cat([wide(B.detach()) for _, B in parts], dim=1)
    return A, B

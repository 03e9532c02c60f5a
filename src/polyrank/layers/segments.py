"""A bank in a saved adapter: its size, and of which growth each rank is."""

from __future__ import annotations

from typing import Any, cast

import torch

from polyrank.errors import CheckpointError
from polyrank.layers.views import Frozen, View


def restore_bank(view: View, shapes: dict[str, Any]) -> None:
    """Make room for what `noted_bank` noted, if anything; without segments it came at once.

    Raises:
        CheckpointError: if segments or order do not add up to the bank.
    """
    if (bank := shapes.get("bank")) is None:
        return
    order, path = shapes.get("order"), view.site.path
    sizes = [bank] if (found := shapes.get("segments")) is None else list(found)
    if sum(sizes) != bank or any(size < 0 for size in sizes):
        raise CheckpointError(
            f"segments at {path}: got {sizes}, expected sizes that add up to the bank's {bank} "
            "ranks; the config was changed, or belongs to other tensors: save the adapter again"
        )
    if order is not None and [order.count(n) for n in range(len(sizes))] != sizes:
        raise CheckpointError(
            f"order at {path}: does not name each growth as often as segments {sizes} say; "
            "the config was changed, or belongs to other tensors: save the adapter again"
        )
    A = torch.zeros(bank, view.site.d_in)
    B = torch.zeros(view.site.d_out, shapes.get("bank_values", bank))
    view.module.polyrank_bank[view.name] = Frozen(A, B)
    view.core.banked(bank)
    view.segments, view.order = sizes, order
    view.evaluating = shapes.get("evaluating", False)


def noted_bank(view: View) -> dict[str, Any]:
    """Return what decides the shape of a bank and whose its ranks are, as plain values."""
    if view.name not in view.module.polyrank_bank:
        return {}
    held = cast("Frozen", view.module.polyrank_bank[view.name])
    keys, values = held.A.shape[0], held.B.shape[1]
    found: dict[str, Any] = {"bank": keys, "segments": list(view.segments)}
    if values != keys:
        found["bank_values"] = values
    if view.order is not None:
        found["order"] = list(view.order)
    if view.evaluating:
        found["evaluating"] = True
    return found

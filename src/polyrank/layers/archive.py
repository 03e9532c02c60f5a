"""What was absorbed into base weights, so that a saved adapter knows which base it belongs to.

The live model has an absorbed update in W. A fresh process has the original W, or the changed one;
a few entries of the weight, kept in the adapter's config, tell which. On the original one the
archive, which keeps the absorbed ranks, acts as a bank: the answers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from polyrank.errors import CheckpointError
from polyrank.frame import Core, Identity
from polyrank.layers.views import Frozen, View, wide

# Entries of a layer that tell one weight from the other; those that moved most.
WITNESSES = 16


class Archive(Frozen):
    """Absorbed ranks. While the base holds them they rest on the host, whatever moves the model."""

    resting = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Archive:
        if not self.resting:
            super()._apply(fn, recurse)
        return self


def witness(original: Tensor, absorbed: Tensor, old: dict[str, Any] | None) -> dict[str, Any]:
    """Return the entries that tell a base weight before its first absorption from now.

    Args:
        original: the weight before this absorption, in its own layout.
        absorbed: the weight after it.
        old: what an earlier absorption gave; its places are kept if that one changed anything,
            as the first weight is gone.
    """
    after = absorbed.detach().reshape(-1)
    if old is None or not old["moved"]:
        before = original.detach().reshape(-1)
        moved = (wide(after) - wide(before)).abs()
        places = moved.topk(min(WITNESSES, moved.numel())).indices.sort().values
        index, first = places.tolist(), wide(before[places]).tolist()
        old = {"dtype": str(original.dtype), "moved": not torch.equal(before, after)}
    else:
        index, first = old["index"], old["original"]
    now = wide(after[torch.tensor(index, device=after.device)]).tolist()
    shared = {key: old[key] for key in ("dtype", "moved")}
    return {"index": index, "original": first, "absorbed": now, **shared}


def restore_archive(view: View, shapes: dict[str, Any]) -> None:
    """Make room for the archive that a saved adapter noted, if any."""
    if (ranks := shapes.get("archive")) is not None:
        A, B = torch.zeros(ranks, view.site.d_in), torch.zeros(view.site.d_out, ranks)
        view.module.polyrank_archive[view.name] = Archive(A, B)
    if (found := shapes.get("witness")) is not None:
        view.witness = dict(found)


def judge(views: Sequence[View]) -> None:
    """Find out whether the base holds what an adapter absorbed; if not, its archive acts.

    All layers are asked together: the answer is one for the whole model.

    Raises:
        CheckpointError: if the base cannot be asked, is neither the original nor the changed one,
            could be either, or is the original one and the ranks were not kept.
    """
    views = [view for view in views if view.witness is not None]
    if not views:
        return
    absorbed = _holds(views)
    if not absorbed and (bare := [v.site.path for v in views if v.archive is None]):
        raise CheckpointError(
            f"base weight at {bare[0]}: updates were absorbed into the base of this adapter and "
            "not archived, and this is the base before; load the changed base, or keep "
            "them at the end of a task by absorb(model, archive=True)"
        )
    for view in views:
        view.absorbed = absorbed
        if view.archive is not None:
            held = cast("Archive", view.module.polyrank_archive[view.name])
            held.resting = absorbed
            if not absorbed:
                held.to(view.module.dense_weight().device)
            view.core.banked(0 if view.bank is None else view.bank[0].shape[0])


def _holds(views: Sequence[View]) -> bool:
    """Say whether base weights hold the absorbed updates; False if they are the original ones."""
    near = [0.0, 0.0]
    rounding = 0.0
    for view in views:
        kept = cast("dict[str, Any]", view.witness)
        if view.module.quantised() or (weight := view.module.dense_weight().detach()).is_meta:
            raise CheckpointError(
                f"base weight at {view.site.path}: is quantised or not loaded yet, so nothing "
                "tells whether it holds this adapter's absorbed updates; load a dense base first, "
                "or use the plain LoRA for the original base that `polyrank export` writes"
            )
        values = wide(weight.reshape(-1)[torch.tensor(kept["index"], device=weight.device)])
        values = values.double().cpu()
        for side, key in enumerate(("absorbed", "original")):
            there = torch.tensor(kept[key], dtype=torch.float64)
            near[side] += float((values - there).abs().sum())
        dtypes = (weight.dtype, getattr(torch, kept["dtype"].removeprefix("torch.")))
        rounding += max(torch.finfo(d).eps for d in dtypes) * float(values.abs().sum())
    if min(near) > rounding:
        raise CheckpointError(
            f"base weights of {len(views)} layers: are neither those that the adapter was made on "
            "nor those that hold its absorbed updates; load it onto the base model of its training"
        )
    if max(near) <= rounding and min(near) > 0:
        raise CheckpointError(
            f"base weights of {len(views)} layers: are rounded so far that nothing tells whether "
            "they hold this adapter's absorbed updates; load the base in the dtype of its training"
        )
    return near[0] <= near[1]


def settled(view: View) -> tuple[Tensor, Tensor]:
    """Return the live factors (A, B) of a layer with the core folded in: B A, without the core."""
    A, B, core = view.A.detach(), view.B.detach(), view.core
    # What weighs tokens differently has no matrix to fold in; a bank of it is its own affair.
    if type(core).settle is not Core.settle or core.merges != "exact":
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


def archived(view: View, *, folded: bool = False) -> tuple[Tensor, Tensor]:
    """Return (A, B) of all that a layer's base weight holds once its update is absorbed too.

    s B A is the sum of everything absorbed so far and of what acts now. Folded, more ranks than
    the smaller width become that many: the product itself beside an identity.
    """
    parts = [part for part in (view.dormant, view.bank, settled(view)) if part is not None]
    parts += negated(view)
    A = torch.cat([wide(A.detach()).cpu() for A, _ in parts])
    B = torch.cat([wide(B.detach()).cpu() for _, B in parts], dim=1)
    if not folded or len(A) <= (least := min(B.shape[0], A.shape[1])):
        return A, B
    product, one = B @ A, torch.eye(least, dtype=B.dtype)
    return (product, one) if least == len(B) else (one, product)

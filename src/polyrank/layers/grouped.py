"""Many adapters in one batch, by products over stacked factors instead of one adapter at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polyrank.frame import Flow
from polyrank.ops.rank_gate import Epilogue, gate

if TYPE_CHECKING:
    from polyrank.layers.linear import AdaptedLinear
    from polyrank.layers.views import View

# Adapters in a batch from which stacking their factors is the faster way.
_LEAST = 4


def grouped(layer: AdaptedLinear, y: Tensor, x: Tensor, lane: Tensor, flow: Flow) -> Tensor | None:
    """Return y plus every sample's own update, or None where the adapters are not alike.

    With N samples, A, rows and B are (N, …) copies of their adapters' factors; h = A x, q = g ⊙ h
    and y + s B q are products over the batch. Sample n has the adapter `flow.lanes[lane[n]]`, none
    if that is negative.
    """
    views = [layer.views[name] for name in flow.lanes if name in layer.views]
    if len(views) < _LEAST or len(views) < len(flow.lanes) or not all(map(_plain, views)):
        return None
    first, epilogues = views[0], [view.core.fused() for view in views]
    alike = [_kind(view, e) for view, e in zip(views, epilogues, strict=True)]
    if any(kind != alike[0] for kind in alike):
        return None
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    own = lane.clamp_min(0)

    def stacked(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
        return torch.stack(tensors).to(dtype)[own]

    wide = torch.promote_types(dtype, torch.float32)
    batch = x.reshape(len(lane), -1, x.shape[-1]).to(dtype)
    with torch.autocast(device, enabled=False):
        A, B = (stacked([getattr(v, n) for v in views], dtype) for n in ("A", "B"))
        h, e, z = torch.bmm(batch, A.mT), epilogues[0], None
        if e.kind == "linear":
            rows = [row for view in views if (row := view.core.rows()) is not None]
            # Logits rounded to 16 bits would tie, and choose otherwise than one adapter alone.
            z = torch.bmm(batch.to(wide), stacked(rows, wide).mT)
            if e.bias is not None:
                biases = [e.bias for e in epilogues if e.bias is not None]
                e = replace(e, bias=stacked(biases, wide)[:, None])
        if e.kind == "static":
            gates = [e.gate for e in epilogues if e.gate is not None]
            q = (stacked(gates, wide)[:, None] * h).to(dtype)
        elif e.kind == "none":
            q = h
        else:
            if e.kind == "self":
                h = torch.bmm(batch.to(wide), A.mT.to(wide))
            h = h.to(wide)
            q = (gate(h, z, e) * h).to(dtype)
        update = torch.bmm(q, B.mT) * first.scale
        update = torch.where((lane >= 0)[:, None, None], update, 0.0)
    return y + update.view(y.shape).to(y.dtype)


def _plain(view: View) -> bool:
    core = view.core
    return (
        core.epilogue != "python"
        and core.portion() is None
        and core.base_gain() is None
        and view.bank is None
        and view.shadow is None
        and not core.training
    )


def _kind(view: View, e: Epilogue) -> tuple[object, ...]:
    """What must be the same for adapters to share a product."""
    constants = (e.k, e.block, e.score, e.bias is None, e.bias_in_weight, e.total)
    return (view.A.shape, view.scale, e.kind, *constants, e.tau, e.delta, e.eps)

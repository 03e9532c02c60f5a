"""Many adapters in one batch, by products over stacked factors instead of one adapter at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from polyrank.frame import Core, Flow
from polyrank.ops.rank_gate import gate

if TYPE_CHECKING:
    from polyrank.layers.linear import AdaptedLinear

# Adapters in a batch from which stacking their factors is the faster way.
_LEAST = 4


def grouped(layer: AdaptedLinear, y: Tensor, x: Tensor, lane: Tensor, flow: Flow) -> Tensor | None:
    """Return y plus every sample's own update, or None where the adapters are not alike.

    With N samples, A, rows and B are (N, …) copies of their adapters' factors; h = A x, q = g ⊙ h
    and y + s B q are products over the batch. Sample n has the adapter `flow.lanes[lane[n]]`, none
    if that is negative.
    """
    names = flow.lanes
    if len(names) < _LEAST or not all(name in layer.views for name in names):
        return None
    # Looked up where modules keep them: there are as many as samples.
    held = cast("dict[str, Any]", layer._modules)
    cores = [held["polyrank_core"]._modules[name] for name in names]
    if not _plain(layer, names, cores):
        return None
    factors = [
        [held[kind]._modules[name]._parameters.get("weight") for name in names]
        for kind in ("polyrank_A", "polyrank_B")
    ]
    if any(factor is None for each in factors for factor in each):
        return None
    scale, epilogues = layer.views[names[0]].scale, [core.fused() for core in cores]
    first, shape = epilogues[0], factors[0][0].shape
    for name, e, A in zip(names, epilogues, factors[0], strict=True):
        if e.constants != first.constants or layer.views[name].scale != scale or A.shape != shape:
            return None
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    own = lane.clamp_min(0)

    def stacked(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
        return torch.stack(tensors).to(dtype)[own]

    wide = torch.promote_types(dtype, torch.float32)
    batch = x.reshape(len(lane), -1, x.shape[-1]).to(dtype)
    with torch.autocast(device, enabled=False):
        A, B = (stacked(each, dtype) for each in factors)
        h, e, z = torch.bmm(batch, A.mT), first, None
        if e.kind == "linear":
            rows = [core.rows() for core in cores]
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
        update = torch.bmm(q, B.mT) * scale
        update = torch.where((lane >= 0)[:, None, None], update, 0.0)
    return y + update.view(y.shape).to(y.dtype)


def _plain(layer: AdaptedLinear, names: Sequence[str], cores: Sequence[Core]) -> bool:
    """Whether products can stand for what every core does."""
    held = layer._modules
    more = [held[n] for n in ("polyrank_bank", "polyrank_archive", "polyrank_shadow")]
    if any(module is not None and module._modules for module in more):
        views = [layer.views[name] for name in names]
        if any(view.bank is not None or view.shadow is not None for view in views):
            return False
    return not any(
        core.epilogue == "python"
        or core.training
        or core.portion() is not None
        or core.base_gain() is not None
        for core in cores
    )

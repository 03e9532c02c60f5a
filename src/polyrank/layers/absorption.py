"""Adding an adapter's update to the base weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from polyrank.errors import ConfigError, MergeError
from polyrank.layers.archive import Archive, archived, witness
from polyrank.layers.ownership import readers, rivals
from polyrank.layers.structure import note, rebuilt, refill, unattached
from polyrank.layers.views import Factor, View, wide


def absorb(
    model: nn.Module,
    *,
    adapter: str | None = None,
    lossy: bool = False,
    archive: bool | str = False,
    ranks: Mapping[str, int] | None = None,
    seed: int = 0,
    key: str = "absorb",
) -> None:
    """Add the adapter's update to the base weights and redraw it; bank, shadow and replicas end.

    A saved adapter remembers a few entries of the changed weights. With an archive it also works on
    the original base, where the absorbed ranks act as a bank; without one it refuses that base.
    Tensors are new ones even where shapes stay, so that an optimiser with moments of the old ones
    is refused.

    Args:
        model: a PEFT model with a polyrank adapter.
        adapter: its name; None is the active one.
        lossy: go on although the base is stored below fp32, where a part of every update is
            rounded away.
        archive: keep the absorbed ranks with the adapter, r (d_in + d_out) weights a layer; with
            "folded", never more than min(d_in, d_out) ranks, their order and number then forgotten.
        ranks: live ranks from now on, by site path; layers that are not named keep theirs.
        seed: key of the new starting values.
        key: word that makes these starting values differ from others of the same seed.

    Raises:
        MergeError: if the update depends on the token or is not finite, the base is quantised, is
            shared with another module or has adapters merged into it, or rounding would lose some
            of the update and `lossy` is False; before anything changes.
        ConfigError: if an optimiser is attached, a core asks for more than this, or another
            adapter was made from the same weights.
    """
    found = unattached(model, adapter, "absorb")
    if merged := sorted({n for view in found.layers for n in view.module.merged_adapters}):
        raise MergeError(
            f"absorb: adapters {merged} are merged into the base, which would be taken for it; "
            "call unmerge_adapter() first"
        )
    if archive and any(view.core.base_gain() is not None for view in found.layers):
        raise ConfigError(
            "absorb: a core that scales the base output is no product of factors and cannot be "
            "archived; pass archive=False"
        )
    if kept := [view for view in found.layers if view.core.unabsorbed]:
        raise ConfigError(f"absorb: at {kept[0].site.path} {kept[0].core.unabsorbed}")
    if problems := [*rivals(found.layers)]:
        raise ConfigError(problems)
    _check_shared(model, found.layers)
    _check_absorption(found.layers, lossy)
    for view in found.layers:
        _take_in(view, archive, None if ranks is None else ranks.get(view.site.path))
        note(model, view)
    refill(model, found, seed, key)


def _take_in(view: View, archive: bool | str, r: int | None) -> None:
    """Let one base weight take its update; what acted ends, and r live ranks are to be filled."""
    layer, had_bank = view.module, view.bank is not None
    held = Archive(*archived(view, folded=archive == "folded")) if archive else None
    weight = _with_update(view)
    view.witness = witness(layer.dense_weight(), weight, view.witness)
    layer.dense_weight().data = weight
    layer.forget(view.name, layer.other_param_names)
    view.absorbed = True
    if held is not None:
        layer.polyrank_archive[view.name] = held
    if r is not None and r != view.site.r:
        _resize(view, r)
    elif had_bank:
        with rebuilt(view):
            layer.polyrank_core[view.name] = view.method.core(view.site)
    _renew(view)
    view.segments, view.order = [], None


def _resize(view: View, r: int) -> None:
    """Give a layer room for r live ranks, to be filled."""
    with rebuilt(view):
        view.site = replace(view.site, r=r)
        core = view.method.core(view.site)
        view.module.polyrank_A[view.name] = Factor(core.widths[0], view.site.d_in)
        view.module.polyrank_B[view.name] = Factor(view.site.d_out, core.widths[1])
        view.module.polyrank_core[view.name] = core


def _renew(view: View) -> None:
    """Let every parameter be another tensor."""
    held = (view.module.polyrank_A, view.module.polyrank_B, view.module.polyrank_core)
    for module in (m for each in held for m in each[view.name].modules()):
        for name, param in module._parameters.items():
            if param is not None:
                module._parameters[name] = nn.Parameter(param.detach().clone(), param.requires_grad)


def _check_shared(model: nn.Module, views: Sequence[View]) -> None:
    """Refuse to change a weight that another module reads too, such as tied embeddings."""
    for view in views:
        view.module.dense_weight()
    for view, paths in readers(model, views):
        raise MergeError(
            f"absorb: the base weight at {view.site.path} is shared by {len(paths)} "
            f"modules ({', '.join(paths[:2])}), and what one learns would change the others; "
            "leave the layer out with exclude_modules, or untie the weights"
        )


def _with_update(view: View) -> Tensor:
    """Return a base weight plus the adapter's update, in its own dtype and layout."""
    delta, weight = view.delta(), view.module.dense_weight().detach()
    return (wide(weight) + (delta.T if view.module.transposed else delta)).to(weight.dtype)


def _check_absorption(views: Sequence[View], lossy: bool) -> None:
    """Refuse to lose a part of the updates, or to spoil the base; one layer at a time."""
    lost = total = 0.0
    below = False
    for view in views:
        weight, merged = view.module.dense_weight().detach(), _with_update(view)
        if not wide(merged).isfinite().all():
            raise MergeError(
                f"absorb: the base weight at {view.site.path} would not be finite any more; look "
                "for a diverged training run"
            )
        delta = view.delta()
        delta = delta.T if view.module.transposed else delta
        lost += float((wide(merged) - wide(weight) - delta).square().sum())
        total += float(delta.square().sum())
        below |= weight.dtype not in (torch.float32, torch.float64)
    share = (lost / total) ** 0.5 if total else 0.0
    if below and not lossy:
        raise MergeError(
            f"absorb: the base is stored below fp32, and rounding would lose {share:.1%} of the "
            "update; use a frozen bank (append), load the base in fp32, or pass lossy=True"
        )
